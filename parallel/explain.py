"""Computes what a layout means for one rank before any of its processes exists: mesh, parameters, bytes,
traffic, pipeline.

    facts = explain(run, rank=0)     a dict that JSON can hold; recipes/dryrun.py prints it

The placements are not described but made: the function that training uses, `parallelize`, is applied to a
model without memory, in a pretended process group of the right size. The bytes follow the table in zero.py,
the traffic of tp follows the rows of the plan in tensor.py, and the rest follows the formulas here. The tests
compare all of them with real steps of a few processes.

unit: the parameters that FSDP gathers and reduces at once, which are those of a block, or all that is outside
    the blocks (embedding, norm, head)
"""

import math
import re
from collections import Counter
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement

from dtensor_llama import Llama, LlamaConfig, loss
from dtensor_llama.shards import local
from parallel.apply import Computation, parallelize
from parallel.config import AXES, DERIVED_AXES, ParallelConfig
from parallel.mesh import build_mesh
from parallel.pipeline import split_layers, stage_indices
from parallel.pretend import pretended_rank as pretend
from parallel.rules import Case, Job
from parallel.schedule_clock import clock, schedule_order
from parallel.tensor import Row, tensor_plan

FP32 = 4


@dataclass(frozen=True)
class Run:
    """Holds what is to be explained: a layout, resolved and checked, the job it does, and the dtype it
    computes in."""

    layout: ParallelConfig
    job: Job
    compute_dtype: torch.dtype = torch.bfloat16

    @property
    def config(self) -> LlamaConfig:
        return self.job.model

    @property
    def n_microbatches(self) -> int:
        return Case(self.layout, self.job).n_microbatches

    @property
    def tokens(self) -> int:
        """Return the number of tokens of a microbatch on one cp rank."""
        return self.job.micro_batch_size * self.job.seq_len // self.layout.cp

    @property
    def hidden_bytes(self) -> int:
        """Return the bytes of the hidden states of those tokens, (B, T/cp, D)."""
        return self.tokens * self.config.hidden_size * self.compute_dtype.itemsize


def explain(run: Run, rank: int = 0) -> dict:
    """Return the facts about one rank. Call it where no process group exists.

    bytes: weights, gradients and optimizer state when all of them are there, at the start of the last
        backward of a step. Activations are not in it, nor are buffers: the gradients of a unit or two on
        their way into a collective.
    sent_bytes: what the rank sends in one step if the collectives go round rings; sends are counted, receives
        are not.
    """
    layout, job = run.layout, run.job
    world_size = math.prod(layout.sizes.values())
    with pretend(rank, world_size):
        mesh = build_mesh(layout, "cpu")
        with torch.device("meta"):
            model = Llama(run.config).float()
        parts = parallelize(
            model, mesh, layout, Computation(dtype=run.compute_dtype, recompute=job.recompute)
        )
        coordinates = {axis: mesh[axis].get_local_rank() for axis in AXES}
        collectives = [
            *zero_traffic(run, parts),
            *tp_traffic(run, parts),
            *cp_traffic(run, parts),
            *pp_traffic(run, parts, coordinates["pp"]),
            _row("world", "all-reduce", 3, _ring("all-reduce", 8 * 3, world_size), "three numbers"),
        ]
        facts = {
            "n_parameters": run.config.n_parameters,
            "world_size": world_size,
            "rank": rank,
            "seq_len": job.seq_len,
            "layout": asdict(layout),
            "n_micros": run.n_microbatches,
            "micro_batch_size": job.micro_batch_size,
            "tokens_per_step": job.seq_len * job.micro_batch_size * run.n_microbatches * layout.dp,
            "coordinates": coordinates,
            "groups": {axis: dist.get_process_group_ranks(mesh[axis].get_group()) for axis in AXES},
            "parameters": parameter_kinds(model),
            "bytes": bytes_per_rank(run, model, parts),
            "collectives": [row for row in collectives if row["count"] and row["sent_bytes"]],
        }
        if layout.pp > 1:
            order = schedule_order(layout.schedule, layout.pp, len(parts), run.n_microbatches, mesh["pp"])
            work, bubble = clock(order)
            layers = split_layers(run.config, layout.pp * len(parts))
            facts["pipeline"] = {
                "stages_of_pp_ranks": stage_indices(layout.schedule, layout.pp, len(parts)),
                "layers_of_stages": [[own[0], own[-1]] for own in layers],
                "work": work,
                "bubble": bubble,
            }
    return facts


# ---- parameters and their bytes ----


def parameter_kinds(model: Llama) -> list[dict]:
    """Return the parameters of this rank, with those that are equal in several layers as one; placements are
    given over the axes of more than one rank."""
    kinds = {}
    for name, parameter in model.named_parameters():
        placements = {
            axis: "R" if placement.is_replicate() else f"S({placement.dim})"
            for axis, placement, size in placements_of(parameter)
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


def placements_of(parameter: Tensor) -> list[tuple[str, Placement, int]]:
    """Return (mesh axis, placement, size of the axis) for each axis; nothing for a plain parameter, which is
    whole on one process."""
    if not isinstance(parameter, DTensor):
        return []
    mesh = parameter.device_mesh
    return list(zip(mesh.mesh_dim_names, parameter.placements, mesh.shape, strict=True))


def computing_shape(parameter: Tensor) -> list[int]:
    """Return the shape that this rank computes with: gathered over the axes that ZeRO shards over, and its
    own slice over every other axis."""
    shape = list(parameter.shape)
    for index, (axis, placement, size) in enumerate(placements_of(parameter)):
        if axis in AXES and axis not in DERIVED_AXES["dp_cp"] and placement.is_shard():
            # The mesh may be an equal one of an earlier process group, which gives the place of another rank:
            # so the place is found by the rank itself.
            is_here = parameter.device_mesh.mesh == dist.get_rank()
            place = is_here.nonzero()[0, index].item()
            whole = shape[placement.dim]
            first = -(-whole // size)  # rows of every rank but the last
            shape[placement.dim] = max(0, min(first, whole - first * place))
    return shape


def units(parts: list[Llama]) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Return the units of this rank: its blocks, and the rest of each part that has more than blocks."""
    blocks = [list(block.parameters()) for part in parts for block in part.model.layers if block is not None]
    inside = {parameter for block in blocks for parameter in block}
    rests = [[parameter for parameter in part.parameters() if parameter not in inside] for part in parts]
    return blocks, [rest for rest in rests if rest]


def bytes_per_rank(run: Run, model: Llama, parts: list[Llama]) -> dict[str, int]:
    """Return the bytes of a rank by the table in zero.py, and by what the table leaves out.

    In a pipeline gradients and gathered weights stay whole through the step, at every stage. Whole gradients
    are kept from one microbatch to the next, so there are none if there is only one microbatch.
    """
    blocks, rests = units(parts)
    whole_blocks, whole_rests = (
        [sum(math.prod(computing_shape(p)) for p in unit) for unit in kind] for kind in (blocks, rests)
    )
    here = sum(local(p).numel() for unit in blocks + rests for p in unit)
    stage, in_pipeline = run.layout.zero_stage, run.layout.pp > 1
    keeps_gradients = run.n_microbatches > 1 and (stage < 2 or in_pipeline)
    keeps_weights = stage < 3 or in_pipeline
    two_blocks = sorted(whole_blocks)[-2:]  # one at work, and the next
    gathered = sum(whole_rests) + sum(whole_blocks if keeps_weights else two_blocks)
    facts = {
        "weights": FP32 * here,
        "moments": 2 * FP32 * sum(local(p).numel() for p in model.parameters()),
        "gradients": FP32 * (sum(whole_blocks) + sum(whole_rests) if keeps_gradients else here),
        "gathered_weights": run.compute_dtype.itemsize * gathered * isinstance(parts[0], FSDPModule),
    }
    return {**facts, "total": sum(facts.values())}


# ---- traffic ----


def _row(axis: str, kind: str, count: int, sent_bytes: float, what: str) -> dict:
    return {"axis": axis, "kind": kind, "count": count, "sent_bytes": round(sent_bytes), "what": what}


def _ring(kind: str, whole_bytes: float, n_ranks: int) -> float:
    """Return what one of n ranks sends for a collective over a tensor of that size; the size counts for an
    all-to-all what this rank has."""
    return whole_bytes * (n_ranks - 1) / n_ranks * (2 if kind == "all-reduce" else 1)


def zero_traffic(run: Run, parts: list[Llama]) -> list[dict]:
    """Return what ZeRO sends: weights, and gradients."""
    layout, stage = run.layout, run.layout.zero_stage
    shards = layout.fsdp if stage > 0 else 1

    def padded(unit: list[Tensor]) -> int:  # FSDP pads the rows of each weight to equal shards
        shapes = map(computing_shape, unit)
        return sum(-(-rows // shards) * shards * math.prod(rest) for rows, *rest in shapes)

    blocks, rests = ([padded(unit) for unit in kind] for kind in units(parts))
    n_units, total = len(blocks + rests), sum(blocks + rests)
    # In a pipeline weights are gathered and gradients reduced once a step, as by the stages below.
    each_microbatch = run.n_microbatches if layout.pp == 1 else 1
    gathers = each_microbatch if stage == 3 else 1
    reduces = each_microbatch if stage >= 2 else 1
    # blocks are gathered for backward again, the rest is not
    again = 2 if stage == 3 and layout.pp == 1 else 1
    n_gathers = gathers * (again * len(blocks) + len(rests))
    gathered_bytes = run.compute_dtype.itemsize * gathers * (again * sum(blocks) + sum(rests))
    reduced_bytes = FP32 * reduces * total
    across = "dp_replicate" if stage > 0 else "dp_cp"
    across_bytes = _ring("all-reduce", FP32 * total / shards, layout.ranks(across))
    return [
        _row("fsdp", "all-gather", n_gathers, _ring("all-gather", gathered_bytes, shards), "weights"),
        _row(
            "fsdp",
            "reduce-scatter",
            reduces * n_units,
            _ring("reduce-scatter", reduced_bytes, shards),
            "gradients",
        ),
        _row(across, "all-reduce", n_units, across_bytes, "gradients"),
    ]


def tp_traffic(run: Run, parts: list[Llama]) -> list[dict]:
    """Return what the rows of the tensor-parallel plan send, for the modules of this rank."""
    layout = run.layout
    if layout.tp == 1:
        return []
    n_modules = {
        "model.embed_tokens": any(part.model.embed_tokens is not None for part in parts),
        "model.norm": any(part.lm_head is not None for part in parts),
        "token_loss": any(part.lm_head is not None for part in parts),
        "lm_head": 0,  # its row is for logits, and with labels there are none
    }
    n_blocks = len(units(parts)[0])
    counts, sent = Counter(), Counter()
    for name, row in tensor_plan(run.config, layout.tp, layout.sequence_parallel).items():
        # Recompute repeats the forward of a block, but for its last sum, which nothing in backward needs.
        in_block = ".*." in name
        repeats = in_block and run.job.recompute != "none" and not name.endswith("down_proj")
        n_here = run.n_microbatches * (n_blocks if in_block else n_modules[name])
        for collectives, is_forward in ((row.forward, True), (row.backward, False)):
            for kind, number in collectives.items():
                what, number, whole_bytes = _one_collective(run, name, row, kind, number, is_forward)
                n = n_here * number * (2 if repeats and is_forward else 1)
                counts[kind, what] += n
                sent[kind, what] += n * _ring(kind, whole_bytes, layout.tp)
    return [_row("tp", kind, n, sent[kind, what], what) for (kind, what), n in counts.items()]


def _one_collective(
    run: Run, name: str, row: Row, kind: str, number: int, is_forward: bool
) -> tuple[str, int, float]:
    """Return (what it carries, how many there are, bytes of the whole tensor) for a collective of a row and
    one microbatch."""
    if name == "token_loss" and is_forward and kind == "all-reduce":
        # Once per chunk of tokens; together they carry 3 fp32 numbers a token.
        chunk_tokens = loss.tokens_per_chunk(-(-run.config.vocab_size // run.layout.tp))
        n_sums = number * -(-run.tokens // chunk_tokens)
        return "sums of the loss", n_sums, 3 * FP32 * run.tokens / n_sums
    if row.weight == "R" and kind == "all-reduce":
        # Each rank used the whole weight for its own tokens, or for its own head.
        shapes = {f"model.layers.*.{own}": shape for own, shape in run.config.block_weights().items()}
        shapes["model.norm.weight"] = (run.config.hidden_size,)
        shape = shapes[f"{name}.weight"]
        what = "gradients of norms" if len(shape) == 1 else "gradients of k_proj, v_proj"
        n_bias = math.prod(shapes.get(f"{name}.bias", (0,)))
        return what, number, FP32 * (math.prod(shape) + n_bias) / number
    return "activations", number, run.hidden_bytes


def cp_traffic(run: Run, parts: list[Llama]) -> list[dict]:
    """Return what attention sends, by the formulas in context.py. Recompute repeats forward, but `selective`
    keeps what the ring gave."""
    layout, config, cp = run.layout, run.config, run.layout.cp
    passes = len(units(parts)[0]) * run.n_microbatches
    itemsize = run.compute_dtype.itemsize
    H, K = config.num_attention_heads // layout.tp, max(1, config.num_key_value_heads // layout.tp)
    head = run.tokens * config.head_dim
    if layout.cp_method == "ulysses":
        n = passes * (2 if run.job.recompute == "none" else 3)
        heads = 2 * H + 2 * math.lcm(K, cp)
        sent = n * _ring("all-to-all", itemsize * head * heads, cp)
        return [_row("cp", "all-to-all", 4 * n, sent, "q, k, v, attention's output")]
    n = passes * (3 if run.job.recompute == "full" else 2) * (cp - 1)
    n_gradients = passes * cp * (cp > 1)
    pair = 2 * head * K
    return [
        _row("cp", "send", 2 * n, n * pair * itemsize, "k, v"),
        _row("cp", "send", 2 * n_gradients, n_gradients * pair * FP32, "gradients of k, v"),
    ]


def pp_traffic(run: Run, parts: list[Llama], pp_rank: int) -> list[dict]:
    """Return what stages send: hidden states to the stage after, gradients to the one before, where that
    stage is on another rank."""
    stages = stage_indices(run.layout.schedule, run.layout.pp, len(parts))
    rank_of = {stage: rank for rank, own in enumerate(stages) for stage in own}
    neighbours = [neighbour for stage in stages[pp_rank] for neighbour in (stage + 1, stage - 1)]
    elsewhere = [stage for stage in neighbours if rank_of.get(stage, pp_rank) != pp_rank]
    n_sends = len(elsewhere) * run.n_microbatches
    sent = n_sends * run.hidden_bytes / run.layout.sequence_shards
    rows = [_row("pp", "send", n_sends, sent, "hidden states, gradients")]
    ends = rank_of[0], rank_of[len(rank_of) - 1]
    if run.config.tie_word_embeddings and ends[0] != ends[1] and pp_rank in ends:
        # The weight goes one way, and its gradient comes back.
        matrix = parts[0].model.embed_tokens or parts[-1].lm_head
        rows.append(_row("pp", "send", 1, FP32 * local(matrix.weight).numel(), "the tied matrix"))
    return rows
