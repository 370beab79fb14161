"""A whole step of llama2-7b, and of a tp rank of llama2-70b, on tensors without memory: what a GPU would
refuse raises here.

On `meta` every operation checks shapes, dtypes and devices, and computes nothing. What would make the host
wait for the device raises: .item(), bool(), .cpu(), nonzero(). So does a tensor that was left on the CPU.
Batches come from the CPU, as the reader gives them. Not covered: FSDP and pipeline transfers, which need real
devices, and what only happens on `cuda`.
"""

from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from pool import run_on

from dtensor_llama import Llama, LlamaConfig
from dtensor_llama.chat.lora import LoraConfig, apply_lora
from dtensor_llama.data.reader import Batch
from dtensor_llama.model import LlamaMLP
from parallel import ParallelConfig, build_mesh
from parallel.apply import Computation
from parallel.assemble import adamw, assemble
from parallel.mesh import Layout
from recipes import pretrain

T, N_MICROS = 4096, 2
META = torch.device("meta")


@dataclass(frozen=True)
class Step:
    preset: str
    n_layers: int
    recompute: str = "none"
    packed: bool = False
    lora: bool = False
    tp: int = 1


STEPS = {
    "7b": Step("llama2-7b", 32),
    "7b-selective-packed": Step("llama2-7b", 32, "selective", packed=True),
    "7b-full": Step("llama2-7b", 32, "full"),
    "7b-lora-packed": Step("llama2-7b", 32, lora=True, packed=True),
    # Of 80 layers as many as make the test short; a rank of tp has its share of each, of the embedding and of
    # the head.
    "70b-tp-8-packed": Step("llama2-70b", 4, packed=True, tp=8),
    "70b-tp-8-selective-lora": Step("llama2-70b", 4, "selective", lora=True, tp=8),
    "70b-tp-16-full": Step("llama2-70b", 4, "full", tp=16),  # 8 key/value heads, each for two ranks
}


def packed_positions() -> torch.Tensor:
    return torch.cat([torch.arange(n_tokens) for n_tokens in (1000, 1, 95, 3000)])[None]


DEFECTS = {
    "none": LlamaMLP.forward,
    "item": lambda mlp, x: mlp.down_proj(mlp.gate_proj(x)) * x.abs().max().item(),
    "bool": lambda mlp, x: mlp.down_proj(mlp.gate_proj(x)) if x.isfinite().all() else x,
    "cpu": lambda mlp, x: mlp.down_proj(mlp.gate_proj(x)) * x.float().mean().cpu(),
    "nonzero": lambda mlp, x: mlp.down_proj(mlp.gate_proj(x)) * len(x[0, :, 0].nonzero()),
    "left on the CPU": lambda mlp, x: mlp.down_proj(mlp.gate_proj(x)) * torch.ones(x.shape[-1]),
}


# The fused AdamW can do `meta`, and is told here not to ask whether `meta` is on its list of devices.
@mock.patch("torch.optim.adam._device_dtype_check_for_fused", lambda *args, **how: None)
def recipe_step(step: Step, defect: str = "none") -> tuple[str, str, str]:
    """Set up and run one step and a validation as recipes/pretrain.py does; where its loss, gradient norm and
    nats are."""
    import torch.testing._internal.distributed.fake_pg  # noqa: F401  its collectives return at once: peers are not needed

    dist.init_process_group("fake", store=dist.HashStore(), rank=step.tp - 1, world_size=step.tp)
    config = replace(LlamaConfig.preset(step.preset), num_hidden_layers=step.n_layers)
    sizes = ParallelConfig(tp=step.tp).resolve(step.tp)
    with META:
        model = Llama(config)
    if step.lora:
        apply_lora(model, LoraConfig(rank=16), torch.bfloat16)
    model.to(torch.bfloat16)  # weights that compute as they are: nothing is left for FSDP to cast

    layout = Layout(sizes, build_mesh(sizes, "cpu"), N_MICROS)
    computation = Computation(META, torch.bfloat16, step.recompute)
    with mock.patch("parallel.apply.apply_zero", lambda *args: None):
        training = assemble(model, layout, computation, adamw(3e-4, 0.1))
    micros = [
        Batch(*torch.zeros(2, 1, T, dtype=torch.int64), packed_positions() if step.packed else None)
        for _ in range(N_MICROS)
    ]
    with mock.patch.object(LlamaMLP, "forward", DEFECTS[defect]):
        loss, grad_norm = pretrain.train_step(training, micros, N_MICROS * T, 3e-4, 1.0)
        nats = training.sum_of_losses(micros[:1])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and all("exp_avg" in training.optimizer.state[parameter] for parameter in trained)
    return loss.device.type, grad_norm.device.type, nats.device.type


@pytest.mark.parametrize("name", STEPS)
def test_a_whole_step_is_on_one_device_and_fetches_nothing(name):
    assert run_on(1, recipe_step, STEPS[name], group=False) == [("meta", "meta", "meta")]


def messages_of_defects() -> dict[str, str]:
    messages = {}
    for defect in DEFECTS:
        try:
            recipe_step(Step("llama2-7b", n_layers=1), defect)
        except (RuntimeError, NotImplementedError) as error:
            messages[defect] = str(error)
        dist.destroy_process_group()
    return messages


def test_a_fetch_to_the_host_or_a_tensor_left_there_would_raise():
    (messages,) = run_on(1, messages_of_defects, group=False)
    assert set(messages) == set(DEFECTS) - {"none"}
    assert all("meta" in message for message in messages.values()), messages
