"""Block inputs wait on the host from forward to backward. With recompute `full` nothing else of a block is
kept.

input    what a block receives, (sequences, tokens, width) on this rank, if its backward or its recomputation
         needs it
slot     room for one input in a slab of pinned host memory. An input has a slot from its block's forward
         until its block's backward is over
kept     the last block's input stays on the device, because backward needs it at once

    compute        F0   F1    F2    F3    | B3     B2     B1     B0
    to the host         x0    x1    x2    |                             while the next block computes
    to the device                         | x2     x1     x0            one block ahead
    on the device  x0   x0 x1 x1 x2 x2 x3 | x3 x2  x2 x1  x1 x0  x0     never more than two

Autograd itself says what it needs: `saved_tensors_hooks` around a block's forward see each tensor that it
saves, and give it back. What the block computes does not change. There is one object per pipeline stage;
torch's pipelining holds a stage's own input besides.
"""

import gc
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from dtensor_llama.shards import local
from memory.lanes import DONE, Lanes

# torch rounds each slab of pinned memory up to a power of two; with so many slots at most an eighth is wasted
SLOTS_PER_SLAB = 8
ALIGNMENT = 512  # bytes; a slot may hold any dtype


class _Input:
    """One block's input in one forward. Autograd owns it; when the block's backward is over, it is deleted
    and frees its slot. previous: a weak reference to the input of the block before, or a function that
    returns None."""

    def __init__(self, offload: "ActivationOffload", flat: Tensor, previous: Callable):
        self.offload, self.previous = offload, previous
        self.slot: Tensor | None = None  # bytes on the host; None: it is kept on the device
        self.host: Tensor | None = None  # what of them it takes, in its dtype
        self.moved = DONE  # event: the last copy, in either direction
        self.flat: Tensor | None = flat  # 1-D on the device: on its way to the host, fetched, or kept

    def release(self) -> None:
        """Drop the device's copy. Computation that is queued from here on may use its memory once the last
        copy is done."""
        if self.flat is not None:
            self.offload.lanes.compute.wait(self.moved)
            self.flat = None

    def __del__(self):
        self.release()
        if self.slot is not None:
            self.offload.free.append((self.slot, self.moved))


class _Saved(NamedTuple):
    """Stands for a tensor that autograd keeps: a view of an input, and the DTensor's layout if it is one."""

    input: _Input
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    layout: tuple | None


class ActivationOffload:
    """Keeps the inputs of `blocks` on the host between forward and backward. At most two are on the device at
    a time, and results are bitwise the same.

    blocks: those of one pipeline stage, in forward order, each called with its input first; apply recompute
        and compile before
    input_bytes: of the largest input on this rank: sequences x tokens x width x bytes, with tokens / tp under
        sequence parallelism
    in_flight: how many forwards have begun whose backward is not over: 1, or under pp up to all microbatches;
        each keeps the last block's input
    lanes: what copies run on, `recording` if they are to be drawn. Not the chunk manager's lanes, whose
        queues hold other work.

    It pins host memory, `host_bytes` in all. Make it before training: to pin within a step can hold up other
    ranks.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        device: torch.device,
        input_bytes: int,
        in_flight: int = 1,
        lanes: Lanes | None = None,
    ):
        self.device, self.lanes = device, lanes or Lanes(device, n_threads=1)
        self.slot_bytes = -(-input_bytes // ALIGNMENT) * ALIGNMENT
        self.last = len(blocks) - 1  # the number of the block whose input is kept
        self.n_slots = self.last * in_flight
        self.free: list[tuple[Tensor, Any]] = []  # slots, each with the event of its last copy
        self.host_bytes = self._make_slots()
        self._no_input = lambda: None
        self._newest = self._in_use = self._no_input  # weak references to inputs
        # The number of the block that computes, and its input ...
        self._entering: tuple[int, Tensor] | None = None
        self._entered: _Input | None = None  # ... and that input once autograd has saved it
        # One pair for all blocks, because a compiled block is guarded on the identity of the hooks.
        self._hooks = (self._pack, self._unpack)
        for i, block in enumerate(blocks):
            block.forward = partial(self._forward, i, block.forward)

    # ---- forward ----

    def _forward(self, i: int, inner: Callable, x: Tensor, *args, **kwargs):
        if not torch.is_grad_enabled():
            return inner(x, *args, **kwargs)
        # The input is copied as one run of bytes, so it has to fill its range of the storage without gaps.
        here = local(x)
        if here.numel() and _extent(here) != here.numel():
            x = x.contiguous()
        self._entering, self._entered = (i, local(x)), None
        try:
            with saved_tensors_hooks(*self._hooks):
                return inner(x, *args, **kwargs)
        finally:
            self._entering = self._entered = None

    def _pack(self, tensor: Tensor):
        """Autograd calls it with each tensor that it saves in a block."""
        i, x = self._entering
        here = local(tensor)
        offset = here.storage_offset() - x.storage_offset()
        if (
            here.untyped_storage()._cdata != x.untyped_storage()._cdata  # on `meta` all pointers are alike
            or here.dtype != x.dtype
            or not here.numel()
            or offset < 0
            or offset + _extent(here) > x.numel()
        ):
            # An output must be detached: saved as it is, it would be in a reference cycle and leak.
            return tensor.detach() if tensor.grad_fn is not None else tensor
        if self._entered is None:
            self._entered = self._leave(i, x.detach().as_strided((x.numel(),), (1,)))
        layout = None
        if isinstance(tensor, DTensor):
            layout = tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride()
        return _Saved(self._entered, here.shape, here.stride(), offset, layout)

    def _leave(self, i: int, flat: Tensor) -> _Input:
        # The copy of the input before had the time of a whole block; if that was too short, computation
        # waits.
        gone = self._newest()
        if gone is not None and gone.slot is not None:
            gone.release()
        input = _Input(self, flat, self._newest if i > 0 else self._no_input)
        self._newest = weakref.ref(input)
        if i < self.last:
            input.slot, last_read = self._take_slot(flat.nbytes)
            input.host = input.slot[: flat.nbytes].view(flat.dtype)
            input.moved = self.lanes.d2h.run(
                "input of a block",
                partial(input.host.copy_, flat, non_blocking=True),
                after=[self.lanes.compute.now(), last_read],  # the block before computed it
            )
        return input

    def _take_slot(self, n_bytes: int):
        if n_bytes > self.slot_bytes:
            raise RuntimeError(
                f"a block's input has {n_bytes:,} bytes and the activation slab's slots {self.slot_bytes:,}; "
                "make the offload with the largest input_bytes"
            )
        if not self.free:
            gc.collect()  # autograd graphs in a reference cycle hold slots whose backward is over
        if not self.free:
            raise RuntimeError(
                f"all {self.n_slots} slots of the activation slab hold inputs that wait for backward: more "
                "forwards are in flight than in_flight says"
            )
        return self.free.pop()

    # ---- backward ----

    def _unpack(self, saved):
        if isinstance(saved, Tensor):
            return saved
        input = saved.input
        if input.flat is None:
            self._fetch(input)
        self.lanes.compute.wait(input.moved)
        # A block's backward begins, so the backward of the block after it is over.
        if (done := self._in_use()) is not input:
            if done is not None and done.slot is not None:
                done.release()
            self._in_use = weakref.ref(input)
            previous = input.previous()
            if previous is not None and previous.flat is None:
                self._fetch(previous)
        view = input.flat.as_strided(saved.shape, saved.stride, saved.offset)
        if saved.layout is None:
            return view
        mesh, placements, shape, stride = saved.layout
        return DTensor.from_local(view, mesh, placements, run_check=False, shape=shape, stride=stride)

    def _fetch(self, input: _Input) -> None:
        input.flat = torch.empty_like(input.host, device=self.device)
        # Its memory may belong to computation that has been queued before.
        input.moved = self.lanes.h2d.run(
            "input of a block",
            partial(input.flat.copy_, input.host, non_blocking=True),
            after=[self.lanes.compute.now(), input.moved],
        )

    def _make_slots(self) -> int:
        """Fill `free`. Return how many bytes of the host that took."""
        pins, slab_bytes, host_bytes = self.device.type == "cuda", self.n_slots * self.slot_bytes, 0
        if pins:
            slab_bytes = 1 << (SLOTS_PER_SLAB * self.slot_bytes - 1).bit_length()
        while len(self.free) < self.n_slots:
            slab = torch.empty(slab_bytes, dtype=torch.uint8, pin_memory=pins)
            whole = slab[: slab_bytes // self.slot_bytes * self.slot_bytes]
            self.free += [(slot, DONE) for slot in whole.split(self.slot_bytes)]
            host_bytes += slab_bytes
        del self.free[self.n_slots :]
        return host_bytes


def _extent(tensor: Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
