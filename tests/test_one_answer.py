"""One answer: in fp32, five steps of any layout equal one process. Losses within 2e-5, gradient norms within
1e-4 relative, final weights within 1e-5, initial weights bitwise. The table of all layouts is printed at the
end of `make test-all`.
"""

import functools
import time
from dataclasses import asdict, replace

import pytest
import torch
import torch.distributed as dist
from conftest import PARITY_ROWS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pool import run_on
from torch.distributed.tensor import DTensor
from training import forward_backward, make_training
from versions import marks_for

from dtensor_llama import Llama, LlamaConfig, UsageError
from dtensor_llama.data.reader import Batch
from dtensor_llama.model import init_weights
from parallel import ParallelConfig
from parallel.apply import Computation
from parallel.config import Job, check_parallel
from parallel.context import shard_sequence

STEPS, SEQUENCES, T = 5, 8, 32
GQA = LlamaConfig(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=5,
    num_attention_heads=8,
    num_key_value_heads=4,
)  # 5 layers: uneven over stages; 101 tokens: uneven over tp
SHAPES = {
    "gqa": GQA,
    "tied": replace(GQA, tie_word_embeddings=True),
    "mha": replace(GQA, num_key_value_heads=8),
    "mqa": replace(GQA, num_key_value_heads=1),
}


def batch_of(step: int, masked: bool) -> Batch:
    """The global batch of a step: (SEQUENCES, T). masked: packed documents, and labels missing unevenly."""
    stream = torch.Generator().manual_seed(step)
    both = torch.randint(101, (SEQUENCES, T + 1), generator=stream)
    tokens, labels, positions = both[:, :-1].contiguous(), both[:, 1:].clone(), None
    if masked:
        labels[torch.rand(labels.shape, generator=stream) < torch.linspace(0, 0.9, SEQUENCES)[:, None]] = -100
        lengths = [5, 1, 14, 12]
        positions = torch.cat([torch.arange(n) for n in lengths]).expand(SEQUENCES, -1).contiguous()
    return Batch(tokens, labels, positions)


def five_steps(shape: str, layout: ParallelConfig, micro: int, masked: bool, recompute: str = "none") -> dict:
    """Train on the ranks of the default group; whole weights come back from rank 0 of the group."""
    began = time.perf_counter()
    config = SHAPES[shape]
    layout = layout.resolve(dist.get_world_size())
    n_micros = check_parallel(layout, Job(config, T, SEQUENCES, micro, recompute=recompute))
    training = make_training(config, layout, n_micros, Computation(recompute=recompute))
    model, mesh, optimizer = training.model, training.layout.mesh, training.optimizer
    init_weights(model, seed=0)
    initial = whole_weights(model)
    losses, norms = [], []
    for step in range(STEPS):
        batch = batch_of(step, masked)
        n_scored = (batch.labels != -100).sum()
        mine = [None if x is None else x.chunk(layout.dp)[mesh["dp"].get_local_rank()] for x in batch]
        micros = [
            Batch(*(None if x is None else x[i : i + micro] for x in mine))
            for i in range(0, SEQUENCES // layout.dp, micro)
        ]
        if layout.cp > 1:
            micros = [
                Batch(*(shard_sequence(x, mesh["cp"], layout.cp_method) for x in m[:2]), m.positions)
                for m in micros
            ]
        loss = forward_backward(training, micros, n_scored)
        dist.all_reduce(loss, group=mesh["loss"].get_group())
        norm = optimizer.clip_grad_norm(0.5)  # 0.5: every step is clipped
        norms.append(norm.item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {
        "losses": losses,
        "norms": norms,
        "initial": initial,
        "final": whole_weights(model),
        "seconds": time.perf_counter() - began,
    }


def whole_weights(model: Llama) -> dict[str, torch.Tensor]:
    """All parameters of all stages, by name, on every rank."""
    own = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return {name: weight for one in everyone for name, weight in one.items()} if dist.get_rank() == 0 else {}


@functools.cache
def one_process(shape: str, masked: bool) -> dict:
    return run_on(1, five_steps, shape, ParallelConfig(), SEQUENCES, masked)[0]


def assert_one_answer(
    name: str, ranks: int, layout: ParallelConfig, shape: str, micro: int, masked: bool, recompute: str
):
    ours = run_on(ranks, five_steps, shape, layout, micro, masked, recompute, timeout=180)[0]
    expected = one_process(shape, masked)
    loss = max(abs(a - b) for a, b in zip(ours["losses"], expected["losses"], strict=True))
    norm = max(abs(a / b - 1) for a, b in zip(ours["norms"], expected["norms"], strict=True))
    weight = max(
        (ours["final"][key] - expected["final"][key]).abs().max().item() for key in expected["final"]
    )
    PARITY_ROWS.append((name, ranks, loss, norm, weight, ours["seconds"]))
    assert ours["initial"].keys() == expected["initial"].keys()
    assert all(torch.equal(ours["initial"][key], value) for key, value in expected["initial"].items())
    assert loss < 2e-5 and norm < 1e-4 and weight < 1e-5, (loss, norm, weight)


def case(
    ranks: int, shape: str = "gqa", micro: int = 1, masked: bool = True, recompute: str = "none", **layout
):
    words = [f"{key}={value}" for key, value in layout.items()]
    words += [
        word
        for word, said in (
            (shape, shape != "gqa"),
            (f"micro={micro}", micro != 1),
            ("unmasked", not masked),
            (f"recompute={recompute}", recompute != "none"),
        )
        if said
    ]
    name = f"{' '.join(words) or 'dp'} on {ranks}"
    return pytest.param(
        ranks,
        ParallelConfig(**layout),
        shape,
        micro,
        masked,
        recompute,
        id=name,
        marks=marks_for(layout.get("schedule")),
    )


RING = {"cp_method": "ring"}
FAST = [  # part of every `make test`: each axis alone, and pairs of them on four ranks
    case(2),
    case(2, zero_stage=1),
    case(2, tp=2, shape="tied", micro=4),
    case(2, cp=2, micro=4),
    case(2, cp=2, micro=4, **RING),
    case(2, pp=2),
    case(2, pp=2, shape="tied", micro=2),
    case(4, pp=2, tp=2, micro=2),
    case(4, cp=2, tp=2, micro=4, **RING),
]
ALL = FAST + [
    case(8, pp=2, tp=2, cp=2, **RING),
    case(4, tp=4),
    case(4, cp=4),
    case(4),
    case(8),
    case(2, micro=4),
    case(2, zero_stage=0),
    case(4, zero_stage=2, micro=2),
    case(2, shape="mha"),
    case(4, dp_replicate=2),
    case(8, dp_replicate=2, tp=2),
    case(4, dp_replicate=2, zero_stage=1),
    case(4, dp_replicate=4, dp_shard=1),
    case(2, tp=2),
    case(2, tp=2, sequence_parallel=False),
    case(4, tp=4, shape="mqa"),
    case(4, tp=2, zero_stage=1),
    case(4, tp=2, sequence_parallel=False, shape="tied"),
    case(8, tp=4, zero_stage=0),
    case(4, tp=2, recompute="full"),
    case(2, tp=2, recompute="selective"),
    case(2, tp=2, masked=False),
    case(8, tp=8, shape="mha"),
    case(2, cp=2, masked=False),
    case(2, cp=2, masked=False, **RING),
    case(4, cp=4, **RING),
    case(4, cp=2),
    case(4, cp=2, tp=2),
    case(8, cp=2, tp=2),
    case(4, cp=2, shape="mqa"),
    case(4, cp=2, recompute="full", **RING),
    case(4, cp=2, dp_replicate=2),
    case(4, cp=2, zero_stage=0, **RING),
    case(2, pp=2, schedule="gpipe"),
    case(2, pp=2, schedule="interleaved-1f1b"),
    case(2, pp=2, schedule="zero-bubble"),
    case(2, pp=2, schedule="zbv"),
    case(2, pp=2, schedule="dualpipev"),
    case(4, pp=4),
    case(4, pp=2),
    case(8, pp=2),
    case(2, pp=2, masked=False),
    case(2, pp=2, recompute="full"),
    case(4, pp=2, zero_stage=1),
    case(8, pp=2, dp_replicate=2),
    case(4, pp=2, tp=2, shape="tied"),
    case(8, pp=2, tp=2),
    case(8, pp=2, tp=4),
    case(8, pp=4, tp=2),
    case(4, pp=2, tp=2, schedule="zbv"),
    case(4, pp=2, tp=2, schedule="interleaved-1f1b", shape="tied"),
    case(4, pp=2, cp=2),
    case(4, pp=2, cp=2, **RING),
    case(8, pp=2, cp=2),
    case(8, pp=2, cp=2, tp=2, shape="tied"),
    case(8, pp=2, tp=2, cp=2, recompute="full", masked=False),
    case(8, pp=2, tp=2, dp_replicate=2, zero_stage=0),
]


@pytest.mark.parametrize("ranks,layout,shape,micro,masked,recompute", FAST)
def test_one_answer(request, ranks, layout, shape, micro, masked, recompute):
    assert_one_answer(
        request.node.callspec.id.rpartition(" on ")[0], ranks, layout, shape, micro, masked, recompute
    )


@pytest.mark.slow
@pytest.mark.parametrize("ranks,layout,shape,micro,masked,recompute", ALL[len(FAST) :])
def test_one_answer_everywhere(request, ranks, layout, shape, micro, masked, recompute):
    assert_one_answer(
        request.node.callspec.id.rpartition(" on ")[0], ranks, layout, shape, micro, masked, recompute
    )


SIZES = st.sampled_from([1, 2, 3, 4])


@st.composite
def any_layout(draw):
    """Mostly small, often impossible: what a user might type."""
    return ParallelConfig(
        pp=draw(SIZES),
        cp=draw(SIZES),
        tp=draw(SIZES),
        dp_replicate=draw(st.sampled_from([1, 1, 2])),
        dp_shard=draw(st.sampled_from([1, 1, 2])),
        zero_stage=draw(st.integers(0, 3)),
        sequence_parallel=draw(st.booleans()),
        cp_method=draw(st.sampled_from(["ulysses", "ring"])),
        virtual_stages=draw(st.sampled_from([None, 1, 2])),
        schedule=draw(
            st.sampled_from(["gpipe", "1f1b", "interleaved-1f1b", "zero-bubble", "zbv", "dualpipev"])
        ),
    )


def run_or_refuse(layout: ParallelConfig, shape: str, micro: int, masked: bool, recompute: str) -> str:
    ranks = layout.pp * layout.dp * layout.cp * layout.tp
    try:
        check_parallel(layout.resolve(ranks), Job(SHAPES[shape], T, SEQUENCES, micro, recompute=recompute))
    except UsageError as refusal:
        assert "=" in str(refusal) and "\n" not in str(refusal), refusal
        return "refused"
    if ranks > 8:
        return "too large for a test machine"
    words = [
        f"{key}={value}" for key, value in asdict(layout).items() if value != getattr(ParallelConfig(), key)
    ]
    assert_one_answer(
        "drawn: " + " ".join([*words, shape, recompute]), ranks, layout, shape, micro, masked, recompute
    )
    return "one answer"


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    any_layout(),
    st.sampled_from(list(SHAPES)),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.sampled_from(["none", "full", "selective"]),
)
def test_any_layout_is_refused_in_words_or_gives_the_one_answer(layout, shape, micro, masked, recompute):
    run_or_refuse(layout, shape, micro, masked, recompute)
