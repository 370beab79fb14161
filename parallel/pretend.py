"""Pretends to be one rank of a cluster: a process group without peers, and a device without memory.

    with pretended_rank(rank, world_size), pretended_device(torch.device("cuda"), counter):
        ... assemble and a training step, on torch.device("meta") ...

Tensors on `meta` have shapes and dtypes and no memory. Most of torch works with them as it does on a GPU.
What does not work, or works differently than on the real device, is replaced here while the block lasts. Each
function below says what it replaces, and why.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager
from importlib import import_module
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fully_shard as fully_shard_module  # private, as is the next
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.pipelining import schedules
from torch.nn.attention import SDPBackend

from dtensor_llama import attention, loss
from dtensor_llama.attention import AttentionMask, expand_heads, pad_head_width, plan_sdpa
from parallel import context, tensor
from parallel.mesh_caches import forget_meshes
from parallel.step_counter import StepCounter

META = torch.device("meta")
_aten = torch.ops.aten


@contextmanager
def pretended_rank(rank: int, world_size: int) -> Iterator[None]:
    """Be one rank of a process group without other processes, whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # private in torch 2.11 to 2.13

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        forget_meshes()


@contextmanager
def pretended_device(device: torch.device, counter: StepCounter) -> Iterator[None]:
    """Let `meta` stand for a device of this type, whose bytes the counter counts."""
    with ExitStack() as stack:
        replace = lambda owner, name, value, **how: stack.enter_context(
            mock.patch.object(owner, name, value, **how)
        )
        # FSDP asks for the module of its device, and finds streams and events there that do nothing.
        replace(torch, "meta", _MetaModule, create=True)
        replace(fully_shard_module, "_get_device_from_mesh", lambda mesh: META)
        replace(FSDPParamGroup, "_validate_no_meta_params", lambda group: None)
        replace(FSDPParam, "reset_sharded_param", _take_shard)
        # The fused AdamW computes on `meta` too, but `meta` is not on its list.
        replace(import_module("torch.optim.adam"), "_device_dtype_check_for_fused", lambda *args, **how: None)
        replace(dist, "batch_isend_irecv", _send_and_receive)
        for user in (loss, tensor):
            replace(user, "take_columns", _take_columns)
        _without_first_messages(replace, counter)
        if device.type == "cuda":
            from parallel.pretended_compiler import compiler  # here, because it imports for seconds

            replace(torch, "compile", compiler(counter))
            replace(F, "rms_norm", _fused_rms_norm)
            replace(attention, "_sdpa", _sdpa_on_gpu)
            replace(attention, "_flash", _flash_on_gpu)
            replace(context, "_cpu_forward", context._cuda_forward)
            replace(context, "_cpu_backward", context._cuda_backward)
            replace(loss, "choose_loss", lambda device: ("compiled", "as on a GPU"))
            replace(loss, "_compiled_loss_of_a_chunk", _fused_loss(counter))
        else:
            replace(attention, "_sdpa", _sdpa_on_cpu)
            replace(loss, "choose_loss", lambda device: ("eager", "as on a CPU"))
            tokens_per_chunk = loss.tokens_per_chunk
            on_cpu = lambda n_columns, eager_on=None: tokens_per_chunk(n_columns, eager_on and device)
            replace(loss, "tokens_per_chunk", on_cpu)
        yield


class _Stream(torch.cpu.Stream):
    """Has events, which FSDP keeps where the device is not a CPU."""

    def record_event(self, event=None) -> torch.cpu.Event:
        return torch.cpu.Event()


class _MetaModule:
    """Stands for torch.cuda where the device is `meta`."""

    Stream, Event, stream = _Stream, torch.cpu.Event, torch.cpu.stream

    @staticmethod
    def current_stream(device=None) -> _Stream:
        return _Stream()

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def set_device(device) -> None:
        pass

    @staticmethod
    def get_rng_state(device=None) -> Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: Tensor, device=None) -> None:
        pass


def take_shards(stages: list[nn.Module]) -> None:
    """Let FSDP work with the shards that `to_empty` has made, as it does otherwise before the first forward.
    Shards that are smaller than those of other ranks become larger then."""
    for stage in stages:
        for module in stage.modules():
            if isinstance(module, FSDPModule):
                state = module._get_fsdp_state()
                groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
                for parameter in [one for group in groups if group for one in group.fsdp_params]:
                    parameter.reset_sharded_param()


def _take_shard(own: FSDPParam) -> None:
    """Do what FSDPParam.reset_sharded_param does, but on `meta`, where that does nothing."""
    own.sharded_param = getattr(own._module_info.module, own._module_info.param_name)
    shard = own.sharded_param._local_tensor
    if own._sharded_param_data.untyped_storage()._cdata == shard.untyped_storage()._cdata:
        return
    if shard.size() != own.padded_sharded_param_size:
        n_rows = shard.size(0) if shard.numel() else 0
        shard = shard.new_zeros(own.padded_sharded_param_size)
        own.sharded_param._local_tensor = shard.narrow(0, 0, n_rows)
    own._sharded_param_data = shard.view(-1)


def _without_first_messages(replace: Callable, counter: StepCounter) -> None:
    """Leave out of the account what pipeline stages tell each other once, before their first step."""
    schedule = schedules._PipelineSchedule
    if not hasattr(schedule, "_warmup_p2p"):  # torch 2.11 sends each neighbour one number; here it sends none
        replace(schedules._PipelineStageBase, "_get_init_p2p_neighbors_ops", lambda stage: [])
        return
    warm_up = schedule._warmup_p2p

    def uncounted(self, *args) -> None:
        before = counter.traffic.copy()
        with counter.muted():
            warm_up(self, *args)
        counter.traffic = before

    replace(schedule, "_warmup_p2p", uncounted)


def _send_and_receive(operations: list[dist.P2POp]) -> list[dist.Work]:
    """Start each operation by itself. torch would ask whether the group can batch them on `meta`, which it
    does not know."""
    works = []
    for one in operations:
        peer = {"group_dst" if one.op is dist.isend else "group_src": one.group_peer}
        works.append(one.op(one.tensor, group=one.group, tag=one.tag, **peer))
    return works


@contextmanager
def pretended_manager() -> Iterator[None]:
    """Let a chunk manager plan and move tensors on `meta`, which have no values.

    Its kernels, which are compiled and hold no memory, compute nothing. The calling thread does the host's
    work, because it is the thread that is watched. The free memory of this computer does not matter."""
    nothing = lambda *args: None
    with ExitStack() as stack:
        stack.enter_context(mock.patch("memory.lanes.ThreadPoolExecutor", _InThisThread))
        stack.enter_context(mock.patch("memory.store.host_share", lambda *args: 2**60))
        stack.enter_context(mock.patch("memory.chunk.Ledger.zeros", _zeros))
        # Nothing modifies a weight between two steps here, and on `meta` all pointers are alike.
        stack.enter_context(mock.patch("memory.store.version_of", nothing))
        # A plan is printed with the time that it predicts, which is not asked for here.
        stack.enter_context(mock.patch("parallel.assemble._compute_seconds", lambda *args: None))
        for name in ("warm_up_host", "warm_up_device", "host_step", "device_steps", "sum_into"):
            stack.enter_context(mock.patch(f"memory.kernel.Kernel.{name}", nothing))
        yield


def _zeros(ledger, account: str, n: int, dtype: torch.dtype, *what, **how) -> Tensor:
    """Do what memory.chunk.Ledger.zeros does, but take no memory of this computer's for the host's."""
    ledger.reserve(account, n * dtype.itemsize, what[0])
    nth = what[2] if len(what) > 2 else how.get("nth", 0)
    shift = 1024 * nth // dtype.itemsize  # STAGGER of memory/chunk.py
    return torch.zeros(shift + n, dtype=dtype, device=META)[shift:]


class _InThisThread(Executor):
    """Runs what it is given at once."""

    def __init__(self, *args, **kwargs):
        pass

    def submit(self, work: Callable, /, *args, **kwargs) -> Future:
        done = Future()
        done.set_result(work(*args, **kwargs))
        return done

    def shutdown(self, *args, **kwargs) -> None:
        pass


class _TakeColumns(torch.autograd.Function):
    """Gives a gradient that takes no memory. On a device this gradient is sparse: its C numbers take hardly
    any memory. There are no sparse tensors on `meta`."""

    @staticmethod
    def forward(ctx, x: Tensor, columns: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.new_empty(len(x))

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.new_zeros(()).expand(ctx.shape), None


def _take_columns(x: Tensor, columns: Tensor) -> Tensor:
    return torch.where(columns >= 0, _TakeColumns.apply(x, columns), 0.0)


# ---- What a GPU computes otherwise -------------------------------------------------------------------------


class _FusedRmsNorm(torch.autograd.Function):
    """Holds what a GPU's kernel holds: it keeps its input and one number a row. Elsewhere, and so on `meta`,
    torch makes the norm of several operations, which keep float32 copies of the input."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        roots = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        ctx.save_for_backward(x, weight, roots)
        return torch.empty_like(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, _ = ctx.saved_tensors
        to_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        return torch.empty_like(x), to_weight


def _fused_rms_norm(x: Tensor, shape, weight: Tensor, eps: float | None = None) -> Tensor:
    if torch.compiler.is_compiling():  # the compiler makes one kernel of the several operations
        return torch.rms_norm(x, shape, weight, eps)
    return _FusedRmsNorm.apply(x, weight)


def _sdpa_on_gpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Call the kernel that torch takes on a GPU (FlashAttention for cuDNN's: they hold the same); on `meta`
    it would store the (T, S) scores."""
    n_tokens, n_heads, head_dim = q.shape[1:]
    grouped, over_cache = n_heads != k.shape[2], n_tokens != k.shape[1]
    plan = plan_sdpa(q.dtype, grouped, masked=mask is not None, over_cache=over_cache)
    if plan.expands_heads:
        k, v = expand_heads(k, n_heads), expand_heads(v, n_heads)
    heads_first = [pad_head_width(x).transpose(1, 2) for x in (q, k, v)]
    is_causal, scale = mask is None and n_tokens > 1, head_dim**-0.5
    if SDPBackend.FLASH_ATTENTION in plan.kernels:
        out = _aten._scaled_dot_product_flash_attention(*heads_first, 0.0, is_causal, scale=scale)[0]
    else:
        bias = context._bias(mask, q.dtype, n_heads)
        out = _aten._scaled_dot_product_efficient_attention(
            *heads_first, bias, q.requires_grad, 0.0, is_causal, scale=scale
        )[0]
    return out.transpose(1, 2)[..., :head_dim]


def _flash_on_gpu(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None) -> Tensor:
    """Call the FlashAttention inside torch, which computes and holds the same: the package need not be
    installed here, and does not know `meta`."""
    if mask is None:
        return _sdpa_on_gpu(q, k, v, None)
    n_sequences, n_tokens = q.shape[:2]
    if mask.cu_seqlens is None:  # a sequence is one document
        ends = torch.arange(n_sequences + 1, dtype=torch.int32, device=q.device) * n_tokens
        mask = AttentionMask(cu_seqlens=ends, window=mask.window)
    return attention._varlen(q, k, v, mask)


def _sdpa_on_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Call the kernel that torch takes on a CPU."""
    if mask is not None:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    out, _ = _aten._scaled_dot_product_flash_attention_for_cpu(
        *(x.transpose(1, 2) for x in (q, k, v)),
        0.0,
        mask is None and q.shape[1] > 1,
        attn_mask=mask,
    )
    return out.transpose(1, 2)


def _fused_loss(counter: StepCounter) -> Callable:
    """Return a function that holds the same memory as the compiled loss of a chunk: the logits and their
    gradient, in the dtype of the computation. The float32 numbers are in registers."""

    def loss_of_a_chunk(hidden: Tensor, weight: Tensor, labels: Tensor, loss_of: Callable, wants_grad: bool):
        logits = hidden.new_empty(len(hidden), len(weight))
        with counter.muted():
            in_registers = torch.empty_like(logits, dtype=torch.float32)
            result = loss._eager_loss_of_a_chunk(in_registers, hidden, weight, labels, loss_of, wants_grad)
        counter.tag([part for part in result if part is not None], counter.kind_of_new)
        del logits
        return result

    return loss_of_a_chunk
