"""With compile a block is compiled once for all layers, whole, and never again: not for other documents, not
by validation."""

import copy
import logging
import pickle
from dataclasses import dataclass, field, replace
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from pool import run_on
from torch._dynamo import lookup_backend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close
from training import forward_backward, make_training

from dtensor_llama import Llama, LlamaConfig, loss
from dtensor_llama.chat.lora import LoraConfig, apply_lora, init_lora
from dtensor_llama.data.reader import Batch
from dtensor_llama.model import init_weights
from memory.activations import ActivationOffload
from parallel import ParallelConfig
from parallel.apply import Computation
from parallel.tensor import SplitVocabulary, apply_tensor_parallel

GQA = LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)
MQA = replace(GQA, num_key_value_heads=1)  # tp 2 is above the number of key/value heads
T, N_MICROS = 32, 2
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Run:
    ranks: int
    layout: dict = field(default_factory=dict)
    config: LlamaConfig = GQA
    recompute: str = "none"
    attention: str = "sdpa"
    lora: bool = False
    activations: bool = False  # the inputs of blocks wait on the host for backward


class CountedGraphs:
    """A compiler that counts the graphs it is given, and hands each to aot_eager, which takes no C++
    compiler."""

    def __init__(self):
        self.n_graphs = 0

    def __call__(self, graph, inputs):
        self.n_graphs += 1
        return lookup_backend("aot_eager")(graph, inputs)


def packed_batches(seed: int, n: int) -> list[Batch]:
    """Sequences of 3 to 5 documents; how many and how long they are depends on the seed."""
    random = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(n):
        tokens = torch.randint(GQA.vocab_size, (1, T + 1), generator=random)
        starts = torch.randperm(T - 1, generator=random)[: 2 + seed % 3] + 1
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), starts]).sort().values
        positions = torch.arange(T)
        positions = positions - starts[torch.bucketize(positions, starts, right=True) - 1]
        batches.append(Batch(tokens[:, :-1], tokens[:, 1:].clone(), positions[None]))
    return batches


class RecordedWarnings(logging.Handler):
    """Keeps what torch's loggers say from warnings on."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def graphs_after_each_phase(run: Run, documents: bool) -> list[int]:
    """Of three steps, a validation, a step and a validation: how many graphs had been compiled when each was
    over."""
    counted = CountedGraphs()
    layout = ParallelConfig(**run.layout).resolve(run.ranks)
    with torch.device("meta"):
        model = Llama(run.config)
    if run.lora:
        apply_lora(model, LoraConfig(rank=2))
    computation = Computation(recompute=run.recompute, compile=True, attention=run.attention)
    # fullgraph: a graph break is an error, and so is a block that was compiled too often and would now run
    # eagerly
    with mock.patch("torch.compile", partial(torch.compile, backend=counted, fullgraph=True)):
        training = make_training(model, layout, N_MICROS, computation)
    if run.activations:
        for stage in training.stages:
            blocks = [block for block in stage.model.layers if block is not None]
            ActivationOffload(blocks, CPU, input_bytes=T * GQA.hidden_size * 4, in_flight=N_MICROS)
    init_weights(model, seed=0)
    if run.lora:
        init_lora(model, seed=0)
    warnings = RecordedWarnings()
    logging.getLogger("torch").addHandler(warnings)
    n_graphs = []
    for seed, phase in enumerate(["step", "step", "step", "validation", "step", "validation"]):
        batches = packed_batches(seed, N_MICROS if phase == "step" else 3)
        if not documents:
            batches = [batch._replace(positions=None) for batch in batches]
        batches = [training.layout.own_tokens(batch) for batch in batches]
        if phase == "step":
            forward_backward(training, batches, N_MICROS * T)
            model.zero_grad()
        else:
            training.sum_of_losses(batches)
        n_graphs.append(counted.n_graphs)
    logging.getLogger("torch").removeHandler(warnings)
    assert not warnings.messages  # every rank would print them
    return n_graphs


def assert_nothing_is_compiled_again(run: Run, documents: bool) -> None:
    for rank, n_graphs in enumerate(run_on(run.ranks, graphs_after_each_phase, run, documents)):
        # One graph that trains. With LoRA there are two, as the input of the model's first block has no
        # gradient.
        has_first_block = "pp" not in run.layout or rank < run.ranks // run.layout["pp"]
        trains = 2 if run.lora and has_first_block else 1
        # The first validation adds one: torch.compile asks whether gradients are wanted.
        validates = trains + 1
        assert n_graphs == [trains, trains, trains, validates, validates, validates], rank


RUNS = {
    "one-lora": Run(1, lora=True),
    "one-selective-activations": Run(1, recompute="selective", activations=True),
    "dp-2-full": Run(2, {"dp_shard": 2}, recompute="full"),
    "tp-2-selective": Run(2, {"tp": 2}, recompute="selective"),
    "tp-2-whole-sequences-shared-heads": Run(2, {"tp": 2, "sequence_parallel": False}, MQA),
    "cp-2-ring": Run(2, {"cp": 2, "cp_method": "ring"}),
    "cp-2-ulysses-full": Run(2, {"cp": 2}, recompute="full"),
    "pp-2": Run(2, {"pp": 2, "schedule": "interleaved-1f1b"}),
}


@pytest.mark.parametrize("name", RUNS)
def test_every_axis_compiles_one_graph_that_trains_and_one_that_validates(name):
    assert_nothing_is_compiled_again(RUNS[name], documents=True)


LAYOUTS = {
    "one": (1, {}),
    "dp-2": (2, {"dp_shard": 2}),
    "dp-2-zero-0": (2, {"dp_shard": 2, "zero_stage": 0}),
    "dp-2-zero-1": (2, {"dp_shard": 2, "zero_stage": 1}),
    "dp-2-zero-2": (2, {"dp_shard": 2, "zero_stage": 2}),
    "hsdp-2-2": (4, {"dp_shard": 2, "dp_replicate": 2}),
    "tp-2": (2, {"tp": 2}),
    "tp-2-whole-sequences": (2, {"tp": 2, "sequence_parallel": False}),
    "tp-4-shared-heads": (4, {"tp": 4}),
    "dp-2-tp-2": (4, {"dp_shard": 2, "tp": 2}),
    "cp-2-ring": (2, {"cp": 2, "cp_method": "ring"}),
    "cp-2-ulysses": (2, {"cp": 2}),
    "cp-2-tp-2": (4, {"cp": 2, "tp": 2}),
    "pp-2": (2, {"pp": 2}),
    "pp-2-tp-2": (4, {"pp": 2, "tp": 2, "schedule": "interleaved-1f1b"}),
    "pp-2-cp-2": (4, {"pp": 2, "cp": 2, "schedule": "interleaved-1f1b"}),
}


# recompute, packed documents, LoRA
KINDS = [
    ("none", True, False),
    ("selective", True, False),
    ("full", True, False),
    ("none", False, False),
    ("selective", False, True),
]


@pytest.mark.slow
@pytest.mark.parametrize("recompute,documents,lora", KINDS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_with_every_recompute_compiles_no_more(name, recompute, documents, lora):
    ranks, layout = LAYOUTS[name]
    # torch fails on a CPU with its fused kernel, tp and full recompute, which parallel/config.py therefore
    # refuses
    attention = "math" if "tp" in layout and recompute == "full" else "sdpa"
    assert_nothing_is_compiled_again(
        Run(ranks, layout, recompute=recompute, lora=lora, attention=attention), documents
    )


def losses_of_shorter_sequences(compiled: bool, layout: dict) -> list[float]:
    """Return the losses of a step and a validation with sequences of T tokens, and of two of each with
    shorter ones."""
    resolved = ParallelConfig(**layout).resolve(dist.get_world_size())
    with torch.device("meta"):
        model = Llama(GQA)
    with mock.patch("torch.compile", partial(torch.compile, backend="aot_eager", fullgraph=True)):
        training = make_training(model, resolved, N_MICROS, Computation(compile=compiled))
    init_weights(model, seed=0)
    losses = []
    for n_tokens in (T, T - 4, T - 8):
        batches = [
            Batch(batch.tokens[:, :n_tokens].clone(), batch.labels[:, :n_tokens].clone(), None)
            for batch in packed_batches(n_tokens, N_MICROS)
        ]
        batches = [training.layout.own_tokens(batch) for batch in batches]
        losses.append(float(forward_backward(training, batches, N_MICROS * n_tokens)))
        model.zero_grad()
        losses.append(float(training.sum_of_losses(batches)))
    return losses


@pytest.mark.parametrize(
    "layout",
    [
        {"dp_shard": 2},
        {"tp": 2, "sequence_parallel": False},
        *(
            pytest.param(layout, marks=pytest.mark.slow)
            for layout in ({"tp": 2}, {"cp": 2, "cp_method": "ring"}, {"cp": 2, "cp_method": "ulysses"})
        ),
    ],
)
def test_sequences_of_another_length_after_the_first_step_train_and_validate_as_without_compile(layout):
    compiled, eager = (run_on(2, losses_of_shorter_sequences, how, layout) for how in (True, False))
    assert_close(compiled, eager, rtol=1e-5, atol=0)


# ---- the loss: its chunk is compiled by itself, by default on a GPU ----


def smoothed(logits: torch.Tensor, labels: torch.Tensor, vocab: loss.Vocabulary) -> torch.Tensor:
    """A reader's loss: label smoothing, a softcap and a z-loss, all in one."""
    logits = 30 * (logits / 30).tanh()
    log_z = vocab.logsumexp(logits)
    return log_z - 0.9 * vocab.pick(logits, labels) - 0.1 * vocab.mean(logits) + 1e-3 * log_z**2


def loss_and_gradients(
    split: bool, dtype: torch.dtype, frozen: bool, token_loss: loss.TokenLoss, backend=None
) -> list[torch.Tensor]:
    """The loss of 21 tokens in chunks of 8, the last one shorter, and its gradients; backend: a compiler, or
    None."""
    random = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=random).to(dtype).requires_grad_() for n in (21, 37))
    weight.requires_grad_(not frozen)
    labels = torch.randint(37, (21,), generator=random)
    labels[:3] = labels[9] = loss.IGNORE
    how = "eager" if backend is None else "compiled"
    compiled = torch.compile(loss.loss_and_gradient, backend=backend or "eager", fullgraph=True)
    of_loss = partial(mock.patch.object, loss)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    if split:
        weight = distribute_tensor(weight, mesh, [Shard(0)])
    vocab = SplitVocabulary(37, mesh, sequence_parallel=False) if split else loss.Vocabulary(37)

    def token_loss_sum() -> torch.Tensor:
        return loss.token_loss_sum(hidden, weight, labels, token_loss, vocab)

    with (
        of_loss("choose_loss", lambda device: (how, "")),
        of_loss("_compiled", lambda: compiled),
        of_loss("CHUNK_ELEMENTS", 8 * vocab.n_columns),
    ):
        nll_sum = token_loss_sum()
        with torch.no_grad():
            assert torch.equal(token_loss_sum(), nll_sum)
    gradients = torch.autograd.grad(nll_sum * 0.3, [hidden] if frozen else [hidden, weight])
    if split and not frozen:
        gradients = gradients[0], gradients[1].full_tensor()
    return [nll_sum.detach(), *gradients]


def compiled_loss_equals_eager(split: bool, backend: str | None = None) -> None:
    for dtype, frozen, token_loss in (
        (torch.float32, False, loss.token_nll),
        (torch.bfloat16, True, loss.token_nll),
        (torch.float32, False, smoothed),
    ):
        torch.compiler.reset()
        counted = CountedGraphs()
        expected = loss_and_gradients(split, dtype, frozen, token_loss)
        compiled = loss_and_gradients(split, dtype, frozen, token_loss, backend or counted)
        for ours, reference in zip(compiled, expected, strict=True):
            # bfloat16: the gradient of a logit may be rounded the other way, once
            assert_close(ours, reference, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)
        if backend is None:
            # one for chunks of every length, and one where no gradient is wanted
            assert counted.n_graphs == 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_loss_compiles_once_for_chunks_of_every_length_and_equals_eager(ranks):
    run_on(ranks, compiled_loss_equals_eager, ranks == 2)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_loss_that_a_cpu_compiler_makes_equals_eager(ranks):
    run_on(ranks, compiled_loss_equals_eager, ranks == 2, "inductor")


@pytest.mark.parametrize(
    "device,triton,c_compiler,how,said",
    [
        ("cpu", True, True, "eager", "on a CPU compiling takes longer"),
        ("cuda", True, True, "compiled", "one pass over the logits"),
        ("cuda", False, True, "eager", "there is no triton"),
        ("cuda", True, False, "eager", "there is no C compiler"),
        ("cuda", False, False, "eager", "there is no triton and no C compiler"),
    ],
)
def test_the_loss_is_compiled_on_a_gpu_that_has_a_compiler(
    monkeypatch, device, triton, c_compiler, how, said
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if triton else None)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/cc" if c_compiler else None)
    loss.choose_loss.cache_clear()
    choice, why = loss.choose_loss(torch.device(device))
    loss.choose_loss.cache_clear()
    assert choice == how and said in why


def most_bytes_held(run) -> int:
    """The most bytes that torch's allocator had given out at one time while `run` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("dtype,bytes_a_logit", [(torch.float32, 4), (torch.bfloat16, 6)])
def test_an_eager_loss_holds_a_chunk_of_logits_once_in_float32_and_once_as_they_are_computed(
    monkeypatch, dtype, bytes_a_logit
):
    """Autograd keeps two tensors of the logits' size, so an eager chunk is half as large."""
    assert 2 * loss.EAGER_ELEMENTS == loss.CHUNK_ELEMENTS
    n_logits = 64 * 1024
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", n_logits)
    monkeypatch.setattr(loss, "EAGER_ELEMENTS", n_logits // 2)
    hidden, weight = (torch.randn(n, 16).to(dtype).requires_grad_() for n in (256, 1024))
    labels = torch.randint(1024, (256,))
    gradients = hidden.nbytes + 4 * weight.numel()
    run = lambda token_loss: loss.token_loss_sum(hidden, weight, labels, token_loss)
    assert most_bytes_held(lambda: run(loss.token_nll)) < n_logits * bytes_a_logit + 1.2 * gradients
    assert most_bytes_held(lambda: run(smoothed)) < 3 * n_logits * bytes_a_logit  # its softcap keeps more


def test_chunks_are_whole_tiles_of_a_matrix_product():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert loss.tokens_per_chunk(32_000) == 2048
    assert loss.tokens_per_chunk(4_000) == 16_640  # 65 tiles of 256
    assert loss.tokens_per_chunk(2**20) == 64  # where a tile does not fit, as many tokens as do
    assert [loss.tokens_per_chunk(n, gpu) for n in (32_000, 2**20)] == [1024, 32]
    assert [loss.tokens_per_chunk(n, cpu) for n in (512, 32_000, 2**20)] == [2048, 256, 32]


# ---- what changes its class is a module like any other ----


def copies_of_a_split_model() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    model = Llama(GQA)
    names = list(model.state_dict())
    tokens = torch.arange(T)[None]
    apply_tensor_parallel(model, mesh)
    assert list(model.state_dict()) == names
    assert "NormOfOwnTokens((32,), eps=1e-05, elementwise_affine=True)" in repr(model)
    with torch.no_grad():
        expected = model(tokens)
        copied = copy.deepcopy(model.model.norm)
        copied.weight.zero_()
        x = torch.ones(1, T, GQA.hidden_size)
        assert not copied(x).any() and model.model.norm(x).any()  # a copy computes with its own weight
        assert torch.equal(model(tokens), expected)
    assert type(pickle.loads(pickle.dumps(type(model.model.norm)))) is type  # and pickle finds its class


def test_a_module_that_tensor_parallelism_changed_is_named_copied_and_printed_like_any_other():
    run_on(1, copies_of_a_split_model)
