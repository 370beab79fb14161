"""What one GPU does by default, and what is refused before it is tried: decisions, so they need no GPU."""

import math
from dataclasses import replace

import pytest
import torch

from dtensor_llama import LlamaConfig, UsageError
from memory import MemoryConfig
from memory.chunk import GIB
from parallel import ParallelConfig
from parallel.assemble import check_skips
from parallel.cost import check_states

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
BF16, F32 = torch.bfloat16, torch.float32
SEVEN_B = LlamaConfig.preset("llama2-7b")
H100, H200 = 79.6 * GIB, 139.8 * GIB


@pytest.mark.parametrize(
    "asked,device,dtype,world_size,placement",
    [
        (None, CUDA, BF16, 1, "static"),  # the one case in which the manager is chosen
        (None, CUDA, F32, 1, "off"),  # float32 weights compute as they are in any case
        (None, CUDA, BF16, 2, "off"),  # FSDP has something to share
        (None, CPU, BF16, 1, "off"),
        ("off", CUDA, BF16, 1, "off"),  # what was asked for stays
        ("auto", CUDA, BF16, 1, "auto"),
    ],
)
def test_one_gpu_computes_with_bfloat16_weights_as_they_are_unless_told_otherwise(
    asked, device, dtype, world_size, placement
):
    memory, said = MemoryConfig(placement=asked).settle(device, dtype, world_size)
    assert memory.placement == placement
    assert (memory.resident == 1) == (placement == "static")
    assert bool(said) == (placement == "static") and ("placement=off" in said) == bool(said)
    memory.check()  # what was settled is a valid configuration


def test_a_budget_without_a_placement_binds_the_default_of_one_gpu_and_is_refused_where_that_is_off():
    asked = MemoryConfig(host_budget_gib=4)
    asked.check()
    assert asked.settle(CUDA, BF16, 1)[0].host_budget_gib == 4
    with pytest.raises(UsageError, match="host_budget_gib=4 would do nothing, because placement=off"):
        asked.settle(CPU, BF16, 1)
    with pytest.raises(UsageError, match="cpu=1 is for placement=static alone"):
        MemoryConfig(cpu=1.0).check()


@pytest.mark.parametrize(
    "skips,max_norm,memory,possible",
    [
        (0, math.inf, MemoryConfig("static", 1, 0, 0), True),
        (1, math.inf, MemoryConfig("static", 1, 0, 0), False),  # chunks are stepped before there is a norm
        (1, math.inf, MemoryConfig("off"), True),
        (1, 1e9, MemoryConfig("static", 1, 0, 0), True),
    ],
)
def test_steps_are_left_out_only_where_nothing_was_stepped_yet(skips, max_norm, memory, possible):
    if possible:
        return check_skips(skips, max_norm, memory)
    with pytest.raises(UsageError, match="skip_nonfinite=1 cannot skip a step.*max_grad_norm=inf"):
        check_skips(skips, max_norm, memory)


ONE, TWO = ParallelConfig().resolve(1), ParallelConfig().resolve(2)


@pytest.mark.parametrize(
    "memory,n_micros,layout,device_bytes,needed",
    [
        (MemoryConfig("off"), 1, ONE, H100, 100.4),  # 16 bytes a parameter
        (MemoryConfig("off"), 1, ONE, H200, None),
        (MemoryConfig("off"), 1, TWO, H100, None),  # half of them on each
        (MemoryConfig("off"), 1, replace(TWO, zero_stage=0), H100, 100.4),  # each has all
        (MemoryConfig("off"), 1, replace(TWO, zero_stage=1), H200, None),
        (
            MemoryConfig("static", 1, 0, 0),
            1,
            ONE,
            H100,
            87.9,
        ),  # 2 weight, 2 lower half, 8 moments, 2 gradient
        (MemoryConfig("static", 1, 0, 0), 4, ONE, H100, 100.4),  # microbatches are summed in float32
        (MemoryConfig("static", 0.5, 0, 0.5), 1, ONE, H100, None),
        (MemoryConfig("auto"), 4, ONE, H100, None),
        (MemoryConfig("auto"), 4, ONE, 12 * GIB, 12.6),  # not even the weights
    ],
)
def test_states_that_a_device_cannot_hold_are_refused_with_what_would_work(
    memory, n_micros, layout, device_bytes, needed
):
    n_bytes = memory.device_bytes_per_parameter(2, n_micros)
    if needed is None:
        return check_states(SEVEN_B, layout, device_bytes, n_bytes)
    with pytest.raises(UsageError, match=f"take {needed} GiB of each device.*placement=auto.*at least 2"):
        check_states(SEVEN_B, layout, device_bytes, n_bytes)
