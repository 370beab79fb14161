"""Counts what a training step does on one rank, by watching its operations: bytes, traffic and FLOPs.

    counter = StepCounter("meta", groups_of(mesh))
    with counter:
        training = assemble(...)
        step(training)
    counter.peak_bytes, counter.peak_moment, counter.traffic, counter.products

It watches tensors of one device. With `meta` they hold no memory, so that any size can be counted on a laptop
(dry_run.py). With `cpu` it counts a real run of a few processes, and the tests compare both counts.

storage   the memory behind a tensor and its views. It is counted from the operation that first returned it
          until nothing refers to it any more, and anew whenever FSDP resizes it.
kind      what the bytes are for, one of KINDS. A storage has the kind of the moment at which it was made,
          until something says more: a collective that is given it, or a gradient that is complete.
"""

import weakref
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch._subclasses import FakeTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group  # private in torch 2.11 to 2.13
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

from dtensor_llama.errors import UsageError
from parallel.config import AXES
from parallel.context import ring_attention, ring_attention_backward

PARAMETERS = "parameters"  # this rank's shards
GRADIENTS = "gradients"
OPTIMIZER = "optimizer"  # moments and, under a chunk manager, what else is kept of the masters
GATHERED = "gathered weights"  # what FSDP computes with: whole, in the dtype of the computation
COMMUNICATION = "communication"  # buffers of collectives
ACTIVATIONS = "activations"  # what was made in forward
BACKWARD = "backward"  # what backward works with: recomputed activations and gradients on their way
OTHER = "other"  # what was made outside forward and backward, for example by the optimizer
HOST = "host"  # offloaded: it does not count for the device
KINDS = (PARAMETERS, GRADIENTS, OPTIMIZER, GATHERED, COMMUNICATION, ACTIVATIONS, BACKWARD, OTHER)
SETTLED = {PARAMETERS, GRADIENTS, OPTIMIZER, HOST}  # kinds that a collective does not change

CUDA_BLOCK = 512  # bytes: torch's allocator for CUDA rounds every allocation up to a multiple of it


class Collective(NamedTuple):
    """Describes collectives that are alike. whole_bytes: of the whole tensor: what an all-gather gives, a
    reduce-scatter takes; of a send, an all-to-all or an all-reduce what this rank has."""

    axis: str  # of the mesh, which may be a derived one, or "world"
    kind: str  # all-gather, reduce-scatter, all-reduce, all-to-all, broadcast or send
    whole_bytes: int
    hop: tuple[int, int] | None = None  # of a send: the places on the axis of its sender and its receiver


class Product(NamedTuple):
    """Describes matrix products (m, k) x (k, n) that are alike; a batched one counts as so many."""

    m: int
    n: int
    k: int
    dtype: str


class Attention(NamedTuple):
    """Describes calls of an attention kernel that are alike.

    batch: how many sequences, or documents if the kernel keeps them apart. tokens, keys: of each of them."""

    is_backward: bool
    batch: int
    heads: int
    tokens: int
    keys: int
    head_dim: int
    is_causal: bool

    @property
    def flops(self) -> int:
        """Return the FLOPs of its matrix products: two in forward, five in backward, which computes the
        scores again. A causal kernel leaves out half of them."""
        one = 2 * self.batch * self.heads * self.tokens * self.keys * self.head_dim
        return one * (5 if self.is_backward else 2) // (2 if self.is_causal else 1)


MESSAGES = ("all-to-all", "send")  # what cp and pp send, and no other axis
# Names of axes that may have the same ranks: the first that has them is taken, so that a name means the same
# in each layout. Weights and gradients are on fsdp, with cp or without.
NAMED_FIRST = {True: ("pp", "cp"), False: ("tp", "fsdp", "dp_replicate", "dp_cp", "loss")}


def groups_of(mesh: DeviceMesh) -> dict[tuple[str, bool], str]:
    """Return the axis of each process group, by the group's name and whether it is asked for MESSAGES.

    Several axes may have the same ranks, and one group or several: see NAMED_FIRST. A group of all ranks that
    is no axis is `world`."""
    world = dist.group.WORLD.group_name
    names = {(world, True): "world", (world, False): "world"}
    groups = {axis: mesh[axis].get_group() for axis in ["loss", "dp", "dp_cp", "fsdp", *AXES]}
    ranks = {axis: dist.get_process_group_ranks(group) for axis, group in groups.items()}
    for axis, group in groups.items():
        if group.size() > 1:
            for is_message, first in NAMED_FIRST.items():
                alike = [name for name in first if ranks[name] == ranks[axis]]
                names[group.group_name, is_message] = (alike or [axis])[0]
    return names


def ring_bytes(kind: str, whole_bytes: float, n_ranks: int) -> float:
    """Return what one of n ranks sends if the collective goes round a ring."""
    if kind == "send":
        return whole_bytes
    return whole_bytes * (n_ranks - 1) / n_ranks * (2 if kind == "all-reduce" else 1)


@dataclass
class _Held:
    """One storage. `storage` is a weak reference, whose callback takes the bytes off the account."""

    storage: weakref.ref
    n_bytes: int
    kind: str


class StepCounter(TorchDispatchMode):
    """See the first lines of this file.

    device_type: of the tensors whose bytes count. axes: the axis of each group, from `groups_of`.
    block_bytes: a storage counts as a multiple of so many. document_tokens: of each document, if
    sequences of several documents go to varlen_attn, which has their ends as values; None: a sequence is one.
    """

    supports_higher_order_operators = True

    def __init__(
        self,
        device_type: str,
        axes: dict[tuple[str, bool], str],
        block_bytes: int = 1,
        document_tokens: int | None = None,
    ):
        super().__init__()
        self.document_tokens = document_tokens
        self.device_type, self.axes, self.block_bytes = device_type, axes, block_bytes
        self.live: dict[int, _Held] = {}
        self.held_bytes = 0
        self.by_kind: Counter[str] = Counter()
        self.shapes: dict[tuple, tuple[torch.Size, tuple[int, ...], torch.dtype]] = {}  # of results
        self.is_muted = False
        self.moment = "building the model"
        self.kind_of_new = OTHER
        self.reset()

    def reset(self) -> None:
        """Begin anew to count what a step does; what is held stays held."""
        self.peak_bytes, self.peak_moment = self.held_bytes, self.moment
        self.at_peak = dict(self.by_kind)
        self.most: Counter[str] = Counter(self.by_kind)  # of each kind, whenever that was
        self.traffic: Counter[Collective] = Counter()
        self.products: Counter[Product] = Counter()
        self.attention: Counter[Attention] = Counter()

    # ---- what is told from outside ----

    def now(self, moment: str, kind_of_new: str) -> None:
        """Say what the program does from here on, and what it makes outside of backward."""
        self.moment, self.kind_of_new = moment, kind_of_new

    def forget_all(self) -> None:
        """Stop counting what is held, before it is deleted."""
        self.live.clear()

    def tag(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Say what tensors are for."""
        for tensor in tensors:
            tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            self._see(tensor, kind)

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Count nothing of what happens meanwhile but traffic and FLOPs, and no bytes."""
        before, self.is_muted = self.is_muted, True
        try:
            yield
        finally:
            self.is_muted = before

    def watching(self) -> "StepCounter | nullcontext":
        """Return the context in which this counter watches, if it does not do so already."""
        return nullcontext() if self in _get_current_dispatch_mode_stack() else self

    @contextmanager
    def following_resizes(self) -> Iterator[None]:
        """Also see storages that are resized, as FSDP does with gathered weights, without an operation."""
        resize = torch.UntypedStorage.resize_

        def resize_and_count(storage: torch.UntypedStorage, n_bytes: int):
            result = resize(storage, n_bytes)
            held = self.live.get(storage._cdata)
            if held is not None:
                if held.kind not in SETTLED:
                    self._move(held, GATHERED)
                self._add(held, self._rounded(n_bytes) - held.n_bytes)
            return result

        torch.UntypedStorage.resize_ = resize_and_count
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = resize

    def watch(self, stages: list[nn.Module], optimizer: torch.optim.Optimizer) -> None:
        """Note from now on where in a step the program is, and which gradients are complete."""
        for stage in stages:
            blocks = [(i, block) for i, block in enumerate(stage.model.layers) if block is not None]
            stage.register_forward_pre_hook(lambda *_: self.now("forward, before the layers", ACTIVATIONS))
            for place, (i, block) in enumerate(blocks):
                is_last = place == len(blocks) - 1
                after = "forward, after the layers" if stage.lm_head is None else "head and loss"
                self._watch_block(block, f"layer {i}", after if is_last else None)
            for parameter in stage.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(self._gradient_is_complete)
        optimizer.register_step_pre_hook(self._optimizer_steps)

    def _watch_block(self, block: nn.Module, name: str, after: str | None) -> None:
        def forward_ends(_, __, output: Tensor) -> None:
            if after:
                self.now(after, ACTIVATIONS)
            if output.requires_grad:
                output.register_hook(partial(self._backward_of, name))

        block.register_forward_pre_hook(lambda *_: self.now(f"forward, {name}", ACTIVATIONS))
        block.register_forward_hook(forward_ends)

    def _backward_of(self, name: str, grad: Tensor) -> None:
        """Note that the backward of a block begins. What the blocks after it have left are gradients."""
        self.now(f"backward, {name}", OTHER)
        self._leave_gradients(grad)

    def _leave_gradients(self, *but: Tensor) -> None:
        others = {tensor.untyped_storage()._cdata for tensor in but}
        for key, held in list(self.live.items()):
            if held.kind == BACKWARD and key not in others:
                self._move(held, GRADIENTS)

    def _optimizer_steps(self, *_) -> None:
        self.now("optimizer step", OTHER)
        self._leave_gradients()

    def _gradient_is_complete(self, parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            self.tag([parameter.grad], GRADIENTS)

    # ---- what is seen ----

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what its shards do is seen instead
        if any(issubclass(kind, FakeTensor) for kind in types):
            return op(*args, **(kwargs or {}))  # DTensor asks for the shape of a result
        kwargs = kwargs or {}
        if isinstance(op, HigherOrderOperator):
            return self._replay(op, args, kwargs)
        namespace, name = op.namespace, op._opname
        if namespace in ("c10d", "_c10d_functional", "_dtensor"):
            self._note_collective(namespace, name, args)
        elif namespace == "dtensor_llama":  # an operation of ours, which is made of others
            with self:
                return _PYTHON_OF[name](*args, **kwargs)
        else:
            self._note_flops(op, args, kwargs)
        if self.device_type == "meta" and (answer := _read_by_host(name, args, kwargs)) is not None:
            return answer
        result = self._result(op, args, kwargs)
        if not self.is_muted:
            for tensor in tree_leaves(result):
                if self._counts(tensor):
                    self._see(tensor)
        if namespace in ("c10d", "fsdp"):
            kind = COMMUNICATION if namespace == "c10d" else GATHERED
            for tensor in tree_leaves([args, kwargs]):
                if self._counts(tensor):
                    self._see(tensor, kind)
        return result

    def _result(self, op: Any, args: tuple, kwargs: dict) -> Any:
        """Run an operation.

        On `meta` torch works out in Python what shape a result has, which takes most of the time of a dry
        run. But a step does the same operations on the same shapes again and again. So the shape of a new
        tensor is worked out once."""
        if self.device_type != "meta" or not _makes_new_tensor(op):
            return op(*args, **kwargs)
        question = (op, _signature(args), _signature(tuple(kwargs.items())))
        known = self.shapes.get(question)
        if known is None:
            result = op(*args, **kwargs)
            if type(result) is Tensor and self._counts(result):
                self.shapes[question] = result.shape, result.stride(), result.dtype
            return result
        shape, stride, dtype = known
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")

    def _replay(self, op: HigherOrderOperator, args: tuple, kwargs: dict) -> Any:
        """Run an operation whose random numbers a compiled graph would replay in its recomputation."""
        with self:
            if op.name() == "run_and_save_rng_state":
                operation, *inputs = args
                return torch.empty(0, dtype=torch.uint8), operation(*inputs, **kwargs)
            if op.name() == "run_with_rng_state":
                _, operation, *inputs = args
                return operation(*inputs, **kwargs)
        raise UsageError(
            f"the step has an operation that a dry run cannot count: {op.name()}. If compile=True made it, "
            "leave that out."
        )

    def _counts(self, value: Any) -> bool:
        """Return whether a value is a dense tensor of this device. A sparse one is seen by its parts."""
        is_plain = isinstance(value, Tensor) and not isinstance(value, FakeTensor)
        return is_plain and value.device.type == self.device_type and value.layout is torch.strided

    def _see(self, tensor: Tensor, kind: str | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        held = self.live.get(key)
        if held is None:
            gone = weakref.ref(storage, lambda _: self._forget(key))
            held = self.live[key] = _Held(gone, 0, kind or self._kind_now())
            self._add(held, self._rounded(storage.nbytes()))
        elif kind and held.kind != kind and (held.kind not in SETTLED or kind in SETTLED):
            self._move(held, kind)

    def _kind_now(self) -> str:
        is_in_backward = torch._C._current_graph_task_id() != -1  # private in torch 2.11 to 2.13
        return BACKWARD if is_in_backward else self.kind_of_new

    def _rounded(self, n_bytes: int) -> int:
        return -(-n_bytes // self.block_bytes) * self.block_bytes

    def _forget(self, key: int) -> None:
        held = self.live.pop(key, None)
        if held is not None:
            self._add(held, -held.n_bytes)

    def _move(self, held: _Held, kind: str) -> None:
        n_bytes = held.n_bytes
        self._add(held, -n_bytes)
        held.kind = kind
        self._add(held, n_bytes)

    def _add(self, held: _Held, n_bytes: int) -> None:
        held.n_bytes += n_bytes
        self.by_kind[held.kind] += n_bytes
        self.most[held.kind] = max(self.most[held.kind], self.by_kind[held.kind])
        if held.kind == HOST:
            return
        self.held_bytes += n_bytes
        if self.held_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_moment = self.held_bytes, self.moment
            self.at_peak = dict(self.by_kind)

    def _note_collective(self, namespace: str, name: str, args: tuple) -> None:
        kind = _KIND_OF.get(name)
        if kind is None:
            return
        if namespace == "c10d":
            (boxed,) = (arg for arg in args if isinstance(arg, torch.ScriptObject) and _is_group(arg))
            group = dist.ProcessGroup.unbox(boxed)
        else:
            group = _resolve_process_group(args[-1])
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        whole_bytes = max(tensor.nbytes for tensor in tensors)
        if namespace != "c10d" and kind == "all-gather":
            whole_bytes *= group.size()
        if group.size() > 1:
            axis = self.axes.get((group.group_name, kind in MESSAGES), "world")
            # The arguments of a send are its tensors, the group, the receiver and a tag.
            hop = (group.rank(), args[2]) if kind == "send" else None
            self.traffic[Collective(axis, kind, whole_bytes, hop)] += 1

    def _note_flops(self, op: Any, args: tuple, kwargs: dict) -> None:
        name = op._opname
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            a, b = args[-2:] if name in ("mm", "bmm") else args[1:3]
            *batch, m, k = a.shape
            dtype = str(a.dtype).removeprefix("torch.")
            self.products[Product(m, b.shape[-1], k, dtype)] += prod(batch)
        elif "attention" in name or name.startswith("_varlen_attn"):
            self._note_attention(op, args, kwargs)

    def _note_attention(self, op: Any, args: tuple, kwargs: dict) -> None:
        is_backward, is_varlen = "backward" in op._opname, op._opname.startswith("_varlen")
        names = [argument.name for argument in op._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        q, k = given["query"], given["key"]
        if is_varlen:  # the tokens of all sequences in a line, (N, H, E), and the length of one
            n_tokens, n_heads, head_dim = q.shape
            before, _ = given.get("window_size") or (-1, 0)
            for length, n_documents in self._documents_of_sequence(given["max_q"]).items():
                width = length if before < 0 else min(length, before + 1)
                # Twice the keys that a query sees on average, since half are left out of a causal kernel. The
                # windows of the first queries are cut short.
                n_keys = round(2 * width - width**2 / length)
                shape = (n_documents * n_tokens // given["max_q"], n_heads, length, n_keys)
                self.attention[Attention(is_backward, *shape, head_dim, True)] += 1
        else:
            *batch, n_tokens, head_dim = q.shape
            shape = (*batch, n_tokens, k.shape[2])
            self.attention[Attention(is_backward, *shape, head_dim, given.get("is_causal", False))] += 1

    def _documents_of_sequence(self, n_tokens: int) -> dict[int, int]:
        """Return the lengths of a sequence's documents, and how many have each; its end cuts the last."""
        length = min(self.document_tokens or n_tokens, n_tokens)
        n_whole, rest = divmod(n_tokens, length)
        return {length: n_whole} | ({rest: 1} if rest else {})


_KIND_OF = {  # the operations of torch.distributed, by their names
    "_allgather_base_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "all_reduce_": "all-reduce",
    "all_to_all_single": "all-to-all",
    "shard_dim_alltoall": "all-to-all",
    "alltoall_base_": "all-to-all",
    "broadcast_": "broadcast",
    "broadcast": "broadcast",
    "send": "send",
}


@cache
def _makes_new_tensor(op: Any) -> bool:
    """Return whether all that an operation of torch does is to make one new tensor: it changes none, and its
    result is no view. torch's _unsafe_view is one, although its schema does not say so."""
    schema = op._schema
    returns = schema.returns
    is_one_tensor = len(returns) == 1 and isinstance(returns[0].type, torch.TensorType)
    is_new = is_one_tensor and returns[0].alias_info is None and op._opname != "_unsafe_view"
    return is_new and op.namespace in ("aten", "prims") and not schema.is_mutable


def _signature(value: Any) -> Hashable:
    """Return what the shape of a result can depend on. The type of a number is part of it: 1 equals 1.0."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device.type
    if isinstance(value, tuple | list):
        return tuple([_signature(one) for one in value])
    return type(value), value


def _is_group(boxed: torch.ScriptObject) -> bool:
    return "ProcessGroup" in str(boxed._type())


# For tensors without memory they would show neither what they send nor what they hold.
_PYTHON_OF = {
    "ring_attention": ring_attention._init_fn,
    "ring_attention_backward": ring_attention_backward._init_fn,
}


def _read_by_host(name: str, args: tuple, kwargs: dict) -> Any:
    """Return what the host reads of a tensor without memory, or None if it reads nothing: 1 wherever it asks
    for a number, and zeros for a copy."""
    if name == "_local_scalar_dense" and args[0].is_meta:
        return torch.ones((), dtype=args[0].dtype).item()
    if name == "copy_" and args[1].is_meta and not args[0].is_meta:
        return args[0]
    device = kwargs.get("device")
    if name == "_to_copy" and args[0].is_meta and device is not None and torch.device(device).type == "cpu":
        return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
    return None
