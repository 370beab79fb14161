"""Gradient norms are float64's, clipping is one contract, and what is not finite changes nothing."""

import copy
import math

import pytest
import torch
from emulated_lanes import QueuedLanes
from pool import run_on
from test_memory_parity import PLANS, adamw, managed, plan_of, tiny, train
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from dtensor_llama import LlamaConfig
from dtensor_llama.model import Llama
from dtensor_llama.optim import float64_norms
from dtensor_llama.shards import local
from memory import ChunkManager, MemoryConfig, Overrides, TrainingLoop
from memory.chunk import cut, find_params
from parallel import Booster, ParallelConfig
from parallel.clip import clip_grad_norm

BF16 = torch.bfloat16
ON = MemoryConfig("static", 1, 0, 0, kernel="blocks")


# ---- the norm ----


N = 2**22 + 77


def numbers(kind: str) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    normal = torch.randn(N, generator=draw)
    if kind == "one large":
        normal[N // 3] = 1e6
    made = {
        "normal": normal,
        "one large": normal,
        "all alike": torch.full((N,), 0.1),
        "bfloat16": normal.to(BF16),
        "heavy tails": torch.empty(N).cauchy_(generator=draw),
        "tiny": normal * 1e-30,
        "huge": normal * 1e30,
    }
    return made[kind]


KINDS = ["normal", "one large", "all alike", "bfloat16", "heavy tails", "tiny", "huge"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_is_float64s_whatever_the_numbers_are_and_however_they_are_cut(kind):
    x = numbers(kind)
    exact = sum(part.double().square().sum().item() for part in x.split(2**16)) ** 0.5
    cuts = [[x], x.split(N // 3), x[: N // 7 * 7].view(7, -1).unbind() + (x[N // 7 * 7 :],)]
    for parts in cuts:
        norms = torch.stack(float64_norms(parts))
        assert norms.dtype == torch.float64
        assert norms.square().sum().sqrt().item() == pytest.approx(exact, rel=1e-12)


def test_norms_of_no_tensors_and_of_empty_ones():
    assert float64_norms([]) == []
    assert float64_norms([torch.empty(0), torch.empty(3, 0)]) == [0.0, 0.0]


def test_the_norm_does_not_depend_on_the_placement():
    norms = []
    for homes in PLANS.values():
        for accumulation in (1, 2):
            sizes = {"sizes": (700, 700, 5), "chunk_elements": 2**17}
            model, manager = managed(homes, accumulation=accumulation, **sizes)
            model(torch.ones(3, 700)).backward()
            norms.append(manager.clip_grad_norm(1.0).item())
            manager.close()
    model = tiny(sizes=(700, 700, 5))
    model(torch.ones(3, 700)).backward()
    norms.append(clip_grad_norm(model.parameters(), 1.0).item())
    assert max(norms) / min(norms) - 1 < 1e-12


# ---- the contract of clipping ----


def spread(how: str) -> nn.Module:
    """The same weights, plain or over the ranks there are."""
    model = tiny(sizes=(8, 32, 20, 6))
    tp = {"layers.0": ColwiseParallel(), "layers.1": RowwiseParallel()}
    if how == "tp":
        parallelize_module(model, init_device_mesh("cpu", (2,)), tp)
        for layer in model.layers[2:]:
            parallelize_module(layer, init_device_mesh("cpu", (2,)), ColwiseParallel())
    if how == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return model


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [local(p.grad).clone() for p in model.parameters()]


def draw_gradients(model: nn.Module, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
        local(p.grad).copy_(torch.randn(local(p).shape, generator=draw))


def both_ways(how: str) -> tuple[float, float]:
    """(largest difference of weights, norm) of clipping in place and in the step: three steps, and one
    without."""
    models = [spread(how), spread(how)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True) for model in models]
    for seed in range(4):
        norms = []
        for in_step, model, optimizer in zip((False, True), models, optimizers, strict=True):
            draw_gradients(model, seed)
            before = gradients(model)
            if seed < 3:
                norm = clip_grad_norm(model.parameters(), 0.3, optimizer, in_step)
                norms.append(norm.item())
                scale = 1.0 if in_step else 0.3 / (norm.item() + 1e-6)
                for ours, grad in zip(gradients(model), before, strict=True):
                    torch.testing.assert_close(ours, grad * scale, rtol=1e-6, atol=0)
            optimizer.step()
            assert optimizer.grad_scale is None and optimizer.found_inf is None
        assert len(set(norms)) <= 1
    pairs = zip(*(model.parameters() for model in models), strict=True)
    return max((local(a) - local(b)).abs().max().item() for a, b in pairs), norm.item()


@pytest.mark.parametrize("how", ["plain", "fsdp", "tp"])
def test_clipping_in_the_step_is_clipping_in_place_for_plain_and_sharded_parameters(how):
    for difference, _ in run_on(2, both_ways, how) if how != "plain" else [both_ways(how)]:
        assert difference < 1e-6


def test_a_norm_that_is_only_asked_for_changes_nothing():
    model = tiny()
    optimizer = adamw(model)
    train(model, optimizer, 2)
    other, its_optimizer = copy.deepcopy((model, optimizer))
    for in_step in (False, True):
        draw_gradients(model, 1)
        before = gradients(model)
        clip_grad_norm(model.parameters(), math.inf, optimizer, in_step)
        assert all(map(torch.equal, gradients(model), before))
        optimizer.step()
        draw_gradients(other, 1)
        its_optimizer.step()
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_an_optimizer_that_cannot_clip_in_its_step_is_refused():
    model = tiny()
    draw_gradients(model, 0)
    with pytest.raises(ValueError, match=r"AdamW cannot clip in its step; give AdamW\(..., fused=True\)"):
        clip_grad_norm(model.parameters(), 1.0, torch.optim.AdamW(model.parameters()), in_step=True)


# ---- what is not finite ----


def states_of(model: nn.Module, optimizer) -> list[torch.Tensor]:
    """Copies of this rank's weights, moments and step counts."""
    if hasattr(optimizer, "manager"):
        optimizer.manager.wait()
        masters = [optimizer.manager.read_state("master", one) for one in optimizer.manager.params]
    else:
        masters = []
    kept = [optimizer.state[p] for p in model.parameters()]
    states = [state[name] for state in kept for name in ("exp_avg", "exp_avg_sq", "step")]
    return masters + [local(tensor).clone() for tensor in [*model.parameters(), *states]]


def one_step(
    model, optimizer, seed: int, bad: float | None = None, max_norm: float = 0.5, accumulation: int = 1
) -> float:
    """bad: what one element of the gradient is on the last rank, in its last microbatch."""
    for micro in range(accumulation):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * seed + micro))
        is_place = micro == accumulation - 1 and torch.distributed.get_rank() == 1
        model.layers[1].weight.bad = bad if is_place else None
        (model(x.to(next(model.parameters()).dtype)) * 10).backward()
    norm = clip_grad_norm(model.parameters(), max_norm, optimizer, in_step=is_fused(optimizer)).item()
    optimizer.step()
    optimizer.zero_grad()
    return norm


def is_fused(optimizer) -> bool:
    return all(group.get("fused") for group in optimizer.param_groups)


def spoil(parameter: nn.Parameter) -> None:
    """As its gradient arrives, before a chunk manager sees it."""
    bad = getattr(parameter, "bad", None)
    if bad is not None:
        local(parameter.grad).view(-1)[3] = bad


def build(placement: str, dtype: torch.dtype, accumulation: int, config=ON, lanes=None):
    """Two ranks' model and optimizer: torch's AdamW, fused or not, or a chunk manager's."""
    model = tiny(sizes=(8, 33, 20, 6), dtype=torch.float32 if placement in ("fused", "foreach") else dtype)
    in_float32 = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), mp_policy=in_float32)
    model.layers[1].weight.register_post_accumulate_grad_hook(spoil)
    if placement == "foreach":
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    optimizer = adamw(model)
    if placement == "fused":
        return model, optimizer
    sizes = [chunk.n for chunk in cut(find_params(model, [model], optimizer), 64)]
    plan = plan_of(sizes, PLANS[placement] * 2)
    loop = TrainingLoop(accumulation=accumulation)
    manager = ChunkManager(model, optimizer, config, loop, overrides=Overrides(plan, 64, lanes))
    return model, manager.optimizer


def nothing_changes(
    placement: str, dtype: torch.dtype, accumulation: int, max_norm: float, bad: float, config=ON, lanes=None
) -> None:
    """On each of two ranks, of which one has the bad element."""
    plant = {"accumulation": accumulation, "max_norm": max_norm}
    runs = [
        build(placement, dtype, accumulation, config, lanes),
        build(placement, dtype, accumulation, config),
    ]
    for seed in range(2):
        assert len({one_step(*run, seed, **plant) for run in runs}) == 1
    before = states_of(*runs[0])
    for _ in range(2):
        assert not math.isfinite(one_step(*runs[0], 5, bad=bad, **plant))
        assert all(map(torch.equal, states_of(*runs[0]), before))
    one_step(*runs[0], 5, bad=bad, **plant)  # the next step follows without a look at the states
    for run in runs:
        one_step(*run, 6, **plant)
        one_step(*run, 7, **plant)
    after = states_of(*runs[0])
    assert all(map(torch.equal, after, states_of(*runs[1])))
    assert not all(map(torch.equal, after, before))
    for _, optimizer in runs:
        if hasattr(optimizer, "manager"):
            optimizer.manager.close()


CASES = [
    ("fused", torch.float32, 1, 0.5),
    ("fused", torch.float32, 1, math.inf),
    ("foreach", torch.float32, 1, 0.5),
    *(
        (placement, dtype, accumulation, 0.5)
        for placement in PLANS
        for dtype in (torch.float32, BF16)
        for accumulation in (1, 2)
    ),
    ("all three", BF16, 1, math.inf),
]


def all_cases(bad: float) -> None:
    for placement, dtype, accumulation, max_norm in CASES:
        try:
            nothing_changes(placement, dtype, accumulation, max_norm, bad)
        except AssertionError as error:
            raise AssertionError(
                f"{placement}, {dtype}, {accumulation} accumulation, max_norm {max_norm}"
            ) from error


@pytest.mark.parametrize("bad", [math.nan, pytest.param(-math.inf, marks=pytest.mark.slow)])
def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any_with_any_placement(bad):
    run_on(2, all_cases, bad)


def late_queues(seed: int | None) -> None:
    for placement in PLANS:
        nothing_changes(placement, BF16, 1, 0.5, math.nan, lanes=QueuedLanes(seed))


@pytest.mark.parametrize("seed", [None, 0])
def test_it_changes_nothing_where_all_work_is_as_late_as_it_may_be(seed):
    run_on(2, late_queues, seed)


def compiled_cases() -> None:
    compiled = MemoryConfig("static", 1, 0, 0, kernel="compiled")
    for placement in ("all three", "cpu"):
        nothing_changes(placement, BF16, 1, 0.5, math.nan, config=compiled)


@pytest.mark.slow
def test_it_changes_nothing_with_compiled_kernels():
    run_on(2, compiled_cases, timeout=400)


def boosted(kind: str) -> None:
    """Gradients are scaled when the Booster's clip returns, and a step with what is not finite is none."""
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    booster = Booster(ParallelConfig())
    model = Llama(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=kind == "fused")
    model, optimizer, _, _ = booster.boost(model, optimizer)
    tokens = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(torch.distributed.get_rank()))
    for bad in (None, math.inf, None):
        booster.step({"input_ids": tokens, "labels": tokens})
        if bad is not None and torch.distributed.get_rank() == 1:
            local(next(model.parameters()).grad).view(-1)[0] = bad
        before = states_of(model, optimizer) if bad else []
        norm = booster.clip_grad_norm(0.01).item()
        if bad is None:
            scaled = clip_grad_norm(model.parameters(), math.inf).item()
            assert scaled == pytest.approx(0.01, rel=1e-3) and norm > 0.01
        optimizer.step()
        optimizer.zero_grad()
        assert all(map(torch.equal, states_of(model, optimizer), before)) if bad else math.isfinite(norm)


@pytest.mark.parametrize("kind", ["fused", "foreach"])
def test_the_booster_scales_in_place_and_steps_nothing_that_is_not_finite(kind):
    run_on(2, boosted, kind)


@pytest.mark.parametrize("plan", PLANS)
def test_it_changes_nothing_with_the_code_of_compiled_kernels(plan, monkeypatch):
    """That code, run as it is written: on the host it would step with whatever it is given."""
    monkeypatch.setattr("memory.kernel._compiled", lambda step, **how: step)
    compiled = MemoryConfig("static", 1, 0, 0, kernel="compiled")
    model, manager = managed(PLANS[plan], dtype=BF16, config=compiled)
    train(model, manager.optimizer, 2, max_norm=0.5)
    before = states_of(model, manager.optimizer)
    (model(torch.ones(1, 7, dtype=BF16)) * math.nan).backward()
    manager.clip_grad_norm(1.0)
    manager.optimizer.step()
    assert all(map(torch.equal, states_of(model, manager.optimizer), before))
    manager.close()
