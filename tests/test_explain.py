"""What explain says is what happens: its shards and orders against real processes, its pictures against known
ones."""

import json
import re
import time
from dataclasses import replace

import pytest
import torch
from pool import run_on
from recipe import recipe
from torch import nn
from torch.distributed.pipelining import PipelineStage
from training import forward_backward, make_training
from versions import marks_for

from dtensor_llama import LlamaConfig
from dtensor_llama.data.reader import Batch
from dtensor_llama.model import init_weights
from dtensor_llama.shards import local
from parallel import ParallelConfig, build_mesh
from parallel.apply import Computation
from parallel.config import Job
from parallel.explain import Run, explain
from parallel.pipeline import SCHEDULES, stage_indices
from parallel.pretend import pretended_rank
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
SEQUENCES, SEQ_LEN = 2, 16


def build(run: Run):
    computation = Computation(dtype=run.compute_dtype, recompute=run.job.recompute)
    training = make_training(run.job.model, run.layout, run.n_microbatches, computation)
    init_weights(training.model, seed=0)
    tokens_and_labels = torch.randint(
        64, (2, run.n_microbatches, SEQUENCES, run.job.seq_len // run.layout.cp)
    )
    micros = [Batch(*micro, None) for micro in zip(*tokens_and_labels, strict=True)]

    def step(recorder: Recorder | None = None):
        if recorder:
            training.pipeline.recorder = recorder
        return forward_backward(training, micros, 64)

    return training.layout.mesh, training.model, training.stages, step


def small(ranks: int, layout: dict, n_microbatches=2) -> Run:
    resolved = ParallelConfig(**layout).resolve(ranks)
    batch = n_microbatches * SEQUENCES * resolved.dp
    return Run(resolved, Job(SMALL, SEQ_LEN, batch, SEQUENCES))


# ---- parameters ----


def real_shards(run: Run):
    _, model, *_ = build(run)
    return {re.sub(r"\.\d+\.", ".*.", name): list(local(p).shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "ranks,layout",
    [(1, {}), *((2, {"zero_stage": stage}) for stage in (0, 3)), (2, {"tp": 2}), (4, {"pp": 2})],
)
def test_shards_of_a_rank_are_those_explained(ranks, layout):
    run = small(ranks, layout)
    for rank, shapes in enumerate(run_on(ranks, real_shards, run)):
        facts = explain(run, rank)
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


@pytest.mark.parametrize("pp,n_microbatches", [(2, 4), (4, 8), (4, 20)])
@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name not in ("gpipe", "1f1b")])
def test_orders_without_a_process_group_are_those_of_torch(schedule, pp, n_microbatches):
    kind = SCHEDULES[schedule]
    per_rank = kind.default_virtual_stages
    with pretended_rank(0, pp):
        mesh = build_mesh(ParallelConfig(pp=pp, dp_shard=1), "cpu")
        stages = [
            PipelineStage(nn.Identity(), i, pp * per_rank, torch.device("cpu"), group=mesh["pp"].get_group())
            for i in stage_indices(schedule, pp, per_rank)[0]
        ]
        torchs = kind.torch_class(stages, n_microbatches, loss_fn=lambda *_: None).pipeline_order
    for rank, mine in enumerate(schedule_order(schedule, pp, per_rank, n_microbatches)):
        single = [
            one for both in torchs[rank] if both for one in getattr(both, "sub_actions", None) or (both,)
        ]
        assert [f"{stage}{kind}{micro}" for kind, stage, micro in mine] == list(map(repr, single))


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
    few_layers = replace(LlamaConfig.preset("llama2-7b"), num_hidden_layers=4)
    (tmp_path / "config.json").write_text(json.dumps(few_layers.to_hf()))
    ended = recipe(
        "dryrun",
        "--model",
        tmp_path,
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
    assert "2 model.layers.*.mlp.down_proj.weight 4096 x 11008 1024 x 1376 fsdp S(0) tp S(1)" in said
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["model"] == str(tmp_path) and facts["mesh"]["groups"]["dp_shard"] == [32, 40, 48, 56]
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
