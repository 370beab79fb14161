"""What can only be checked on an accelerator; asked for with `pytest -m gpu` (recipes/bench/gpu.sh does)."""

import json
from dataclasses import replace

import pytest
import torch
from recipe import metrics, recipe
from recipe import pretrain_flags as flags
from test_memory_manager import CLIP, HYPER, chunk_of, exact
from test_memory_parity import (
    ON,
    PLANS,
    SMALL_CHUNKS,
    adamw,
    chunk_sizes,
    masters_of,
    plan_of,
    tiny,
    train,
    weights,
)
from torch.testing import assert_close

from dtensor_llama import Llama, LlamaConfig, loss
from dtensor_llama.attention import AttentionMask, WholeSequences, attention, choose_attention
from dtensor_llama.checkpoint import Checkpointer, SavedWeights, training_state
from dtensor_llama.generate import KVCache
from dtensor_llama.model import init_weights
from dtensor_llama.optim import build_adamw, float64_norms
from memory import ChunkManager, Home, Overrides, TrainingLoop
from memory.kernel import Kernel, join_master, split_master
from parallel import ParallelConfig, build_mesh
from parallel.clip import clip_grad_norm
from parallel.context import apply_context_parallel
from parallel.mesh import start_process_group, stop_process_group
from parallel.recompute import apply_recompute
from parallel.tensor import apply_tensor_parallel
from parallel.zero import apply_zero

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize(
    "kernel,packed", [("sdpa", False), ("sdpa", True), ("varlen", True), ("flash", False), ("flash", True)]
)
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_fused_kernels_equal_the_maths_in_bfloat16(kernel, packed, kv_heads):
    device = torch.device("cuda")
    if kernel == "flash":
        pytest.importorskip("flash_attn")
    q, k, v = (
        torch.randn(2, 256, heads, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        for heads in (8, kv_heads, kv_heads)
    )
    positions = torch.cat([torch.arange(n) for n in (100, 1, 155)]).expand(2, -1)
    results = {}
    for name in ("math", kernel):
        documents = AttentionMask.of_documents(positions, name, device) if packed else None
        out = attention(q, k, v, name, documents)
        results[name] = [out, *torch.autograd.grad(out.float().square().sum(), [q, k, v])]
    for ours, reference in zip(results[kernel], results["math"], strict=True):
        assert_close(ours, reference, rtol=2e-2, atol=2e-2 * reference.abs().max().item())


@pytest.mark.parametrize("kernel", ["auto", "math"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_logits_and_gradients_on_the_gpu_equal_the_cpu_in_float32(kv_heads, kernel):
    config = LlamaConfig(
        vocab_size=307,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
    )
    on_cpu, on_gpu = Llama(config), Llama(config).cuda()
    on_gpu.attention = WholeSequences(choose_attention(kernel, torch.device("cuda"), torch.float32)[0])
    tokens = torch.randint(307, (2, 50))
    positions = torch.cat([torch.arange(n) for n in (20, 1, 29)]).expand(2, -1)
    for packed in (None, positions):
        logits, expected = on_gpu(tokens.cuda(), positions=packed), on_cpu(tokens, positions=packed)
        assert_close(logits.cpu(), expected, rtol=0, atol=1e-4)
        for model, out in ((on_gpu, logits), (on_cpu, expected)):
            model.zero_grad()
            out.square().sum().backward()
        for ours, reference in zip(on_gpu.parameters(), on_cpu.parameters(), strict=True):
            largest = reference.grad.abs().max().item()
            assert_close(ours.grad.cpu(), reference.grad, rtol=0, atol=1e-4 * largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_over_a_cache_continue_prompts_of_unequal_lengths_as_the_whole_sequences_would(dtype):
    """One new token at a time, and several: what is decoded equals the logits of the sequences as a whole."""
    config = LlamaConfig(
        vocab_size=307,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = Llama(config).to("cuda", dtype)
    tokens = torch.randint(307, (2, 40), device="cuda")
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for padding in (None, torch.tensor([0, 7], device="cuda")):
        cache, parts = KVCache(40, padding), []
        with torch.no_grad():
            model.attention = WholeSequences("sdpa")
            for new in tokens.split([25, 9, 3, 1, 1, 1], dim=1):
                parts.append(model(new, cache=cache))
            model.attention = WholeSequences("math")
            whole = model(tokens, cache=KVCache(40, padding))
        assert_close(torch.cat(parts, dim=1)[:, 7:], whole[:, 7:], rtol=tolerance, atol=tolerance)


def test_initial_weights_are_the_same_on_every_device():
    config = LlamaConfig.preset("tiny-1m")
    with torch.device("meta"):
        model = Llama(config)
    model.to_empty(device="cuda")
    init_weights(model, seed=0)
    for ours, expected in zip(model.parameters(), Llama(config).parameters(), strict=True):
        assert_close(ours.cpu(), expected, rtol=0, atol=0)


def test_auto_takes_a_fused_kernel():
    device = torch.device("cuda")
    assert choose_attention("auto", device, torch.bfloat16)[0] in ("flash", "sdpa")
    assert choose_attention("auto", device, torch.bfloat16, documents=True)[0] in ("flash", "varlen")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_compiled_loss_equals_the_eager_one(monkeypatch, dtype):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 256 * 1111)  # chunks of 256 tokens, the last one of 100
    hidden, weight = (
        torch.randn(n, 128, device="cuda", dtype=dtype, requires_grad=True) for n in (612, 1111)
    )
    labels = torch.randint(1111, (612,), device="cuda")
    labels[::7] = loss.IGNORE
    results = []
    for how in ("compiled", "eager"):
        monkeypatch.setattr(loss, "choose_loss", lambda device, how=how: (how, ""))
        nll_sum = loss.token_loss_sum(hidden, weight, labels)
        results.append([nll_sum.detach(), *torch.autograd.grad(nll_sum, [hidden, weight])])
    for compiled, eager in zip(*results, strict=True):
        # the gradient of a logit may round the other way
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        assert_close(compiled, eager, rtol=tolerance, atol=tolerance * eager.abs().max().item())


@pytest.mark.parametrize("kernel", ["blocks", "compiled"])
@pytest.mark.parametrize("max_norm", [None, 0.01])
@pytest.mark.parametrize("plan", PLANS)
def test_every_placement_on_a_gpu_equals_torchs_adamw(plan, max_norm, kernel):
    of = {}
    for who in ("torch", "manager"):
        model = tiny().cuda()
        optimizer = adamw(model)
        if who == "manager":
            placements = plan_of(chunk_sizes(model, optimizer, 64), PLANS[plan])
            manager = ChunkManager(
                model,
                optimizer,
                replace(ON, kernel=kernel),
                TrainingLoop(clips=max_norm is not None),
                overrides=Overrides(placements, 64),
            )
            optimizer = manager.optimizer
        train(model, optimizer, 20, max_norm=max_norm)
        if who == "manager":
            manager.close()
        of[who] = weights(model)
    # host and device round differently in the last place
    assert_close(of["manager"], of["torch"], rtol=1e-5, atol=1e-7)


def test_the_compiled_kernels_of_the_device_are_exact_at_any_length_compiled_once_and_heed_a_factor_of_nan():
    device = torch.device("cuda")
    kernel = Kernel("compiled", device)
    for grad_dtype in (torch.bfloat16, torch.float32):
        kernel.warm_up_device(torch.bfloat16, grad_dtype, {5000})
    with torch.compiler.set_stance("fail_on_recompile"):
        for grad_dtype in (torch.bfloat16, torch.float32):
            for n in (900, 2048, 5000, 3 * 2**20, 3 * 2**20 + 64):
                master, m, v, grad = (tensor.to(device) for tensor in chunk_of(n, torch.bfloat16, grad_dtype))
                right = exact(master.cpu(), m.cpu(), v.cpu(), grad.cpu())
                states = (*split_master(master), m, v)
                before = [state.clone() for state in states]
                kernel.device_step(*states, grad, torch.tensor(torch.nan, device=device), HYPER)
                assert_close(states, before, rtol=0, atol=0)
                kernel.device_step(*states, grad, CLIP.to(device), HYPER)
                for ours, it in zip((join_master(*states[:2]), m, v), right, strict=True):
                    assert_close(ours.cpu().double(), it, rtol=2e-6, atol=1e-7)
                total, more = torch.randn(n, device=device), torch.randn(n, device=device).bfloat16()
                for adds in (True, False):
                    it = total + more.float() if adds else more.float()
                    kernel.sum_into(total, more, adds)
                    assert_close(total, it, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_on_the_gpu_is_float64s(dtype):
    for scale in (1.0, 1e-30, 1e30):
        x = (torch.randn(2**24 + 5, device="cuda") * scale).to(dtype)
        [norm] = float64_norms([x])
        assert_close(norm, x.double().square().sum().sqrt(), rtol=1e-12, atol=0)


def large(placements, device: str, clips: bool, one_at_a_time: bool) -> list[torch.Tensor]:
    """Masters after 6 steps of 50M bfloat16 parameters in chunks of a Mi, with every queue emptied in between
    or none."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048, bias=False) for _ in range(12))).to(
        device, torch.bfloat16
    )
    optimizer = adamw(model)
    plan = plan_of(chunk_sizes(model, optimizer, 2**20), placements)
    overrides = Overrides(plan, 2**20)
    manager = ChunkManager(model, optimizer, ON, TrainingLoop(clips=clips), overrides=overrides)

    def pause() -> None:
        if one_at_a_time:
            manager.wait()
            torch.cuda.synchronize()

    for step in range(6):
        x = torch.randn(64, 2048, generator=torch.Generator().manual_seed(step)).to(device, torch.bfloat16)
        loss = model(x).float().square().mean()
        pause()
        loss.backward()
        pause()
        if clips:
            manager.clip_grad_norm(1e-3)
        manager.optimizer.step()
        pause()
    masters = list(masters_of(manager).values())
    manager.close()
    return masters


@pytest.mark.parametrize("clips", [True, False])
@pytest.mark.parametrize("plan", ["resident", "stream", "cpu", "all three", "upside down"])
def test_nothing_depends_on_how_far_the_streams_have_come(plan, clips):
    """Copies take long here, so that a stream that does not await the computation, or memory that is let go
    of too early, is a wrong number: what queues without a GPU cannot show (tests/emulated_lanes.py)."""
    n, (r, s, c) = 48, Home
    placements = {
        "resident": [r] * n,
        "stream": [s] * n,
        "cpu": [c] * n,
        "all three": [r] * (n // 3) + [s, c] * n,
        "upside down": [c, s] * (n // 3) + [r] * n,
    }[plan]
    ours, right = (large(placements, "cuda", clips, one_at_a_time) for one_at_a_time in (False, True))
    assert_close(ours, right, rtol=0, atol=0)


def test_a_device_budget_binds_the_allocator_until_the_manager_is_closed():
    model = tiny().cuda()
    optimizer = adamw(model)
    manager = ChunkManager(model, optimizer, replace(ON, device_budget_gib=0.5), overrides=SMALL_CHUNKS)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2**30, dtype=torch.uint8, device="cuda")
    manager.close()
    assert torch.empty(2**30, dtype=torch.uint8, device="cuda").nbytes == 2**30


@pytest.mark.parametrize("has_room", [True, False])
def test_a_checkpoint_holds_the_masters_whether_the_host_has_room_for_a_copy_or_not(tmp_path, has_room):
    """Without room all tensors pass through one buffer, which is right only if torch's writer takes one after
    another; on a machine with a GPU it would read ahead unless it is told not to."""
    config = LlamaConfig.preset("tiny-1m")
    with torch.device("meta"):
        model = Llama(config).to(torch.bfloat16)
    model.to_empty(device="cuda")
    manager = ChunkManager(model, build_adamw(model, 1e-3, 0.1), replace(ON, resident=0, cpu=1))
    init_weights(manager.masters(), seed=0)
    if not has_room:
        manager.budgets = manager.budgets | {"host": manager.bytes_needed(manager.plan)["host"]}
    assert manager.stages_checkpoints() == has_room
    saver = Checkpointer(tmp_path)
    saver.save(1, training_state(model, manager.optimizer, 1), wait=True)
    saver.close()
    manager.close()
    expected = dict(Llama(config).named_parameters())
    saved = SavedWeights(tmp_path / "step-00000001").read(
        {name: torch.empty_like(p) for name, p in expected.items()}
    )
    for name, value in expected.items():
        assert_close(saved[name], value.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("cp_method", ["ulysses", "ring"])
def test_every_pass_runs_on_nccl_with_one_rank_and_changes_nothing(cp_method, device=torch.device("cuda", 0)):
    config = replace(LlamaConfig.preset("tiny-1m"), num_key_value_heads=2)
    tokens, labels = torch.randint(
        config.vocab_size, (2, 2, 32), generator=torch.Generator().manual_seed(0)
    ).to(device)
    results = []
    start_process_group(device, 1)
    try:
        for layout in (None, ParallelConfig(zero_stage=3)):
            with torch.device("meta"):
                model = Llama(config)
            if layout:
                mesh = build_mesh(layout.resolve(1), device.type)
                model.attention = WholeSequences("math")
                apply_context_parallel(model, mesh["cp"], cp_method)
                apply_tensor_parallel(model, mesh["tp"], sequence_parallel=True)
                apply_recompute(list(model.model.layers), "full")
                apply_zero(model, list(model.model.layers), mesh, 3, torch.float32)
            else:
                model.attention = WholeSequences("math")
            model.to_empty(device=device)
            init_weights(model, seed=0)
            loss = model(tokens, labels=labels)
            loss.backward()
            results.append([loss.detach(), clip_grad_norm(model.parameters(), 1.0)])
    finally:
        stop_process_group()
    assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--train.compile"],
        ["--train.recompute", "selective"],
        ["--train.recompute", "full"],
        ["--parallel.zero-stage", 0],
        ["--parallel.zero-stage", 1],
        ["--parallel.zero-stage", 2],
        [
            "--memory.placement",
            "static",
            "--memory.resident",
            0.4,
            "--memory.stream",
            0.3,
            "--memory.cpu",
            0.3,
            "--memory.activations",
        ],
        ["--memory.placement", "auto", "--memory.device-budget-gib", 4, "--memory.draw"],
    ],
)
def test_a_run_on_one_gpu_learns_resumes_and_reports_its_memory(inputs, tmp_path, more):
    run_dir = tmp_path / "run"
    arguments = flags(inputs, run_dir, "--data.document-mask", "--train.dtype", "bfloat16", *more)
    assert recipe("pretrain", *arguments, stop_at_step=4, timeout=300).status == 0
    assert recipe("pretrain", *arguments, timeout=300).status == 0
    rows = metrics(run_dir)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert all(row["device_memory_gib"] > 0 for row in rows)
    assert json.loads((run_dir / "config.json").read_text())["device"].startswith("cuda")
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
