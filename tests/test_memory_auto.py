"""Placement auto traces, plans within the budgets, and plans again when it was wrong; the numbers stay those
of torch's AdamW."""

import itertools
import json
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from pool import run_on
from test_memory_parity import SMALL_CHUNKS, of_torch, tiny, train, weights
from test_memory_parity import adamw as torchs_adamw

from dtensor_llama import UsageError
from memory import ChunkManager, Home, Machine, MemoryConfig
from memory.auto import WARM_UP_STEPS
from memory.chunk import GIB
from memory.tracer import MachineRates, Usage

RATES = MachineRates(h2d=1e9, d2h=1e9, duplex=2e9, dram_in_update=1e10, host_adam=1e8, device_adam=1e9)


def managed(peak=0, said=None, **config):
    """peak: the bytes on the device that are always read."""
    model, counters = tiny(), SimpleNamespace(read=lambda: Usage(peak), reset=lambda: None)
    with mock.patch("memory.auto.Counters", lambda device: counters):
        manager = ChunkManager(
            model,
            torchs_adamw(model),
            MemoryConfig("auto", kernel="blocks", **config),
            machine=Machine(rates=RATES, say=(said if said is not None else []).append),
            overrides=SMALL_CHUNKS,
        )
    return model, manager


def bytes_of(model) -> int:
    return sum(p.nbytes for p in model.parameters())


def trained(device_share: float) -> tuple:
    """Train 20 steps with a device budget that is a share of what an all-resident plan takes."""
    said: list[str] = []
    whole = bytes_of(tiny()) * 4 / 0.97
    model, manager = managed(said=said, device_budget_gib=whole * device_share / GIB, host_budget_gib=0.1)
    train(model, manager.optimizer, WARM_UP_STEPS, max_norm=0.1)
    homes = manager.plan.homes
    train_rest(model, manager.optimizer)
    manager.close()
    return weights(model), homes, manager.ledger.peak, int(whole * device_share), said


def train_rest(model, optimizer):
    for step in range(WARM_UP_STEPS, 20):
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(step * 10))
        (model(x) * 10).backward()
        optimizer.clip_grad_norm(0.1)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("share,kinds", [(2.0, {Home.RESIDENT}), (0.75, {Home.RESIDENT, Home.CPU})])
def test_after_the_warm_up_chunks_are_where_the_budget_lets_them_and_nothing_else_changes(share, kinds):
    ((ours, homes, peak, budget, said),) = run_on(1, trained, share)
    assert set(homes) - {Home.STREAM} == kinds and said[1].startswith("memory plan, auto")
    assert peak["device"] <= budget
    torch.testing.assert_close(ours, of_torch(20, max_norm=0.1), rtol=1e-6, atol=1e-7)


def drifting() -> list[str]:
    """Report an update that is 100 times slower than predicted, and return what the manager printed."""
    said: list[str] = []
    model, manager = managed(said=said, device_budget_gib=bytes_of(tiny()) * 2.5 / GIB, host_budget_gib=0.1)
    ticks = itertools.count()  # forward takes 50 us, and so hides the predicted update, but not a slow one
    with mock.patch("memory.tracer.moment", lambda device: 50e-6 * next(ticks)):
        train(model, manager.optimizer, WARM_UP_STEPS)
    update_took = mock.patch.object(
        ChunkManager, "host_update_s", new_callable=mock.PropertyMock, create=True
    )
    with mock.patch("memory.auto.WATCH_EVERY", 1), update_took as seconds:
        seconds.return_value = 100 * manager.plan.seconds["update"]
        train(model, manager.optimizer, 1)
        seconds.return_value = manager.plan.seconds["update"]
        train(model, manager.optimizer, 3)
    manager.close()
    return said


def test_an_update_far_from_its_prediction_is_planned_again_once():
    (said,) = run_on(1, drifting)
    assert (
        len(said) == 4
        and "planned again, because the update took" in said[2]
        and said[3].startswith("memory plan, auto")
    ), said


def one_rank_has_less_room():
    peak = 1000 if dist.get_rank() else 0
    model, manager = managed(
        peak,
        host_budget_gib=0.1,
        device_budget_gib=bytes_of(tiny()) * 3 / GIB,
    )
    train(model, manager.optimizer, WARM_UP_STEPS)
    manager.close()
    return [placement.value for placement in manager.plan.homes], manager.plan.other_device_bytes


def test_ranks_agree_on_the_highest_peak():
    (one, one_peak), (other, other_peak) = run_on(2, one_rank_has_less_room)
    assert one == other and one_peak == other_peak == 1000


def too_many_activations() -> tuple[str, float, list[str]]:
    """Return the refusal, how far weights moved, and the hooks of the tracer that are left."""
    model, manager = managed(100_000, device_budget_gib=50_000 / GIB)
    before = weights(model)
    with pytest.raises(UsageError) as refusal:
        train(model, manager.optimizer, 1, max_norm=1.0)
    moved = (weights(model) - before).abs().max().item()
    manager.close()
    return str(refusal.value), moved, [hook for layer in model.layers for hook in layer._forward_hooks]


def test_what_cannot_fit_is_refused_with_the_nearest_budget_before_any_weight_has_changed():
    ((said, moved, hooks),) = run_on(1, too_many_activations)
    assert (
        said.startswith("device_budget_gib=")
        and "nearest setting that works is device_budget_gib=0.0001" in said
    )
    assert moved == 0 and hooks == []
    with pytest.raises(UsageError, match="besides activations; use that much and what activations need"):
        managed(device_budget_gib=bytes_of(tiny()) * 0.9 / GIB)


def steps_without_a_forward() -> list[str]:
    said: list[str] = []
    model, manager = managed(said=said, host_budget_gib=0.1)
    for _ in range(WARM_UP_STEPS + 1):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        manager.optimizer.step()
        manager.optimizer.zero_grad()
    saved_plan = lambda: manager.optimizer.checkpoint_state()["plan"]["0"]
    assert manager.auto.is_tracing and saved_plan() == ""
    manager.auto.take_plan("")  # a checkpoint from before the plan: traced anew
    train(model, manager.optimizer, WARM_UP_STEPS - 1)
    assert manager.auto.is_tracing
    train(model, manager.optimizer, 1)
    assert not manager.auto.is_tracing and json.loads(saved_plan())["policy"] == "auto"
    manager.close()
    return said


def test_only_steps_with_a_forward_are_traced():
    (said,) = run_on(1, steps_without_a_forward)
    assert [line.split(":")[0] for line in said if line.startswith("memory plan")] == ["memory plan, auto"]


# bytes of the host, of which the largest parameter takes three copies in passing
LITTLE = 12_885 + 3 * 4 * 33 * 20


def only_one_rank_has_no_room() -> str:
    """Both ranks have room for the warm-up, one of them little on the host; then activations are seen."""
    little = LITTLE / GIB
    model, manager = managed(
        1000, device_budget_gib=10_400 / GIB, host_budget_gib=1.0 if dist.get_rank() else little
    )
    with pytest.raises(UsageError) as refusal:
        train(model, manager.optimizer, 1, max_norm=1.0)
    manager.close()
    return str(refusal.value)


def test_what_one_rank_refuses_ends_all():
    one, other = run_on(2, only_one_rank_has_no_room, timeout=30)
    assert f"host_budget_gib={LITTLE / GIB:.4g}" in one and "another rank" in other, (one, other)
