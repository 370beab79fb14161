"""AdamW over one chunk, from one source for host and device.

The arithmetic is written once, in `adamw_chunk`. torch.compile makes a loop of it for the host and a kernel
for the device. Without a compiler torch's fused AdamW runs instead, in blocks. On the device torch's fused
kernel is also used wherever nothing has to be cast (float32 weights): it takes many pieces in one call.

host_step     steps a CPU chunk, whose float32 master is on the host. The new weight is rounded into memory
              of its own. Written over the gradient it would halve the speed: the compiled loop's masked loads
              are as wide as a register and wait for the masked store before them (bfloat16 on one core: 0.39
              G parameters/s in place, 0.80 into other memory).
device_step   steps RESIDENT and STREAM chunks. The weight is the master or a part of it, so that its bytes
              exist once:
    float32 weights     the weight is the master.
    bfloat16 weights    the weight is the upper half of the master and `low16` its lower 16 bits; the two are
                        the master bit for bit. The upper half is rounded half up in magnitude. This differs
                        from torch's half-to-even on exact ties only: half-to-even would not tell which of
                        two masters a tie came from.

Bytes that are read and written per parameter, compiled, in one pass: 28 on the host with bfloat16 gradients
and weights, 26 on the device.
"""

import functools
import importlib.util
import itertools
import shutil
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from dtensor_llama.errors import UsageError

# elements: gradient, master and both moments take 1 MiB of float32 each and stay in a core's cache
BLOCK = 256 * 1024
BLOCK_TO_DEVICE = 8 * 2**20  # 32 MiB of float32
ROW = 1024  # elements: compiled device kernels take views of shape (rows, ROW)


class HyperParameters(NamedTuple):
    """The numbers that AdamW needs beside its tensors; `step` counts from 1."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int

    @functools.lru_cache(maxsize=64)  # noqa: B019  a step has a handful
    def tensors(self) -> tuple[Tensor, ...]:
        """Return the numbers that adamw_chunk takes, as 0-dim float32 tensors on the host: a compiled kernel
        accepts new values of those without recompiling. Differences from 1 are computed in float64, because
        1 - 0.999 in float32 is wrong in the fifth digit."""
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


NO_CHANGE = HyperParameters(lr=0.0, beta1=0.9, beta2=0.95, eps=1e-5, weight_decay=0.0, step=1)


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
    """Return the new (master, exp_avg, exp_avg_sq).

    This is AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101) as in torch.optim.AdamW, except that step_size
    and eps already contain the bias correction of exp_avg_sq, which saves a division per parameter."""
    grad = grad.float() * clip
    exp_avg = exp_avg + (grad - exp_avg) * one_minus_beta1
    exp_avg_sq = exp_avg_sq * beta2 + grad * grad * one_minus_beta2
    return master * decay - step_size * (exp_avg / (exp_avg_sq.sqrt() + eps)), exp_avg, exp_avg_sq


def join_master(weight: Tensor, low16: Tensor) -> Tensor:
    """Return the float32 master that was split into a bfloat16 weight and its int16 lower half."""
    # The weight was rounded up where the lower half is at least a half, which makes its int16 negative.
    high = weight.view(torch.int16).int() - (low16 < 0).int()
    return ((high << 16) | (low16.int() & 0xFFFF)).view(torch.float32)


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """Split a float32 master into a bfloat16 weight and the int16 lower half, without losing a bit."""
    bits = master.view(torch.int32)
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def _host_step(master, exp_avg, exp_avg_sq, grad, weight, clip, *hyper):
    new = adamw_chunk(master, exp_avg, exp_avg_sq, grad, clip, *hyper)
    for old, value in zip((master, exp_avg, exp_avg_sq), new, strict=True):
        old.copy_(value)
    weight.copy_(new[0])


def _device_step(weight, low16, exp_avg, exp_avg_sq, grad, clip, *hyper):
    """Step a piece of bfloat16 weights on the device. If `clip` is nan every element keeps its value, so that
    the host need not wait to see whether the gradient is finite."""
    skips, master = clip.isnan(), join_master(weight, low16)
    stepped, *moments = adamw_chunk(master, exp_avg, exp_avg_sq, grad, clip, *hyper)
    new = (*split_master(stepped), *moments)
    for old, value in zip((weight, low16, exp_avg, exp_avg_sq), new, strict=True):
        old.copy_(torch.where(skips, old, value))


def _add(total, grad):
    total.add_(grad)


def _copy(total, grad):
    total.copy_(grad)


def whole_rows(n: int) -> int:
    """Return how many of n elements a compiled device kernel takes as rows of ROW elements; the rest follows
    in a second launch.

    The compiler knows that the length of a (rows, ROW) view is a multiple of ROW, so it loads and stores 16
    bytes at a time (PTX for sm_90, 8 elements a thread: 7 loads, 6 stores). It knows nothing of a plain
    length, and then moves every element alone (16 elements a thread: 41 loads, 32 stores). A single row is
    left to the rest, because torch.compile treats a size of 1 as a constant and would recompile."""
    rows = n // ROW
    return rows * ROW if rows > 1 else 0


class _ByRows:
    """Runs a device kernel on 1-D tensors of one length: one launch, and a second where whole_rows leaves a
    rest. It is compiled once for rows, once for rests, and once for a rest of a single element."""

    def __init__(self, step: Callable):
        self._rows, self._rest = _compiled(step), _compiled(step)

    def __call__(self, tensors: Sequence[Tensor], *numbers: Tensor) -> None:
        """tensors: what is read and written element by element. numbers: 0-dim tensors."""
        n = len(tensors[0])
        whole = whole_rows(n)
        if whole:
            self._rows(*_of_any_length([tensor[:whole].view(-1, ROW) for tensor in tensors]), *numbers)
        if whole < n:
            self._rest(*_of_any_length([tensor[whole:] for tensor in tensors]), *numbers)


def _of_any_length(tensors: list[Tensor]) -> list[Tensor]:
    """Mark the number of rows, or of elements in a rest, as dynamic, so that torch.compile does not recompile
    for other lengths. (dynamic=True would also make the length of the storage behind a view dynamic. Two
    tensors whose storages happen to be equally long at first would then have to stay so, or everything
    recompiles.)"""
    for tensor in tensors:
        if len(tensor) > 1:
            torch._dynamo.mark_dynamic(tensor, 0)
    return tensors


class Kernel:
    """AdamW in one of two implementations. The argument `kind` is `compiled`, `blocks`, or `auto`, which
    takes `compiled` where there is a compiler. The attribute `kind` says which it is and `why` explains it.

    A clip factor of nan means that the gradient norm is not finite; device_step and device_steps then change
    nothing. host_step must not be called with it: the thread that calls it reads the factor first anyway."""

    def __init__(self, kind: str, device: torch.device):
        self.device = device
        self.kind, self.why = _choose(kind, device)
        if self.kind == "compiled":
            # Inductor's C++ wrapper releases the interpreter lock while the loop runs. The default Python
            # wrapper holds it, and the forward that runs meanwhile could not launch a kernel.
            self._host = _compiled(_host_step, dynamic=True, options={"cpp_wrapper": True})
            self._device = _ByRows(_device_step)
            self._add_by_rows, self._copy_by_rows = _ByRows(_add), _ByRows(_copy)

    def warm_up_host(self, dtype: torch.dtype, grad_dtype: torch.dtype, n_threads: int) -> None:
        """Step some zeros, so that host_step is compiled now. Call it whenever a plan has put chunks on the
        host: if it were compiled within a step, other ranks would wait in a collective for 10 to 25 s. A
        second call takes a millisecond.

        dtype: of the weights. n_threads: of the thread that will call host_step. Compilation happens in the
        calling thread, because with torch 2.11 the next backward may crash after another thread has compiled.
        It happens with so many threads, because Inductor specialises on their number."""
        if self.kind != "compiled":
            return
        with threads_of_torch(n_threads):
            for n in (2 * BLOCK, BLOCK):
                self.host_step_of_zeros(n, dtype, grad_dtype)()

    def warm_up_device(self, dtype: torch.dtype, grad_dtype: torch.dtype, lengths: set[int]) -> None:
        """Call device_step and sum_into with zeros, so that they are compiled now for pieces of these
        lengths: see warm_up_host."""
        if self.kind != "compiled" or dtype == torch.float32:  # device_steps then uses torch's own kernel
            return
        # With fewer elements than BLOCK Inductor would compile for a single thread.
        rows = {BLOCK for n in lengths if whole_rows(n)}
        rests = {ROW - 1 for n in lengths if whole_rows(n) < n}
        for n in rows | rests:
            self.device_step_of_zeros(n, grad_dtype)()
            if grad_dtype == torch.float32:  # gradients arrive in the weights' dtype and are summed
                total, grad = _zeros(n, self.device, torch.float32, torch.bfloat16)
                self.sum_into(total, grad, adds=False)
                self.sum_into(total, grad, adds=True)

    def host_step_of_zeros(self, n: int, dtype: torch.dtype, grad_dtype: torch.dtype) -> Callable[[], None]:
        """Return a call of host_step with n elements that are all zero, to compile or to time it."""
        float32 = torch.float32
        tensors = _zeros(n, torch.device("cpu"), float32, float32, float32, grad_dtype, dtype)
        return functools.partial(self.host_step, *tensors, None, NO_CHANGE)

    def device_step_of_zeros(self, n: int, grad_dtype: torch.dtype) -> Callable[[], None]:
        """Return a call of device_step with n elements that are all zero, to compile or to time it."""
        dtypes = torch.bfloat16, torch.int16, torch.float32, torch.float32, grad_dtype
        return functools.partial(self.device_step, *_zeros(n, self.device, *dtypes), None, NO_CHANGE)

    @torch.no_grad()
    def host_step(
        self,
        master: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        grad: Tensor,
        weight: Tensor,
        clip: Tensor | None,
        hyper: HyperParameters,
    ) -> None:
        """Step 1-D host tensors of one length. The states change in place, the new master is rounded into
        `weight`, and `grad` may be scaled. clip: the factor on the gradient, a 0-dim float32 tensor on the
        same device; None means 1."""
        if self.kind == "compiled":
            clip = _one_on(grad.device) if clip is None else clip
            self._host(master, exp_avg, exp_avg_sq, grad, weight, clip, *hyper.tensors())
            return
        for stepped, avg, avg_sq, part, new_weight in blocks(master, exp_avg, exp_avg_sq, grad, weight):
            _fused([stepped], [avg], [avg_sq], [part.float()], clip, hyper)
            new_weight.copy_(stepped)

    def device_steps(self, steps: list[tuple]) -> None:
        """Call device_step with each of these tuples of arguments. Where `low16` is None the weights are
        float32, so nothing has to be cast, and torch's fused kernel takes those with the same
        hyperparameters in one call."""
        if steps[0][1] is not None:
            for step in steps:
                self.device_step(*step)
            return
        for hyper, alike in itertools.groupby(steps, key=lambda step: step[-1]):
            weights, _, *tensors, (clip, *_), _ = zip(*alike, strict=True)
            _fused(weights, *tensors, clip, hyper)

    @torch.no_grad()
    def device_step(
        self,
        weight: Tensor,
        low16: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        grad: Tensor,
        clip: Tensor | None,
        hyper: HyperParameters,
    ) -> None:
        """Step 1-D tensors of one length on one device, in place; the weights are bfloat16, and `grad` may be
        scaled."""
        if self.kind == "compiled":
            clip = _one_on(grad.device) if clip is None else clip
            self._device((weight, low16, exp_avg, exp_avg_sq, grad), clip, *hyper.tensors())
            return
        for high, low, avg, avg_sq, part in blocks(weight, low16, exp_avg, exp_avg_sq, grad):
            stepped = join_master(high, low)
            _fused([stepped], [avg], [avg_sq], [part.float()], clip, hyper)
            new_high, new_low = split_master(stepped)
            high.copy_(new_high)
            low.copy_(new_low)

    @torch.no_grad()
    def sum_into(self, total: Tensor, grad: Tensor, adds: bool) -> None:
        """Add a gradient to the sum of a step, or with adds=False start the sum with it. Both are 1-D, of one
        length, on one device; their dtypes may differ. On a GPU torch's own kernels for two dtypes load every
        element alone; for equal dtypes and on a CPU they are used."""
        if self.kind == "compiled" and total.is_cuda and total.dtype != grad.dtype:
            (self._add_by_rows if adds else self._copy_by_rows)((total, grad))
        else:
            (_add if adds else _copy)(total, grad)


def _compiled(step: Callable, **how) -> Callable:
    """Compile a copy of the function's code object: Dynamo limits recompilations per code object, and kernels
    for other numbers of threads would use up the same limit."""
    own = types.FunctionType(step.__code__.replace(), step.__globals__, step.__name__)
    return torch.compile(own, fullgraph=True, **how)


def _zeros(n: int, device: torch.device, *dtypes: torch.dtype) -> list[Tensor]:
    return [torch.zeros(n, dtype=dtype, device=device) for dtype in dtypes]


@functools.cache
def _one_on(device: torch.device) -> Tensor:
    return torch.ones((), device=device)


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield views of 1-D tensors of one length, block by block, so that what is made of a block takes no
    memory to speak of. On the host it is in a core's cache; between host and device a block is larger,
    because each copy waits for the one before."""
    n = BLOCK if all(tensor.is_cpu for tensor in tensors) else BLOCK_TO_DEVICE
    return zip(*(tensor.split(n) for tensor in tensors), strict=True)


@contextmanager
def threads_of_torch(n: int) -> Iterator[None]:
    """Let torch use n cores in this thread and in threads that it starts, and as many as before when the
    block ends."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def _fused(
    masters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    grads: Sequence[Tensor],
    clip: Tensor | None,
    hyper: HyperParameters,
) -> None:
    """Call torch's AdamW(fused=True) on float32 tensors; it scales gradients in place. A clip of nan changes
    nothing."""
    # It adds one to the step counts before it uses them.
    done = torch.full((len(masters),), hyper.step - 1, dtype=torch.float32, device=masters[0].device)
    grad_scale = None if clip is None else clip.reciprocal()  # it divides gradients by this
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
    """Return the kind that can be used, and what AdamW is then, in words."""
    missing = [] if any(map(shutil.which, ("g++", "clang++"))) else ["a C++ compiler"]
    missing += ["triton"] if device.type == "cuda" and importlib.util.find_spec("triton") is None else []
    if kind == "compiled" and missing:
        raise UsageError(f"kernel=compiled needs {' and '.join(missing)}; install it, or use kernel=blocks.")
    if kind == "blocks" or missing:
        because = f", as there is no {' and no '.join(missing)}" if kind == "auto" else ""
        return "blocks", f"torch's fused AdamW in blocks of {BLOCK // 1024}k elements{because}"
    return "compiled", (
        "torch.compile in one pass over gradient, states and weight; for float32 weights on the device it "
        "is torch's fused AdamW"
    )
