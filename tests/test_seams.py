"""A reader's own token loss and attention: each is written once, set once on the model, and equal to one
process under every layout; what a layout cannot do is refused in one line."""

import functools
import json
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pool import run_on
from recipe import Ended, module_of, pretrain_flags, run_here
from test_compile import Run, graphs_after_each_phase
from test_one_answer import GQA, SEQUENCES, SHAPES, batch_of, five_steps
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from dtensor_llama import Llama, UsageError, loss
from dtensor_llama.attention import AttentionMask, WholeSequences
from dtensor_llama.chat.lora import LoraConfig, adapter_parameters, apply_lora, init_lora
from dtensor_llama.model import init_weights
from parallel import Booster, ParallelConfig, build_mesh, parallelize
from parallel.context import Ulysses
from parallel.tensor import check_token_loss

V = GQA.vocab_size

# ---- what a reader writes: a loss is a function, an attention is a class ----


def with_z_loss(logits, labels, vocab):
    log_z = vocab.logsumexp(logits)
    return log_z - vocab.pick(logits, labels) + 1e-2 * log_z**2


def smoothed(logits, labels, vocab):
    log_z = vocab.logsumexp(logits)
    return 0.9 * (log_z - vocab.pick(logits, labels)) + 0.1 * (log_z - vocab.mean(logits))


RARE = torch.linspace(0.5, 3, V)  # the weight of each label


def weighted(logits, labels, vocab):
    return RARE[labels] * (vocab.logsumexp(logits) - vocab.pick(logits, labels))


def capped(logits, labels, vocab):
    """No part of the vocabulary has its own gradient here: the softcap stands between, and the focal
    factor."""
    logits = 5 * torch.tanh(logits / 5)
    nll = vocab.logsumexp(logits) - vocab.pick(logits, labels)
    return (1 - torch.exp(-nll)) ** 2 * nll


def by_torch(logits, labels, vocab):
    return F.cross_entropy(logits, labels, reduction="none")


def against_the_mean(logits, labels, vocab):
    return logits.mean(-1) - vocab.pick(logits, labels)


class SlidingWindow(WholeSequences):
    """Each token sees at most the last `width` tokens of its document, itself among them."""

    def __init__(self, width: int):
        super().__init__("sdpa")
        self.width = width

    def prepare(self, n_tokens, positions, cache, device):
        positions, mask = super().prepare(n_tokens, positions, cache, device)
        at = torch.arange(n_tokens, device=device)
        near = (at[:, None] >= at) & (at[:, None] - at < self.width)  # (T, T)
        return positions, AttentionMask(dense=near[None, None] if mask is None else mask.dense & near)


# ---- the loss, in one process ----


def as_torch_has_it(token_loss, logits, labels):
    """The sums of these losses as torch.nn.functional computes them."""
    by_torch = functools.partial(F.cross_entropy, logits, labels, reduction="sum")
    if token_loss is with_z_loss:
        return by_torch() + 1e-2 * (logits.logsumexp(-1) ** 2)[labels != loss.IGNORE].sum()
    more = {smoothed: {"label_smoothing": 0.1}, weighted: {"weight": RARE}}
    return by_torch(**more.get(token_loss, {}))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    token_loss=st.sampled_from([loss.token_nll, with_z_loss, smoothed, weighted]),
    n_tokens=st.integers(1, 40),
    chunk=st.integers(1, 40),
    scored=st.sampled_from([0.0, 0.3, 1.0]),
    frozen=st.booleans(),
    scale=st.sampled_from([0.1, 10.0]),
    seed=st.integers(0, 1000),
)
def test_a_token_loss_and_its_gradients_are_those_of_torch(
    token_loss, n_tokens, chunk, scored, frozen, scale, seed
):
    stream = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, 8, generator=stream).mul(scale**0.5) for n in (n_tokens, V))
    labels = torch.randint(V, (n_tokens,), generator=stream)
    labels[torch.rand(n_tokens, generator=stream) >= scored] = loss.IGNORE
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    inputs = [hidden] if frozen else [hidden, weight]
    with mock.patch.object(loss, "CHUNK_ELEMENTS", chunk * V):
        ours = loss.token_loss_sum(hidden, weight, labels, token_loss)
        ours_grads = torch.autograd.grad(ours * 0.3, inputs)
        with torch.no_grad():
            assert torch.equal(loss.token_loss_sum(hidden, weight, labels, token_loss), ours)
    expected = as_torch_has_it(token_loss, hidden @ weight.T, labels)
    assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    for grad, reference in zip(ours_grads, torch.autograd.grad(expected * 0.3, inputs), strict=True):
        assert_close(grad, reference, rtol=1e-5, atol=1e-4)


def test_a_loss_that_is_no_number_a_token_is_refused_in_a_line():
    model = Llama(GQA)
    model.token_loss = lambda logits, labels, vocab: loss.token_nll(logits, labels, vocab).mean()
    batch = batch_of(0, masked=False)
    with pytest.raises(UsageError, match=r"shape \[\] for .* one number for each") as refusal:
        model(batch.tokens, labels=batch.labels)
    assert "\n" not in str(refusal.value)


def test_a_loss_that_reads_other_ranks_columns_itself_is_refused_under_tp():
    for works in (loss.token_nll, with_z_loss, smoothed, weighted, capped):
        check_token_loss(works, V, torch.device("cpu"))
    for fails in (by_torch, against_the_mean):
        with pytest.raises(UsageError, match=r"needs columns .* use vocab.logsumexp, .* or tp=1") as refusal:
            check_token_loss(fails, V, torch.device("cpu"))
        assert "\n" not in str(refusal.value)


def one_refusal() -> str:
    layout, model = ParallelConfig(tp=2).resolve(2), Llama(GQA)
    model.token_loss = by_torch
    with pytest.raises(UsageError) as refusal:
        parallelize(model, build_mesh(layout, "cpu"), layout)
    return str(refusal.value)


def test_parallelize_asks_a_readers_loss_before_it_splits_the_logits():
    for refusal in run_on(2, one_refusal):
        assert refusal.startswith("model.token_loss needs columns")


# ---- every layout ----

LAYOUTS = {
    "tp-2": (2, ParallelConfig(tp=2)),
    "pp-2-tp-2": (4, ParallelConfig(pp=2, tp=2)),
    "cp-2-ulysses": (2, ParallelConfig(cp=2)),
    "cp-2-ring": (2, ParallelConfig(cp=2, cp_method="ring")),
    "zero-3": (2, ParallelConfig(zero_stage=3)),
}


def five_steps_with(name: str, seam, *arguments) -> dict:
    """The five steps of test_one_answer.py, with model.token_loss or model.attention set once, at first."""

    def parallelize_own(model, *args, **settings):
        setattr(model, name, seam)
        return parallelize(model, *args, **settings)

    few_tokens = mock.patch.object(loss, "CHUNK_ELEMENTS", 3 * V)  # some chunks have no label at all
    with mock.patch("parallel.assemble.parallelize", parallelize_own), few_tokens:
        return five_steps(*arguments)


def five_steps_of_each(name: str, seams: list, *arguments) -> list[dict]:
    return [five_steps_with(name, seam, *arguments) for seam in seams]


def assert_as_one_process(ours: dict, expected: dict) -> None:
    assert max(abs(a - b) for a, b in zip(ours["losses"], expected["losses"], strict=True)) < 2e-5
    for name, weight in expected["final"].items():
        assert_close(ours["final"][name], weight, rtol=0, atol=1e-5)


LOSSES = [with_z_loss, smoothed, weighted, capped]


@functools.cache
def losses_in_one_process(shape: str) -> list[dict]:
    every = [*LOSSES, loss.token_nll]
    *own, default = run_on(
        1, five_steps_of_each, "token_loss", every, shape, ParallelConfig(), SEQUENCES, True
    )[0]
    for one in own:  # each is a loss of its own
        assert abs(one["losses"][0] - default["losses"][0]) > 2e-4
    return own


# What every `make test` runs. All losses under all layouts are `slow`.
QUICK = {
    "pp-2-tp-2": (with_z_loss, capped),
    "cp-2-ulysses": (smoothed, weighted),
    "zero-3": (weighted, capped),
}


@pytest.mark.parametrize(
    "layout,losses",
    [
        *QUICK.items(),
        *(pytest.param(layout, LOSSES, marks=pytest.mark.slow) for layout in LAYOUTS),
    ],
)
def test_a_readers_loss_gives_the_answer_of_one_process(layout, losses):
    ranks, config = LAYOUTS[layout]
    shape = "tied" if layout == "pp-2-tp-2" else "gqa"
    micro = 2 if layout == "zero-3" else 4  # sequences: a rank cuts its 4, or all 8, into two microbatches
    ours = run_on(ranks, five_steps_of_each, "token_loss", losses, shape, config, micro, True, timeout=240)[0]
    expected = dict(zip(LOSSES, losses_in_one_process(shape), strict=True))
    for token_loss, own in zip(losses, ours, strict=True):
        assert_as_one_process(own, expected[token_loss])


def adapters_gradients(tp: int) -> tuple[float, dict[str, torch.Tensor]]:
    """A step of LoRA, whose head is frozen."""
    layout = ParallelConfig(tp=tp, dp_shard=1)
    model = Llama(GQA)
    apply_lora(model, LoraConfig(rank=2))
    model.token_loss = smoothed
    parallelize(model, build_mesh(layout, "cpu"), layout)
    init_lora(model, seed=0)
    adapters = adapter_parameters(model)
    with torch.no_grad():
        for name, parameter in adapters.items():
            if "lora_B" in name:
                parameter.fill_(0.02)
    batch = batch_of(0, masked=True)
    loss_sum = model(batch.tokens, labels=batch.labels, positions=batch.positions)
    loss_sum.backward()
    grads = {name: parameter.grad for name, parameter in adapters.items()}
    return loss_sum.item(), {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}


def test_a_readers_loss_trains_adapters_below_a_frozen_split_head():
    loss_sum, grads = run_on(2, adapters_gradients, 2)[1]
    expected, expected_grads = run_on(1, adapters_gradients, 1)[0]
    assert_close(loss_sum, expected, rtol=1e-6, atol=0)
    for name, reference in expected_grads.items():
        assert (grads[name] - reference).norm() < 1e-4 * reference.norm(), name


@functools.cache
def window_in_one_process() -> dict:
    window = SlidingWindow(3)
    return run_on(1, five_steps_with, "attention", window, "gqa", ParallelConfig(), SEQUENCES, True)[0]


@pytest.mark.parametrize("layout", [pytest.param("tp-2", marks=pytest.mark.slow), "pp-2-tp-2", "zero-3"])
def test_a_readers_attention_gives_the_answer_of_one_process(layout):
    ranks, config = LAYOUTS[layout]
    window = SlidingWindow(3)
    ours = run_on(ranks, five_steps_with, "attention", window, "gqa", config, 2, True, timeout=240)[0]
    assert_as_one_process(ours, window_in_one_process())


def window_over_split_sequences(wrapped: bool):
    layout = ParallelConfig(cp=2).resolve(2)
    mesh = build_mesh(layout, "cpu")
    model = Llama(GQA)
    model.attention = Ulysses(mesh["cp"], SlidingWindow(3)) if wrapped else SlidingWindow(3)
    try:
        parallelize(model, mesh, layout)
    except UsageError as refusal:
        return str(refusal)
    batch = batch_of(0, masked=True)
    tokens, labels = (x.chunk(2, dim=1)[mesh["cp"].get_local_rank()] for x in (batch.tokens, batch.labels))
    return model(tokens, labels=labels, positions=batch.positions).item()


def test_a_readers_attention_is_refused_on_split_sequences_or_set_as_one_that_can():
    for refusal in run_on(2, window_over_split_sequences, False):
        assert refusal == (
            "model.attention is of class SlidingWindow, which needs whole sequences, and with cp=2 no rank "
            "has them: "
            'use cp=1, or set model.attention = Ulysses(mesh["cp"], SlidingWindow(...)).'
        )
    model, batch = Llama(GQA), batch_of(0, masked=True)
    default = model(batch.tokens, labels=batch.labels, positions=batch.positions).item()
    model.attention = SlidingWindow(3)
    expected = model(batch.tokens, labels=batch.labels, positions=batch.positions).item()
    assert abs(expected - default) > 1e-3
    assert sum(run_on(2, window_over_split_sequences, True)) == pytest.approx(expected, rel=1e-6)


def recipe_with(name: str, seam: str, value, flags: list) -> tuple[Ended, int]:
    """Run a recipe whose reader has set a seam of the model; return how it ended, and its process groups."""
    module = module_of(name)

    def edited(config):
        model = Llama(config)
        setattr(model, seam, value)
        return model

    start = mock.Mock(wraps=module.start_process_group)
    with mock.patch.multiple(module, Llama=edited, start_process_group=start):
        return run_here(name, [str(flag) for flag in flags]), start.call_count


def sft_flags(inputs: Path, run_dir: Path, *more) -> list:
    """Return the flags of two steps of sft.py, on a conversation that is written here."""
    turns = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "This one."}]
    data = run_dir.parent / "chat.jsonl"
    data.write_text(f"{json.dumps({'messages': turns})}\n" * 20)
    base = ["--model", inputs / "model", "--random-init", "--data.path", data, "--data.seq-len", 64]
    return [*base, "--train.steps", 2, "--train.global-batch-size", 2, "--run-dir", run_dir, *more]


@pytest.mark.parametrize("name, flags_of", [("pretrain", pretrain_flags), ("sft", sft_flags)])
def test_a_recipe_names_a_readers_attention(name, flags_of, inputs, tmp_path):
    flags = flags_of(inputs, tmp_path / "run", "--train.steps", 2)
    [(ended, _)] = run_on(1, recipe_with, name, "attention", SlidingWindow(3), flags, group=False)
    assert ended.status == 0, ended
    assert "parameters, attention of class SlidingWindow\n" in ended.out


@pytest.mark.parametrize("name, flags_of", [("pretrain", pretrain_flags), ("sft", sft_flags)])
@pytest.mark.parametrize(
    "seam, value, axis, says",
    [
        ("attention", SlidingWindow(3), "cp", "needs whole sequences"),
        ("token_loss", by_torch, "tp", "vocab.pick"),
    ],
)
def test_a_recipe_refuses_a_seam_before_it_starts_a_process_group(
    name, flags_of, seam, value, axis, says, inputs, tmp_path
):
    flags = flags_of(inputs, tmp_path / "run", f"--parallel.{axis}", 2)
    ranks = run_on(2, recipe_with, name, seam, value, flags, group=False)
    assert [(ended.status, n_groups) for ended, n_groups in ranks] == [(2, 0)] * 2
    [line] = ranks[0][0].err.splitlines()
    assert says in line and f"--parallel.{axis} 1" in line
    assert not (tmp_path / "run").exists()


def graphs_with_a_window() -> list[int]:
    def parallelize_own(model, *args, **settings):
        model.attention = SlidingWindow(3)
        return parallelize(model, *args, **settings)

    with mock.patch("parallel.assemble.parallelize", parallelize_own):
        return graphs_after_each_phase(Run(1), documents=True)


def test_a_readers_attention_compiles_one_graph_for_all_layers_and_never_again():
    assert run_on(1, graphs_with_a_window) == [[1, 1, 1, 2, 2, 2]]


def set_too_late() -> list[str]:
    layout = ParallelConfig(pp=2).resolve(2)
    model, refusals = Llama(GQA), []
    parts = parallelize(model, build_mesh(layout, "cpu"), layout)
    for late in (model, *parts):
        for name, seam in (("token_loss", smoothed), ("attention", SlidingWindow(3))):
            with pytest.raises(UsageError) as refusal:
                setattr(late, name, seam)
            refusals.append(str(refusal.value))
    return refusals


def test_what_is_set_after_parallelize_is_refused_and_not_dropped():
    for refusals in run_on(2, set_too_late):
        assert len(refusals) == 4
        for refusal in refusals:
            assert "set after parallelize" in refusal and "\n" not in refusal


def boosted_loss() -> float:
    model = Llama(SHAPES["gqa"])
    model.token_loss, model.attention = smoothed, SlidingWindow(3)
    booster = Booster(ParallelConfig(tp=2))
    booster.boost(model, torch.optim.AdamW(model.parameters()))
    tokens = batch_of(0, masked=False).tokens
    return booster.step({"input_ids": tokens, "labels": tokens}).item()


def test_the_booster_keeps_what_is_set_on_a_model():
    model, tokens = Llama(SHAPES["gqa"]), batch_of(0, masked=False).tokens
    init_weights(model, seed=0)
    model.token_loss, model.attention = smoothed, SlidingWindow(3)
    labels = F.pad(tokens[:, 1:], (0, 1), value=loss.IGNORE)
    expected = model(tokens, labels=labels).item() / (labels != loss.IGNORE).sum().item()
    for ours in run_on(2, boosted_loss):
        assert ours == pytest.approx(expected, abs=2e-5)
