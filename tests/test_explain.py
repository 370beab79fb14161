"""What explain says is what happens: its bytes and collectives against real steps, its pictures against known
ones."""

import gc
import json
import re
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from pool import run_on
from recipe import recipe
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from training import forward_backward, make_training
from versions import marks_for

from dtensor_llama import LlamaConfig, loss
from dtensor_llama.data.reader import Batch
from dtensor_llama.model import init_weights
from dtensor_llama.optim import build_adamw
from dtensor_llama.shards import local
from parallel import ParallelConfig, context
from parallel.apply import Computation
from parallel.config import Job
from parallel.explain import FP32, Run, explain
from parallel.pipeline import SCHEDULES
from parallel.schedule_clock import clock, draw, schedule_order
from parallel.schedule_picture import Recorder

SMALL = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)
ROWS, SEQ_LEN = 2, 16
CHUNK = 7 * 32  # elements of the loss's chunks: so small that there are several


def build(run: Run):
    computation = Computation(dtype=run.compute_dtype, recompute=run.job.recompute)
    training = make_training(run.config, run.layout, run.n_microbatches, computation)
    init_weights(training.model, seed=0)
    tokens_and_labels = torch.randint(64, (2, run.n_microbatches, ROWS, run.job.seq_len // run.layout.cp))
    micros = [Batch(*micro, None) for micro in zip(*tokens_and_labels, strict=True)]

    def step(recorder: Recorder | None = None):
        if recorder:
            training.pipeline.recorder = recorder
        return forward_backward(training, micros, 64)

    return training.layout.mesh, training.model, training.stages, step


# ---- traffic ----


class Wire(TorchDispatchMode):
    """Counts what collectives there are, (axis, kind) -> number and bytes that this rank must send."""

    def __init__(self, mesh, zero_axis):
        super().__init__()
        self.axes = {mesh[axis].get_group().group_name: axis for axis in ("pp", "cp", "tp", "dp_replicate")}
        # may be that of cp
        self.zero_group, self.zero_axis = mesh[zero_axis].get_group().group_name, zero_axis
        self.counts, self.sent = Counter(), Counter()

    def note(self, group, kind, whole_bytes, by_fsdp=False):
        n = group.size()
        axis = (
            self.zero_axis
            if by_fsdp and group.group_name == self.zero_group
            else self.axes.get(group.group_name)
        )
        if n > 1:
            self.counts[axis, kind] += 1
            self.sent[axis, kind] += (
                whole_bytes
                if kind == "send"
                else (whole_bytes * (n - 1) / n * (2 if kind == "all-reduce" else 1))
            )

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name, space = str(op).split(".")[1], str(op).split(".")[0]
        if space == "c10d":
            (*tensors, group) = (
                args[:3] if name in ("_allgather_base_", "_reduce_scatter_base_") else args[:2]
            )
            tensors = [x for one in tensors for x in (one if isinstance(one, list) else [one])]
            group = dist.ProcessGroup.unbox(group)
            kind = {
                "_allgather_base_": "all-gather",
                "_reduce_scatter_base_": "reduce-scatter",
                "allreduce_": "all-reduce",
                "send": "send",
            }.get(name)
            if kind:
                self.note(group, kind, max(x.nbytes for x in tensors), by_fsdp=kind != "send")
        elif space == "_c10d_functional" and name in (
            "all_gather_into_tensor",
            "reduce_scatter_tensor",
            "all_reduce",
        ):
            group = _resolve_process_group(args[-1])
            # gloo has no all-to-all: DTensor gathers and takes its share
            if self.axes.get(group.group_name) == "cp":
                self.note(group, "all-to-all", args[0].nbytes)
            else:
                whole = args[0].nbytes * (group.size() if name == "all_gather_into_tensor" else 1)
                self.note(
                    group, name.replace("_into_tensor", "").replace("_tensor", "").replace("_", "-"), whole
                )
        return op(*args, **(kwargs or {}))


def real_traffic(run: Run):
    loss.CHUNK_ELEMENTS, before = CHUNK, loss.CHUNK_ELEMENTS
    mesh, _, _, step = build(run)
    step()  # the first step sets things up
    send_round = context._send_round
    with Wire(mesh, "fsdp" if run.layout.zero_stage else "dp_cp") as wire:

        def noted(xs, group, *args, **kwargs):  # inside a custom op, where no dispatch mode looks
            for x in xs:
                wire.note(group, "send", x.nbytes)
            return send_round(xs, group, *args, **kwargs)

        context._send_round = noted
        step()
    context._send_round, loss.CHUNK_ELEMENTS = send_round, before
    return dict(wire.counts), dict(wire.sent)


TRAFFIC = {  # ranks, layout, recompute
    "zero-0": (2, {"zero_stage": 0}, "none"),
    "zero-1": (2, {"zero_stage": 1}, "none"),
    "zero-2": (2, {"zero_stage": 2}, "none"),
    "zero-3": (2, {"zero_stage": 3}, "full"),
    "hsdp": (4, {"dp_replicate": 2}, "none"),
    "hsdp-zero-1": (4, {"dp_replicate": 2, "zero_stage": 1}, "none"),
    "tp": (2, {"tp": 2}, "none"),
    "tp-recompute": (2, {"tp": 2}, "full"),
    "tp-selective": (2, {"tp": 2}, "selective"),
    "tp-no-sp": (2, {"tp": 2, "sequence_parallel": False}, "none"),
    "tp-no-sp-recompute": (2, {"tp": 2, "sequence_parallel": False}, "full"),
    "tp-shared-heads": (4, {"tp": 4}, "none"),
    "ulysses": (2, {"cp": 2}, "none"),
    "ulysses-recompute": (2, {"cp": 2}, "selective"),
    "ulysses-shared-heads": (4, {"cp": 4}, "none"),
    "ring": (2, {"cp": 2, "cp_method": "ring"}, "none"),
    "ring-4-selective": (4, {"cp": 4, "cp_method": "ring"}, "selective"),
    "ring-recompute": (2, {"cp": 2, "cp_method": "ring"}, "full"),
    "pp-dp": (4, {"pp": 2}, "none"),
    "pp-tied": (4, {"pp": 2}, "none"),
    "pp-tp": (4, {"pp": 2, "tp": 2}, "none"),
    "pp-interleaved": (2, {"pp": 2, "schedule": "interleaved-1f1b"}, "none"),
    "pp-zbv": (2, {"pp": 2, "schedule": "zbv"}, "none"),
    "cp-tp": (4, {"cp": 2, "tp": 2, "zero_stage": 1}, "none"),
}


def small(ranks: int, layout: dict, recompute="none", model=SMALL, n_microbatches=2) -> Run:
    resolved = ParallelConfig(**layout).resolve(ranks)
    rows = n_microbatches * ROWS * resolved.dp
    return Run(resolved, Job(model, SEQ_LEN, rows, ROWS, recompute=recompute))


FAST = (
    "zero-0",
    "zero-3",
    "hsdp-zero-1",
    "tp-no-sp-recompute",
    "ulysses-recompute",
    "ring",
    "pp-dp",
    "cp-tp",
)


def traffic_case(name: str):
    marks = marks_for(TRAFFIC[name][1].get("schedule"))
    return pytest.param(name, marks=marks if name in FAST else [*marks, pytest.mark.slow])


@pytest.mark.parametrize("case", map(traffic_case, TRAFFIC))
def test_the_collectives_of_a_step_are_those_explained(case, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", CHUNK)
    run = small(*TRAFFIC[case], model=replace(SMALL, tie_word_embeddings="tied" in case))
    for rank, (counts, sent) in enumerate(run_on(TRAFFIC[case][0], real_traffic, run)):
        told, told_bytes = Counter(), Counter()
        for row in explain(run, rank)["collectives"]:
            if row["axis"] != "world":
                told[row["axis"], row["kind"]] += row["count"]
                told_bytes[row["axis"], row["kind"]] += row["sent_bytes"]
        assert counts == told and sent == pytest.approx(told_bytes, abs=4)


# ---- bytes ----


def live_bytes() -> int:
    """Of all tensors made since gc.freeze()."""
    gc.collect()
    tensors = [
        x
        for x in gc.get_objects()
        if isinstance(x, torch.Tensor) and not isinstance(x, DTensor) and x.device.type == "cpu"
    ]
    # Python has not met those of plain ones
    tensors += [x.grad for x in tensors if x.is_leaf and x.grad is not None]
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def real_bytes(run: Run):
    """The most bytes of tensors seen in the second step, at the forward of each block and before its
    backward."""
    gc.freeze()
    _, model, parts, step = build(run)
    shapes = {re.sub(r"\.\d+\.", ".*.", name): list(local(p).shape) for name, p in model.named_parameters()}
    optimizer = build_adamw(model, 1e-3, 0.1)
    step()
    optimizer.step()
    optimizer.zero_grad()
    seen = []
    for block in (block for part in parts for block in part.model.layers if block is not None):
        block.mlp.register_forward_pre_hook(lambda *_: seen.append(live_bytes()))
        block.mlp.register_full_backward_pre_hook(lambda *_: seen.append(live_bytes()))
    step()
    gc.unfreeze()
    return max(seen), shapes


BLOCK = 128 * 128 * 3 + 128 * 352 * 3 + 2 * 128  # parameters of a block of
WIDE = replace(SMALL, hidden_size=128, intermediate_size=352, vocab_size=128, num_hidden_layers=6)


@pytest.mark.parametrize(
    "ranks,layout",
    [(1, {}), *((2, {"zero_stage": stage}) for stage in range(4)), (2, {"tp": 2}), (4, {"pp": 2})],
)
def test_bytes_and_shards_of_a_rank_are_those_explained(ranks, layout):
    run = small(ranks, layout, model=WIDE)
    run = replace(run, job=replace(run.job, seq_len=4))  # few tokens: activations are not explained
    if ranks == 1:
        run = replace(run, compute_dtype=torch.float32)  # what stays plain
    for rank, (most, shapes) in enumerate(run_on(ranks, real_bytes, run)):
        facts = explain(run, rank)
        # the rest: gradients of a block on their way
        assert 0 < most - facts["bytes"]["total"] < 1.2 * FP32 * BLOCK
        assert shapes == {row["name"]: row["local_shape"] for row in facts["parameters"]}


# ---- the pipeline ----


def test_orders_and_bubbles_as_pictures():
    def drawn(schedule):
        work, bubble = clock(schedule_order(schedule, 2, 1, 4))
        assert bubble == pytest.approx(1 / 5)  # (pp - 1) / (microbatches + pp - 1)
        return [draw(rank_work, 15) for rank_work in work]

    assert drawn("gpipe") == [
        "F0 F1 F2 F3 .........B0 B0 B1 B1 B2 B2 B3 B3",
        "...F0 F1 F2 F3 B0 B0 B1 B1 B2 B2 B3 B3 ......",
    ]
    assert drawn("1f1b") == [
        "F0 F1 ......B0 B0 F2 B1 B1 F3 B2 B2 ...B3 B3",
        "...F0 B0 B0 F1 B1 B1 F2 B2 B2 F3 B3 B3 ......",
    ]


def real_order(run: Run):
    mesh, *_, step = build(run)
    recorder = Recorder(mesh["pp"], torch.device("cpu"))
    step(recorder)
    return recorder.gather()


@pytest.mark.parametrize("schedule", [pytest.param(name, marks=marks_for(name)) for name in SCHEDULES])
def test_a_step_runs_in_the_order_explained(schedule):
    run = small(2, {"pp": 2, "schedule": schedule}, n_microbatches=4)
    events = run_on(2, real_order, run)[0]
    for pp_rank, work in enumerate(explain(run)["pipeline"]["work"]):
        told = [action for _, *action in work]
        # The first stage has no gradient of its input to hand on: its I is nothing, its W a whole backward.
        told = [
            ["B", 0, micro] if stage == 0 and kind == "W" else [kind, stage, micro]
            for kind, stage, micro in told
            if (kind, stage) != ("I", 0)
        ]
        mine = sorted(
            (event for event in events if event.pp_rank == pp_rank), key=lambda event: event.start_s
        )
        assert [[event.kind, event.stage, event.microbatch] for event in mine] == told


# ---- the recipe ----


def test_the_recipe_draws_the_mesh_and_writes_the_facts(tmp_path):
    ended = recipe(
        "dryrun",
        "--model",
        "llama2-7b",
        "--gpus",
        64,
        "--parallel.tp",
        8,
        "--parallel.pp",
        2,
        "--rank",
        40,
        "--train.global-batch-size",
        64,
        "--json",
        tmp_path / "facts.json",
    )
    assert ended.status == 0, ended
    said = [" ".join(line.split()) for line in ended.out.splitlines()]
    assert "pp 1 dp_shard 1 tp | 40 41 42 43 44 45 46 47" in said and "pp 2 8 40" in said
    assert "16 model.layers.*.mlp.down_proj.weight 4096 x 11008 1024 x 1376 fsdp S(0) tp S(1)" in said
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["model"] == "llama2-7b" and facts["mesh"]["groups"]["dp_shard"] == [32, 40, 48, 56]
    assert facts["ranks"][0]["held_gib"]["optimizer"] >= 2 * facts["ranks"][0]["held_gib"]["parameters"]


@pytest.mark.parametrize(
    "flags,said",
    [
        (["--gpus", 0], "--gpus 0 is not possible"),
        (["--rank", 4], "--rank 4 is not one of --gpus 4; use 0 to 3"),
        (["--parallel.tp", 3], "--parallel.tp 3, which needs a multiple of 3"),
        (["--parallel.pp", 4, "--train.global-batch-size", 2], "needs a microbatch for each"),
    ],
)
def test_what_pretrain_would_refuse_is_refused(flags, said):
    ended = recipe("dryrun", "--model", "tiny-1m", "--gpus", 4, *flags)
    assert ended.status == 2 and said in ended.err and ended.err.count("\n") == 1


def test_70b_on_512_ranks_takes_seconds():
    began = time.process_time()
    layout = ParallelConfig(tp=8, pp=8, cp=2, schedule="interleaved-1f1b").resolve(512)
    job = Job(LlamaConfig.preset("llama2-70b"), 8192, 128 * layout.dp, recompute="full")
    facts = explain(Run(layout, job), rank=511)
    assert time.process_time() - began < 10
    assert facts["n_parameters"] == 68_976_648_192 and facts["pipeline"]["bubble"] < 0.05
