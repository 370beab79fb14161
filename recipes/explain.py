"""Explain a layout before running it: mesh, placements, bytes per rank, traffic per step, pipeline. It needs
no GPU.

    python recipes/explain.py --model llama2-7b --gpus 64 --parallel.tp 8 --parallel.pp 2 \\
        --train.global-batch-size 64

It takes any command line of pretrain.py, and the number of processes that the command line is for. The facts
come from parallel/explain.py; this file prints them.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed
# the recipes beside it are found also under `python -m recipes.explain`
sys.path.insert(0, str(Path(__file__).resolve().parent))

if __name__ == "__main__":
    from dtensor_llama.terminal import end_quietly_on_ctrl_c

    end_quietly_on_ctrl_c()  # the imports below take seconds

import torch
from pretrain import PretrainConfig, check_numbers

from dtensor_llama import LlamaConfig, UsageError
from dtensor_llama.cli import FilePath, run_recipe
from parallel.config import AXES, Job, check_parallel
from parallel.explain import Run, explain
from parallel.schedule_clock import DURATION, draw


@dataclass(frozen=True)
class ExplainConfig(PretrainConfig):
    """Explain what a layout means for one rank."""

    gpus: int = 1  # number of processes that the layout is for: nodes x processes per node
    rank: int = 0  # the rank to explain: the first and the last pipeline stage have more than the others
    json: FilePath | None = None  # file to write the same facts to, as data


def main(cfg: ExplainConfig) -> None:
    check_numbers(cfg)
    if cfg.memory.is_on or cfg.memory.activations:
        raise UsageError(
            f"--memory.placement {cfg.memory.placement} with --memory.activations {cfg.memory.activations} "
            "is not explained here: these bytes are all on the device. The plan is printed where training "
            "starts."
        )
    if cfg.gpus < 1:
        raise UsageError(f"--gpus {cfg.gpus} is not possible; use a whole number of at least 1.")
    if not 0 <= cfg.rank < cfg.gpus:
        raise UsageError(f"--rank {cfg.rank} is not one of --gpus {cfg.gpus}; use 0 to {cfg.gpus - 1}.")
    train, layout = cfg.train, cfg.parallel.resolve(cfg.gpus)
    config = LlamaConfig.from_hf(cfg.model) if Path(cfg.model).exists() else LlamaConfig.preset(cfg.model)
    seq_len = cfg.data.seq_len or config.max_position_embeddings
    kernel = "sdpa" if train.attention == "auto" else train.attention
    job = Job(
        config,
        seq_len,
        train.global_batch_size,
        train.micro_batch_size,
        attention=kernel,
        recompute=train.recompute,
        compile=train.compile,
        device_type="cuda",
    )
    n_microbatches = check_parallel(layout, job)
    facts = explain(Run(layout, job, getattr(torch, train.dtype)), cfg.rank)
    print(
        f"{cfg.model}, {config.n_parameters / 1e9:.2f}B parameters, on {cfg.gpus} ranks with ZeRO stage "
        f"{layout.zero_stage}\n"
        f"{facts['tokens_per_step']:,} tokens a step: {layout.dp} dp ranks x {n_microbatches} microbatches x "
        f"{train.micro_batch_size} rows x {seq_len} tokens",
        *mesh(facts),
        *parameters(facts),
        *traffic(facts),
        *pipeline(facts),
        sep="\n",
    )
    if cfg.json:
        Path(cfg.json).write_text(json.dumps({"model": cfg.model, **facts}) + "\n", encoding="utf-8")


def some(items: list, most: int) -> list:
    """Return at most that many of the items: the first ones and the last."""
    return items if len(items) <= most else [*items[: most - 1], "  ...", items[-1]]


def mesh(facts: dict) -> list[str]:
    """Draw the ranks: a line for each place on the outer axes in use, a column for each on the innermost."""
    sizes = {axis: facts["layout"][axis] for axis in AXES if facts["layout"][axis] > 1} or {AXES[-1]: 1}
    *outer, inner = sizes
    lines = []
    for first in range(0, facts["world_size"], sizes[inner]):
        line, rest = f"  {inner} |", first // sizes[inner]
        for axis in reversed(outer):
            line, rest = f"  {axis} {rest % sizes[axis]:<3}{line}", rest // sizes[axis]
        ranks = some(list(range(first, first + sizes[inner])), 8)
        lines.append(line + "".join(f"{rank:>5}" for rank in ranks))
    groups = [
        f"  {axis:13}{size:>3}   {' '.join(map(str, some(facts['groups'][axis], 9)))}"
        for axis, size in sizes.items()
    ]
    return [
        "\nranks by their place on each axis",
        *some(lines, 10),
        f"\nthe ranks that rank {facts['rank']} meets on each axis",
        *groups,
    ]


def parameters(facts: dict) -> list[str]:
    title = f"parameters of rank {facts['rank']}"
    lines = [f"\n{title:51}{'whole':>15}{'here':>15}   split over (S: dim, R: not)"]
    for row in facts["parameters"]:
        whole, here = (" x ".join(map(str, row[key])) for key in ("shape", "local_shape"))
        placed = " ".join(f"{axis} {placement}" for axis, placement in row["placements"].items())
        lines.append(f"{row['count']:>4} {row['name']:46}{whole:>15}{here:>15}   {placed}")
    return [
        *lines,
        "\nits bytes, without activations and buffers",
        *(f"  {name.replace('_', ' '):18}{size / 2**30:10.3f} GiB" for name, size in facts["bytes"].items()),
    ]


def traffic(facts: dict) -> list[str]:
    lines = [f"\nits traffic in a step\n  {'axis':14}{'kind':16}{'count':>7}{'sent':>14}"]
    for row in facts["collectives"]:
        sent = f"{row['sent_bytes'] / 2**20:>14,.1f} MiB"
        lines.append(f"  {row['axis']:14}{row['kind']:16}{row['count']:>7}{sent}   {row['what']}")
    return lines


def pipeline(facts: dict) -> list[str]:
    if not (about := facts.get("pipeline")):
        return []
    lines = []
    width = min(28, max(work[-1][0] + DURATION[work[-1][1]] for work in about["work"]))
    for rank, (own, work) in enumerate(zip(about["stages_of_pp_ranks"], about["work"], strict=True)):
        layers = ", ".join("{}-{}".format(*about["layers_of_stages"][stage]) for stage in own)
        lines.append(f"  pp {rank:<3} layers {layers:13} |{draw(work, width)}")
    return [
        f"\nschedule {facts['layout']['schedule']}: {about['bubble']:.1%} bubbles, if backward takes as long "
        "as two forwards (F forward, B backward, I and W its halves)",
        *some(lines, 10),
    ]


if __name__ == "__main__":
    run_recipe(main, ExplainConfig, stdout_is_result=True)
