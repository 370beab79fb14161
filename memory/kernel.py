"""AdamW over one chunk: one source for host and device, torch.compile's or, without a compiler, torch's fused kernel in blocks.
On the device, where nothing is to be cast (float32 weights), torch's fused kernel takes many pieces in one call in any case.

host_step       a CPU chunk: fp32 master on the host; the new weight, rounded, goes to memory of its own. Written where the
                gradient was it would halve the speed: the compiled loop's masked loads are as wide as a register and wait
                for the masked store before them (bfloat16, one core: 0.39 G parameters/s in place, 0.80 beside)
device_step     RESIDENT and STREAM: the weight is (part of) the master, so that those bytes exist once
    float32 weights    the weight is the master
    bfloat16 weights   the weight is the high half of the master, `low` its low 16 bits; the two are bit for bit the master.
                       High is rounded half up in magnitude, so it differs from torch's half-to-even on exact ties only:
                       of a low half that could be either, half-to-even would not say which it was
Bytes read and written per parameter: compiled 28 on the host (bfloat16 gradient and weight), 26 on the device; one pass.
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

BLOCK = 256 * 1024        # elements: 1 MiB of fp32 each for gradient, master and both moments stays in a core's cache


class Hyper(NamedTuple):
    """What AdamW needs beside tensors; `step` counts from 1."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int

    @functools.lru_cache(maxsize=64)       # noqa: B019  a step has a handful
    def tensors(self) -> tuple[Tensor, ...]:
        """As 0-dim float32 host tensors, which a compiled kernel takes without compiling anew when they change. The
        differences from 1 are taken in float64: in float32, 1 - 0.999 is wrong in the fifth digit."""
        correction1, correction2 = 1 - self.beta1**self.step, 1 - self.beta2**self.step
        root = correction2**0.5
        numbers = (1 - self.lr * self.weight_decay, 1 - self.beta1, self.beta2, 1 - self.beta2, self.lr * root / correction1,
                   self.eps * root)
        return tuple(torch.tensor(number, dtype=torch.float32) for number in numbers)


def adamw_chunk(master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, clip: Tensor, decay: Tensor,
                one_minus_beta1: Tensor, beta2: Tensor, one_minus_beta2: Tensor, step_size: Tensor, eps: Tensor,
                ) -> tuple[Tensor, Tensor, Tensor]:
    """New (master, exp_avg, exp_avg_sq). Source: Loshchilov & Hutter 2017, arXiv:1711.05101, as torch.optim.AdamW has it, but
    that step_size and eps carry the correction of exp_avg_sq, which saves a division per parameter."""
    grad = grad.float() * clip
    exp_avg = exp_avg + (grad - exp_avg) * one_minus_beta1
    exp_avg_sq = exp_avg_sq * beta2 + grad * grad * one_minus_beta2
    return master * decay - step_size * (exp_avg / (exp_avg_sq.sqrt() + eps)), exp_avg, exp_avg_sq


def join_master(weight: Tensor, low: Tensor) -> Tensor:
    """bfloat16 weight and int16 low half -> the float32 master they were split from."""
    high = weight.view(torch.int16).int() - (low < 0).int()      # rounding went up where the low half is a half or more
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
    master = weight if low is None else join_master(weight, low)
    master, new_avg, new_avg_sq = adamw_chunk(master, exp_avg, exp_avg_sq, grad, clip, *hyper)
    exp_avg.copy_(new_avg)
    exp_avg_sq.copy_(new_avg_sq)
    if low is None:
        weight.copy_(master)
    else:
        high, new_low = split_master(master)
        weight.copy_(high)
        low.copy_(new_low)


class Kernel:
    """kind: `compiled`, `blocks`, or `auto`: compiled where there is a compiler. `kind` and `why` say what it became."""

    def __init__(self, kind: str, device: torch.device):
        self.kind, self.why = _choose(kind, device)
        if self.kind == "compiled":
            # A wrapper in C++ lets go of the interpreter while the loop runs; the default one in Python does not, and the
            # forward beside it could launch nothing.
            self._host, self._device = _compiled(_host_step, options={"cpp_wrapper": True}), _compiled(_device_step)

    def warm_up(self, device: torch.device, dtype: torch.dtype, grad_dtypes: set[torch.dtype], n_threads: int) -> None:
        """Compile now what will run later, between collectives that other ranks wait in. dtype: of the weights.

        Here, in the caller's thread, and as if it had n_threads, for which the thread of the host's steps takes it then: with
        torch 2.11 the next backward may crash once another thread has compiled."""
        before = torch.get_num_threads()
        for n in (2 * BLOCK, BLOCK) if self.kind == "compiled" else ():
            for grad_dtype in grad_dtypes:
                def zeros(where, dtype=torch.float32, n=n):
                    return torch.zeros(n, dtype=dtype, device=where)
                hyper, cpu = Hyper(0.0, 0.9, 0.95, 1e-5, 0.0, 1), torch.device("cpu")
                states = zeros(cpu), zeros(cpu), zeros(cpu), zeros(cpu, grad_dtype), zeros(cpu, dtype)
                torch.set_num_threads(n_threads)
                self.host_step(*states, None, hyper)
                torch.set_num_threads(before)
                if dtype == torch.bfloat16:      # else device_steps has torch's
                    states = zeros(device, dtype), zeros(device, torch.int16), zeros(device), zeros(device)
                    self.device_step(*states, zeros(device, grad_dtype), None, hyper)
        torch.set_num_threads(before)            # of threads that begin from now on too, after the host's has set its own

    @torch.no_grad()
    def host_step(self, master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, weight: Tensor,
                  clip: Tensor | None, hyper: Hyper) -> None:
        """All 1-D of one length on the host, states changed in place, the new master rounded into `weight`; `grad` may be
        scaled. clip: factor on the gradient, a 0-dim float32 tensor of the same device; None is 1."""
        if self.kind == "compiled":
            self._host(master, exp_avg, exp_avg_sq, grad, weight, _one(grad) if clip is None else clip, *hyper.tensors())
            return
        for block in _blocks(len(grad)):
            _fused([master[block]], [exp_avg[block]], [exp_avg_sq[block]], [grad[block].float()], clip, hyper)
            weight[block].copy_(master[block])

    def device_steps(self, steps: list[tuple]) -> None:
        """device_step with each of these arguments. Where nothing is to be cast torch's own fused kernel takes all at once."""
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
    def device_step(self, weight: Tensor, low: Tensor | None, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor,
                    clip: Tensor | None, hyper: Hyper) -> None:
        """All 1-D of one length on one device, changed in place; `grad` may be scaled. low: None if weights are float32."""
        if self.kind == "compiled":
            self._device(weight, low, exp_avg, exp_avg_sq, grad, _one(grad) if clip is None else clip, *hyper.tensors())
            return
        for block in _blocks(len(grad)):
            master = weight[block] if low is None else join_master(weight[block], low[block])
            _fused([master], [exp_avg[block]], [exp_avg_sq[block]], [grad[block].float()], clip, hyper)
            if low is not None:
                high, new_low = split_master(master)
                weight[block].copy_(high)
                low[block].copy_(new_low)


def _compiled(step: Callable, **how) -> Callable:
    """Of a copy of its code: dynamo has a limit a code, and other numbers of threads, in other kernels, would count for it."""
    own = types.FunctionType(step.__code__.replace(), step.__globals__, step.__name__)
    return torch.compile(own, fullgraph=True, dynamic=True, **how)


@functools.cache
def _one_on(device: torch.device) -> Tensor:
    return torch.ones((), device=device)


def _one(like: Tensor) -> Tensor:
    return _one_on(like.device)


def _blocks(n: int) -> list[slice]:
    return [slice(start, start + BLOCK) for start in range(0, n, BLOCK)]


@torch.no_grad()
def _fused(masters: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor], grads: Sequence[Tensor],
           clip: Tensor | None, hyper: Hyper) -> None:
    """torch's AdamW(fused=True), all float32; gradients are scaled in place."""
    device = masters[0].device
    done = torch.full((len(masters),), hyper.step - 1, dtype=torch.float32, device=device)      # it adds the one being made
    adamw(list(masters), list(grads), list(exp_avgs), list(exp_avg_sqs), [], list(done.unbind()), fused=True,
          grad_scale=None if clip is None else clip.reciprocal(), found_inf=None if clip is None else torch.zeros_like(clip),
          amsgrad=False, beta1=hyper.beta1, beta2=hyper.beta2, lr=hyper.lr, weight_decay=hyper.weight_decay, eps=hyper.eps,
          maximize=False)


def _choose(kind: str, device: torch.device) -> tuple[str, str]:
    missing = [] if any(map(shutil.which, ("g++", "clang++"))) else ["a C++ compiler"]
    missing += ["triton"] if device.type == "cuda" and importlib.util.find_spec("triton") is None else []
    if kind == "compiled" and missing:
        raise UsageError(f"--memory.kernel compiled needs {' and '.join(missing)}; install it, or use --memory.kernel blocks.")
    if kind == "blocks" or missing:
        because = f", as there is no {' and no '.join(missing)}" if kind == "auto" else ""
        return "blocks", f"torch's fused AdamW in blocks of {BLOCK // 1024}k elements{because}"
    return "compiled", "torch.compile, one pass over gradient, states and weight; of float32 weights on the device, torch's own"
