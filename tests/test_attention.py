"""Which kernel computes attention, as tables; and packed documents without a mask.

Packed equals unpacked, in forward and in gradients and under every axis that has whole sequences.
Another number of documents compiles nothing anew.
"""

import re
import shutil
import sys
from contextlib import nullcontext
from functools import partial
from itertools import product
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
from pool import run_on
from test_one_answer import five_steps, one_process
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.nn.attention import SDPBackend
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dtensor_llama import Llama, LlamaConfig, UsageError
from dtensor_llama import attention as module
from dtensor_llama.attention import AttentionMask, WholeSequences, attention, choose_attention, plan_sdpa
from dtensor_llama.model import OnHost
from parallel import ParallelConfig, build_mesh, parallelize
from parallel.apply import Computation
from parallel.recompute import apply_recompute

FLASH = SDPBackend.FLASH_ATTENTION
CUDNN = SDPBackend.CUDNN_ATTENTION
EFFICIENT = SDPBackend.EFFICIENT_ATTENTION
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BF16, FP32 = torch.bfloat16, torch.float32
GQA = LlamaConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


# ---- torch's kernels on a GPU ----

ANY_16_BITS, MASKED = (FLASH, CUDNN, EFFICIENT), (CUDNN, EFFICIENT)
SDPA_PLANS = [
    # dtype, grouped heads, masked, over a cache -> kernels, in this order, K and V are copied for all heads
    (BF16, False, False, False, ANY_16_BITS, False, False),
    (BF16, True, False, False, ANY_16_BITS, False, False),
    (BF16, False, False, True, ANY_16_BITS, True, False),  # flash first: cuDNN plans for every length
    (BF16, True, False, True, ANY_16_BITS, True, False),
    (BF16, False, True, False, MASKED, False, False),
    (BF16, True, True, False, MASKED, False, True),
    (BF16, False, True, True, (EFFICIENT,), False, False),
    (BF16, True, True, True, (EFFICIENT,), False, True),
    (FP32, False, False, False, (EFFICIENT,), False, False),
    (FP32, True, False, False, (EFFICIENT,), False, True),
    (FP32, False, False, True, (EFFICIENT,), False, False),
    (FP32, True, False, True, (EFFICIENT,), False, True),
    (FP32, False, True, False, (EFFICIENT,), False, False),
    (FP32, True, True, False, (EFFICIENT,), False, True),
    (FP32, False, True, True, (EFFICIENT,), False, False),
    (FP32, True, True, True, (EFFICIENT,), False, True),
]


def test_every_dtype_mask_and_kind_of_heads_has_a_fused_kernel_on_a_gpu():
    everything = set(product((BF16, FP32), (False, True), (False, True), (False, True)))
    assert {row[:4] for row in SDPA_PLANS} == everything
    for *asked, kernels, in_order, expands_heads in SDPA_PLANS:
        assert plan_sdpa(*asked) == (kernels, in_order, expands_heads), asked


@pytest.mark.parametrize("width", [16, 12])  # 12: padded to 16
@pytest.mark.parametrize("n_kv_heads", [6, 2])
@pytest.mark.parametrize("n_new,masked", [(9, False), (9, True), (4, False), (1, False), (1, True)])
def test_what_is_handed_to_a_gpus_kernels_is_attention(monkeypatch, width, n_kv_heads, n_new, masked):
    """_sdpa_on_gpu, run on the CPU: it copies heads, pads widths, and has the right masks and scale."""
    allowed = []

    def note_the_kernels(kernels, set_priority):
        allowed.append(kernels)
        return nullcontext()

    monkeypatch.setattr(module, "_sdpa", module._sdpa_on_gpu)
    monkeypatch.setattr(module, "sdpa_kernel", note_the_kernels)
    stream = torch.Generator().manual_seed(4)
    q, k, v = (
        torch.randn(2, *shape, width, generator=stream).requires_grad_()
        for shape in ((n_new, 6), (9, n_kv_heads), (9, n_kv_heads))
    )
    mask = torch.ones(2, 1, n_new, 9, dtype=torch.bool).tril(9 - n_new)
    # The second sequence begins with three tokens of padding, which see nothing but themselves.
    mask[1, :, :, :3] &= torch.eye(9, dtype=torch.bool)[9 - n_new :, :3]
    its_mask = AttentionMask(dense=mask) if masked else None
    results = {}
    for kernel in ("sdpa", "math"):
        out = attention(q, k, v, kernel, its_mask)
        results[kernel] = [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]
    for ours, reference in zip(results["sdpa"], results["math"], strict=True):
        assert_close(ours, reference, rtol=0, atol=2e-5)
    assert allowed == [[EFFICIENT]]


# ---- the flag ----

CHOICES = [
    # asked, device, dtype, ring, documents, flash-attn installed -> the kernel or None, words of what is said
    ("auto", CPU, FP32, False, False, False, "sdpa", "the device is cpu"),
    ("auto", CPU, BF16, False, True, False, "sdpa", "the device is cpu"),
    ("auto", CUDA, BF16, False, False, False, "sdpa", "does not import"),
    ("auto", CUDA, BF16, False, True, False, "varlen", "documents without a mask"),
    ("auto", CUDA, BF16, True, True, False, "sdpa", "neither .* ring attention"),
    ("auto", CUDA, FP32, False, True, False, "sdpa", "through a mask: varlen_attn computes in bfloat16"),
    ("auto", CUDA, BF16, False, True, True, "flash", "is installed"),
    ("auto", CUDA, BF16, True, False, True, "sdpa", "flash-attn cannot merge"),
    ("auto", CUDA, FP32, False, False, True, "sdpa", "flash-attn computes in bfloat16"),
    ("varlen", CUDA, BF16, False, True, False, "varlen", "asked for"),
    ("varlen", CPU, FP32, False, True, False, "varlen", "asked for; on a CPU a slow reference"),
    ("varlen", CUDA, BF16, False, False, False, None, "varlen cannot .* `document_mask` is off"),
    ("varlen", CUDA, FP32, False, True, False, None, "attention=varlen cannot .* dtype=float32"),
    ("flash", CUDA, BF16, False, True, False, None, "attention=flash cannot .* does not import"),
    ("sdpa", CUDA, BF16, False, True, True, "sdpa", "asked for"),
    ("math", CPU, FP32, True, True, False, "math", "asked for"),
    (
        "fast",
        CPU,
        FP32,
        False,
        False,
        False,
        None,
        "attention=fast is not one of auto, flash, varlen, sdpa, math",
    ),
]


@pytest.mark.parametrize("choice", CHOICES)
def test_a_kernel_is_chosen_with_a_reason_or_refused_in_a_line(monkeypatch, choice):
    asked, device, dtype, ring, documents, installed, kernel, said = choice
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn") if installed else None)
    if kernel is None:
        with pytest.raises(UsageError, match=said) as refusal:
            choose_attention(asked, device, dtype, ring, documents)
        assert "\n" not in str(refusal.value)
        return
    chosen, reason = choose_attention(asked, device, dtype, ring, documents)
    assert chosen == kernel
    assert re.search(said, reason), reason


# ---- documents without a mask ----


def packed_sequences(step: int) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    """Tokens and positions (2, 32), and the lengths of each sequence's documents, one more in each step."""
    stream = torch.Generator().manual_seed(step)
    cuts = sorted((torch.randperm(31, generator=stream)[: step + 1] + 1).tolist())
    first = [end - begin for begin, end in zip([0, *cuts], [*cuts, 32], strict=True)]
    # The second sequence is one document, whose beginning is in an earlier sequence.
    positions = torch.stack([torch.cat([torch.arange(n) for n in first]), torch.arange(5, 37)])
    return torch.randint(97, (2, 32), generator=stream), positions, [first, [32]]


def test_lengths_of_documents_add_up_over_the_flattened_sequences():
    _, positions, lengths = packed_sequences(step=3)
    ends = AttentionMask.of_documents(positions, "varlen", CPU).cu_seqlens
    assert ends.dtype == torch.int32 and ends.diff().tolist() == [
        n for of_sequence in lengths for n in of_sequence
    ]
    assert ends[0] == 0 and ends[-1] == positions.numel()


@pytest.mark.parametrize("n_kv_heads,width", [(6, 16), (2, 16), (1, 12)])
def test_varlen_attention_and_its_gradients_are_those_of_each_document_alone(n_kv_heads, width):
    _, positions, lengths = packed_sequences(step=3)
    stream = torch.Generator().manual_seed(5)
    q, k, v = (
        torch.randn(2, 32, heads, width, generator=stream).requires_grad_()
        for heads in (6, n_kv_heads, n_kv_heads)
    )
    packed = attention(q, k, v, "varlen", AttentionMask.of_documents(positions, "varlen", CPU))
    sequences = []
    for sequence, of_sequence in enumerate(lengths):
        own = [x[sequence : sequence + 1].split(of_sequence, dim=1) for x in (q, k, v)]
        sequences.append(
            torch.cat([attention(*document, "math") for document in zip(*own, strict=True)], dim=1)
        )
    alone = torch.cat(sequences)
    assert_close(packed, alone, rtol=0, atol=2e-6)  # fp32: the order of summation
    weight = torch.randn(packed.shape, generator=stream)
    grads = torch.autograd.grad(packed, (q, k, v), weight)
    expected_grads = torch.autograd.grad(alone, (q, k, v), weight)
    for ours, reference in zip(grads, expected_grads, strict=True):
        assert_close(ours, reference, rtol=0, atol=1e-5)


def test_sequences_of_one_document_and_a_cache_need_no_varlen_kernel():
    q, k, v = torch.randn(2, 4, 6, 16), torch.randn(2, 9, 2, 16), torch.randn(2, 9, 2, 16)
    assert_close(attention(q, k, v, "varlen"), attention(q, k, v, "math"), rtol=0, atol=1e-6)
    padded = AttentionMask(dense=torch.ones(2, 1, 4, 9, dtype=torch.bool).tril(5))
    assert_close(attention(q, k, v, "varlen", padded), attention(q, k, v, "math", padded), rtol=0, atol=1e-6)


@pytest.mark.parametrize("n_kv_heads", [8, 2])
def test_torch_takes_our_call_of_varlen_attn(n_kv_heads):
    """On `meta`, where only shapes are computed: the signature, grouped heads, forward and backward."""
    q, k, v = (
        torch.empty(2, 32, heads, 16, dtype=BF16, device="meta", requires_grad=True)
        for heads in (8, n_kv_heads, n_kv_heads)
    )
    _, positions, _ = packed_sequences(step=3)
    documents = AttentionMask.of_documents(positions, "varlen", torch.device("meta"))
    with KernelCount() as calls:
        out = attention(q, k, v, "varlen", documents)
        grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert out.shape == q.shape and [grad.shape for grad in grads] == [x.shape for x in (q, k, v)]
    assert calls.seen == {"_varlen_attn": 1, "_varlen_attn_backward": 1}


class KernelCount(TorchDispatchMode):
    """Counts the calls of torch's varlen operators."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "torch_attn":
            name = op.name().partition("::")[2]
            self.seen[name] = self.seen.get(name, 0) + 1
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute,forwards", [("none", 2), ("selective", 2), ("full", 4)])
def test_selective_recompute_keeps_what_varlen_attention_gave(recompute, forwards):
    tokens, positions, _ = packed_sequences(step=3)
    with torch.device("meta"):
        model = Llama(GQA).to(BF16)
    model.attention = WholeSequences("varlen")
    apply_recompute(list(model.model.layers), recompute)
    with KernelCount() as calls:
        model(tokens.to("meta"), labels=tokens.to("meta"), positions=positions).backward()
    assert calls.seen == {"_varlen_attn": forwards, "_varlen_attn_backward": 2}  # two layers


NEEDS_GXX = pytest.mark.skipif(not shutil.which("g++"), reason="compiling for the CPU needs g++")
SLOW = pytest.mark.slow
INDUCTOR = pytest.param("inductor", marks=[SLOW, NEEDS_GXX])


# aot_eager has the guards and the graphs of inductor, the default, and no C++ to compile.
@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
# Selective recompute has the most to guard: part of a block is computed once more, under a policy.
@pytest.mark.parametrize(
    "recompute", ["selective", *(pytest.param(how, marks=SLOW) for how in ("none", "full"))]
)
def test_another_number_of_documents_compiles_nothing_anew(recompute, backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, plain = Llama(GQA), Llama(GQA)
    for model in (compiled, plain):
        model.attention = WholeSequences("varlen")
    apply_recompute(list(compiled.model.layers), recompute)
    for block in compiled.model.layers:
        block.forward = torch.compile(block.forward, backend=backend)
    for step in range(4):
        tokens, positions, _ = packed_sequences(step)
        # The first step has compiled all there is: after it every recompilation is an exception.
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            losses = [model(tokens, labels=tokens, positions=positions) for model in (compiled, plain)]
            for loss in losses:
                loss.backward()
        assert_close(*losses, rtol=1e-5, atol=0)
    for ours, reference in zip(compiled.parameters(), plain.parameters(), strict=True):
        assert_close(ours.grad, reference.grad, rtol=1e-4, atol=1e-4)
    assert not torch._dynamo.utils.counters["graph_break"]


def arguments_that_fsdp_sees() -> list[type]:
    mesh = build_mesh(ParallelConfig(dp_shard=2), "cpu")
    (model,) = parallelize(Llama(GQA), mesh, ParallelConfig(dp_shard=2), Computation(attention="varlen"))
    tokens, positions, _ = packed_sequences(step=3)
    seen = []
    original = FSDPState._root_pre_forward

    def look(state, module, args, kwargs):
        if isinstance(module, Llama):
            seen.append(type(kwargs["positions"]))
        return original(state, module, args, kwargs)

    with patch.object(FSDPState, "_root_pre_forward", look):
        model(tokens, labels=tokens, positions=positions)
    return seen


def test_fsdp_gets_no_positions_to_move_to_the_gpu_and_wait_for():
    assert run_on(2, arguments_that_fsdp_sees) == [[OnHost]] * 2


def five_steps_without_masks(*arguments) -> dict:
    with patch("test_one_answer.Computation", partial(Computation, attention="varlen")):
        return five_steps(*arguments)


@pytest.mark.parametrize(
    "ranks,layout",
    [
        pytest.param(2, ParallelConfig(cp=2), id="ulysses"),
        pytest.param(2, ParallelConfig(tp=2), id="tensor parallel"),
        pytest.param(2, ParallelConfig(pp=2), id="pipeline"),
        pytest.param(4, ParallelConfig(pp=2, tp=2), id="pipeline and tensor parallel", marks=SLOW),
    ],
)
def test_varlen_attention_gives_the_one_answer_under_every_axis_with_whole_sequences(ranks, layout):
    ours = run_on(ranks, five_steps_without_masks, "gqa", layout, 2, True, timeout=180)[0]
    expected = one_process("gqa", True)  # by a mask
    assert max(abs(a - b) for a, b in zip(ours["losses"], expected["losses"], strict=True)) < 2e-5
    assert max(abs(a / b - 1) for a, b in zip(ours["norms"], expected["norms"], strict=True)) < 1e-4
    for name, weight in expected["final"].items():
        assert_close(ours["final"][name], weight, rtol=0, atol=1e-5)
