"""AdamW over one chunk: one source for host and device, torch.compile's or, without a compiler, torch's fused
kernel in blocks. On the device, where nothing is to be cast (float32 weights), torch's fused kernel takes
many pieces in one call in any case.

host_step       a CPU chunk: fp32 master on the host; the new weight, rounded, goes to memory of its own. Written where the
                gradient was it would halve the speed: the compiled loop's masked loads are as wide as a register and wait
                for the masked store before them (bfloat16, one core: 0.39 G parameters/s in place, 0.80 beside)
device_step     RESIDENT and STREAM: the weight is (part of) the master, so that those bytes exist once
    float32 weights    the weight is the master
    bfloat16 weights   the weight is the high half of the master, `low` its low 16 bits; the two are bit for bit the master.
                       High is rounded half up in magnitude, so it differs from torch's half-to-even on exact
                       ties only: of a low half that could be either, half-to-even would not say which it was
Bytes read and written per parameter: compiled 28 on the host (bfloat16 gradient and weight), 26 on the
device; one pass.
"""

import functools
import importlib.util
import shutil
import types
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from dtensor_llama.errors import UsageError

# elements: 1 MiB of fp32 each for gradient, master and both moments stays in a core's cache
BLOCK = 256 * 1024
ROW = 1024  # elements: of the (rows, ROW) views that compiled device kernels take


class Hyper(NamedTuple):
    """What AdamW needs beside tensors; `step` counts from 1."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int

    @functools.lru_cache(maxsize=64)  # noqa: B019  a step has a handful
    def tensors(self) -> tuple[Tensor, ...]:
        """As 0-dim float32 host tensors, which a compiled kernel takes without compiling anew when they
        change. The differences from 1 are taken in float64: in float32, 1 - 0.999 is wrong in the fifth
        digit."""
        correction1, correction2 = 1 - self.beta1**self.step, 1 - self.beta2**self.step
        root = correction2**0.5
        numbers = (
            1 - self.lr * self.weight_decay,
            1 - self.beta1,
            self.beta2,
            1 - self.beta2,
            self.lr * root / correction1,
            self.eps * root,
        )
        return tuple(torch.tensor(number, dtype=torch.float32) for number in numbers)


NO_CHANGE = Hyper(lr=0.0, beta1=0.9, beta2=0.95, eps=1e-5, weight_decay=0.0, step=1)


def adamw_chunk(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    clip: Tensor,
    decay: Tensor,
    one_minus_beta1: Tensor,
    beta2: Tensor,
    one_minus_beta2: Tensor,
    step_size: Tensor,
    eps: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """New (master, exp_avg, exp_avg_sq). Source: Loshchilov & Hutter 2017, arXiv:1711.05101, as
    torch.optim.AdamW has it, but that step_size and eps carry the correction of exp_avg_sq, which saves a
    division per parameter."""
    grad = grad.float() * clip
    exp_avg = exp_avg + (grad - exp_avg) * one_minus_beta1
    exp_avg_sq = exp_avg_sq * beta2 + grad * grad * one_minus_beta2
    return master * decay - step_size * (exp_avg / (exp_avg_sq.sqrt() + eps)), exp_avg, exp_avg_sq


def join_master(weight: Tensor, low: Tensor) -> Tensor:
    """bfloat16 weight and int16 low half -> the float32 master they were split from."""
    # rounding went up where the low half is a half or more
    high = weight.view(torch.int16).int() - (low < 0).int()
    return ((high << 16) | (low.int() & 0xFFFF)).view(torch.float32)


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """float32 -> (bfloat16 weight, int16 low half), both from the same bits."""
    bits = master.view(torch.int32)
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def _host_step(master, exp_avg, exp_avg_sq, grad, weight, clip, *hyper):
    new = adamw_chunk(master, exp_avg, exp_avg_sq, grad, clip, *hyper)
    for old, value in zip((master, exp_avg, exp_avg_sq), new, strict=True):
        old.copy_(value)
    weight.copy_(new[0])


def _device_step(weight, low, exp_avg, exp_avg_sq, grad, clip, *hyper):
    """If `clip` is nan every element keeps its value: no host has to look whether the gradient is finite."""
    skips = clip.isnan()
    master = weight if low is None else join_master(weight, low)
    stepped, new_avg, new_avg_sq = adamw_chunk(master, exp_avg, exp_avg_sq, grad, clip, *hyper)
    exp_avg.copy_(torch.where(skips, exp_avg, new_avg))
    exp_avg_sq.copy_(torch.where(skips, exp_avg_sq, new_avg_sq))
    if low is None:
        weight.copy_(torch.where(skips, weight, stepped))
    else:
        high, new_low = split_master(stepped)
        weight.copy_(torch.where(skips, weight, high))
        low.copy_(torch.where(skips, low, new_low))


def _device_add(total, grad):
    total.add_(grad)


def _device_copy(total, grad):
    total.copy_(grad)


def whole_rows(n: int) -> int:
    """How many of n elements a compiled device kernel takes as rows of ROW; the rest goes alone.

    Of a (rows, ROW) view the compiler knows that the length is a multiple of ROW, so it loads and stores 16
    bytes at a time (PTX for sm_90, 8 elements a thread: 7 loads, 6 stores). Of a plain length it knows
    nothing, and takes each element alone (16 elements a thread: 41 loads, 32 stores). A single row is left to
    the rest, as torch.compile takes a size of 1 for a constant and would compile anew."""
    rows = n // ROW
    return rows * ROW if rows > 1 else 0


class _ByRows:
    """A kernel for the device on 1-D tensors of one length: one launch, and one more where whole_rows leaves
    a rest. It is compiled once for rows, once for rests, and once for a rest of a single element."""

    def __init__(self, step: Callable):
        self._rows, self._rest = _compiled(step), _compiled(step)

    def __call__(self, tensors: Sequence[Tensor | None], *numbers: Tensor) -> None:
        """tensors: those that it reads and writes by element, some may be None; numbers: 0-dim."""
        n = len(tensors[0])
        whole = whole_rows(n)
        if whole:
            rows = [None if tensor is None else tensor[:whole].view(-1, ROW) for tensor in tensors]
            self._rows(*_of_any_length(rows), *numbers)
        if whole < n:
            rest = [None if tensor is None else tensor[whole:] for tensor in tensors]
            self._rest(*_of_any_length(rest), *numbers)


def _of_any_length(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """Tells torch.compile that other numbers of rows, or elements in a rest, are no reason to compile anew.
    (dynamic=True says so of the memory that a view lies in, too. Then two tensors that first lie in memory of
    equal length have to do so ever after, or all is compiled anew.)"""
    for tensor in tensors:
        if tensor is not None and len(tensor) > 1:
            torch._dynamo.mark_dynamic(tensor, 0)
    return tensors


class Kernel:
    """kind: `compiled`, `blocks`, or `auto`: compiled where there is a compiler. `kind` and `why` say which.

    A clip factor of nan says that the gradient norm is not finite: then device_step and device_steps change
    nothing. host_step is not to be called then: the thread that calls it reads the factor anyway."""

    def __init__(self, kind: str, device: torch.device):
        self.kind, self.why = _choose(kind, device)
        self._is_warm: set[tuple] = set()
        if self.kind == "compiled":
            # A wrapper in C++ lets go of the interpreter while the loop runs; the default one in Python does
            # not, and the forward beside it could launch nothing.
            self._host = _compiled(_host_step, dynamic=True, options={"cpp_wrapper": True})
            self._device = _ByRows(_device_step)
            self._add, self._copy = _ByRows(_device_add), _ByRows(_device_copy)

    def warm_up_host(self, dtype: torch.dtype, grad_dtype: torch.dtype, n_threads: int) -> None:
        """Compile host_step now, unless it was: within a step other ranks would wait for it in a collective,
        10 to 25 s. dtype: of the weights. To be called whenever a plan has put chunks on the host.

        It compiles in the caller's thread, as with torch 2.11 the next backward may crash once another thread
        has compiled, and as if that had n_threads, for which the thread of the host's steps takes it then."""
        if self.kind != "compiled" or ("host", dtype, grad_dtype) in self._is_warm:
            return
        self._is_warm.add(("host", dtype, grad_dtype))
        before = torch.get_num_threads()
        torch.set_num_threads(n_threads)
        for n in (2 * BLOCK, BLOCK):
            master, exp_avg, exp_avg_sq = torch.zeros(n), torch.zeros(n), torch.zeros(n)
            grad, weight = torch.zeros(n, dtype=grad_dtype), torch.zeros(n, dtype=dtype)
            self.host_step(master, exp_avg, exp_avg_sq, grad, weight, None, NO_CHANGE)
        # of threads that begin from now on too, after the host's has set its own
        torch.set_num_threads(before)

    def warm_up_device(
        self, device: torch.device, dtype: torch.dtype, grad_dtype: torch.dtype, lengths: set[int]
    ) -> None:
        """warm_up_host for device_steps and sum_into: whenever a plan has pieces of such lengths for the
        device to step."""
        casts_nothing = dtype == grad_dtype == torch.float32  # then device_steps takes torch's own kernel
        if self.kind != "compiled" or casts_nothing:
            return
        has_rows = any(whole_rows(n) for n in lengths)
        has_rest = any(whole_rows(n) < n for n in lengths)
        # For as many elements as make it pay to compile for many threads.
        needed = {BLOCK: has_rows, ROW - 1: has_rest}
        for n in [n for n, is_needed in needed.items() if is_needed]:
            if (n, dtype, grad_dtype) in self._is_warm:
                continue
            self._is_warm.add((n, dtype, grad_dtype))
            zeros = functools.partial(torch.zeros, n, device=device)
            weight, low, exp_avg, exp_avg_sq = zeros(dtype=dtype), zeros(dtype=torch.int16), zeros(), zeros()
            grad = zeros(dtype=grad_dtype)
            self.device_step(weight, low, exp_avg, exp_avg_sq, grad, None, NO_CHANGE)
            for adds in (False, True) if grad_dtype != dtype else ():
                self.sum_into(grad, weight, adds)  # gradients come in the weights' dtype

    @torch.no_grad()
    def host_step(
        self,
        master: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        grad: Tensor,
        weight: Tensor,
        clip: Tensor | None,
        hyper: Hyper,
    ) -> None:
        """All 1-D of one length on the host, states changed in place, the new master rounded into `weight`;
        `grad` may be scaled. clip: factor on the gradient, a 0-dim float32 tensor of the same device; None is
        1."""
        if self.kind == "compiled":
            self._host(
                master,
                exp_avg,
                exp_avg_sq,
                grad,
                weight,
                _one(grad) if clip is None else clip,
                *hyper.tensors(),
            )
            return
        for block in _blocks(len(grad)):
            _fused([master[block]], [exp_avg[block]], [exp_avg_sq[block]], [grad[block].float()], clip, hyper)
            weight[block].copy_(master[block])

    def device_steps(self, steps: list[tuple]) -> None:
        """device_step with each of these arguments. Where nothing is to be cast torch's own fused kernel
        takes all at once."""
        alike: dict[Hyper, list[tuple]] = {}
        for step in steps:
            _, low, _, _, grad, _, hyper = step
            if low is None and grad.dtype == torch.float32:
                alike.setdefault(hyper, []).append(step)
            else:
                self.device_step(*step)
        for hyper, same in alike.items():
            weights, _, exp_avgs, exp_avg_sqs, grads, (clip, *_), _ = zip(*same, strict=True)
            _fused(weights, exp_avgs, exp_avg_sqs, grads, clip, hyper)

    @torch.no_grad()
    def device_step(
        self,
        weight: Tensor,
        low: Tensor | None,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        grad: Tensor,
        clip: Tensor | None,
        hyper: Hyper,
    ) -> None:
        """All 1-D of one length on one device, changed in place; `grad` may be scaled. low: None if weights
        are float32."""
        if self.kind == "compiled":
            clip = _one(grad) if clip is None else clip
            self._device((weight, low, exp_avg, exp_avg_sq, grad), clip, *hyper.tensors())
            return
        for block in _blocks(len(grad)):
            master = weight[block] if low is None else join_master(weight[block], low[block])
            _fused([master], [exp_avg[block]], [exp_avg_sq[block]], [grad[block].float()], clip, hyper)
            if low is not None:
                high, new_low = split_master(master)
                weight[block].copy_(high)
                low[block].copy_(new_low)

    @torch.no_grad()
    def sum_into(self, total: Tensor, grad: Tensor, adds: bool) -> None:
        """total += grad, or total = grad for the first gradient of a step; 1-D of one length on the device,
        dtypes may differ. torch's own kernels for two dtypes on a GPU load each element alone; for equal
        dtypes, and on a CPU, they serve."""
        if self.kind == "compiled" and total.is_cuda and total.dtype != grad.dtype:
            (self._add if adds else self._copy)((total, grad))
        elif adds:
            total.add_(grad)
        else:
            total.copy_(grad)


def _compiled(step: Callable, **how) -> Callable:
    """Of a copy of its code: dynamo has a limit a code, and other numbers of threads, in other kernels, would
    count for it."""
    own = types.FunctionType(step.__code__.replace(), step.__globals__, step.__name__)
    return torch.compile(own, fullgraph=True, **how)


@functools.cache
def _one_on(device: torch.device) -> Tensor:
    return torch.ones((), device=device)


def _one(like: Tensor) -> Tensor:
    return _one_on(like.device)


def _blocks(n: int) -> list[slice]:
    return [slice(start, start + BLOCK) for start in range(0, n, BLOCK)]


@torch.no_grad()
def _fused(
    masters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    grads: Sequence[Tensor],
    clip: Tensor | None,
    hyper: Hyper,
) -> None:
    """torch's AdamW(fused=True), all float32; scales gradients in place. A clip of nan changes nothing."""
    device = masters[0].device
    # it adds the one being made
    done = torch.full((len(masters),), hyper.step - 1, dtype=torch.float32, device=device)
    grad_scale = None if clip is None else clip.reciprocal()  # it divides by that
    found_inf = None if clip is None else clip.isnan().float()
    adamw(
        list(masters),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        [],
        list(done.unbind()),
        fused=True,
        grad_scale=grad_scale,
        found_inf=found_inf,
        amsgrad=False,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        lr=hyper.lr,
        weight_decay=hyper.weight_decay,
        eps=hyper.eps,
        maximize=False,
    )


def _choose(kind: str, device: torch.device) -> tuple[str, str]:
    missing = [] if any(map(shutil.which, ("g++", "clang++"))) else ["a C++ compiler"]
    missing += ["triton"] if device.type == "cuda" and importlib.util.find_spec("triton") is None else []
    if kind == "compiled" and missing:
        raise UsageError(
            f"--memory.kernel compiled needs {' and '.join(missing)}; install it, or use --memory.kernel blocks."
        )
    if kind == "blocks" or missing:
        because = f", as there is no {' and no '.join(missing)}" if kind == "auto" else ""
        return "blocks", f"torch's fused AdamW in blocks of {BLOCK // 1024}k elements{because}"
    return (
        "compiled",
        "torch.compile, one pass over gradient, states and weight; of float32 weights on the device, torch's own",
    )
