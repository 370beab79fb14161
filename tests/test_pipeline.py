"""A pipeline gives the losses, gradients and weights of one process, under every schedule, and refuses what cannot run."""

import functools

import pytest
import torch
from pool import run_on
from torch.distributed.device_mesh import init_device_mesh

from dtensor_llama import Llama, LlamaConfig
from dtensor_llama.data.reader import Batch
from dtensor_llama.model import init_weights
from parallel.pipeline import make_step_runner, split_stages
from parallel.recompute import apply_recompute
from parallel.zero import apply_zero

CPU = torch.device("cpu")
TINY = LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
                   num_key_value_heads=2)
TIED = LlamaConfig(**{**vars(TINY), "tie_word_embeddings": True})


def make_micros(n, step=0, dp_rank=0, documents=False):
    """n microbatches of 2 rows of 32 tokens, each with another number of scored labels; the second has none at all."""
    micros = []
    for i in range(n):
        draw = torch.Generator().manual_seed(1000 * step + 100 * dp_rank + i)
        tokens, labels = torch.randint(61, (2, 2, 32), generator=draw)
        labels[torch.rand(labels.shape, generator=draw) < 0.2 * i] = -100
        if i == 1:
            labels[:] = -100
        positions = None
        if documents:
            cut = 5 + 3 * i
            positions = torch.cat([torch.arange(cut), torch.arange(32 - cut)]).expand(2, -1).contiguous()
        micros.append(Batch(tokens, labels, positions))
    return micros


def count_scored(micros):
    return sum(int((micro.labels != -100).sum()) for micro in micros)


def build(config, mesh, schedule, virtual_stages, n_micros, recompute="none", shard=False, compute_dtype=torch.float32):
    with torch.device("meta"):
        model = Llama(config)
    parts = split_stages(model, mesh["pp"], schedule, virtual_stages)
    for part in parts:
        blocks = [block for block in part.model.layers if block is not None]
        apply_recompute(blocks, recompute)
        if shard:
            apply_zero(part, blocks, mesh["dp_shard"], compute_dtype)
        part.to_empty(device=CPU)
    init_weights(model, seed=0)
    return model, make_step_runner(parts, mesh["pp"], schedule, n_micros, CPU, compute_dtype)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def loss_and_gradients(pp, cases):
    mesh = init_device_mesh("cpu", (pp,), mesh_dim_names=("pp",))
    answers = []
    for config, schedule, virtual_stages, n_micros, documents, recompute in cases:
        model, runner = build(config, mesh, schedule, virtual_stages, n_micros, recompute)
        micros = make_micros(n_micros, documents=documents)
        before = runner.evaluate_step(micros[:3]).item()
        loss = runner.step(micros, count_scored(micros), grad_scale=3.0).item()
        answers.append((before, loss, {name: p.grad for name, p in model.named_parameters()}))
    return answers


@functools.cache
def plain(config, n_micros, documents):
    model, micros = Llama(config), make_micros(n_micros, documents=documents)
    runner = make_step_runner([model], None, "1f1b", n_micros, CPU)
    nats = runner.evaluate_step(micros[:3]).item()
    loss = runner.step(micros, count_scored(micros), grad_scale=3.0).item()
    return nats, loss, {name: p.grad for name, p in model.named_parameters()}


def assert_same(case, ranks):
    config, _, _, n_micros, documents, _ = case
    nats, loss, gradients = plain(config, n_micros, documents)
    assert abs(sum(nats for nats, _, _ in ranks) - nats) < 1e-4 * nats
    assert abs(sum(loss for _, loss, _ in ranks) - loss) < 2e-5
    merged = {name: gradient for _, _, held in ranks for name, gradient in held.items()}
    assert merged.keys() == gradients.keys() and len(merged) == sum(len(held) for _, _, held in ranks)
    for name, gradient in gradients.items():
        difference = (merged[name] - gradient).norm() / gradient.norm()
        assert difference < 1e-4, f"{name}: {difference}"


SCHEDULES = [("gpipe", 1, 4), ("1f1b", 1, 4), ("interleaved-1f1b", 2, 4), ("zero-bubble", 2, 4), ("zbv", 2, 4), ("dualpipev", 2, 4)]


@pytest.mark.parametrize("schedule,virtual_stages,n_micros", SCHEDULES)
def test_losses_gradients_and_evaluation_equal_one_process(schedule, virtual_stages, n_micros):
    cases = [(config, schedule, virtual_stages, n_micros, documents, recompute)
             for config, documents, recompute in [(TINY, False, "none"), (TIED, True, "full")]]
    for case, *ranks in zip(cases, *run_on(2, loss_and_gradients, 2, cases), strict=True):
        assert_same(case, ranks)
