"""parallel/planner.py: the search over layouts, its reasons, what it refuses, and what people ask about."""

import json
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from recipe import ROOT, pretrain_flags, recipe
from versions import needs_split_backward

from dtensor_llama import LlamaConfig, UsageError
from dtensor_llama.metrics import GIB
from memory import MemoryConfig
from memory.auto import foresee
from parallel import ParallelConfig
from parallel.cluster import NODES, cluster_here, find_cluster
from parallel.config import check_parallel
from parallel.cost import FITS_SHARE, States, bytes_needed, bytes_of_rank
from parallel.dry_run_report import search, settings_of
from parallel.pipeline import SCHEDULES
from parallel.planner import (
    PURPOSES,
    Question,
    choose_open,
    draw_plan,
    frontier,
    name_of,
    plan,
    plan_settings,
    works,
)
from parallel.recompute import MODES
from parallel.rules import Job
from recipes import dryrun, pretrain
from recipes.pretrain import PretrainConfig, TrainConfig

sys.path[:0] = [str(ROOT / "recipes/launch"), str(ROOT / "recipes/bench")]
import plan_cases  # noqa: E402
from sizes import SLOWER, TABLE, T, account_of, flags  # noqa: E402

SEVEN_B, SEVENTY_B = LlamaConfig.preset("llama2-7b"), LlamaConfig.preset("llama2-70b")


def question(model=SEVEN_B, gpu="h100-80gb", gpus=8, sequences=1024, seq_len=4096, **more) -> Question:
    return Question(model, seq_len, sequences, find_cluster(gpu, gpus), **more)


# ---- The search --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpus", [1, 2, 8, 64])
def test_every_layout_that_is_proposed_can_run_and_fits(gpus):
    found = plan(question(LlamaConfig.preset("tiny-15m"), gpus=gpus, seq_len=1024))
    assert found.n_fitting <= found.n_tried
    for candidate in found.candidates:
        assert check_parallel(candidate.work.layout, candidate.work.job) == candidate.work.n_microbatches
        assert candidate.work.n_gpus == gpus
        assert candidate.account.peak_gib <= FITS_SHARE * 79
        assert candidate.reason.endswith(".")


def test_the_best_is_first_and_the_others_say_what_they_lose():
    found = plan(question())
    speeds = [each.account.tokens_per_second_per_gpu for each in found.candidates]
    assert speeds[0] >= 0.995 * max(speeds) and speeds[1:] == sorted(speeds[1:], reverse=True)
    meshes = [tuple(each.work.layout.sizes.values()) for each in found.candidates]
    assert len(set(meshes)) == len(meshes) == 5
    by_name = {name_of(each.work, in_table=True): each.reason for each in found.candidates}
    reason = next(reason for name, reason in by_name.items() if name.startswith("dp 4 x tp 2"))
    assert "waiting for tp takes" in reason
    assert found.too_large is None or "does not fit" in found.too_large.reason
    said = found.describe()
    for name in by_name:
        assert said.count(name) == 2  # in the table, and with its reason


def test_the_answer_is_json_and_a_picture(tmp_path):
    found = plan(question(gpus=16))
    stored = json.loads(found.to_json())
    best = stored["candidates"][0]
    assert stored["gpus"] == 16 and best["layout"]["dp_shard"] >= 1
    assert best["peak_gib"] == pytest.approx(sum(best["gib_by_kind"].values()), abs=0.1)
    assert best["step_seconds"] == pytest.approx(sum(best["seconds"].values()))
    draw_plan(found, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_the_frontier_is_what_nothing_surpasses():
    points = [(10, 5, "a"), (20, 4, "b"), (20, 9, "c"), (30, 9, "d"), (40, 10, "e")]
    assert [name for _, _, name in frontier(points)] == ["a", "c", "e"]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("gpus,sequences", [(512, 1024), (4096, 4096)])
def test_seventy_b_on_many_gpus_is_planned_in_seconds(gpus, sequences, compiled):
    start = time.process_time()  # what other processes do does not count
    found = plan(question(SEVENTY_B, gpus=gpus, sequences=sequences, compile=compiled))
    assert found.n_tried > 500 and time.process_time() - start < 20  # 2 s were measured
    assert 0.35 < found.best.account.mfu < 0.6


@needs_split_backward
def test_schedules_with_a_backward_in_halves_win_where_nothing_is_compiled():
    """Compiled blocks have one graph for both halves (rules.py), so that there they are not tried."""
    asked = question(SEVENTY_B, gpus=64, sequences=128)
    in_halves = {name for name, kind in SCHEDULES.items() if kind.splits_backward}
    assert not in_halves & {work.layout.schedule for work in works(asked)}
    eager = replace(asked, compile=False)
    tried = {work.layout.schedule for work in works(eager) if work.layout.pp > 1}
    assert tried == {"1f1b", "interleaved-1f1b", *in_halves}
    best = plan(eager).best
    assert best.work.layout.schedule == "dualpipev" and best.account.bubble < 0.02
    assert check_parallel(best.work.layout, best.work.job) == best.work.n_microbatches


# ---- What does not fit -------------------------------------------------------------------------------------


def test_small_gpus_are_told_what_takes_most_of_them_whatever_it_is():
    """With a large vocabulary and short sequences the loss takes most."""
    for model, memory_gib, seq_len in (("qwen2.5-0.5b", 1.5, 512), ("llama3-8b", 8, 512)):
        asked = question(LlamaConfig.preset(model), gpus=8, sequences=64, seq_len=seq_len)
        small = replace(asked.cluster, gpu=replace(asked.cluster.gpu, memory_gib=memory_gib))
        try:
            said = plan(replace(asked, cluster=small)).describe()
        except UsageError as refusal:
            said = str(refusal)
        assert "of them for " in said
    kinds = {kind for work in works(question()) for kind in bytes_of_rank(work)}
    assert "loss" in kinds and kinds <= set(PURPOSES)


def test_what_fits_nowhere_gets_what_it_would_take():
    with pytest.raises(UsageError) as refused:
        plan(question(SEVENTY_B, gpus=8))
    said = str(refused.value)
    assert "69.0G parameters" in said and "fit no layout of 8 x h100-80gb" in said
    assert "Use 16 of these GPUs, or 8 x b200, or placement=auto" in said
    small = find_cluster("h100-80gb", 8)
    small = replace(small, gpu=replace(small.gpu, memory_gib=0.01))
    tiny = question(LlamaConfig.preset("tiny-10m"), seq_len=512, foresee=foresee)
    tiny = replace(tiny, cluster=small)
    with pytest.raises(UsageError, match=r"11\.2M parameters.*adapters \(lora\.rank=16\)"):
        plan(tiny)


def test_states_go_to_the_host_only_where_nothing_fits_without():
    found = plan(question(SEVENTY_B, gpu="a100-40gb", gpus=8, sequences=128, foresee=foresee))
    assert all(each.work.states.offloads for each in found.candidates)
    best = found.best.account
    assert best.host_bytes <= NODES["a100-40gb"].host_memory_gib * GIB and best.peak_gib <= 39 * FITS_SHARE
    assert not plan(question(foresee=foresee)).best.work.states.offloads
    with pytest.raises(UsageError, match="16 of these GPUs"):
        plan(question(SEVENTY_B, gpus=1, sequences=16, foresee=foresee))


def under(**memory) -> dict:
    return {"states": States.under(MemoryConfig(**memory), itemsize=2), "foresee": foresee}


def test_a_layout_is_planned_with_the_placement_and_the_budgets_that_were_asked_for():
    asked = {"placement": "auto", "device_budget_gib": 30, "host_budget_gib": 40}
    found = plan(question(gpus=2, sequences=16, **under(**asked)))
    assert all(each.account.peak_gib <= 30 for each in found.candidates)
    assert all(0 < each.account.host_bytes <= 40 * GIB for each in found.candidates)
    assert all(gib <= 30 for gib, _, _ in found.points)
    said = found.describe()
    assert "fit device_budget_gib=30 and host_budget_gib=40; the fastest" in said and "on the host" in said
    with pytest.raises(UsageError, match="^dp 2, zero 3.*host_budget_gib=5 .* cannot hold 3,369,207,808"):
        plan(question(gpus=2, sequences=16, **under(**asked | {"host_budget_gib": 5})))
    with pytest.raises(UsageError, match=r"5.0 can be used \(device_budget_gib=5 .* or device_budget_gib=9"):
        plan(question(gpus=2, sequences=16, **under(**asked | {"device_budget_gib": 5})))
    plan(question(gpus=2, sequences=16, **under(placement="auto", device_budget_gib=9)))  # as was advised


def test_static_shares_cost_in_a_plan_what_they_cost_in_a_step():
    on_host = {"placement": "static", "resident": 0.0, "stream": 0.0, "cpu": 1.0}
    asked = question(gpus=2, sequences=8)
    free, static, auto = (
        plan(replace(asked, **how)).best.account for how in ({}, under(**on_host), under(placement="auto"))
    )
    assert static.seconds["waiting for host"] > 0 == free.seconds["waiting for host"]
    assert static.bytes["optimizer"] == 0 < static.host_bytes
    assert auto.step_seconds < static.step_seconds
    with pytest.raises(UsageError, match="placement=static needs .* 10.0 can be used"):
        plan(replace(asked, **under(**on_host, host_budget_gib=10)))


def planned_by_pretrain(monkeypatch, model, gpus, gib, **memory):
    """Return the settings that pretrain.py would train with on so many GPUs, and what it prints."""
    properties = SimpleNamespace(name="NVIDIA H200", total_memory=int(gib * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr("parallel.cluster.host_memory", lambda: 2048 * GIB)
    device = torch.device("cuda")
    launch = SimpleNamespace(world_size=gpus, ranks_per_host=8, take_device=lambda: device)
    settings = pretrain.PretrainConfig(model, memory=MemoryConfig(**memory))
    train = replace(settings.train, global_batch_size=256, compile=True)
    settings = replace(settings, parallel=ParallelConfig(auto=True), train=train)
    return plan_settings(settings, LlamaConfig.preset(model), 4096, launch, foresee)


def test_pretrain_and_a_dry_run_plan_alike_under_a_placement(monkeypatch):
    memory = {"placement": "auto", "device_budget_gib": 40.0}
    planned, said = planned_by_pretrain(monkeypatch, "llama2-70b", 16, 139, **memory)
    # What a plan has chosen would be kept as given, so the same is asked anew.
    train = replace(planned.train, micro_batch_size=1, recompute="none")
    settings = dryrun.DryrunConfig("llama2-70b", gpus=16, train=train, memory=planned.memory)
    settings = replace(settings, parallel=ParallelConfig(auto=True))
    found = search(settings, SEVENTY_B, find_cluster("h200-141gb", 16), foresee)
    assert found.describe() == said and "device_budget_gib=40" in said
    assert found.best.work.layout == planned.parallel and found.best.account.peak_gib <= 40
    proposed = settings_of(settings, found.best)
    assert proposed.memory == planned.memory == MemoryConfig(**memory)
    assert proposed.train.recompute == planned.train.recompute


def test_states_that_fit_nowhere_else_go_to_the_host_unless_that_was_turned_off(monkeypatch):
    planned, said = planned_by_pretrain(monkeypatch, "llama2-70b", 4, 139)
    assert planned.memory.placement == "auto" and ", offload" in said
    assert planned_by_pretrain(monkeypatch, "llama2-7b", 4, 139)[0].memory.placement is None
    with pytest.raises(UsageError, match="or placement=auto, which keeps optimizer states on the host"):
        planned_by_pretrain(monkeypatch, "llama2-70b", 4, 139, placement="off")


def test_sequences_that_no_layout_can_share_are_refused():
    with pytest.raises(UsageError, match="no layout of 7 GPUs that .* can share global_batch_size=5"):
        plan(question(gpus=7, sequences=5))


def test_a_number_of_gpus_that_is_no_power_of_2_gets_stages_of_uneven_layers():
    """32 layers over 3 stages are 11, 11 and 10; 7 sequences are shared by no other axis of 3 or 6 ranks."""
    assert {each.work.layout.pp for each in plan(question(gpus=6, sequences=7)).candidates} <= {3, 6}


# ---- What a recipe leaves open -----------------------------------------------------------------------------


def test_auto_takes_the_whole_layout_from_the_planner():
    layout = ParallelConfig(auto=True).resolve(8)
    job = Job(SEVEN_B, 4096, 64, None, recompute=None, compile=True, device_type="cuda")
    chosen, resolved, why = choose_open(job, layout, find_cluster("h100-80gb", 8), States(), tries_tp=False)
    best = plan(question(sequences=64)).best.work
    assert (chosen.micro_batch_size, chosen.recompute) == (best.job.micro_batch_size, best.job.recompute)
    assert resolved == best.layout and not resolved.auto and "the fastest" in why
    with pytest.raises(UsageError, match="auto=True chooses every axis, and tp=2 is given too"):
        ParallelConfig(auto=True, tp=2).resolve(8)


def test_what_a_recipe_leaves_open_keeps_its_device_budget():
    """All states are on the host, so that activations and weights decide."""
    job = Job(SEVEN_B, 4096, 64, None, recompute=None, compile=True, device_type="cuda")
    layout, cluster = ParallelConfig(zero_stage=3).resolve(8), find_cluster("h100-80gb", 8)
    open_to = lambda gib: MemoryConfig(placement="static", cpu=1.0, device_budget_gib=gib)
    choose = lambda gib: choose_open(job, layout, cluster, States.under(open_to(gib), 2), tries_tp=False)
    (roomy, _, _), (tight, _, why) = choose(None), choose(24.0)
    assert bytes_needed(tight, layout, States.under(open_to(None), 2)) <= 24 * GIB
    assert bytes_needed(roomy, layout, States.under(open_to(None), 2)) > 24 * GIB
    assert "of 24.0 GiB a rank" in why
    with pytest.raises(UsageError, match=r"do not fit 4\.0 GiB a rank"):
        choose(4.0)


def test_an_attention_kernel_that_cannot_merge_blocks_keeps_ring_attention_out_of_the_search():
    long = replace(question(sequences=8), seq_len=65536)
    rings = lambda asked: {work.layout.cp_method for work in works(asked) if work.layout.cp > 1}
    assert rings(long) == {"ulysses", "ring"}
    assert rings(replace(long, attention="flash")) == {"ulysses"}


def test_long_sequences_of_short_documents_are_fast_where_the_kernel_keeps_them_apart():
    """Ring attention computes what its masks hide."""
    long = replace(question(sequences=8), seq_len=65536)
    packed = replace(long, document_tokens=512)
    whole, apart = plan(long).best.account, plan(packed).best.account
    assert apart.seconds["attention"] < 0.02 * apart.step_seconds < whole.seconds["attention"]
    assert apart.work.layout.cp_method == "ulysses"


def test_pretrain_trains_what_the_planner_chose_and_prints_why(inputs, tmp_path):
    flags = pretrain_flags(inputs, tmp_path / "run", "--parallel.auto", steps=2)
    ended = recipe("pretrain", *flags, ranks=2)
    assert ended.status == 0, ended
    assert "layouts on 2 x cpu" in ended.out and "the fastest" in ended.out
    ran = json.loads((tmp_path / "run/config.json").read_text())
    assert not json.dumps(ran).count('"auto": true')
    ended = recipe("pretrain", *flags, "--parallel.tp", 2, ranks=2)
    assert ended.status == 2 and "--parallel.tp 2 is given too" in ended.err, ended
    ended = recipe("benchmark", "--model", "tiny-1m", "--parallel.auto")
    assert ended.status == 2 and "asks the planner" in ended.err, ended


def launch_on(monkeypatch, name: str, gib: float, world_size: int, ranks_per_host: int) -> SimpleNamespace:
    """Return a launch on GPUs that are not here."""
    properties = SimpleNamespace(name=name, total_memory=int(gib * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    device = torch.device("cuda", 0)
    return SimpleNamespace(take_device=lambda: device, world_size=world_size, ranks_per_host=ranks_per_host)


def settings_with(train: dict, **layout) -> PretrainConfig:
    train = replace(TrainConfig(), global_batch_size=64, **train)
    return PretrainConfig("llama2-7b", train=train, parallel=ParallelConfig(auto=True, **layout))


def test_auto_plans_for_the_gpu_that_is_there_by_name_and_for_the_nodes_of_the_launch(monkeypatch):
    launch = launch_on(monkeypatch, "NVIDIA H100 80GB HBM3", 79.1, world_size=16, ranks_per_host=4)
    monkeypatch.setattr("parallel.cluster.host_memory", lambda: 1000 * GIB + 1)
    cluster = cluster_here(launch, 0)
    here = replace(NODES["h100-80gb"], n_gpus=16, gpus_per_node=4, host_memory_gib=218)  # 7/8 of a quarter
    assert replace(cluster, gpu=here.gpu) == here
    assert cluster.gpu == replace(here.gpu, memory_gib=int(79.1 * GIB) / GIB)
    settings, why = plan_settings(settings_with({}), SEVEN_B, 4096, launch, foresee)
    assert "layouts on 16 x h100-80gb in nodes of 4, of which" in why and "fit 90% of 79.1 GiB" in why
    assert max(work.layout.tp for work in works(question(sequences=64))) == 8
    assert max(work.layout.tp for work in works(replace(question(sequences=64), cluster=cluster))) == 4
    job = Job(SEVEN_B, 4096, 64, None, recompute=None, device_type="cuda")
    layout = ParallelConfig().resolve(16)  # as sft.py, which leaves dp or tp open
    _, chosen, why = choose_open(job, layout, replace(cluster, gpus_per_node=1), States(), tries_tp=True)
    assert chosen.tp == 1 and why.endswith("on h100-80gb")
    uneven = launch_on(monkeypatch, "NVIDIA H100 80GB HBM3", 79.1, world_size=6, ranks_per_host=4)
    with pytest.raises(UsageError, match="auto=True plans for nodes of equally many processes, and 6 do not"):
        plan_settings(settings_with({}), SEVEN_B, 4096, uneven, foresee)


def test_auto_plans_for_the_memory_that_the_host_has(monkeypatch):
    """13B on one GPU keeps most of its 16 bytes a parameter on the host, which has to have room for them."""
    launch = launch_on(monkeypatch, "NVIDIA H100 80GB HBM3", 79.1, world_size=1, ranks_per_host=1)
    settings = replace(settings_with({}), model="llama2-13b")
    thirteen_b = LlamaConfig.preset("llama2-13b")
    monkeypatch.setattr("parallel.cluster.host_memory", lambda: 256 * GIB)
    settled, _ = plan_settings(settings, thirteen_b, 4096, launch, foresee)
    assert settled.memory.placement == "auto"
    monkeypatch.setattr("parallel.cluster.host_memory", lambda: 96 * GIB)
    with pytest.raises(UsageError, match="on the host it does not fit either.*host_budget_gib=84 "):
        plan_settings(settings, thirteen_b, 4096, launch, foresee)


@pytest.mark.parametrize(
    "name,gib,said",
    [
        (
            "NVIDIA L40S",
            44.5,
            "NVIDIA L40S (not known here: at the rates of a100-40gb, the nearest in memory)",
        ),
        (
            "NVIDIA H100",
            64.0,
            "NVIDIA H100 (not known here: at the rates of h100-80gb, the nearest in memory)",
        ),
    ],
)
def test_a_gpu_that_is_not_known_says_whose_rates_it_is_given(monkeypatch, name, gib, said):
    launch = launch_on(monkeypatch, name, gib, world_size=8, ranks_per_host=8)
    _, why = plan_settings(settings_with({}), SEVEN_B, 4096, launch, foresee)
    assert f"layouts on 8 x {said}, of which" in why and f"fit 90% of {gib:.4g} GiB" in why


@needs_split_backward
def test_auto_keeps_what_was_given_and_searches_the_rest(monkeypatch):
    launch = launch_on(monkeypatch, "NVIDIA H100 80GB HBM3", 79.1, world_size=16, ranks_per_host=8)
    layout = {"zero_stage": 2, "schedule": "zbv", "sequence_parallel": False, "draw_schedule": True}
    train = {"recompute": "full", "micro_batch_size": 4}
    settings, why = plan_settings(settings_with(train, **layout), SEVEN_B, 4096, launch, foresee)
    assert {name: getattr(settings.parallel, name) for name in layout} == layout
    assert {name: getattr(settings.train, name) for name in train} == train
    assert settings.parallel.pp > 1 and not settings.parallel.auto
    assert "schedule=zbv draw_schedule=True micro_batch_size=4 recompute=full, as given" in why
    asked = question(seq_len=8192, layout=ParallelConfig(auto=True, cp_method="ring", zero_stage=1))
    kept = {(each.layout.cp_method, each.layout.zero_stage) for each in works(asked)}
    assert kept == {("ring", 1)}
    interleaved = ParallelConfig(schedule="interleaved-1f1b", virtual_stages=8)
    ways = {
        (each.layout.schedule, each.layout.virtual_stages) for each in works(question(layout=interleaved))
    }
    assert ways == {("interleaved-1f1b", 8)}
    asked = question(sequences=72, layout=ParallelConfig(microbatches=3))
    assert {(each.n_microbatches, each.layout.pp <= 3) for each in works(asked)} == {(3, True)}


@pytest.mark.parametrize(
    "train,layout,said",
    [
        ({"compile": True}, {"schedule": "zbv"}, "zbv runs backward in two halves, .*leave `schedule` out"),
        ({"micro_batch_size": 3}, {}, "keeps micro_batch_size=3, as given, .* leave `micro_batch_size` out"),
        ({}, {"microbatches": 3}, "microbatches=3 is not what .* leave `microbatches` out"),
        ({}, {"dp_shard": 8}, "auto=True chooses every axis, and dp_shard=8 is given too"),
    ],
)
def test_what_auto_cannot_keep_is_refused_in_words(monkeypatch, train, layout, said):
    launch = launch_on(monkeypatch, "NVIDIA H100 80GB HBM3", 79.1, world_size=8, ranks_per_host=8)
    with pytest.raises(UsageError, match=said):
        plan_settings(settings_with(train, **layout), SEVEN_B, 4096, launch, foresee)


# ---- The cases that people ask about -----------------------------------------------------------------------


def test_seven_b_on_eight_gpus_takes_data_parallelism_alone():
    for gpu, mfu in (("a100-80gb", 0.68), ("h200-141gb", 0.64)):
        best = plan(question(gpu=gpu)).best
        layout = best.work.layout
        assert (layout.dp, layout.tp, layout.pp, best.work.job.recompute) == (8, 1, 1, "none")
        assert best.account.mfu == pytest.approx(mfu, abs=0.02)


def test_seventy_b_on_512_small_gpus_fits_with_recomputation_and_not_without():
    """ZeRO-3 alone did not start there: its activations are several times the GPU."""
    gib = {mode: plan_cases.zero3_account(mode).peak_gib for mode in MODES}
    assert gib["none"] > 4 * 39 and gib["selective"] > 3 * 39 and gib["full"] < 0.6 * 39
    found = plan(question(SEVENTY_B, gpu="a100-40gb", gpus=512))
    assert found.n_fitting > 100 and 0.45 < found.best.account.mfu < 0.55
    zero3 = next(each for each in found.candidates if each.work.layout.dp_shard == 512)
    assert name_of(zero3.work) == "dp 512, zero 3, 1 x 2 sequences, recompute full"
    assert zero3.account.mfu > 0.95 * found.best.account.mfu


@pytest.mark.parametrize("size,gpu", [key for key in TABLE if "-" not in key[0]])
def test_each_size_of_the_launchers_agrees_with_the_planner_or_says_why_not(size, gpu):
    for gpus in (TABLE[size, gpu].least, 512):
        chosen = flags("pretrain", size, gpu, gpus)
        ours = account_of(size, gpu, gpus, chosen)
        batch = chosen["--train.global-batch-size"]
        model = LlamaConfig.preset(f"llama2-{size}")
        best = plan(Question(model, T, batch, replace(NODES[gpu], n_gpus=gpus))).best.account
        share = ours.tokens_per_second_per_gpu / best.tokens_per_second_per_gpu
        assert share > 0.9 or (size, gpu) in SLOWER, f"{share:.0%} of {name_of(best.work)}"
        assert share > 0.75, f"{share:.0%} of {name_of(best.work)}"
