"""What a dry run counts is what happens: bytes and collectives of real processes, counted by the same counter."""

import gc
import statistics
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from pool import run_on
from versions import marks_for

from dtensor_llama import Llama, LlamaConfig
from dtensor_llama.chat.lora import LoraConfig, apply_lora, init_lora
from dtensor_llama.model import init_weights
from memory import MemoryConfig
from parallel import ParallelConfig, build_mesh
from parallel.apply import Computation
from parallel.assemble import Offload, adamw, assemble
from parallel.dry_run import Setup, _microbatch, count_states, dry_run
from parallel.mesh import Layout
from parallel.rules import Job
from parallel.step_counter import StepCounter, groups_of
from recipes import pretrain

SMALL = LlamaConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=128,
)
SEQ_LEN = 128


@dataclass(frozen=True)
class Case:
    ranks: int
    layout: dict
    recompute: str = "none"
    n_microbatches: int = 2
    memory: dict | None = None
    lora_rank: int = 0
    dtype: str = "bfloat16"
    document_tokens: int | None = None

    def setup(self, n_microbatches: int | None = None, device: str = "cpu") -> Setup:
        layout = ParallelConfig(**self.layout).resolve(self.ranks)
        n_microbatches = n_microbatches or self.n_microbatches
        job = Job(SMALL, SEQ_LEN, 2 * n_microbatches * layout.dp, 2, recompute=self.recompute)
        memory = MemoryConfig(kernel="blocks", **self.memory) if self.memory else None
        return Setup(
            layout,
            job,
            Computation(torch.device(device), getattr(torch, self.dtype), self.recompute),
            LoraConfig(rank=self.lora_rank),
            Offload(memory, 2, SEQ_LEN) if memory else None,
            self.document_tokens,
        )


ON_HOST = {"placement": "static", "resident": 0.4, "stream": 0.3, "cpu": 0.3}
RESIDENT = {"placement": "static", "resident": 1.0, "stream": 0.0, "cpu": 0.0}
CASES = {
    "zero-0": Case(2, {"zero_stage": 0}),
    "zero-1": Case(2, {"zero_stage": 1}),
    "zero-2": Case(2, {"zero_stage": 2}),
    "zero-3": Case(2, {}),
    "zero-3-selective": Case(2, {}, "selective"),
    "zero-3-full": Case(2, {}, "full"),
    "zero-3-float32": Case(2, {}, dtype="float32"),
    "zero-3-documents": Case(2, {}, document_tokens=32),
    "hsdp": Case(4, {"dp_replicate": 2}),
    "hsdp-zero-1": Case(4, {"dp_replicate": 2, "zero_stage": 1}),
    "tp": Case(2, {"tp": 2}),
    "tp-selective": Case(4, {"tp": 2}, "selective"),
    "tp-no-sp": Case(2, {"tp": 2, "sequence_parallel": False}),
    "ulysses": Case(2, {"cp": 2}),
    "ring": Case(2, {"cp": 2, "cp_method": "ring"}),
    "ring-full": Case(4, {"cp": 2, "cp_method": "ring"}, "full"),
    "cp-tp": Case(4, {"cp": 2, "tp": 2, "zero_stage": 1}),
    "gpipe": Case(2, {"pp": 2, "schedule": "gpipe"}, n_microbatches=4),
    "1f1b": Case(2, {"pp": 2}, n_microbatches=4),
    "1f1b-dp": Case(4, {"pp": 2}, "full", n_microbatches=4),
    "1f1b-tp": Case(4, {"pp": 2, "tp": 2}, "selective", n_microbatches=2),
    "interleaved": Case(2, {"pp": 2, "schedule": "interleaved-1f1b"}, n_microbatches=4),
    "zero-bubble": Case(2, {"pp": 2, "schedule": "zero-bubble"}, n_microbatches=4),
    "zbv": Case(2, {"pp": 2, "schedule": "zbv"}, n_microbatches=4),
    "dualpipev": Case(2, {"pp": 2, "schedule": "dualpipev"}, n_microbatches=4),
    "lora": Case(2, {}, lora_rank=4),
    "lora-tp": Case(2, {"tp": 2}, "selective", lora_rank=4),
    "resident": Case(1, {}, memory=RESIDENT),
    "offload": Case(2, {}, memory=ON_HOST),
    "offload-pp": Case(2, {"pp": 2}, memory=ON_HOST),
    "activations": Case(2, {}, "full", memory={**RESIDENT, "activations": True}),
}
FAST = ("zero-1", "zero-3-full", "tp-no-sp", "ring", "1f1b", "lora", "offload")


def step(training, microbatches):
    return pretrain.train_step(training, microbatches, len(microbatches) * 2 * SEQ_LEN, 1e-3, 1.0)


def count_really(setup: Setup):
    """Count the second step of a real run on this rank."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Llama(setup.job.model)
    if setup.lora.rank:
        apply_lora(model, setup.lora, setup.computation.dtype)
    mesh = build_mesh(setup.layout, "cpu")
    layout = Layout(setup.layout, mesh, setup.n_microbatches)
    training = assemble(model, layout, setup.computation, adamw(1e-3, 0.1), setup.offload)
    init_weights(training.fp32_weights(), seed=0)
    init_lora(training.fp32_weights(), seed=0)
    microbatches = [_microbatch(setup) for _ in range(setup.n_microbatches)]
    step(training, microbatches)
    counter = StepCounter("cpu", groups_of(mesh))
    count_states(counter, training)
    held = dict(counter.by_kind)
    counter.watch(training.stages, training.optimizer)
    gc.collect()
    counter.reset()
    with counter.following_resizes(), counter:
        step(training, microbatches)
    counter.forget_all()
    dist.barrier()
    peak = counter.peak_bytes, counter.peak_moment, counter.at_peak
    return held, peak, dict(counter.traffic), dict(counter.products)


def compare(name: str) -> list[float]:
    """Hold a dry run against the real one; return by how much the peak of each kind of rank is off."""
    setup = CASES[name].setup()
    real = run_on(setup.world_size, count_really, setup)
    (counted,) = run_on(1, count_dry, setup, group=False)
    errors = []
    for rank in counted:
        held, (peak_bytes, moment, at_peak), traffic, products = real[rank.pp_rank * len(real) // setup.layout.pp]
        assert rank.held_bytes == held
        assert rank.traffic == traffic
        assert rank.products == products
        errors.append(rank.peak_bytes / peak_bytes - 1)
        print(f"| {name} | {rank.pp_rank} | {rank.peak_bytes:,} | {peak_bytes:,} | {errors[-1]:+.2%} | {moment} |")
    return errors


def count_dry(setup: Setup):
    return dry_run(setup, step).ranks


def cases():
    for name, case in CASES.items():
        marks = marks_for(case.layout.get("schedule"))
        yield pytest.param(name, marks=marks if name in FAST else [*marks, pytest.mark.slow])


@pytest.mark.parametrize("name", cases())
def test_bytes_and_traffic_of_a_step_are_those_of_real_processes(name):
    assert all(abs(error) <= 0.03 for error in compare(name))
