"""Context parallelism: a sequence split over ranks gives what one process gives, for the work and the traffic
that it claims."""

import pytest
import torch
import torch.distributed as dist
from pool import run_on
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close

from dtensor_llama import Llama, LlamaConfig
from dtensor_llama.attention import AttentionMask, WholeSequences, attention
from dtensor_llama.model import init_weights
from parallel import context
from parallel.context import (
    apply_context_parallel,
    ring_rounds,
    shard_sequence,
    slices_of,
)
from parallel.recompute import apply_recompute

GQA = LlamaConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
)
T = 64


def sequences(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """tokens and labels (2, T), with unscored runs of uneven length, and positions of packed documents (2,
    T)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(97, (2, T + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[0, 3:20] = labels[1, 50:] = -100
    documents = [[5, 1, 17, 30, 11], [40, 24]]  # 40 begins in the first zigzag slice and ends in a late one
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in documents])
    positions[1, :40] += 7  # a document whose beginning is in an earlier sequence
    return tokens[:, :-1].contiguous(), labels, positions


def model_on(cp_mesh, method: str, kernel: str = "sdpa", config: LlamaConfig = GQA) -> Llama:
    model = Llama(config)
    init_weights(model, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():  # large enough for attention to matter
            if parameter.dim() == 2:
                parameter.mul_(5)
    model.attention = WholeSequences("math" if cp_mesh is None else kernel)
    if cp_mesh is not None:
        apply_context_parallel(model, cp_mesh, method)
    return model


# ---- attention alone ----


def assert_attention_is_whole(method: str, kernel: str, n_heads: int, n_kv_heads: int, packed: bool) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    generator = torch.Generator().manual_seed(n_heads)
    q, k, v, grad = (
        torch.randn(2, T, heads, 16, generator=generator).requires_grad_()
        for heads in (n_heads, n_kv_heads, n_kv_heads, n_heads)
    )
    tokens, _, positions = sequences()
    positions = positions if packed else None
    whole = attention(
        q, k, v, "math", AttentionMask.of_documents(positions, "math", q.device) if packed else None
    )
    whole_grads = torch.autograd.grad(whole, (q, k, v), grad)

    its_attention = model_on(mesh, method, kernel).attention
    _, mask = its_attention.prepare(T // mesh.size(), positions, None, q.device)
    mine = [shard_sequence(x, mesh, method).detach().requires_grad_() for x in (q, k, v)]
    out = its_attention(*mine, mask)
    grads = torch.autograd.grad(out, mine, shard_sequence(grad, mesh, method))
    assert_close(out, shard_sequence(whole, mesh, method), rtol=0, atol=2e-6)  # fp32: the order of summation
    for name, got, expected in zip("qkv", grads, whole_grads, strict=True):
        assert_close(
            got,
            shard_sequence(expected, mesh, method),
            rtol=2e-6,
            atol=1e-5,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def every_attention(method: str, heads: list[tuple[int, int]]) -> None:
    for n_heads, n_kv_heads in heads:
        for kernel in ("sdpa", "math"):
            for packed in (False, True):
                assert_attention_is_whole(method, kernel, n_heads, n_kv_heads, packed)
        if method == "ulysses":  # ring has no varlen: test_what_cannot_be_split_is_refused
            assert_attention_is_whole(method, "varlen", n_heads, n_kv_heads, packed=True)


@pytest.mark.parametrize("cp", [2, 4])
def test_ulysses_attention_and_its_gradients_are_those_of_the_whole_sequence(cp):
    # K a multiple of cp, K divides cp, K = 1, and neither divides the other (12 / 3 at cp 2 and 4)
    run_on(cp, every_attention, "ulysses", [(8, 8), (8, 2), (4, 1), (12, 3)])


@pytest.mark.parametrize("cp", [2, 4])
def test_ring_attention_and_its_gradients_are_those_of_the_whole_sequence(cp):
    run_on(cp, every_attention, "ring", [(4, 4), (6, 2), (3, 1)])  # no need for heads to divide by cp


# ---- the whole model ----


def losses_and_gradients(method: str, kernel: str, packed: bool, recompute: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    tokens, labels, positions = sequences()
    positions = positions if packed else None
    plain = model_on(None, "")
    expected = plain(tokens, labels, positions=positions)
    expected.backward()
    model = model_on(mesh, method, kernel)
    apply_recompute(list(model.model.layers), recompute)
    loss = model(*(shard_sequence(x, mesh, method) for x in (tokens, labels)), positions=positions)
    loss.backward()
    n_scored = (labels != -100).sum()
    total = loss.detach().clone()
    dist.all_reduce(total)  # the sum over cp of the ranks' token sums
    assert abs(total - expected) / n_scored < 2e-5
    for (name, parameter), reference in zip(model.named_parameters(), plain.parameters(), strict=True):
        dist.all_reduce(parameter.grad)
        difference = (parameter.grad - reference.grad).norm() / reference.grad.norm()
        assert difference < 1e-4, f"{name}: {difference}"


@pytest.mark.parametrize(
    "method,kernel,packed,recompute",
    [
        ("ulysses", "sdpa", False, "none"),
        ("ulysses", "math", True, "full"),
        ("ulysses", "sdpa", True, "selective"),
        ("ring", "sdpa", False, "none"),
        ("ring", "math", True, "full"),
        ("ring", "sdpa", True, "selective"),
    ],
)
def test_loss_and_gradients_of_a_split_sequence_equal_one_process(method, kernel, packed, recompute):
    run_on(4, losses_and_gradients, method, kernel, packed, recompute)


def five_steps(method: str | None) -> tuple[list[float], list[torch.Tensor]]:
    """Five AdamW steps; over cp with fully_shard, which shares the parameters among the ranks of cp. ->
    losses, weights"""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    model = model_on(mesh if method else None, method)
    if method:
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5), []
    for step in range(5):
        tokens, labels, positions = sequences(step)
        n_scored = (labels != -100).sum()
        if method:
            tokens, labels = (shard_sequence(x, mesh, method) for x in (tokens, labels))
        loss = model(tokens, labels, positions=positions) / n_scored
        (loss * mesh.size() if method else loss).backward()  # FSDP averages over cp; we want the sum
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if method:
            dist.all_reduce(total)
        losses.append(total.item())
    return losses, [(p.full_tensor() if method else p).detach() for p in model.parameters()]


@pytest.fixture(scope="module")
def plain_steps():
    return run_on(1, five_steps, None)[0]


@pytest.mark.parametrize("method", ["ulysses", "ring"])
def test_five_adamw_steps_sharded_over_cp_equal_one_process(method, plain_steps):
    losses, weights = run_on(2, five_steps, method)[0]
    assert_close(losses, plain_steps[0], rtol=0, atol=2e-5)
    for got, expected in zip(weights, plain_steps[1], strict=True):
        assert_close(got, expected, rtol=0, atol=1e-5)
    assert losses[4] < losses[0]


def bfloat16_step(method: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    tokens, labels, positions = sequences()
    plain = model_on(None, "").to(torch.bfloat16)
    expected = plain(tokens, labels, positions=positions)
    expected.backward()
    model = model_on(mesh, method).to(torch.bfloat16)
    loss = model(*(shard_sequence(x, mesh, method) for x in (tokens, labels)), positions=positions)
    loss.backward()
    dist.all_reduce(total := loss.detach().clone())
    assert abs(total / expected - 1) < 1e-2  # bf16 keeps 8 bits
    for parameter, reference in zip(model.parameters(), plain.parameters(), strict=True):
        grad = parameter.grad.float()
        dist.all_reduce(grad)
        assert (grad - reference.grad.float()).norm() / reference.grad.float().norm() < 0.05


@pytest.mark.parametrize("method", ["ulysses", "ring"])
def test_bfloat16_stays_near_one_process(method):
    run_on(2, bfloat16_step, method)


def compiled_block(method: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    tokens, labels, positions = sequences()
    tokens, labels = (shard_sequence(x, mesh, method) for x in (tokens, labels))
    losses, grads = [], []
    for compiled in (False, True):
        model = model_on(mesh, method)
        if compiled:
            for block in model.model.layers:
                block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
        losses.append(model(tokens, labels, positions=positions))
        grads.append(torch.autograd.grad(losses[-1], list(model.parameters())))
    assert_close(losses[1], losses[0])
    for got, expected in zip(*grads, strict=True):
        assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["ulysses", "ring"])
def test_a_block_compiles_into_one_graph(method):
    run_on(2, compiled_block, method)


# ---- work and traffic ----


@pytest.mark.parametrize("cp", [2, 3, 4, 8])
def test_zigzag_rounds_cover_the_causal_mask_once_with_equal_work(cp):
    n = 6  # tokens a share
    seen = torch.zeros(cp * n, cp * n, dtype=torch.int64)
    share = [
        torch.cat([torch.arange(n // 2) + s * n // 2 for s in slices_of("ring", r, cp)]) for r in range(cp)
    ]
    for rank in range(cp):
        rounds = ring_rounds(rank, cp, n)
        assert sorted(r.source for r in rounds) == list(range(cp))
        for hop, (source, queries, keys, causal) in enumerate(rounds):
            pairs = torch.ones(n, n, dtype=torch.int64)[queries, keys]
            assert causal == (hop == 0)
            assert pairs.numel() == (n * n if causal else n * n // 2)  # every rank, every round
            seen[share[rank][queries][:, None], share[source][keys]] += pairs.tril() if causal else pairs
    assert torch.equal(seen, torch.ones_like(seen).tril())


def bytes_sent(n_heads: int, n_kv_heads: int) -> tuple[int, int]:
    """What one rank sends in forward and in backward of ring attention; batch 2, head width 16, fp32."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    sent, original = [0], dist.batch_isend_irecv

    def spy(ops):
        sent[0] += sum(op.tensor.nbytes for op in ops if op.op is dist.isend)
        return original(ops)

    q, k, v = (
        torch.randn(2, T // mesh.size(), heads, 16, requires_grad=True)
        for heads in (n_heads, n_kv_heads, n_kv_heads)
    )
    dist.batch_isend_irecv = spy
    try:
        out = context.Ring(mesh, "sdpa")(q, k, v, None)
        forward = sent[0]
        out.sum().backward()
    finally:
        dist.batch_isend_irecv = original
    return forward, sent[0] - forward


def test_ring_sends_key_value_heads_unexpanded():
    for answer in run_on(4, bytes_sent, 8, 2):
        keys_and_values = 2 * 2 * (T // 4) * 2 * 16 * 4  # both, sequences, tokens, K heads, E, bytes
        # hops: of kv; of kv and of its gradients
        assert answer == (3 * keys_and_values, (3 + 4) * keys_and_values)


def heads_redistributed(n_heads: int, n_kv_heads: int) -> list[int]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    seen, original = [], context._redistribute
    context._redistribute = lambda x, *rest: seen.append(x.shape[2]) or original(x, *rest)
    try:
        q, k, v = (torch.randn(1, 4, heads, 16) for heads in (n_heads, n_kv_heads, n_kv_heads))
        context.Ulysses(mesh, WholeSequences("sdpa"))(q, k, v, None)
    finally:
        context._redistribute = original
    return seen


@pytest.mark.parametrize("n_heads,n_kv_heads,wire", [(8, 4, 4), (8, 2, 4), (8, 1, 4), (12, 3, 12)])
def test_ulysses_sends_the_fewest_key_value_heads_that_cp_divides(n_heads, n_kv_heads, wire):
    assert run_on(4, heads_redistributed, n_heads, n_kv_heads)[0] == [n_heads, wire, wire, n_heads // 4]


# ---- positions ----


def positions_of_each_share(method: str) -> tuple[list[int], list[int]]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    its_attention, device = model_on(mesh, method).attention, torch.device("cpu")
    unpacked, nothing = its_attention.prepare(4, None, None, device)
    assert nothing is None
    packed, mask = its_attention.prepare(4, torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]), None, device)
    assert mask is not None
    return unpacked[0].tolist(), packed[0].tolist()


def test_positions_are_the_true_ones_of_each_share():
    assert run_on(2, positions_of_each_share, "ulysses") == [
        ([0, 1, 2, 3], [0, 1, 2, 0]),
        ([4, 5, 6, 7], [1, 2, 3, 4]),
    ]
    assert run_on(2, positions_of_each_share, "ring") == [
        ([0, 1, 6, 7], [0, 1, 3, 4]),
        ([2, 3, 4, 5], [2, 0, 1, 2]),
    ]


# ---- GPU ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_the_cuda_kernels_of_this_torch_take_what_they_are_given(dtype, packed):
    """On `meta`, so without a GPU: names, arguments and shapes of the private ops, flash and
    memory-efficient."""
    q, k = (torch.empty(2, n, heads, 20, dtype=dtype, device="meta") for n, heads in ((72, 6), (40, 2)))
    mask = torch.empty(2, 1, 72, 40, dtype=torch.bool, device="meta") if packed else None
    out, lse = context._cuda_forward(q, k, k, not packed, mask)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, (2, 6, 72), torch.float32)
    grads = context._cuda_backward(out, q, k, k, out, lse, not packed, mask)
    assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype,atol", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("head_dim", [16, 20])  # 20: padded to 24 for the kernel
def test_the_cuda_kernels_of_a_block_equal_the_maths(dtype, atol, head_dim):
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, grad = (
        torch.randn(2, n, heads, head_dim, generator=generator, device="cuda", dtype=dtype)
        for n, heads in ((72, 6), (40, 2), (40, 2), (72, 6))
    )
    some = torch.rand(2, 1, 72, 40, generator=generator, device="cuda") > 0.5
    some[:, :, ::5] = False  # queries that see no key
    for causal, mask in ((False, None), (False, some), (True, None)):
        block = (q, q[:, :, :2], q[:, :, 2:4]) if causal else (q, k, v)
        (out, lse), (expected, expected_lse) = (
            context.block_forward(*block, causal, mask, kernel) for kernel in ("sdpa", "math")
        )
        assert_close(out, expected, rtol=0, atol=atol)
        assert_close(lse, expected_lse, rtol=0, atol=atol)
        total = torch.logaddexp(expected_lse, torch.ones_like(lse))  # as if other blocks had been seen
        got, wanted = (
            context.block_backward(grad, *block, expected, total, causal, mask, kernel)
            for kernel in ("sdpa", "math")
        )
        for mine, theirs in zip(got, wanted, strict=True):
            assert_close(mine.float(), theirs.float(), rtol=atol, atol=10 * atol)


@pytest.mark.gpu
def test_ring_of_one_gpu_equals_the_maths(tmp_path):
    dist.init_process_group("nccl", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cuda", (1,), mesh_dim_names=("cp",))
        q, k, v = (
            torch.randn(2, T, heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for heads in (8, 2, 2)
        )
        out = context.Ring(mesh, "sdpa")(q, k, v, None)
        expected = attention(q, k, v, "math")
        assert_close(out, expected, rtol=0, atol=2e-2)
        for got, wanted in zip(
            torch.autograd.grad(out.sum(), (q, k, v)),
            torch.autograd.grad(expected.sum(), (q, k, v)),
            strict=True,
        ):
            assert_close(got, wanted, rtol=2e-2, atol=5e-2)
    finally:
        dist.destroy_process_group()
