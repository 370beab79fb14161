"""Checkpoints of a chunk manager are exact under any plan and layout, and exchangeable with those of
AdamW."""

import pytest
import torch
import torch.distributed as dist
from pool import run_on
from test_memory_layouts import start, step
from test_one_answer import SEQUENCES, SHAPES, batch_of
from torch.distributed.tensor import DTensor
from training import forward_backward, make_training

from dtensor_llama.checkpoint import Checkpointer, Deferred, restore_training_state, training_state
from dtensor_llama.data.reader import Batch
from dtensor_llama.model import init_weights
from memory.chunk import from_local_like
from parallel import ParallelConfig

MICRO = 2


def whole(model, optimizer) -> dict:
    """Return whole masters, moments, steps and settings of this rank's parameters."""
    state = training_state(model, optimizer)
    values = {
        f"{kind}.{name}": value for kind in ("model", "optimizer") for name, value in state[kind].items()
    }
    for name, value in values.items():
        if isinstance(value, Deferred):
            value = from_local_like(value.like, value.read())
        values[name] = value.full_tensor() if isinstance(value, DTensor) else value
    return values


def save_and_go_on(folder, layout, plan_seed, dtype=torch.float32, steps=3, more=2):
    layout, mesh, model, manager, training = start("gqa", layout, MICRO, plan_seed, dtype)
    for i in range(steps):
        step(i, layout, mesh, manager.optimizer, training, MICRO)
    saver = Checkpointer(folder)
    at_save = whole(model, manager.optimizer)
    saver.save(steps, training_state(model, manager.optimizer, steps))
    later = [step(i, layout, mesh, manager.optimizer, training, MICRO) for i in range(steps, steps + more)]
    saver.close()
    manager.close()
    return at_save, later, whole(model, manager.optimizer)


def load_and_go_on(folder, layout, plan_seed, dtype=torch.float32, more=2):
    layout, mesh, model, manager, training = start("gqa", layout, MICRO, plan_seed, dtype)
    saver = Checkpointer(folder)
    state = training_state(model, manager.optimizer)
    saver.load(saver.latest(), state)
    done = restore_training_state(state, model, manager.optimizer)["step"]
    saver.close()
    at_load = whole(model, manager.optimizer)
    later = [step(i, layout, mesh, manager.optimizer, training, MICRO) for i in range(done, done + more)]
    manager.close()
    return at_load, later, whole(model, manager.optimizer)


def with_torchs_adamw(folder, load: bool):
    """One process without a manager: save after 3 steps, or load and say what came."""
    training = make_training(SHAPES["gqa"], ParallelConfig(), SEQUENCES // MICRO)
    model, optimizer = training.model, training.optimizer
    init_weights(model, seed=0)
    saver = Checkpointer(folder)
    if load:
        state = training_state(model, optimizer)
        saver.load(saver.latest(), state)
        restore_training_state(state, model, optimizer)
        saver.close()
        return whole(model, optimizer)
    for i in range(3):
        batch = batch_of(i, masked=True)
        micros = [Batch(*(x[j : j + MICRO] for x in batch)) for j in range(0, SEQUENCES, MICRO)]
        forward_backward(training, micros, (batch.labels != -100).sum())
        optimizer.clip_grad_norm(0.5)
        optimizer.step()
        optimizer.zero_grad()
    saver.save(3, training_state(model, optimizer, 3), wait=True)
    saver.close()
    return whole(model, optimizer)


def assert_same(one: dict, other: dict):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name], (
            name
        )


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_a_run_resumed_under_the_same_plan_is_bitwise_the_run_that_never_stopped(tmp_path, dtype):
    layout = ParallelConfig()
    for stopped, resumed in zip(
        run_on(2, save_and_go_on, tmp_path, layout, 1, dtype),
        run_on(2, load_and_go_on, tmp_path, layout, 1, dtype),
        strict=True,
    ):
        assert_same(stopped[0], resumed[0])
        assert stopped[1] == resumed[1]
        assert_same(stopped[2], resumed[2])


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_another_plan_on_another_layout_gets_identical_values_and_goes_on_alike(tmp_path, dtype):
    stopped = run_on(2, save_and_go_on, tmp_path, ParallelConfig(), 1, dtype)[0]
    loss = max(abs(a) for a, _ in stopped[1]) * (2e-5 if dtype == torch.float32 else 1e-2)
    for ranks, layout in ((1, ParallelConfig()), (2, ParallelConfig(tp=2)), (2, ParallelConfig(pp=2))):
        results = run_on(ranks, load_and_go_on, tmp_path, layout, 2, dtype)
        assert_same(stopped[0], {name: value for result in results for name, value in result[0].items()})
        for now, then in zip(results[0][1], stopped[1], strict=True):
            assert abs(now[0] - then[0]) < loss and now[1] == pytest.approx(
                then[1], rel=1e-4 if loss < 1e-3 else 5e-2
            )


def test_a_checkpoint_of_torchs_adamw_goes_on_with_chunks_and_back(tmp_path):
    plain = run_on(1, with_torchs_adamw, tmp_path / "plain", False)[0]
    at_load, _, _ = run_on(2, load_and_go_on, tmp_path / "plain", ParallelConfig(), 3)[0]
    assert_same(plain, at_load)
    chunks = run_on(2, save_and_go_on, tmp_path / "chunks", ParallelConfig(), 3)[0][0]
    assert_same(chunks, run_on(1, with_torchs_adamw, tmp_path / "chunks", True)[0])


def save_before_the_first_step(folder):
    layout, mesh, model, manager, training = start("gqa", ParallelConfig(), MICRO, 1)
    saver = Checkpointer(folder)
    saver.save(0, training_state(model, manager.optimizer, 0), wait=True)
    saver.close()
    later = [step(i, layout, mesh, manager.optimizer, training, MICRO) for i in range(2)]
    assert dist.is_initialized()
    return whole(model, manager.optimizer), later


def test_saving_before_the_first_step_changes_nothing(tmp_path):
    end, later = run_on(1, save_before_the_first_step, tmp_path)[0]
    _, again, its_end = run_on(1, load_and_go_on, tmp_path, ParallelConfig(), 1)[0]
    assert later == again
    assert_same(end, its_end)
