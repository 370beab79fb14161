"""LoRA: the same answer on any layout, merged equals unmerged, and the adapter's file is peft's."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from pool import run_on
from safetensors.torch import load_file
from test_one_answer import GQA, SEQUENCES, batch_of, whole_weights
from torch.testing import assert_close
from training import forward_backward, make_training
from versions import marks_for

from dtensor_llama import Llama, UsageError, save_hf
from dtensor_llama.chat.lora import (
    LoraConfig,
    adapter_parameters,
    apply_lora,
    init_lora,
    merge_lora,
    n_adapter_parameters,
    save_adapter,
)
from dtensor_llama.data.reader import Batch
from dtensor_llama.model import init_weights
from parallel import ParallelConfig
from parallel.apply import Computation
from parallel.clip import clip_grad_norm
from parallel.config import Job, check_parallel

LORA = LoraConfig(rank=4, alpha=8)
SHAPES = {
    "gqa": GQA,
    "tied": replace(GQA, tie_word_embeddings=True),
    "mqa": replace(GQA, num_key_value_heads=1),
}


def three_steps(
    shape: str,
    layout: ParallelConfig,
    micro: int,
    dtype: torch.dtype = torch.float32,
    recompute="none",
    out=None,
) -> dict:
    """Train the adapters on the ranks of the default group; export merged and unmerged into `out`."""
    config = SHAPES[shape]
    layout = layout.resolve(dist.get_world_size())
    n_micros = check_parallel(layout, Job(config, 32, SEQUENCES, micro, recompute=recompute))
    with torch.device("meta"):
        model = Llama(config)
    apply_lora(model, LORA, frozen_dtype=dtype)
    computation = Computation(dtype=dtype, recompute=recompute)
    training = make_training(model, layout, n_micros, computation, lr=1e-2, weight_decay=0.0)
    mesh, optimizer = training.layout.mesh, training.optimizer
    init_weights(model, seed=0)
    init_lora(model, seed=0)
    initial = whole_weights(model)
    losses, norms = [], []
    for step in range(3):
        batch = batch_of(step, masked=True)
        n_scored = (batch.labels != -100).sum()
        mine = [x.chunk(layout.dp)[mesh["dp"].get_local_rank()] for x in batch]
        micros = [Batch(*(x[i : i + micro] for x in mine)) for i in range(0, SEQUENCES // layout.dp, micro)]
        own = [training.layout.own_tokens(batch) for batch in micros]
        loss = forward_backward(training, own, n_scored)
        dist.all_reduce(loss, group=mesh["loss"].get_group())
        norms.append(clip_grad_norm(model.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    final = whole_weights(model)
    if out is not None:
        save_adapter(model, out / "adapter", LORA, "base")
        merge_lora(model)
        save_hf(model, out / "merged")
    return {"losses": losses, "norms": norms, "initial": initial, "final": final}


@functools.cache
def one_process(shape: str) -> dict:
    return run_on(1, three_steps, shape, ParallelConfig(), SEQUENCES)[0]


def case(
    ranks: int, shape: str = "gqa", micro: int = 1, recompute: str = "none", slow: bool = False, **layout
):
    name = (
        " ".join([f"{key}={value}" for key, value in layout.items()] or ["dp"])
        + f" {ranks} {shape} {recompute}"
    )
    return pytest.param(
        ranks,
        shape,
        micro,
        recompute,
        ParallelConfig(**layout),
        id=name,
        marks=[*marks_for(layout.get("schedule")), *[pytest.mark.slow] * slow],
    )


@pytest.mark.parametrize(
    "ranks,shape,micro,recompute,layout",
    [
        case(2, tp=2),
        case(2, pp=2, shape="tied"),
        *(
            functools.partial(case, slow=True)(ranks, **layout)
            for ranks, layout in [
                (2, {}),
                (2, {"zero_stage": 0}),
                (4, {"dp_replicate": 2}),
                (2, {"recompute": "selective", "micro": 2}),
                (4, {"tp": 4}),
                (4, {"tp": 4, "shape": "mqa"}),
                (4, {"tp": 2, "zero_stage": 1}),
                (4, {"tp": 2, "cp": 2}),
                (2, {"tp": 2, "sequence_parallel": False, "shape": "tied"}),
                (2, {"cp": 2, "cp_method": "ring"}),
                (2, {"pp": 2, "schedule": "zero-bubble"}),
                (8, {"pp": 2, "tp": 2}),
                (4, {"pp": 2, "tp": 2, "recompute": "full"}),
            ]
        ),
    ],
)
def test_adapters_train_alike_on_every_layout_and_frozen_weights_stay(ranks, shape, micro, recompute, layout):
    ours, expected = (
        run_on(ranks, three_steps, shape, layout, micro, torch.float32, recompute)[0],
        one_process(shape),
    )
    assert ours["initial"].keys() == expected["initial"].keys()
    assert all(torch.equal(ours["initial"][name], value) for name, value in expected["initial"].items())
    assert max(abs(a - b) for a, b in zip(ours["losses"], expected["losses"], strict=True)) < 2e-5
    assert max(abs(a / b - 1) for a, b in zip(ours["norms"], expected["norms"], strict=True)) < 1e-4
    for name, weight in ours["final"].items():
        if "_lora." in name:
            assert_close(weight, expected["final"][name], rtol=0, atol=1e-5)
        else:
            assert torch.equal(weight, ours["initial"][name]), name
    assert expected["losses"][0] != expected["losses"][-1]


def test_frozen_weights_are_bfloat16_beside_float32_adapters_and_merge_into_what_peft_reads(tmp_path):
    ours = run_on(2, three_steps, "gqa", ParallelConfig(tp=2), 1, torch.bfloat16, "none", tmp_path)[0]
    expected = run_on(1, three_steps, "gqa", ParallelConfig(), SEQUENCES, torch.float32)[0]
    assert max(abs(a - b) for a, b in zip(ours["losses"], expected["losses"], strict=True)) < 0.02
    assert {("_lora." in name, weight.dtype) for name, weight in ours["final"].items()} == {
        (True, torch.float32),
        (False, torch.bfloat16),
    }
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.model.layers.3.mlp.down_proj.lora_{one}.weight"] for one in "AB")
    merged = load_file(tmp_path / "merged/model.safetensors")["model.layers.3.mlp.down_proj.weight"]
    whole = ours["final"]["model.layers.3.mlp.down_proj.weight"].float() + LORA.scale * b @ a
    assert merged.dtype == torch.bfloat16 and torch.equal(merged, whole.bfloat16())


def test_a_model_with_adapters_is_not_saved_as_if_it_had_none(tmp_path):
    model = Llama(GQA)
    apply_lora(model, LORA)
    init_lora(model, seed=0)
    tokens = torch.arange(20)[None]
    with pytest.raises(ValueError, match="merge_lora"):
        save_hf(model, tmp_path)
    for name, parameter in adapter_parameters(model).items():
        assert name.endswith(("lora_A.weight", "lora_B.weight")) and parameter.requires_grad
        parameter.data += 0.1
    unmerged = model(tokens)
    merge_lora(model)
    assert not adapter_parameters(model)
    assert_close(model(tokens), unmerged, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "config,said",
    [
        (LoraConfig(rank=4, targets=("q_proj", "lm_head")), "lora.targets=lm_head: .* q_proj, k_proj"),
        (LoraConfig(rank=4, targets=("query_key_value",)), "query_key_value"),
        (LoraConfig(rank=4, targets=()), "there are q_proj"),
        (LoraConfig(rank=0), "lora.rank=0"),
        (LoraConfig(rank=4, alpha=-1), "lora.alpha=-1"),
    ],
)
def test_adapters_that_cannot_be_are_refused(config, said):
    with torch.device("meta"), pytest.raises(UsageError, match=said):
        apply_lora(Llama(GQA), config)


def test_the_count_of_adapter_parameters_is_what_there_is():
    with torch.device("meta"):
        model = Llama(GQA)
    apply_lora(model, LORA)
    assert n_adapter_parameters(GQA, LORA) == sum(p.numel() for p in adapter_parameters(model).values())
