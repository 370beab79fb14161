"""The plan of gpu.sh, as data: measurements, each with a time limit and the figures that we expect.

    part          some measurements that together end within one call of ten minutes
    measurement   one command that prints JSON lines, with its limit in seconds and the figures that we expect
    card          h100 (80 GB) or h200 (141 GB). They compute alike; the H200 has more and faster memory

Training 7B with fp32 masters and moments takes 16 bytes a parameter, 100.4 GiB. An H200 holds that. An H100
does not, so there the parts `resident` and `zero3` measure 16 layers of the 7B model (3.5B), and 7B is
measured with its states on the host.

Predictions come from three places: a table of seconds per kind of work (STEP_7B), peaks of torch's own
allocator in a run on a GPU without arithmetic (PEAKS), and for states on the host the account of
parallel/cost.py at the rates that such a machine was measured to have (MACHINE).
"""

import importlib.util
import json
import os
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from offload import START_SECONDS, predict_peer, turn_seconds
from offload import Config as OffloadConfig

from dtensor_llama import LlamaConfig, UsageError
from dtensor_llama.flops import PEAK_FLOPS, hardware_flops_per_token, model_flops_per_token
from memory import MemoryConfig
from memory.auto import foresee
from memory.tracer import HOST_ADAM_BYTES, MachineRates
from parallel.cluster import find_cluster
from parallel.config import ParallelConfig
from parallel.cost import States, Work, account_with_offload
from parallel.rules import Job

CALL_SECONDS = 600  # what one call on a lent machine may take; every part stays below it


@dataclass(frozen=True)
class Card:
    name: str
    memory_gib: float  # as torch states it
    tb_s: float  # bandwidth of its memory, from the data sheet
    layers: int  # how many layers of the 7B model it can train with everything resident
    cluster: str  # its name in parallel/cluster.py


CARDS = {
    "h100": Card("h100", 79.6, 3.35, 16, "h100-80gb"),
    "h200": Card("h200", 139.8, 4.8, 32, "h200-141gb"),
}


def choose_card(memory_gib: float) -> Card | None:
    """Return the card whose plan fits a GPU of this size, or None if the GPU is too small for either."""
    with_drivers_share = memory_gib * 1.02
    fitting = [card for card in CARDS.values() if card.memory_gib <= with_drivers_share]
    return max(fitting, key=lambda card: card.memory_gib) if fitting else None


@dataclass(frozen=True)
class Expected:
    """States the range in which a figure of a result line is expected."""

    figure: str
    low: float
    high: float
    line: dict = field(default_factory=dict)  # entries that single out one of several lines of a measurement


@dataclass(frozen=True)
class Measurement:
    name: str
    command: tuple[str, ...]  # the arguments of `python`
    limit_s: int  # after so many seconds the command is ended
    expects: tuple[Expected, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    name: str
    why: str
    measurements: tuple[Measurement, ...]

    @property
    def limit_s(self) -> int:
        return sum(measurement.limit_s for measurement in self.measurements)

    def with_limits_times(self, factor: int) -> "Part":
        measurements = [replace(one, limit_s=factor * one.limit_s) for one in self.measurements]
        return replace(self, measurements=tuple(measurements))


@dataclass(frozen=True)
class Setting:
    """Holds what a plan depends on: the card, and the flags of gpu.py."""

    card: Card
    out: Path
    host_budget_gib: float | None = None
    layers: int | None = None  # in a rehearsal: of every model, in place of its own number

    @property
    def patience(self) -> int:
        """The factor on every limit. A rehearsal runs on a small machine, where compiling takes minutes."""
        return 4 if self.layers else 1

    def model(self, preset: str, layers: int | None = None) -> str:
        """Return the value of --model: a preset, or the folder of a shorter one (see write_models)."""
        layers = self.layers or layers
        if layers in (None, LlamaConfig.preset(preset).num_hidden_layers):
            return preset
        return str(self.out / "models" / f"{preset}-{layers}-layers")

    @property
    def host_flags(self) -> str:
        return f"--memory.host-budget-gib {self.host_budget_gib:g}" if self.host_budget_gib else ""


# ---- predictions: a step -------------------------------------------------------------------------

STEP_TOKENS = 16384
WAYS = ("zero3 selective", "resident selective", "resident none")  # where states are, and what is recomputed
# Seconds that a step of 7B with 16,384 tokens spends on an H200. Work grows with the FLOPs or with the bytes
# of activations or of parameters; the last column says whether more tokens a step make more of it.
STEP_7B = {
    "matrix products at 680 to 720 TFLOP/s": ((0.955, 0.955, 0.902), "flops", "each token"),
    "attention, cuDNN": ((0.130, 0.130, 0.125), "flops", "each token"),
    "norm, RoPE, SwiGLU, residual": ((0.075, 0.075, 0.062), "activation bytes", "each token"),
    "loss": ((0.012, 0.012, 0.012), "head", "each token"),
    "FSDP's copies, or sums of microbatches": ((0.270, 0.081, 0.036), "parameter bytes", "each token"),
    "norm and clip; AdamW": ((0.066, 0.072, 0.072), "parameter bytes", "each step"),
    "launch tail, embedding, gap": ((0.012, 0.030, 0.020), "launches", "each step"),
}
ADAMW_MAY_SAVE = 0.05  # of a resident 7B step: vector loads, and chunks of 256 Mi elements


def llama_7b(layers: int) -> LlamaConfig:
    return replace(LlamaConfig.preset("llama2-7b"), num_hidden_layers=layers)


def step_seconds(way: str, card: Card, n_tokens: int) -> float:
    """Predict, from STEP_7B, the seconds of a step on this card with as many layers as it holds."""
    return sum(kind_seconds(way, card, n_tokens).values())


def kind_seconds(way: str, card: Card, n_tokens: int) -> dict[str, float]:
    """Predict, from STEP_7B, the seconds that each kind of work takes of such a step."""
    whole, ours = llama_7b(32), llama_7b(card.layers)
    slower_memory = CARDS["h200"].tb_s / card.tb_s
    scale = {
        "flops": model_flops_per_token(ours, 4096) / model_flops_per_token(whole, 4096),
        "activation bytes": card.layers / 32 * slower_memory,
        "parameter bytes": ours.n_parameters / whole.n_parameters * slower_memory,
        "head": 1.0,
        "launches": 1.0,
    }
    predicted = {}
    for kind, (seconds, grows_with, per) in STEP_7B.items():
        times = n_tokens / STEP_TOKENS if per == "each token" else 1.0
        predicted[kind] = seconds[WAYS.index(way)] * scale[grows_with] * times
    return predicted


def expected_step(way: str, card: Card, n_tokens: int) -> tuple[Expected, Expected, Expected]:
    """Predict seconds, tokens/s and MFU. A resident step may be shorter by what AdamW may save."""
    slow = step_seconds(way, card, n_tokens)
    may_save = ADAMW_MAY_SAVE * llama_7b(card.layers).n_parameters / llama_7b(32).n_parameters
    fast = slow - may_save if way.startswith("resident") else slow
    flops = model_flops_per_token(llama_7b(card.layers), 4096) / PEAK_FLOPS["H100"]
    return (
        Expected("step_seconds", fast, slow),
        Expected("tokens_per_second", n_tokens / slow, n_tokens / fast),
        Expected("mfu", n_tokens / slow * flops, n_tokens / fast * flops),
    )


# ---- predictions: memory -------------------------------------------------------------------------

# Peaks of a steady step, in GiB: what torch's allocator had given out, and what it had reserved. The keys are
# the number of layers, where states are and what is recomputed, and the sequences of a microbatch.
PEAKS = {
    (32, "zero3 selective", 1): (113.7, 120.8),
    (32, "zero2 selective", 1): (125.8, 135.4),
    (32, "zero2 selective, expandable", 1): (125.8, 127.5),
    (32, "zero3 full", 4): (103.7, 112.7),
    (32, "resident selective", 1): (113.2, 114.5),
    (32, "resident selective", 2): (124.7, 126.7),
    (32, "resident none", 1): (117.8, 118.5),
    (32, "resident none", 2): (134.0, 134.7),
    (32, "resident full", 4): (90.4, 91.9),
    (16, "zero3 selective", 1): (59.8, 65.6),
    (16, "resident none", 1): (61.6, 62.2),
    (16, "resident none", 2): (69.7, 70.3),
}


def expected_memory(layers: int, way: str, per_microbatch: int) -> tuple[Expected, ...]:
    """Return the peaks of such a run from PEAKS, or nothing where none was made."""
    peaks = PEAKS.get((layers, way, per_microbatch))
    if peaks is None:
        return ()
    allocated, reserved = peaks
    return (
        Expected("device_memory_gib", allocated, allocated),
        Expected("device_reserved_gib", reserved, reserved),
    )


# ---- predictions: states on the host -------------------------------------------------------------

# What a machine with one H200, 16 cores and 126 GiB did on 2026-11-28. `dram_in_update` is what an update of
# 3.5B parameters reached; a plain stream of 13 cores, with the link busy beside it, had reached 134 GB/s.
SUSTAINED_FLOPS = 592e12  # forward and backward of a step, with full recompute counted
PLAIN_STREAM = 120e9  # bytes/s in DRAM of a plain stream with the link idle
MACHINE = MachineRates(
    h2d=53.7e9,
    d2h=52.8e9,
    duplex=96.3e9,
    dram_in_update=97e9,
    host_adam=3.13e9,
    device_adam=123e9,
)


def our_seconds(
    config: LlamaConfig, budget_gib: float | None, setting: Setting, n_tokens: int
) -> float | None:
    """Predict a step of ours with full recompute and at most 4 sequences a forward; None if device and host
    cannot hold it, which our run then says too.

    budget_gib: of the device; None: all that the card has."""
    own = find_cluster(setting.card.cluster, 1)
    cluster = replace(
        own,
        gpu=replace(own.gpu, host_link_bytes_s=MACHINE.duplex / 2),
        host_memory_gib=120,
        host_dram_bytes_s=MACHINE.dram_in_update,
        host_adam_per_s=MACHINE.host_adam,
    )
    batch = n_tokens // 4096  # sequences of a step
    job = Job(config, 4096, batch, min(4, batch), recompute="full", compile=True, device_type="cuda")
    memory = MemoryConfig("auto", device_budget_gib=budget_gib, host_budget_gib=setting.host_budget_gib)
    work = Work(job, ParallelConfig(dp_shard=1), States.under(memory, itemsize=2))
    try:
        return account_with_offload(work, cluster, foresee).step_seconds
    except UsageError:
        return None


def fsdp2_seconds(config: LlamaConfig, n_tokens: int) -> float:
    """Predict a step of FSDP2's CPU offload on one rank of that machine, with 4 sequences a microbatch."""
    alone_s = n_tokens * hardware_flops_per_token(config, 4096, "full") / SUSTAINED_FLOPS
    return predict_peer("fsdp2_offload", config.n_parameters, alone_s, MACHINE, max(1, n_tokens // 4096 // 4))


# ---- measurements --------------------------------------------------------------------------------

PLACEMENT = {
    "resident": "--memory.placement static --memory.resident 1 --memory.stream 0 --memory.cpu 0",
    "zero3": "--memory.placement off",
    "zero2": "--memory.placement off --parallel.zero-stage 2",
}


# This limit allows for everything before the first step ends, and for twice the longest run that we expect:
# 7 s of initial weights, 2 steps to warm up and 4 timed ones, of 4.6 s each.
STEP_LIMIT_S = sum(START_SECONDS.values()) + 70


def step(setting: Setting, way: str, microbatches: int, per_microbatch: int) -> Measurement:
    """Time training steps of 7B, or of the layers that the card holds, with benchmark.py. way: as in WAYS."""
    placement, recompute = way.split()
    n_tokens = 4096 * per_microbatch * microbatches
    n_timed = max(4, 8 * STEP_TOKENS // n_tokens)
    command = (
        f"recipes/benchmark.py --model {setting.model('llama2-7b', setting.card.layers)} --data.seq-len 4096 "
        f"--train.compile --train.recompute {recompute} "
        f"--train.global-batch-size {per_microbatch * microbatches} "
        f"--train.micro-batch-size {per_microbatch} --train.steps {n_timed} --warmup 2 {PLACEMENT[placement]}"
    )
    if placement == "resident":
        command += f" {setting.host_flags}"
    expects = expected_step(way, setting.card, n_tokens) if way in WAYS else ()
    return Measurement(
        f"{recompute} {microbatches} x {per_microbatch} rows",  # sequences; results/*.jsonl has this name
        tuple(command.split()),
        STEP_LIMIT_S,
        (*expects, *expected_memory(setting.card.layers, way, per_microbatch)),
    )


def step_kernels(setting: Setting) -> Measurement:
    """Sum the time of one step's kernels by kind of work, beside what STEP_7B predicts for each kind."""
    timed = step(setting, "resident none", 4, 2)
    predicted = kind_seconds("resident none", setting.card, 4 * 2 * 4096)
    names = {
        "matrix products": "matrix products at 680 to 720 TFLOP/s",
        "attention": "attention, cuDNN",
    }
    expects = tuple(
        Expected("ms", 1e3 * predicted[row], 1e3 * predicted[row], {"kind": kind})
        for kind, row in names.items()
    )
    command = ("recipes/bench/step_kernels.py", *timed.command[1:])
    return Measurement("none 4 x 2 rows", command, STEP_LIMIT_S, expects)


def under_budget(
    setting: Setting, size: str, n_tokens: int, contenders: tuple[str, ...], more: str = ""
) -> Measurement:
    """Run offload.py with one number of tokens a step; its limit is the sum of the contenders' turns."""
    preset, layers = MODELS[size]
    command = (
        f"recipes/bench/offload.py --compile --rounds 1 --model {preset} --tokens {n_tokens} "
        f"--contenders {' '.join(contenders)} {more}"
    )
    if setting.layers or layers:
        command += f" --layers {setting.layers or layers}"
    if setting.host_budget_gib:
        command += f" --host-budget-gib {setting.host_budget_gib:g}"
    n_steps = 3 if n_tokens < 65536 else 2  # 13B with 64k tokens takes 12 s a step, and a call ten minutes
    command += f" --steps {n_steps}"
    cfg = OffloadConfig(steps=n_steps)
    turns_s = [turn_seconds(cfg, config_of(size), name, n_tokens) for name in contenders]
    limit_s = sum(turns_s) + 15
    command += f" --timeout-s {max(turns_s) * setting.patience}"
    return Measurement(f"{n_tokens} tokens", tuple(command.split()), limit_s)


def expecting(measurement: Measurement, contender: str, seconds: float) -> Measurement:
    """Return the measurement with the contender's seconds of a step added to what is expected."""
    more = Expected("step_seconds", seconds, seconds, line={"contender": contender})
    return replace(measurement, expects=(*measurement.expects, more))


def budget_part(setting: Setting, name: str, why: str, tokens: tuple[int, ...]) -> Part:
    """Measure a model under a budget: ours against FSDP2's offload, where the host can hold that."""
    size, budget_gib = next(BUDGETS[begins] for begins in BUDGETS if name.startswith(begins))
    more = f"--device-budget-gib {budget_gib}" if budget_gib else ""
    contenders = ("ours", "fsdp2_offload")
    if size == "13b" or name in ("7b-card-64k", "7b-40-64k"):
        contenders = ("ours",)  # FSDP2's offload of 13B takes more host memory, or there is no time for both
    measurements = []
    for n_tokens in tokens:
        measurement = under_budget(setting, size, n_tokens, contenders, more)
        ours_s = our_seconds(config_of(size), budget_gib, setting, n_tokens)
        if ours_s is not None:
            measurement = expecting(measurement, "ours", ours_s)
        if "fsdp2_offload" in contenders:
            measurement = expecting(measurement, "fsdp2_offload", fsdp2_seconds(config_of(size), n_tokens))
        measurements.append(measurement)
    return Part(name, why, tuple(measurements))


def config_of(size: str) -> LlamaConfig:
    """Return the configuration of a size in MODELS."""
    preset, layers = MODELS[size]
    config = LlamaConfig.preset(preset)
    return replace(config, num_hidden_layers=layers or config.num_hidden_layers)


MODELS = {"3.5b": ("llama2-7b", 16), "7b": ("llama2-7b", None), "13b": ("llama2-13b", None)}  # preset, layers
BUDGETS = {  # how a part's name begins: its model, and the GiB of the device; None: the whole card
    "3.5b-24": ("3.5b", 24),
    "7b-40": ("7b", 40),
    "7b-card": ("7b", None),
    "13b": ("13b", None),
}


def ceiling(setting: Setting, name: str, tokens: tuple[int, ...]) -> Part:
    """Measure what 3.5B reaches when nothing has to be on the host."""
    measurements = []
    for n_tokens in tokens:
        measurement = under_budget(setting, "3.5b", n_tokens, ("all_resident",))
        resident_s = our_seconds(config_of("3.5b"), None, setting, n_tokens)
        measurements.append(expecting(measurement, "all_resident", resident_s))
    why = "3.5B with everything resident: what the budgets of 3.5b-24 are measured against"
    return Part(name, why, tuple(measurements))


def kernels(card: Card) -> Measurement:
    slower_memory = CARDS["h200"].tb_s / card.tb_s
    expects = (
        Expected("tflop_s", 640, 700, {"kernel": "matmul 4096 x 4096 x 4096"}),
        Expected("tflop_s", 680, 730, {"kernel": "matmul 4096 x 11008 x 4096"}),
        Expected("tflop_s", 700, 750, {"kernel": "matmul 8192 x 4096 x 4096"}),
        # A forward of one sequence takes 0.137 TFLOP. The first predictions, 0.13 and 0.53 ms, were above the
        # peak of the data sheet; these are what an H200 took on 2026-11-27.
        Expected("forward_ms", 0.285, 0.285, {"kernel": "attention"}),
        Expected("forward_backward_ms", 1.12, 1.12, {"kernel": "attention"}),
        Expected("g_parameters_s", 100 / slower_memory, 155 / slower_memory, {"kernel": "device AdamW"}),
        Expected("h2d_gb_s", 50, 50, {"kernel": "copies of 256 MiB, pinned"}),
    )
    # torch can also let threads touch the memory first and then register it: with 8 of them an H200's host
    # pinned 1.6 GB/s, and 2.0 by default. A huge page is registered in one go where 512 small ones are not.
    pinned = Expected("gb_s", 2, 16, {"kernel": "pinning 4 GiB of huge pages"})
    return Measurement("kernels", ("recipes/bench/machine.py",), 60, (*expects, pinned))


def tests(name: str, which: str, limit_s: int) -> Measurement:
    at_once = ("-n", "3") if importlib.util.find_spec("xdist") else ()
    command = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *at_once, "tests/test_gpu.py")
    return Measurement(name, (*command, "-k", which), limit_s, (Expected("status", 0, 0),))


WARM_UP_S = 180  # on 16 cores it took 135 s, and the start of a run became 26 s long instead of 117
MIXED = "--memory.placement static --memory.resident 0.4 --memory.stream 0.3 --memory.cpu 0.3"


def warm_up(setting: Setting, measurements: list[Measurement]) -> list[Measurement]:
    """Return runs of two layers, one for each kind of step that the measurements time.

    They compile what those steps then find compiled, and can run side by side because nothing of theirs is
    timed. Their cache is their own, so that the rates of a busy machine are not kept."""
    short, commands = replace(setting, layers=2), []
    for measurement in measurements:
        script, *flags = measurement.command
        given = dict(pairwise(flags))  # each flag, and what follows it
        if script == "recipes/bench/offload.py":
            preset, recompute = given["--model"], "full"
            batch = int(given["--tokens"]) // 4096
            per_microbatch = min(4, batch)
            placement = f"{MIXED} {setting.host_flags}".split()
        elif "--train.recompute" in given:
            preset, recompute = "llama2-7b", given["--train.recompute"]
            batch = int(given["--train.global-batch-size"])
            per_microbatch = int(given["--train.micro-batch-size"])
            placement = flags[flags.index("--memory.placement") :]
        else:
            continue
        several = min(batch, 2 * per_microbatch)  # microbatches are summed by a kernel of its own
        command = (
            f"recipes/benchmark.py --model {short.model(preset)} --data.seq-len 4096 --train.compile "
            f"--train.recompute {recompute} --train.global-batch-size {several} "
            f"--train.micro-batch-size {per_microbatch} --train.steps 1 --warmup 1 "
            f"--data.cache-dir {setting.out / 'warm-up'} --run-dir {setting.out / 'warm-up'}"
        )
        commands.append((*command.split(), *placement))
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": "4"}
    return [
        Measurement(f"kind {i}", command, WARM_UP_S * setting.patience, environment=threads)
        for i, command in enumerate(dict.fromkeys(commands), 1)
    ]


def plan(setting: Setting) -> list[Part]:
    """Return all parts, in the order in which they are measured: the largest promise first."""
    card = setting.card
    held = "7B"
    if card.layers < 32:
        held = f"{card.layers} layers of 7B (an {card.name.upper()} cannot hold 7B's 100.4 GiB)"

    def budget(name: str, why: str, *tokens: int) -> Part:
        return budget_part(setting, name, why, tokens)

    parts = [
        Part(
            "resident",
            f"{held}, all states on the device, nothing recomputed: the README's promise",
            (step(setting, "resident none", 4, 2), step(setting, "resident none", 8, 2)),
        ),
        Part("kernels", "matrix product, attention, update, copy: what a step is made of", (kernels(card),)),
        Part("step-kernels", "the GPU's time in that step by kind of work", (step_kernels(setting),)),
        Part(
            "zero3",
            f"{held} with FSDP2 at ZeRO stage 3, as several ranks would train it",
            (step(setting, "zero3 selective", 4, 1),),
        ),
        Part("first-tests", "those likeliest to find a wrong number", (tests("riskiest", RISKIEST, 180),)),
        Part("rates", "the wires, the host's memory and its cores: what every plan is made of", (rates(),)),
        budget("3.5b-24-4k", "3.5B under 24 GiB with 4k tokens a step: ours against FSDP2's offload", 4096),
        budget("3.5b-24", "3.5B under 24 GiB", 16384),
        budget("7b-card", "7B on the whole card with placement auto", 16384),
        budget("7b-card-4k", "the same with 4k tokens a step", 4096),
        budget("7b-card-64k", "the same with 64k tokens a step", 65536),
        budget("7b-40", "7B under 40 GiB", 16384),
        budget("7b-40-4k", "7B under 40 GiB with 4k tokens a step", 4096),
        Part("variants", "smaller steps, selective recompute", variants(setting)),
        *segments(setting),
        Part("step-price", "our step over the barest loop, and a small model's speed", small_models()),
        budget("3.5b-24-64k", "3.5B under 24 GiB with 64k tokens a step", 65536),
        budget("7b-40-64k", "7B under 40 GiB with 64k tokens a step", 65536),
        budget("13b", "13B on one card", 16384),
        budget("13b-64k", "13B on one card with 64k tokens a step", 65536),
        ceiling(setting, "ceiling", (4096, 16384)),
        ceiling(setting, "ceiling-64k", (65536,)),
        Part("host", "AdamW on the host against a plain stream, and torch calls beside it", (host(),)),
        Part("tests", "all tests of numbers that need a GPU", (tests("numbers", "not learns", 560),)),
        Part("test-runs", "whole training runs: stop, resume, export", (tests("runs", "learns", 580),)),
    ]
    return [part.with_limits_times(setting.patience) for part in parts]


RISKIEST = "fused or logits or every_pass or nothing_depends or budget or initial"  # for pytest -k


def rates() -> Measurement:
    in_update, host_adam = MACHINE.dram_in_update / 1e9, HOST_ADAM_BYTES * MACHINE.host_adam / 1e9
    expects = (
        Expected("dram_gb_s", PLAIN_STREAM / 1e9, PLAIN_STREAM / 1e9),
        Expected("dram_in_update_gb_s", in_update, in_update),
        Expected("host_adam_gb_s", host_adam, host_adam),
    )
    return Measurement("rates", ("recipes/bench/memory_rates.py",), 180, expects)


def host() -> Measurement:
    return Measurement("host", ("recipes/bench/host_adam.py", "--threads", str(os.cpu_count())), 300)


def variants(setting: Setting) -> tuple[Measurement, ...]:
    return step(setting, "resident none", 2, 2), step(setting, "resident selective", 4, 1)


def segments(setting: Setting) -> list[Part]:
    """Measure whether segments that can grow leave less memory unused, where a card holds 7B at ZeRO 2."""
    if setting.card.layers < 32:
        return []
    allocator = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    measurement = replace(
        step(setting, "zero2 selective", 4, 1),
        name="zero2, expandable segments",
        environment=allocator,
        expects=expected_memory(32, "zero2 selective, expandable", 1),
    )
    return [Part("segments", "memory segments that can grow", (measurement,))]


def small_models() -> tuple[Measurement, ...]:
    """Measure a small model. It gets 32 sequences because with 8 the GPU would wait for the host."""
    price = "recipes/bench/step_price.py --model small-110m --seq-len 2048 --dtype bfloat16 --rows 32"
    speed = (
        "recipes/benchmark.py --model small-110m --data.seq-len 2048 --train.compile "
        "--train.global-batch-size 32 --train.micro-batch-size 32"
    )
    return (
        Measurement("price", tuple(price.split()), STEP_LIMIT_S),
        Measurement("small-110m", tuple(speed.split()), STEP_LIMIT_S),
    )


def write_models(setting: Setting) -> None:
    """Write the config.json of each shorter model, where Setting.model says that it is: what the card holds
    of 7B, and the two layers of a warm-up."""
    held = setting.layers or setting.card.layers
    for preset, layers in (("llama2-7b", held), ("llama2-7b", 2), ("llama2-13b", 2)):
        folder = Path(replace(setting, layers=layers).model(preset))
        if str(folder) != preset:
            folder.mkdir(parents=True, exist_ok=True)
            config = replace(LlamaConfig.preset(preset), num_hidden_layers=layers)
            (folder / "config.json").write_text(json.dumps(config.to_hf()))
