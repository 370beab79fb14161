"""What a layout means for one rank, before any of its processes exists: mesh, parameters, bytes, traffic,
pipeline.

    facts = explain(run, rank=0)     what JSON can hold
    print(show(facts))               the same for people

Placements are not described but made: in a pretended process group of the right size, a model without memory
goes through the very `parallelize` that training uses. Bytes follow the table in zero.py, tp's traffic the
plan in tensor.py, the rest the formulas here; tests hold them all against real steps of a few processes.

unit: the parameters that FSDP gathers and reduces at once: a block, or what is left of the model (embedding,
    norm, head)
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement

from dtensor_llama import Llama, LlamaConfig, loss
from dtensor_llama.shards import local
from parallel.apply import Computation, parallelize
from parallel.config import AXES, ParallelConfig
from parallel.mesh import build_mesh
from parallel.pipeline import split_layers, stage_indices
from parallel.schedule_clock import clock, schedule_order
from parallel.tensor import describe

FP32 = 4


@dataclass(frozen=True)
class Run:
    """What is to be explained: layout resolved and checked, n_micros microbatches of so many rows per dp rank
    and step."""

    config: LlamaConfig
    layout: ParallelConfig
    seq_len: int
    n_micros: int
    micro_batch_size: int = 1
    compute_dtype: torch.dtype = torch.bfloat16
    recompute: str = "none"

    @property
    def tokens(self) -> int:
        """Of a microbatch, on one cp rank."""
        return self.micro_batch_size * self.seq_len // self.layout.cp

    @property
    def hidden_bytes(self) -> int:
        """Of the hidden states of those tokens, (B, T/cp, D)."""
        return self.tokens * self.config.hidden_size * self.compute_dtype.itemsize


@contextmanager
def pretend(rank: int, world_size: int) -> Iterator[None]:
    """Be one rank of a process group in which nobody else is there and collectives do nothing. Good for
    shapes only."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # private in torch 2.11 to 2.13

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def explain(run: Run, rank: int = 0) -> dict:
    """The facts about one rank; called where no process group exists.

    bytes: weights, gradients and optimizer state when all of them are there, at the start of a step's last
        backward. Neither activations are in it, nor buffers: the gradients of a unit or two on their way into
        a collective.
    sent_bytes: what the rank sends in one step, if collectives go round rings; sends are counted, not
        receives.
    """
    layout, config = run.layout, run.config
    sizes = {axis: getattr(layout, axis) for axis in AXES}
    world_size = math.prod(sizes.values())
    with pretend(rank, world_size):
        mesh = build_mesh(layout, "cpu")
        with torch.device("meta"):
            model = Llama(config).float()
        parts = parallelize(
            model, mesh, layout, Computation(dtype=run.compute_dtype, recompute=run.recompute)
        )
        stages = stage_indices(layout.schedule, layout.pp, len(parts))
        coordinates = {axis: mesh[axis].get_local_rank() for axis in AXES}
        facts = {
            "n_parameters": config.n_parameters,
            "world_size": world_size,
            "rank": rank,
            "seq_len": run.seq_len,
            "layout": asdict(layout),
            "n_micros": run.n_micros,
            "micro_batch_size": run.micro_batch_size,
            "tokens_per_step": run.seq_len * run.micro_batch_size * run.n_micros * layout.dp,
            "coordinates": coordinates,
            "groups": {axis: dist.get_process_group_ranks(mesh[axis].get_group()) for axis in AXES},
            "parameters": parameter_kinds(model),
            "bytes": bytes_per_rank(run, model, parts),
            "collectives": [
                *zero_traffic(run, parts),
                *tp_traffic(run, parts),
                *cp_traffic(run, parts),
                *pp_traffic(run, parts, stages, coordinates["pp"]),
                _row("world", "all-reduce", 3, _ring("all-reduce", 8 * 3, world_size), "three numbers"),
            ],
        }
        if layout.pp > 1:
            work, bubble = clock(
                schedule_order(layout.schedule, layout.pp, len(parts), run.n_micros, mesh["pp"])
            )
            layers = [[layers[0], layers[-1]] for layers in split_layers(config, layout.pp * len(parts))]
            facts["pipeline"] = {
                "stages_of_pp_ranks": stages,
                "layers_of_stages": layers,
                "work": work,
                "bubble": bubble,
            }
    facts["collectives"] = [row for row in facts["collectives"] if row["count"] and row["sent_bytes"]]
    return facts


# ---- parameters and their bytes ----


def parameter_kinds(model: Llama) -> list[dict]:
    """The parameters of this rank, equal ones of several layers as one; placements over axes of more than one
    rank."""
    kinds = {}
    for name, parameter in model.named_parameters():
        placements = {
            axis: "R" if placement.is_replicate() else f"S({placement.dim})"
            for axis, placement, size in spread(parameter)
            if size > 1
        }
        row = {
            "name": re.sub(r"\.\d+\.", ".*.", name),
            "shape": list(parameter.shape),
            "placements": placements,
            "local_shape": list(local(parameter).shape),
        }
        kinds.setdefault(str(row), {"count": 0, **row})["count"] += 1
    return list(kinds.values())


def spread(parameter: Tensor) -> list[tuple[str, Placement, int]]:
    """(mesh axis, placement, size of the axis); nothing for a plain parameter, which one process has to
    itself."""
    if not isinstance(parameter, DTensor):
        return []
    mesh = parameter.device_mesh
    return list(zip(mesh.mesh_dim_names, parameter.placements, mesh.shape, strict=True))


def computing_shape(parameter: Tensor) -> list[int]:
    """What this rank computes with: its slice over tp, gathered over all other axes."""
    shape = list(parameter.shape)  # its mesh is perhaps an equal one of an earlier group:
    for axis, placement, size in spread(parameter):
        if axis == "tp" and placement.is_shard():
            first = -(-shape[placement.dim] // size)  # so ask for the rank itself; tp is the innermost axis
            shape[placement.dim] = max(0, min(first, shape[placement.dim] - first * (dist.get_rank() % size)))
    return shape


def units(parts: list[Llama]) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """This rank's units: its blocks, and the rest of each part that has more than blocks."""
    blocks = [list(block.parameters()) for part in parts for block in part.model.layers if block is not None]
    inside = {parameter for block in blocks for parameter in block}
    rests = [[parameter for parameter in part.parameters() if parameter not in inside] for part in parts]
    return blocks, [rest for rest in rests if rest]


def bytes_per_rank(run: Run, model: Llama, parts: list[Llama]) -> dict[str, int]:
    """As the table in zero.py, and: in a pipeline gradients and gathered weights stay whole through the step,
    at every stage; whole gradients are kept from one microbatch to the next, so never if there is only
    one."""
    blocks, rests = units(parts)
    whole = [[sum(math.prod(computing_shape(p)) for p in unit) for unit in kind] for kind in (blocks, rests)]
    here = sum(local(p).numel() for unit in blocks + rests for p in unit)
    stage, in_pipeline = run.layout.zero_stage, run.layout.pp > 1
    keeps_gradients = run.n_micros > 1 and (stage < 2 or in_pipeline)
    # one at work, the next
    gathered = sum(whole[1]) + sum(whole[0] if stage < 3 or in_pipeline else sorted(whole[0])[-2:])
    facts = {
        "weights": FP32 * here,
        "moments": 2 * FP32 * sum(local(p).numel() for p in model.parameters()),
        "gradients": FP32 * (sum(map(sum, whole)) if keeps_gradients else here),
        "gathered_weights": run.compute_dtype.itemsize * gathered * isinstance(parts[0], FSDPModule),
    }
    return {**facts, "total": sum(facts.values())}


# ---- traffic ----


def _row(axis: str, kind: str, count: int, sent_bytes: float, what: str) -> dict:
    return {"axis": axis, "kind": kind, "count": count, "sent_bytes": round(sent_bytes), "what": what}


def _ring(kind: str, whole_bytes: float, n_ranks: int) -> float:
    """What one of n ranks sends for a collective over a tensor of that size (all-to-all: over what this rank
    has)."""
    return whole_bytes * (n_ranks - 1) / n_ranks * (2 if kind == "all-reduce" else 1)


def _times_a_step(run: Run, from_stage: int) -> int:
    """How often what ZeRO does for each microbatch from this stage on is done; in a pipeline, as below it,
    once a step."""
    return run.n_micros if run.layout.zero_stage >= from_stage and run.layout.pp == 1 else 1


def zero_traffic(run: Run, parts: list[Llama]) -> list[dict]:
    """Weights and gradients."""
    layout, cb = run.layout, run.compute_dtype.itemsize
    blocks, rests = units(parts)
    shards = layout.dp_shard * layout.cp if layout.zero_stage > 0 else 1
    sizes = [
        [
            sum(-(-rows // shards) * shards * math.prod(rest) for rows, *rest in map(computing_shape, unit))
            for unit in kind
        ]
        for kind in (blocks, rests)
    ]  # FSDP pads rows to equal shards
    n_units, total = len(blocks + rests), sum(map(sum, sizes))
    gathers, reduces = _times_a_step(run, from_stage=3), _times_a_step(run, from_stage=2)
    # blocks are gathered again, the rest is not
    for_backward = 2 if layout.zero_stage == 3 and layout.pp == 1 else 1
    gathered = gathers * (for_backward * sum(sizes[0]) + sum(sizes[1]))
    across, n_across = (
        ("dp_replicate", layout.dp_replicate) if layout.zero_stage > 0 else ("dp_cp", layout.grad_ranks)
    )
    return [
        _row(
            "fsdp",
            "all-gather",
            gathers * (for_backward * len(blocks) + len(rests)),
            _ring("all-gather", cb * gathered, shards),
            "weights",
        ),
        _row(
            "fsdp",
            "reduce-scatter",
            reduces * n_units,
            _ring("reduce-scatter", FP32 * reduces * total, shards),
            "gradients",
        ),
        _row(
            across, "all-reduce", n_units, _ring("all-reduce", FP32 * total / shards, n_across), "gradients"
        ),
    ]


def tp_traffic(run: Run, parts: list[Llama]) -> list[dict]:
    """What the rows of the plan name, for the modules of this rank, and two sums that follow from their
    placements."""
    layout, config, counts, sent = run.layout, run.config, Counter(), Counter()
    if layout.tp == 1:
        return []

    def add(kind: str, what: str, n: int, whole_bytes: float, often: int = run.n_micros) -> None:
        counts[kind, what] += n * often
        sent[kind, what] += n * often * _ring(kind, whole_bytes, layout.tp)

    n_blocks, is_first, is_last = (
        len(units(parts)[0]),
        any(part.model.embed_tokens is not None for part in parts),
        any(part.lm_head is not None for part in parts),
    )
    # lm_head: with labels unused
    ends = {"model.embed_tokens": is_first, "model.norm": is_last, "cross_entropy": is_last}
    n_chunks = -(-run.tokens // loss.tokens_per_chunk(-(-config.vocab_size // layout.tp)))
    for name, _, _, *passes in describe(config, layout.tp, layout.sequence_parallel):
        n_here = n_blocks if ".*." in name else int(ends.get(name, 0))
        # whose sum nobody needs again
        again = run.recompute != "none" and ".*." in name and not name.endswith("down_proj")
        for remark, times in zip(passes, (2 if again else 1, 1), strict=True):
            for number, kind in re.findall(r"(\d*) ?(all-gather|all-reduce|reduce-scatter)", remark):
                if name == "cross_entropy" and number:  # of each chunk: together 3 fp32 numbers a token
                    n_sums = int(number) * n_chunks
                    add(kind, "sums of the loss", n_sums * n_here, 3 * FP32 * run.tokens / n_sums)
                elif name.endswith("norm"):  # each rank had its own tokens
                    add(kind, "gradients of norms", n_here, FP32 * config.hidden_size)
                elif name.endswith(("k_proj", "v_proj")):  # each rank used one head of the whole matrix
                    add(
                        kind,
                        "gradients of k_proj, v_proj",
                        n_here,
                        FP32 * config.num_key_value_heads * config.head_dim * config.hidden_size,
                    )
                else:
                    add(kind, "activations", int(number or 1) * n_here * times, run.hidden_bytes)
    return [_row("tp", kind, n, sent[kind, what], what) for (kind, what), n in counts.items()]


def cp_traffic(run: Run, parts: list[Llama]) -> list[dict]:
    """Per block as context.py says. Recompute repeats forward, but `selective` keeps what the ring gave."""
    layout, config, cp = run.layout, run.config, run.layout.cp
    passes = len(units(parts)[0]) * run.n_micros
    H, K = config.num_attention_heads // layout.tp, max(1, config.num_key_value_heads // layout.tp)
    head = run.tokens * config.head_dim
    if layout.cp_method == "ulysses":
        n, W = (2 if run.recompute == "none" else 3), math.lcm(K, cp)
        return [
            _row(
                "cp",
                "all-to-all",
                4 * n * passes,
                n * passes * _ring("all-to-all", run.compute_dtype.itemsize * head * (2 * H + 2 * W), cp),
                "q, k, v, attention's output",
            )
        ]
    n, pair = (3 if run.recompute == "full" else 2), 2 * head * K
    return [
        _row(
            "cp",
            "send",
            2 * n * (cp - 1) * passes,
            n * (cp - 1) * passes * pair * run.compute_dtype.itemsize,
            "k, v",
        ),
        _row("cp", "send", 2 * cp * passes * (cp > 1), cp * passes * pair * FP32, "gradients of k, v"),
    ]


def pp_traffic(run: Run, parts: list[Llama], stages: list[list[int]], pp_rank: int) -> list[dict]:
    """Hidden states to the stage after, their gradients to the one before, where that is on another rank."""
    rank_of = {stage: rank for rank, own in enumerate(stages) for stage in own}
    n_sends = (
        sum(rank_of.get(stage + step, pp_rank) != pp_rank for stage in stages[pp_rank] for step in (1, -1))
        * run.n_micros
    )
    rows = [
        _row(
            "pp",
            "send",
            n_sends,
            n_sends * run.hidden_bytes / run.layout.sequence_shards,
            "hidden states, gradients",
        )
    ]
    ends = rank_of[0], rank_of[len(rank_of) - 1]
    # the weight one way, its gradient back
    if run.config.tie_word_embeddings and ends[0] != ends[1] and pp_rank in ends:
        matrix = parts[0].model.embed_tokens or parts[-1].lm_head
        rows.append(_row("pp", "send", 1, FP32 * local(matrix.weight).numel(), "the tied matrix"))
    return rows
