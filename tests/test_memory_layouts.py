"""Under every kind of layout the chunk manager gives the numbers of one process with torch's AdamW."""

import functools
import random

import pytest
import torch
import torch.distributed as dist
from emulated_lanes import QueuedLanes
from pool import run_on
from test_memory_parity import chunk_sizes, plan_of
from test_one_answer import SEQUENCES, SHAPES, STEPS, batch_of, five_steps, whole_weights
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from training import forward_backward
from versions import needs_split_backward

from dtensor_llama import Llama
from dtensor_llama.data.reader import Batch
from dtensor_llama.model import init_weights
from dtensor_llama.optim import build_adamw
from dtensor_llama.shards import local
from memory import ChunkManager, Home, MemoryConfig, Overrides, TrainingLoop
from parallel import ParallelConfig, build_mesh, parallelize
from parallel.apply import Computation
from parallel.assemble import Training
from parallel.context import shard_batch
from parallel.mesh import Layout
from parallel.pipeline import Pipeline

CHUNK = 1024  # elements: tens of chunks on each rank, most matrices in several


def start(
    shape: str,
    layout: ParallelConfig,
    micro: int,
    plan_seed: int | None,
    dtype=torch.float32,
    passes=None,
    lanes=None,
    **config,
):
    """Do what a recipe does: meta, parallelize, to_empty, manager, initial weights through the masters.
    plan_seed: of random homes; None: every chunk is CPU."""
    layout = layout.resolve(dist.get_world_size())
    mesh = build_mesh(layout, "cpu")
    computation = Computation(dtype=dtype, **passes or {})
    with torch.device("meta"):
        model = Llama(SHAPES[shape]).to(dtype)
    parts = parallelize(model, mesh, layout, computation)
    for part in parts:
        part.to_empty(device="cpu")
    n_micros = SEQUENCES // layout.dp // micro
    adamw = build_adamw(model, lr=1e-3, weight_decay=0.1)
    draw = random.Random(f"{plan_seed} {dist.get_rank()}")  # ranks need not agree where their chunks live
    sizes = chunk_sizes(model, adamw, CHUNK, parts)
    plan = plan_of(sizes, [Home.CPU if plan_seed is None else draw.choice(list(Home)) for _ in sizes])
    tied_over_stages = (
        SHAPES[shape].tie_word_embeddings and layout.pp > 1 and model.model.embed_tokens is not None
    )
    loop = TrainingLoop(
        parts,
        accumulation=n_micros if layout.zero_stage >= 2 and layout.pp == 1 else 1,
        tied=[model.model.embed_tokens.weight] if tied_over_stages else [],
    )
    config = MemoryConfig("static", 1, 0, 0, kernel="blocks", **config)
    manager = ChunkManager(model, adamw, config, loop, overrides=Overrides(plan, CHUNK, lanes))
    init_weights(manager.masters(), seed=0)
    owner = Layout(layout, mesh, n_micros)
    pipeline = Pipeline(parts, owner, computation) if layout.pp > 1 else None
    training = Training(model, parts, pipeline, manager.optimizer, owner, computation)
    return layout, mesh, model, manager, training


def step(number: int, layout, mesh, optimizer, training, micro: int) -> tuple[float, float]:
    batch = batch_of(number, masked=True)
    mine = [x.chunk(layout.dp)[mesh["dp"].get_local_rank()] for x in batch]
    micros = [Batch(*(x[i : i + micro] for x in mine)) for i in range(0, SEQUENCES // layout.dp, micro)]
    micros = [shard_batch(one, mesh["cp"], layout.cp_method) for one in micros]
    loss = forward_backward(training, micros, (batch.labels != -100).sum())
    dist.all_reduce(loss, group=mesh["loss"].get_group())
    norm = optimizer.clip_grad_norm(0.5)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), norm.item()


def managed_steps(shape: str, layout: ParallelConfig, micro: int, plan_seed: int, passes: dict) -> dict:
    layout, mesh, model, manager, training = start(shape, layout, micro, plan_seed, passes=passes)
    initial, said = whole_weights(model), []
    manager.say = said.append
    losses, norms = zip(
        *(step(i, layout, mesh, manager.optimizer, training, micro) for i in range(STEPS)), strict=True
    )
    manager.close()
    assert said == [], said  # nobody but the manager has changed a weight
    return {"losses": losses, "norms": norms, "initial": initial, "final": whole_weights(model)}


@functools.cache
def one_process(shape: str) -> dict:
    return run_on(1, five_steps, shape, ParallelConfig(), SEQUENCES, True)[0]


@pytest.mark.parametrize(
    "ranks,shape,micro,layout",
    [
        pytest.param(2, "gqa", 4, dict(zero_stage=3), id="ZeRO 3"),
        pytest.param(2, "gqa", 1, dict(zero_stage=3), id="ZeRO 3, 4 microbatches"),
        pytest.param(2, "tied", 2, dict(zero_stage=2), id="ZeRO 2, 2 microbatches"),
        pytest.param(2, "gqa", 2, dict(zero_stage=1), id="ZeRO 1, 2 microbatches"),
        pytest.param(2, "gqa", 4, dict(zero_stage=0), id="ZeRO 0"),
        pytest.param(2, "tied", 4, dict(tp=2), id="tp"),
        pytest.param(2, "tied", 2, dict(pp=2), id="pp, tied matrix"),
        pytest.param(
            2,
            "gqa",
            2,
            dict(pp=2, schedule="zbv"),
            id="pp, two stages a rank, split backward",
            marks=needs_split_backward,
        ),
        pytest.param(4, "gqa", 2, dict(pp=2, tp=2), id="pp tp"),
        pytest.param(4, "gqa", 2, dict(dp_replicate=2, dp_shard=2), id="HSDP"),
        pytest.param(2, "gqa", 2, dict(cp=2, recompute="full"), id="cp Ulysses, recompute"),
        pytest.param(
            2,
            "gqa",
            2,
            dict(cp=2, cp_method="ring", zero_stage=2, recompute="selective"),
            id="cp ring, selective",
        ),
        pytest.param(4, "gqa", 2, dict(cp=2, tp=2), id="cp tp", marks=pytest.mark.slow),
        pytest.param(2, "gqa", 2, dict(compile=True), id="ZeRO 3, compiled", marks=pytest.mark.slow),
        pytest.param(
            2,
            "gqa",
            2,
            dict(tp=2, compile=True, recompute="selective"),
            id="tp, compiled, selective",
            marks=pytest.mark.slow,
        ),
        pytest.param(2, "tied", 2, dict(pp=2, compile=True), id="pp, compiled", marks=pytest.mark.slow),
        pytest.param(8, "gqa", 2, dict(pp=2, tp=2, zero_stage=1), id="pp tp ZeRO 1", marks=pytest.mark.slow),
    ],
)
def test_a_layout_with_chunks_in_random_places_equals_one_process(ranks, shape, micro, layout):
    passes = {name: layout[name] for name in ("recompute", "compile") if name in layout}
    layout = ParallelConfig(**{name: value for name, value in layout.items() if name not in passes})
    ours, theirs = (
        run_on(ranks, managed_steps, shape, layout, micro, 1, passes, timeout=180)[0],
        one_process(shape),
    )
    assert all(torch.equal(ours["initial"][name], value) for name, value in theirs["initial"].items())
    assert max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True)) < 2e-5
    assert max(abs(a / b - 1) for a, b in zip(ours["norms"], theirs["norms"], strict=True)) < 1e-4
    assert (
        max((ours["final"][name] - value).abs().max().item() for name, value in theirs["final"].items())
        < 1e-5
    )


# ---- what only a whole model shows ----


def jobs_left_as_blocks_begin(layout: ParallelConfig) -> tuple[list[int], int, list[int]]:
    """Look at the forward after an update of which the host does nothing until something waits for it. Return
    how many of its jobs are left when each block begins, how many there were, and how many cover later blocks
    alone."""
    lanes, micro = QueuedLanes(), SEQUENCES // dist.get_world_size()
    layout, mesh, model, manager, training = start("gqa", layout, micro, None, lanes=lanes)
    blocks, left, later = list(model.model.layers), [], []
    for number, block in enumerate(blocks):
        after = {p for other in blocks[number + 1 :] for p in other.parameters()}
        later.append(sum(all(param.parameter in after for param in chunk.params) for chunk in manager.chunks))
        block.register_forward_pre_hook(lambda *_: left.append(len(lanes.thread.queue.jobs)))
    step(0, layout, mesh, manager.optimizer, training, micro)
    manager.wait()
    left.clear()
    step(1, layout, mesh, manager.optimizer, training, micro)
    n_jobs = len(lanes.thread.queue.jobs)
    left.clear()
    with torch.no_grad():
        model(torch.zeros(1, 8, dtype=torch.int64))
    manager.close()
    return left, n_jobs, later


@pytest.mark.parametrize("ranks,stage", [(1, 0), (2, 3), (2, 1)])
def test_blocks_begin_while_the_host_still_steps_later_ones(ranks, stage):
    """Embedding, norms and head are waited for before all blocks, so they are stepped first; otherwise no
    update could hide."""
    left, n_jobs, later = run_on(ranks, jobs_left_as_blocks_begin, ParallelConfig(zero_stage=stage))[0]
    assert left == later and n_jobs > left[0] > n_jobs // 4, (left, later, n_jobs)


def gradients_that_wait(layout: ParallelConfig, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of the storages that gradients keep alive until the step, and what the ledger counts of them."""
    layout, mesh, model, manager, training = start(
        "gqa", layout, SEQUENCES // dist.get_world_size(), 1, dtype
    )
    before = manager.ledger.held["device"]
    batch = batch_of(0, masked=True)
    mine = Batch(*(x.chunk(layout.dp)[mesh["dp"].get_local_rank()] for x in batch))
    forward_backward(training, [mine], (batch.labels != -100).sum())
    manager.finish_backward()
    kept = [p.grad for p in model.parameters()] + [
        piece.grad for one in manager.params for piece in one.pieces
    ]
    storages = {local(one).untyped_storage() for one in kept if one is not None}
    counted = manager.ledger.held["device"] - before
    manager.optimizer.zero_grad()
    assert manager.ledger.held["device"] == before
    manager.close()
    return sum({one.data_ptr(): one.nbytes() for one in storages}.values()), counted


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("ranks,stage", [(1, 0), (2, 0), (2, 3)])
def test_gradients_that_leave_are_kept_alive_by_none_that_waits(ranks, stage, dtype):
    """FSDP's gradients are views of one buffer per block, and a plain gradient is whole although only some of
    it waits."""
    for held, counted in run_on(ranks, gradients_that_wait, ParallelConfig(zero_stage=stage), dtype):
        assert 0 < held <= counted, (held, counted)


def weights_changed_by_hand(layout: ParallelConfig) -> float:
    """Return the largest difference of whole weights, on rank 0, from those of torch's AdamW; chunks have
    random homes."""
    with torch.device("meta"):
        other = Llama(SHAPES["gqa"])
    other.to_empty(device="cpu")
    init_weights(other, seed=5)
    ends = []
    for manage in (True, False):
        resolved, mesh, model, manager, training = start(
            "gqa", layout, SEQUENCES // dist.get_world_size(), 1 if manage else None
        )
        if not manage:
            manager.close()
            init_weights(model, seed=0)
        optimizer = manager.optimizer if manage else build_adamw(model, lr=1e-3, weight_decay=0.1)
        for i in range(3):
            batch = batch_of(i, masked=True)
            mine = Batch(*(x.chunk(resolved.dp)[mesh["dp"].get_local_rank()] for x in batch))
            forward_backward(training, [mine], (batch.labels != -100).sum())
            optimizer.step()
            optimizer.zero_grad()
            if i == 0:
                set_model_state_dict(
                    model, other.state_dict(), options=StateDictOptions(full_state_dict=True)
                )
            if i == 1:
                _ = manager.wait() if manage else None
                with torch.no_grad():
                    for p in model.parameters():
                        p.clamp_(-0.03, 0.03)
        if manage:
            manager.close()
        ends.append(whole_weights(model))
    return max(((value - ends[1][name]).abs().max().item() for name, value in ends[0].items()), default=-1.0)


@pytest.mark.parametrize("ranks,stage", [(1, 0), (2, 3), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_sharded_weights_that_are_loaded_or_changed_by_hand_become_the_masters(ranks, stage):
    assert 0 <= run_on(ranks, weights_changed_by_hand, ParallelConfig(zero_stage=stage))[0] < 1e-6


class Spread(torch.nn.Module):
    """A weight that all ranks hold and each uses with its own sequences, so that autograd leaves its gradient
    Partial."""

    def __init__(self, mesh):
        super().__init__()
        self.weight = torch.nn.Parameter(
            DTensor.from_local(torch.linspace(-1, 1, 160).view(16, 10), mesh, [Replicate()])
        )
        self.mesh = mesh

    def forward(self, x):
        return (DTensor.from_local(x, self.mesh, [Shard(0)]) @ self.weight).square().sum().full_tensor()


def partial_gradients(placement: Home, accumulation: int) -> tuple[float, torch.Tensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = Spread(mesh)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)
    plan = plan_of(chunk_sizes(model, adamw, 64), [placement] * 9)
    loop = TrainingLoop(accumulation=accumulation)
    config = MemoryConfig("static", 1, 0, 0, kernel="blocks")
    manager = ChunkManager(model, adamw, config, loop, overrides=Overrides(plan, 64))
    for i in range(accumulation):
        model(
            torch.randn(4, 16, generator=torch.Generator().manual_seed(10 * i + dist.get_rank()))
        ).backward()
    norm = manager.clip_grad_norm(1.0).item()
    manager.optimizer.step()
    manager.close()
    return norm, local(model.weight).clone()


@pytest.mark.parametrize("accumulation", [1, 3])
def test_gradients_that_nobody_has_reduced_are_at_every_placement(accumulation):
    (right, expected), _ = run_on(2, partial_gradients, Home.CPU, accumulation)
    for placement in (Home.RESIDENT, Home.STREAM):
        for norm, weight in run_on(2, partial_gradients, placement, accumulation):
            assert norm == pytest.approx(right, rel=1e-5)
            torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-7)
