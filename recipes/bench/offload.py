"""Compare training under a memory budget: our chunk manager, everything resident, and two peers that offload.

    python recipes/bench/offload.py --model llama2-7b --layers 16 --device-budget-gib 24      # 3.5B, one GPU
    python recipes/bench/offload.py --model llama2-13b --tokens 16384 --contenders ours fsdp2_offload

    ours             recipes/benchmark.py --memory.placement auto, with the budgets
    all_resident     the same with everything on the device: the ceiling, whatever the budget says
    fsdp2_offload    fully_shard per block with CPUOffloadPolicy, AdamW(fused) on the host
    deepspeed_zero3  DeepSpeed ZeRO-3 with its optimizer on the host (CPUAdam), where it is installed

All contenders have the same model, seed, sequences, clipping and recompute. Two of them together do not fit
one device, so each turn is a process of its own, and the turns go round: each contender once, then each
again. The peers have no setting for a device budget, so torch's allocator is limited to it. A peer that the
host's memory cannot hold is not started, because Linux would kill it, and us with it. After each turn one
JSON line has the median of the contender's rounds so far, or the error that ended it, so that nothing is lost
when the machine goes away; of several lines the last one counts. A table comes at the end.

    exposed update   the step less its forward and backward, which our tracer saw or which the peer measured
    DRAM share       bytes that the host's update must move, over its time, over the rate of a plain stream
    predicted        ours is the plan's prediction; the others' is `predict_peer`, from the same rates
"""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone works without being installed

import psutil
import torch
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from dtensor_llama import Llama, LlamaConfig
from dtensor_llama.cli import run_recipe
from dtensor_llama.errors import UsageError
from dtensor_llama.flops import hardware_flops_per_token
from dtensor_llama.initial_weights import init_weights
from dtensor_llama.metrics import GIB, PeakMemory
from dtensor_llama.optim import build_adamw
from memory.tracer import MachineRates
from parallel.mesh import start_process_group, stop_process_group
from parallel.recompute import apply_recompute

ROOT = Path(__file__).resolve().parents[2]
CONTENDERS = ("ours", "all_resident", "fsdp2_offload", "deepspeed_zero3")
LR, WEIGHT_DECAY, MAX_NORM = 3e-4, 0.1, 1.0  # as pretrain.py has them


@dataclass(frozen=True)
class Config:
    """Offload under a budget against its peers, taking turns."""

    model: str = "llama2-7b"  # a preset
    layers: int | None = None  # how many layers it gets; llama2-7b with 16 has 3.5B parameters
    device_budget_gib: float | None = None  # None: the whole device
    host_budget_gib: float | None = None  # None: what is free; give it where memory grows on demand
    tokens: tuple[int, ...] = (4096, 16384, 65536)  # tokens of a step, each number measured by itself
    seq_len: int = 4096
    micro_batch_size: int = 4  # sequences of a forward, at most
    contenders: tuple[str, ...] = CONTENDERS
    rounds: int = 2
    steps: int = 3  # timed steps of each turn
    warmup: int = 5  # our steps before them: three are traced, then comes the plan, and two steps follow it
    peer_warmup: int = 2  # the peers' steps before them; the first one compiles
    dtype: str = "bfloat16"
    compile: bool = False  # compile each block, in all contenders
    timeout_s: int | None = None  # limit of a turn; None: 240, or turn_seconds if that is more
    turn: str | None = None  # internal: be this contender, in this process


def main(cfg: Config) -> None:
    unknown = [name for name in cfg.contenders if name not in CONTENDERS]
    if unknown or not cfg.contenders:
        raise UsageError(f"--contenders {' '.join(cfg.contenders)}: there are {', '.join(CONTENDERS)}.")
    wrong = [n for n in cfg.tokens if n < cfg.seq_len or n % cfg.seq_len]
    if wrong or min(cfg.rounds, cfg.steps, cfg.warmup, cfg.peer_warmup, cfg.micro_batch_size) < 1:
        raise UsageError(
            f"--tokens {wrong} must be multiples of --seq-len {cfg.seq_len}; --rounds, --steps and "
            "--micro-batch-size must be at least 1, and so must --warmup and --peer-warmup, as the first "
            "step compiles."
        )
    if cfg.host_budget_gib is not None and cfg.host_budget_gib <= 0:
        raise UsageError(f"--host-budget-gib {cfg.host_budget_gib:g} is not possible; use GiB above 0.")
    preset = LlamaConfig.preset(cfg.model)
    config = replace(preset, num_hidden_layers=cfg.layers or preset.num_hidden_layers)
    if cfg.turn:
        print(json.dumps(peer(cfg, config)), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config.to_hf()))
        results = []
        for n_tokens in cfg.tokens:
            results += at(cfg, config, folder, n_tokens)
    print(table(results), flush=True)


def at(cfg: Config, config: LlamaConfig, folder: str, n_tokens: int) -> list[dict]:
    """Let all contenders take turns with so many tokens a step. One that fails gets no further turn."""
    # Ours comes first, because its rates predict the others.
    in_order = [name for name in CONTENDERS if name in cfg.contenders]
    turns = {name: [] for name in in_order}
    lines = {}
    for _ in range(cfg.rounds):
        for name in in_order:
            if "error" in lines.get(name, {}):
                continue
            try:
                turns[name].append(take_turn(cfg, config, name, folder, n_tokens))
                measured = judge(name, turns, n_tokens, config)
            except DoesNotFit as error:
                measured = {"error": str(error), "refused": True}
            except RuntimeError as error:
                measured = {"error": str(error)}
            lines[name] = {
                "contender": name,
                "model": cfg.model,
                "layers": config.num_hidden_layers,
                "n_parameters": config.n_parameters,
                "tokens_per_step": n_tokens,
                "device_budget_gib": cfg.device_budget_gib,
                "rounds": len(turns[name]),
                **measured,
            }
            print(json.dumps(lines[name]), flush=True)
    return list(lines.values())


def take_turn(cfg: Config, config: LlamaConfig, name: str, folder: str, n_tokens: int) -> dict:
    """Run one contender in a process of its own. Return its last JSON line; RuntimeError has its error."""
    if name in ("ours", "all_resident"):
        command = ours_command(cfg, name, folder, n_tokens)
    else:
        refuse_if_the_host_is_too_small(name, config, cfg.host_budget_gib)
        if not torch.cuda.is_available():
            raise DoesNotFit(
                "offloads from a GPU, and there is none; use --contenders ours all_resident to leave it out."
            )
        command = peer_command(cfg, name, n_tokens)
    timeout_s = cfg.timeout_s or max(240, turn_seconds(cfg, config, name, n_tokens))
    said: list[str] = []
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env={**os.environ, "PYTHONFAULTHANDLER": "1"},
            text=True,
            stdout=printed,
            stderr=subprocess.PIPE,
        )
        reader = threading.Thread(target=pass_on, args=(process.stderr, name, said))
        reader.start()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # it then prints where its threads stand, and ends
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
            reader.join()
            stood = where_it_stood("".join(said))
            raise RuntimeError(f"was not done after {timeout_s} s; it stood in {stood}") from None
        reader.join()
        printed.seek(0)
        results = printed.read().splitlines()
    if process.returncode:
        lines = [line.strip() for line in said if line.strip()]
        errors = [line for line in lines if "rror" in line]
        raise RuntimeError((errors or lines or [f"ended with status {process.returncode}"])[-1])
    return json.loads(results[-1])


def pass_on(stream: IO[str], name: str, said: list[str]) -> None:
    """Keep each line that a contender says, and write it to our own standard error with the seconds since its
    turn began. Whoever ends a turn, the log then shows how far it had come."""
    began = time.monotonic()
    for line in stream:
        said.append(line)
        sys.stderr.write(f"{name} {time.monotonic() - began:6.1f} s: {line}")
        sys.stderr.flush()


def where_it_stood(said: str) -> str:
    """Return the innermost functions of the main thread from what a process printed when it was aborted, and
    the last phase of its start that it had ended."""
    lines = said.splitlines()
    phases = [" ".join(line.split()) for line in lines if line.startswith("start ")]
    # The main thread comes last; a line of it is `  File "model.py", line 7 in forward`.
    heads = [i for i, line in enumerate(lines) if re.match(r"(Current thread|Thread) 0x", line)]
    frames = (
        [line.split('"')[1:] for line in lines[heads[-1] :] if line.startswith("  File")] if heads else []
    )
    stood = [
        f"{Path(path).name}{where.replace(', line ', ':').replace(' in ', ' ')}" for path, where in frames
    ]
    return f"{' < '.join(stood[:6]) or 'an unknown place'}, after {phases[-1] if phases else 'nothing'}"


def ours_command(cfg: Config, name: str, folder: str, n_tokens: int) -> list:
    batch = n_tokens // cfg.seq_len
    command = [
        "recipes/benchmark.py",
        "--model",
        folder,
        "--data.seq-len",
        cfg.seq_len,
        "--train.global-batch-size",
        batch,
        "--train.micro-batch-size",
        min(batch, cfg.micro_batch_size),
        "--train.recompute",
        "full",
        "--train.dtype",
        cfg.dtype,
        "--train.lr",
        LR,
        "--train.steps",
        cfg.steps,
        "--warmup",
        cfg.warmup,
    ]
    if cfg.compile:
        command += ["--train.compile"]
    if name == "all_resident":
        fractions = ["--memory.resident", 1, "--memory.stream", 0, "--memory.cpu", 0]
        return [*command, "--memory.placement", "static", *fractions]
    command += ["--memory.placement", "auto"]
    if cfg.device_budget_gib:
        command += ["--memory.device-budget-gib", cfg.device_budget_gib]
    if cfg.host_budget_gib:
        command += ["--memory.host-budget-gib", cfg.host_budget_gib]
    return command


def peer_command(cfg: Config, name: str, n_tokens: int) -> list:
    """Return the command that runs this script as one contender."""
    micro = min(n_tokens // cfg.seq_len, cfg.micro_batch_size)
    own = asdict(cfg) | {"tokens": (n_tokens,), "micro_batch_size": micro, "warmup": cfg.peer_warmup}
    own |= {"turn": name, "contenders": (name,)}
    command = ["recipes/bench/offload.py"]
    for key, value in own.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            command += [f"--{flag}" if value else f"--no-{flag}"]
        elif value is not None:
            command += [f"--{flag}", *(value if isinstance(value, tuple) else (value,))]
    return command


# What a run may need beside initial weights and steps. The loss is compiled in the first step on any GPU,
# also where blocks are not. The first run on a fresh machine with an H200 took 117 s before its first step,
# and the second one 44 s; reading torch from the disk for the first time took more than 20 s of it.
START_SECONDS = {"imports and process group": 40, "compiling blocks": 25, "compiling the loss": 30}
START_SECONDS |= {"compiling AdamW": 25, "measuring rates": 20}
# How fast the host of an H200 pins memory, and how fast 16 of its cores write memory for the first time.
PINNED_BYTES_S, TOUCHED_BYTES_S = 2e9, 4.7e9


def turn_seconds(cfg: Config, config: LlamaConfig, name: str, n_tokens: int) -> int:
    """Return how long a turn may take: START_SECONDS, and twice what we expect of initial weights and steps.

    A step computes at 500 TFLOP/s with full recompute. Ours is at its slowest while it traces, with all
    states on the host: 28 bytes a parameter pass through memory at 88 GB/s, and 4 over a link of 50 GB/s. A
    peer moves 40 at 56 GB/s and, for each microbatch of 4 sequences, 12 over the link. A second initializes
    1e9 weights, touches TOUCHED_BYTES_S and pins PINNED_BYTES_S. Of ours, 14 bytes a parameter are touched,
    and 7 pinned, most of them after the trace, when states move; a peer pins all 14. (3.5B in all took us 146
    s where everything was compiled already, and FSDP2 69. 7B had not ended after 185 s.)
    """
    n = config.n_parameters
    compute_s = n_tokens * hardware_flops_per_token(config, 4096, "full") / 500e12
    n_microbatches = max(1, n_tokens // 4096 // 4)
    start_s = sum(START_SECONDS.values())
    if name in ("ours", "all_resident"):
        n_steps = cfg.warmup + cfg.steps
        moving_s = n * (28 / 88e9 + 4 / 50e9)
        memory_s = 0 if name == "all_resident" else n * (14 / TOUCHED_BYTES_S + 7 / PINNED_BYTES_S)
    else:
        n_steps = cfg.peer_warmup + cfg.steps
        moving_s = n * (40 / 56e9 + 12 * n_microbatches / 50e9)
        memory_s = n * 14 / PINNED_BYTES_S
        start_s -= START_SECONDS["compiling AdamW"] + START_SECONDS["measuring rates"]
    return round(start_s + memory_s + 2 * (n / 1e9 + n_steps * (compute_s + moving_s)))


# ---- what the host must hold --------------------------------------------------------------------------


class DoesNotFit(RuntimeError):
    """Says that a contender cannot be measured on this machine, which is its result."""


def pinned_bytes(n_bytes: int) -> int:
    """Return how many bytes torch pins for a tensor: it rounds up to a power of two."""
    return 1 << (n_bytes - 1).bit_length()


def peer_host_bytes(name: str, config: LlamaConfig) -> tuple[int, str]:
    """Return the least that a peer needs of the host's memory, and the sum in words."""
    with torch.device("meta"):
        sizes = [4 * parameter.numel() for parameter in Llama(config).parameters()]
    if name == "fsdp2_offload":  # AdamW makes its two moments with zeros_like, which does not pin them
        pinned, pageable = 2 * sum(map(pinned_bytes, sizes)), 2 * sum(sizes)
        what = (
            f"{pinned / GIB:.1f} GiB pinned for float32 weights and gradients, each tensor rounded up to "
            f"a power of two, and {pageable / GIB:.1f} for AdamW's two moments"
        )
        return pinned + pageable, what
    least = 4 * sum(sizes)
    return least, "float32 masters, gradients and two moments"


def refuse_if_the_host_is_too_small(name: str, config: LlamaConfig, host_budget_gib: float | None) -> None:
    """Raise DoesNotFit for a peer that would be killed. Ours refuses by itself, with its plan's numbers."""
    needed, what = peer_host_bytes(name, config)
    own = GIB + min(9 * GIB, needed // 10)  # torch, CUDA, compiled code, what is copied in passing
    available = host_budget_gib * GIB if host_budget_gib else psutil.virtual_memory().available
    if needed + own > available:
        budget = "are free (--host-budget-gib, if there is more)"
        if host_budget_gib:
            budget = "--host-budget-gib allows"
        raise DoesNotFit(
            f"does not fit the host: it needs {needed / GIB:.1f} GiB ({what}) and about "
            f"{own / GIB:.0f} for itself, and {available / GIB:.1f} {budget}"
        )


# ---- results of a turn -------------------------------------------------------------------------------------


def judge(name: str, turns_of: dict[str, list[dict]], n_tokens: int, config: LlamaConfig) -> dict:
    """Return the figures of the contender's turns so far, with their ratios to ours."""
    turns, ours = turns_of[name], turns_of.get("ours") or []
    plan = ours[-1]["memory_plan"] if ours else {}
    step_s = statistics.median(turn["step_seconds"] for turn in turns)
    losses = turns[0]["losses"]
    facts = {"tokens_per_second": n_tokens / step_s, "step_seconds": step_s, "losses": losses}
    for memory in ("device_memory_gib", "device_reserved_gib", "host_memory_gib", "host_pinned_gib"):
        facts[memory] = max(turn[memory] for turn in turns)
    if "start_seconds" in turns[0]:
        facts["start_seconds"] = turns[0]["start_seconds"]
    if ours:
        facts["ours_over_it"] = step_s / statistics.median(turn["step_seconds"] for turn in ours)
        # Contenders warm up by different numbers of steps, so what both have made is compared.
        both = zip(losses, ours[0]["losses"], strict=False)
        facts["loss_difference"] = max(abs(theirs - our) for theirs, our in both)
    alone = plan["seconds"]["forward"] + plan["seconds"]["backward"] if plan else None
    update_s, moved = turns[-1].get("update_seconds"), 40 * config.n_parameters  # fsdp2: see predict_peer
    if name == "ours" and plan:
        facts |= {
            "plan": plan["parameters"],
            "bound": plan["bound"],
            "predicted_step_seconds": plan["seconds"]["step"],
        }
        update_s, moved = plan["host_update_seconds"], plan["host_dram_bytes"]
    elif plan:
        facts["predicted_step_seconds"] = predict_peer(
            name,
            config.n_parameters,
            alone,
            MachineRates(**plan["rates"]),
            turns[-1].get("n_microbatches", 1),
        )
    alone = turns[-1].get("forward_backward_seconds", alone)
    facts["exposed_update_seconds"] = alone and max(0.0, step_s - alone)
    if name != "all_resident" and update_s and plan:
        facts["dram_share"] = moved / update_s / plan["rates"]["dram_in_update"]
    return facts


# Torch's norm, clip and AdamW(fused) reached so much of the rate of DRAM in an update of ours on the 16 cores
# beside an H200, for 3.5B parameters (2026-11-28): 56 of 97 GB/s.
TORCHS_SHARE_OF_DRAM = 0.581


def predict_peer(
    name: str, n: int, forward_backward_s: float, rates: MachineRates, n_microbatches: int
) -> float:
    """Predict the seconds of a step of n parameters: bytes over rates, as our plan does."""
    if name == "all_resident":
        return forward_backward_s + n / rates.device_adam
    if name == "fsdp2_offload":
        # Each forward and each backward fetches fp32 weights; fp32 gradients leave once, after the last
        # microbatch. On one rank FSDP2 makes these copies on the stream that computes, so nothing overlaps
        # and the times add up; on several ranks, where the copies are part of a prefetched all-gather, it
        # would do better. Then the host works alone: the norm reads 4 bytes a parameter, the clip moves 8
        # and AdamW 28.
        link = n_microbatches * 2 * 4 * n / rates.h2d + 4 * n / rates.d2h
        return forward_backward_s + link + 40 * n / (TORCHS_SHARE_OF_DRAM * rates.dram_in_update)
    # DeepSpeed moves bf16 gradients down, then steps with CPUAdam (12 + 12 bytes of states, 4 of the gradient
    # and 2 of the weight), and then moves bf16 weights up.
    return forward_backward_s + 2 * n / rates.d2h + 30 * n / rates.dram_in_update + 2 * n / rates.h2d


COLUMNS = {  # heading: entry of a result line, and how it is printed
    "tokens": ("tokens_per_step", ""),
    "contender": ("contender", ""),
    "tokens/s": ("tokens_per_second", ",.0f"),
    "step s": ("step_seconds", ".3f"),
    "predicted": ("predicted_step_seconds", ".3f"),
    "exposed s": ("exposed_update_seconds", ".3f"),
    "DRAM": ("dram_share", ".0%"),
    "device GiB": ("device_memory_gib", ".1f"),
    "host GiB": ("host_memory_gib", ".1f"),
    "step / ours": ("ours_over_it", ".2f"),
}


def table(results: list[dict]) -> str:
    """Return one row for each result line, in which an error stands in place of the figures."""

    def cell(line: dict, key: str, form: str) -> str:
        return "-" if line.get(key) is None else format(line[key], form)

    rows = [list(COLUMNS)]
    widths = list(map(len, COLUMNS))
    for line in results:
        row = [cell(line, key, form) for key, form in COLUMNS.values()]
        if "error" in line:
            row[2:] = [line["error"][:90]]
        else:
            widths = [max(width, len(text)) for width, text in zip(widths, row, strict=True)]
        rows.append(row)
    padded = [[f"{text:>{width}}" for text, width in zip(row, widths, strict=False)] for row in rows]
    return "\n".join("  ".join(row) for row in padded)


# ---- the peers, each in its own process --------------------------------------------------------------------


def peer(cfg: Config, config: LlamaConfig) -> dict:
    """Train with the peer that `cfg.turn` names, and return its figures."""
    device, dtype = torch.device("cuda", 0), getattr(torch, cfg.dtype)
    if cfg.device_budget_gib:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cfg.device_budget_gib * GIB / total), device)
    start_process_group(device, 1)
    n_microbatches = cfg.tokens[0] // cfg.seq_len // cfg.micro_batch_size
    microbatches = torch.randint(
        config.vocab_size,
        (n_microbatches, cfg.micro_batch_size, cfg.seq_len + 1),
        generator=torch.Generator().manual_seed(0),
    ).to(device)
    n_scored = microbatches[:, :, 1:].numel()
    with torch.device("meta"):
        model = Llama(config)
    step = (fsdp2_offload if cfg.turn == "fsdp2_offload" else deepspeed_zero3)(cfg, model, dtype, device)
    memory, times, losses = PeakMemory(device), [], []
    for _ in range(cfg.warmup + cfg.steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        loss, forward_backward_s = step(microbatches, n_scored)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began, forward_backward_s))
        losses.append(loss)
    peaks = memory.take()
    stop_process_group()
    step_s, alone_s = map(statistics.median, zip(*times[cfg.warmup :], strict=True))
    return {
        "step_seconds": step_s,
        "forward_backward_seconds": alone_s,
        "update_seconds": step_s - alone_s,
        "losses": losses,
        "n_microbatches": n_microbatches,
        "device_memory_gib": peaks.device / GIB,
        "device_reserved_gib": peaks.device_reserved / GIB,
        "host_memory_gib": peaks.host / GIB,
        "host_pinned_gib": peaks.host_pinned / GIB,
    }


def fsdp2_offload(cfg: Config, model: Llama, dtype: torch.dtype, device: torch.device):
    apply_recompute(list(model.model.layers), "full")
    for block in model.model.layers if cfg.compile else ():
        block.compile()
    how = {
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
        "offload_policy": CPUOffloadPolicy(pin_memory=True),
    }
    for block in model.model.layers:
        fully_shard(block, **how)
    fully_shard(model, reshard_after_forward=False, **how)
    model.to_empty(device="cpu")
    init_weights(model, 0)
    optimizer = build_adamw(model, LR, WEIGHT_DECAY)

    def step(microbatches: torch.Tensor, n_scored: int) -> tuple[float, float]:
        began, total = time.perf_counter(), torch.zeros((), device=device)
        for i, micro in enumerate(microbatches):
            model.set_requires_gradient_sync(i == len(microbatches) - 1)
            loss = model(micro[:, :-1], labels=micro[:, 1:]) / n_scored
            loss.backward()
            total += loss.detach()
        torch.cuda.synchronize()
        alone_s = time.perf_counter() - began
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return total.item(), alone_s

    return step


def deepspeed_zero3(cfg: Config, model: Llama, dtype: torch.dtype, device: torch.device):
    import deepspeed  # where it is not installed, the ImportError is this contender's result

    model.to_empty(device="cpu")
    init_weights(model, 0)
    apply_recompute(list(model.model.layers), "full")
    n_microbatches = cfg.tokens[0] // cfg.seq_len // cfg.micro_batch_size
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": cfg.micro_batch_size,
            "gradient_accumulation_steps": n_microbatches,
            "gradient_clipping": MAX_NORM,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": LR, "betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": WEIGHT_DECAY},
            },
        },
    )

    def step(microbatches: torch.Tensor, n_scored: int) -> tuple[float, float]:
        began, alone_s, total = time.perf_counter(), 0.0, torch.zeros((), device=device)
        for micro in microbatches:
            # DeepSpeed averages over microbatches.
            loss = engine(micro[:, :-1], labels=micro[:, 1:]) / n_scored * len(microbatches)
            engine.backward(loss)
            total += loss.detach() / len(microbatches)
            torch.cuda.synchronize()
            alone_s = time.perf_counter() - began
            engine.step()  # this updates after the last microbatch only
        return total.item(), alone_s

    return step


if __name__ == "__main__":
    run_recipe(main, Config)
