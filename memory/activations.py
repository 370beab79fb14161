"""Block inputs wait on the host from forward to backward: with recompute `full` nothing else of a block is
kept.

input    what a block gets, (rows, tokens, width) on this rank, if its backward or its recomputation needs it
slot     room for one input in a pinned host slab; an input has one from its block's forward until its backward is over
kept     the last block's input stays on the device: backward needs it at once

    compute        F0   F1    F2    F3    | B3     B2     B1     B0
    to the host         x0    x1    x2    |                             while the next block computes
    to the device                         | x2     x1     x0            one block ahead
    on the device  x0   x0 x1 x1 x2 x2 x3 | x3 x2  x2 x1  x1 x0  x0     never more than two

Autograd itself says what it needs: `saved_tensors_hooks` around a block's forward see each tensor it saves,
and give it back. What the block computes does not change. One object per pipeline stage; torch's pipelining
holds a stage's own input besides.
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

# torch rounds pinned memory up to 2^k bytes a slab: of slots of any size at most an eighth is wasted
SLOTS_PER_SLAB = 8
ALIGNMENT = 512  # bytes; a slot may hold any dtype


class _Input:
    """One block's input in one forward. Autograd owns it; when the block's backward is over it dies and frees
    its slot."""

    def __init__(self, owner: "ActivationOffload", flat: Tensor, kept: bool, before: Callable):
        # before: () -> input of the block before, or None
        self.owner, self.kept, self.before = owner, kept, before
        self.n_bytes, self.dtype = flat.nbytes, flat.dtype
        self.slot: Tensor | None = None  # bytes on the host
        self.moved = DONE  # event: the last copy, either way
        self.flat: Tensor | None = None  # 1-d on the device: on its way out, or fetched, or kept
        self.hold(flat)

    def hold(self, flat: Tensor) -> None:
        self.flat = flat
        self.owner.count(self.n_bytes)

    def let_go(self) -> None:
        """Forget the device's copy; compute that is queued from here on may use its memory once the last copy
        is done."""
        if self.flat is not None:
            self.owner.lanes.compute.wait(self.moved)
            self.flat = None
            self.owner.count(-self.n_bytes)

    def __del__(self):
        self.let_go()
        if self.slot is not None:
            self.owner.free.append((self.slot, self.moved))


class _Saved(NamedTuple):
    """What autograd keeps instead of a tensor: a view of an input, and the DTensor's layout if it was one."""

    input: _Input
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    layout: tuple | None


class ActivationOffload:
    """See `offload_block_inputs`. device_bytes, peak_device_bytes: block inputs on the device; host_bytes:
    the slab."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        device: torch.device,
        input_bytes: int,
        in_flight: int,
        lanes: Lanes,
    ):
        self.device, self.blocks, self.lanes = device, list(blocks), lanes
        self.slot_bytes = -(-input_bytes // ALIGNMENT) * ALIGNMENT
        self.n_slots = (len(self.blocks) - 1) * in_flight
        self.device_bytes = self.peak_device_bytes = 0
        self.free: list[tuple[Tensor, Any]] = []  # slots, each with the event of its last copy
        self.host_bytes = self._make_slots()
        self._nobody = lambda: None
        self._leaving = self._newest = self._in_use = self._nobody  # weak references to inputs
        self._entering: tuple[Tensor, bool] | None = None  # the input of the block that computes, kept
        self._entered: _Input | None = None  # the same, once autograd has asked for it
        # one pair for all blocks: a compiled block is guarded on which they are
        self._hooks = (self._pack, self._unpack)
        self._inner = [block.forward for block in self.blocks]
        for i, (block, inner) in enumerate(zip(self.blocks, self._inner, strict=True)):
            block.forward = partial(self._forward, i, inner)

    def close(self) -> None:
        """Give the blocks their own forward back."""
        for block, inner in zip(self.blocks, self._inner, strict=True):
            block.forward = inner

    def count(self, n_bytes: int) -> None:
        self.device_bytes += n_bytes
        self.peak_device_bytes = max(self.peak_device_bytes, self.device_bytes)

    # ---- forward ----

    def _forward(self, i: int, inner: Callable, x: Tensor, *args, **kwargs):
        if not torch.is_grad_enabled():
            return inner(x, *args, **kwargs)
        if not _is_dense(local(x)):
            x = x.contiguous()
        if i == 0:
            self._newest = self._nobody
        self._entering, self._entered = (local(x), i == len(self.blocks) - 1), None
        try:
            with saved_tensors_hooks(*self._hooks):
                return inner(x, *args, **kwargs)
        finally:
            self._entering = self._entered = None

    def _pack(self, tensor: Tensor):
        """Called with each tensor that autograd saves in a block."""
        x, kept = self._entering
        here = local(tensor)
        offset = here.storage_offset() - x.storage_offset()
        if (
            here.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
            or here.dtype != x.dtype
            or not here.numel()
            or offset < 0
            or offset + _extent(here) > x.numel()
        ):
            # an output itself would be a cycle: a leak
            return tensor.detach() if tensor.grad_fn is not None else tensor
        if self._entered is None:
            self._entered = self._leave(x.detach().as_strided((x.numel(),), (1,)), kept)
        layout = (
            (tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride())
            if isinstance(tensor, DTensor)
            else None
        )
        return _Saved(self._entered, here.shape, here.stride(), offset, layout)

    def _leave(self, flat: Tensor, kept: bool) -> _Input:
        # its copy had a whole block's time; if that was too short compute waits
        if (gone := self._leaving()) is not None:
            gone.let_go()
        self._leaving = self._nobody
        input = _Input(self, flat, kept, self._newest)
        self._newest = weakref.ref(input)
        if not kept:
            input.slot, last_read = self._take_slot(flat.nbytes)
            host = input.slot[: flat.nbytes].view(flat.dtype)
            input.moved = self.lanes.d2h.run(
                "input of a block",
                partial(host.copy_, flat, non_blocking=True),
                # the block before computed it
                after=[self.lanes.compute.now(), last_read],
            )
            self._leaving = weakref.ref(input)
        return input

    def _take_slot(self, n_bytes: int):
        if n_bytes > self.slot_bytes:
            raise RuntimeError(
                f"a block's input has {n_bytes:,} bytes and the activation slab's slots {self.slot_bytes:,}; "
                "make the offload with the largest input_bytes"
            )
        if not self.free:
            gc.collect()  # graphs in a reference cycle hold slots whose backward is over
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
        # a block's backward begins, so that of the block after is over
        if (done := self._in_use()) is not input:
            if done is not None and not done.kept:
                done.let_go()
            self._in_use = weakref.ref(input)
            before = input.before()
            if before is not None and before.flat is None:
                self._fetch(before)
        view = input.flat.as_strided(saved.shape, saved.stride, saved.offset)
        if saved.layout is None:
            return view
        mesh, placements, shape, stride = saved.layout
        return DTensor.from_local(view, mesh, placements, run_check=False, shape=shape, stride=stride)

    def _fetch(self, input: _Input) -> None:
        host = input.slot[: input.n_bytes].view(input.dtype)
        flat = torch.empty(host.shape, dtype=input.dtype, device=self.device)
        # What computed until now may have had the memory that `flat` has.
        input.moved = self.lanes.h2d.run(
            "input of a block",
            partial(flat.copy_, host, non_blocking=True),
            after=[self.lanes.compute.now(), input.moved],
        )
        input.hold(flat)

    def _make_slots(self) -> int:
        """Fill `free`; returns the bytes taken."""
        if self.n_slots == 0:
            return 0
        if self.device.type != "cuda":
            slabs = [torch.empty(self.n_slots * self.slot_bytes, dtype=torch.uint8)]
        else:
            slab_bytes = 1 << (SLOTS_PER_SLAB * self.slot_bytes - 1).bit_length()
            n_slabs = -(-self.n_slots // (slab_bytes // self.slot_bytes))
            slabs = [torch.empty(slab_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(n_slabs)]
        for slab in slabs:
            n_fit = slab.numel() // self.slot_bytes
            self.free += [(slot, DONE) for slot in slab[: n_fit * self.slot_bytes].split(self.slot_bytes)]
        del self.free[self.n_slots :]
        return sum(slab.numel() for slab in slabs)


def offload_block_inputs(
    blocks: Sequence[nn.Module],
    device: torch.device,
    input_bytes: int,
    in_flight: int = 1,
    lanes: Lanes | None = None,
) -> ActivationOffload:
    """Keep the inputs of `blocks` on the host between forward and backward; at most two are on the device at
    a time.

    blocks: of one pipeline stage, in forward order, each called with its input first; after recompute and
        compile were applied
    input_bytes: the largest input on this rank (rows x tokens x width x bytes, tokens / tp with sequence
        parallelism)
    in_flight: forwards whose backward is not over: 1, under pp up to all microbatches; each keeps the last
        block's input
    lanes: what copies run on, `recording` if they shall be drawn; not the chunk manager's, whose queues hold
        other work Pins host memory: call it before training; a pin within a step can hold up other ranks.
        Results are bitwise those without.
    """
    return ActivationOffload(blocks, device, input_bytes, in_flight, lanes or Lanes(device, n_threads=1))


def _extent(tensor: Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _is_dense(tensor: Tensor) -> bool:
    """Every element of its piece of the storage is its own: it can be copied as one run of bytes."""
    return tensor.numel() == 0 or _extent(tensor) == tensor.numel()
