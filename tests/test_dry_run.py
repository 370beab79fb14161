"""What a dry run counts is what happens: the same counter counts real processes."""

import gc
import json
import os
import re
import select
import signal
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import NamedTuple

import pytest
import torch
from pool import run_on
from recipe import recipe
from versions import marks_for

from dtensor_llama import Llama, LlamaConfig, UsageError
from dtensor_llama.chat.lora import LoraConfig, apply_lora, init_lora
from dtensor_llama.cli import parse_cli
from dtensor_llama.metrics import GIB
from dtensor_llama.model import init_weights
from memory import MemoryConfig
from memory.auto import foresee
from parallel import ParallelConfig, build_mesh, dry_run_report
from parallel import dry_run as dry_run_module
from parallel.apply import Computation
from parallel.assemble import Offload, adamw, assemble
from parallel.cluster import NODES
from parallel.cost import Work, account_for
from parallel.dry_run import RankCount, Setup, _microbatch, count_states, dry_run
from parallel.mesh import Layout
from parallel.rules import Job
from parallel.step_counter import Collective, StepCounter, groups_of
from recipes import dryrun, pretrain

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
    model: LlamaConfig = SMALL

    def setup(self, n_microbatches: int | None = None, device: str = "cpu") -> Setup:
        layout = ParallelConfig(**self.layout).resolve(self.ranks)
        n_microbatches = n_microbatches or self.n_microbatches
        job = Job(
            self.model,
            SEQ_LEN,
            2 * n_microbatches * layout.dp,
            2,
            recompute=self.recompute,
            document_tokens=self.document_tokens,
        )
        memory = MemoryConfig(kernel="blocks", **self.memory) if self.memory else None
        return Setup(
            layout,
            job,
            Computation(torch.device(device), getattr(torch, self.dtype), self.recompute),
            LoraConfig(rank=self.lora_rank),
            Offload(memory, 2, SEQ_LEN) if memory else None,
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
    "tp-shared-heads": Case(4, {"tp": 4}, model=replace(SMALL, num_key_value_heads=2)),
    "pp-tied": Case(2, {"pp": 2}, model=replace(SMALL, tie_word_embeddings=True)),
    "qwen2-tp": Case(2, {"tp": 2}, model=replace(SMALL, model_type="qwen2")),
    "qwen3-tp": Case(2, {"tp": 2}, model=replace(SMALL, model_type="qwen3")),
    "activations": Case(2, {}, "full", memory={**RESIDENT, "activations": True}),
}
FAST = ("zero-1", "zero-3-full", "tp-no-sp", "ring", "1f1b", "lora", "offload")


def step(training, microbatches):
    return pretrain.train_step(training, microbatches, len(microbatches) * 2 * SEQ_LEN, 1e-3, 1.0)


class Really(NamedTuple):
    held_bytes: dict
    peak_bytes: int
    traffic: dict
    products: dict
    attention: dict


def count_really(setup: Setup) -> Really:
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
    return Really(
        held, counter.peak_bytes, dict(counter.traffic), dict(counter.products), dict(counter.attention)
    )


class Compared(NamedTuple):
    """Compares one kind of rank of a case: its bytes at the peak, in a dry run and in a real one."""

    name: str
    pp_rank: int
    dry: int
    real: int

    @property
    def error(self) -> float:
        return self.dry / self.real - 1


def count_dry(setup: Setup):
    return dry_run(setup, step).ranks


def compare(name: str) -> list[Compared]:
    """Hold a dry run against the real one. All but the peaks are equal."""
    setup = CASES[name].setup()
    real = run_on(setup.world_size, count_really, setup)
    (counted,) = run_on(1, count_dry, setup, group=False)
    compared = []
    for rank in counted:
        seen = real[rank.pp_rank * len(real) // setup.layout.pp]
        assert rank.held_bytes == seen.held_bytes
        assert rank.traffic == seen.traffic
        assert rank.products == seen.products and rank.attention == seen.attention
        compared.append(Compared(name, rank.pp_rank, rank.peak_bytes, seen.peak_bytes))
    return compared


def cases():
    for name, case in CASES.items():
        marks = marks_for(case.layout.get("schedule"))
        yield pytest.param(name, marks=marks if name in FAST else [*marks, pytest.mark.slow])


@pytest.mark.parametrize("name", list(cases()))
def test_states_and_traffic_are_those_of_real_processes_and_peaks_within_2_percent(name):
    assert all(abs(one.error) <= 0.02 for one in compare(name))


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"zero_stage": 1},
        pytest.param({"pp": 2, "schedule": "gpipe"}, marks=pytest.mark.slow),
        {"pp": 2},
        pytest.param({"pp": 4}, marks=pytest.mark.slow),
        {"pp": 2, "schedule": "interleaved-1f1b"},
        pytest.param({"pp": 2, "tp": 2, "schedule": "zbv"}, marks=[pytest.mark.slow, *marks_for("zbv")]),
    ],
    ids=str,
)
def test_what_a_microbatch_adds_is_what_a_longer_step_has(layout, monkeypatch):
    setup = Case(4, layout, n_microbatches=12).setup(device="cuda")
    assert max(dry_run_module.few_microbatches(setup)) < 12
    short = dry_run(setup, step).ranks
    monkeypatch.setattr(dry_run_module, "few_microbatches", lambda setup: (12, 12))
    for one, whole in zip(short, dry_run(setup, step).ranks, strict=True):
        assert one.peak_bytes == whole.peak_bytes
        assert one.traffic == whole.traffic and one.products == whole.products


def test_a_tensor_that_is_kept_is_seen():
    """Memory that a step keeps by mistake makes its count larger: the tests above would fail."""
    setup = Case(1, {}, memory=RESIDENT).setup()
    kept = []

    def leaks(training, microbatches):
        step(training, microbatches)
        kept.append(torch.empty(2**24, dtype=torch.uint8, device="meta"))
        step(training, microbatches)

    (plain,), (more,) = (dry_run(setup, run).ranks for run in (step, leaks))
    assert more.peak_bytes - plain.peak_bytes == 2**24


def test_steps_counted_side_by_side_are_those_counted_one_after_another(monkeypatch):
    setup = Case(4, {"pp": 4}, n_microbatches=8).setup()

    def refuses(training, microbatches):
        raise UsageError("this step cannot be counted")

    assert dry_run_module._forks_can_step()
    side_by_side = dry_run(setup, step).ranks
    with pytest.raises(UsageError, match="this step cannot be counted"):
        dry_run(setup, refuses)
    monkeypatch.setattr(dry_run_module, "_forks_can_step", lambda: False)
    assert dry_run(setup, step).ranks == side_by_side and len(side_by_side) == 3


def test_the_end_of_a_sequence_cuts_its_last_document():
    documents_of_sequence = StepCounter("meta", {}, document_tokens=512)._documents_of_sequence
    assert documents_of_sequence(1280) == {512: 2, 256: 1}
    assert documents_of_sequence(256) == {256: 1}


def test_flash_with_a_sliding_window_stores_no_mask(tmp_path, capsys):
    model = replace(SMALL, model_type="mistral", sliding_window=32, max_position_embeddings=1024)
    (tmp_path / "config.json").write_text(json.dumps(asdict(model)))

    def peak(*flags: str) -> float:
        path = tmp_path / "facts.json"
        command = ["--model", str(tmp_path), "--gpus", "2", "--data.seq-len", "1024", "--json", str(path)]
        asked = parse_cli(dryrun.DryrunConfig, [*command, "--parallel.zero-stage", "2", *flags])
        dryrun.main(asked)
        return json.loads(path.read_text())["per_rank"]["peak_gib"]

    assert peak("--train.attention", "flash") < peak("--train.attention", "sdpa") - 2**20 / GIB


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})


def test_ctrl_c_does_not_wait_for_steps_that_are_being_counted(monkeypatch, two_cores):
    def interrupted(results, n_results):
        raise KeyboardInterrupt

    monkeypatch.setattr(dry_run_module, "_with_progress", interrupted)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        dry_run_module._side_by_side([partial(time.sleep, 60)] * 2)
    assert time.monotonic() - started < 30


def test_processes_that_count_do_not_outlive_the_one_that_asked(two_cores):
    """A dry run that is killed, for example by `timeout`, leaves nobody who holds its output open."""
    reader, writer = os.pipe()

    def count_for_long():
        os.write(writer, b".")
        time.sleep(60)

    asking = dry_run_module.FORK.Process(target=dry_run_module._side_by_side, args=([count_for_long] * 2,))
    asking.start()
    os.close(writer)
    assert os.read(reader, 1) + os.read(reader, 1) == b".."
    asking.kill()
    asking.join()
    is_closed, *_ = select.select([reader], [], [], 30)
    assert is_closed and os.read(reader, 1) == b""
    os.close(reader)


def test_a_counting_process_that_is_killed_is_no_traceback(two_cores):
    def killed():
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(UsageError, match="ended from outside, as Linux does where no memory is left"):
        dry_run_module._side_by_side([killed] * 2)


def test_a_dry_run_that_ignores_ctrl_c_counts_on(two_cores):
    """So does every command that a shell script runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        handlers = dry_run_module._side_by_side([partial(signal.getsignal, signal.SIGINT)] * 2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert handlers == [signal.SIG_IGN] * 2


def test_where_no_process_can_be_forked_steps_are_counted_one_after_another(monkeypatch, two_cores):
    def refuses(process):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(dry_run_module.FORK.Process, "start", refuses)
    assert dry_run_module._side_by_side([os.getpid] * 2) == [os.getpid()] * 2


def test_what_leaves_a_node_is_known_by_the_way_that_bytes_take():
    nobody = {"held_bytes": {}, "at_peak": {}, "most": {}, "peak_bytes": 0, "peak_moment": ""}
    groups = {"cp": list(range(16)), "pp": [0, 4, 8, 12]}
    sent = {
        Collective("cp", "all-to-all", 160): 1,  # 150 to others, of whom 8 of 15 are in the other node
        Collective("pp", "send", 100, hop=(0, 1)): 3,  # to rank 4, in the node
        Collective("pp", "send", 10, hop=(1, 2)): 1,  # from rank 4 to rank 8
    }
    rank = RankCount(0, **nobody, checkpoint_bytes=0, traffic=sent, products={}, attention={}, groups=groups)
    assert rank.sent_bytes() == {"cp": 150, "pp": 310}
    assert rank.sent_between_nodes(8) == {"cp": 80, "pp": 10}
    ring = replace(rank, traffic={Collective("cp", "all-gather", 160): 1})
    assert ring.sent_between_nodes(8) == {"cp": 19}  # 150 over each of 16 hops, of which 2 leave a node


@pytest.mark.parametrize(
    "layout,axes",
    [
        ({}, "fsdp"),
        ({"zero_stage": 0}, "fsdp"),
        ({"tp": 2}, "fsdp tp"),
        ({"tp": 2, "zero_stage": 0}, "fsdp tp"),
        ({"tp": 4, "dp_shard": 1}, "tp"),
        ({"cp": 2}, "fsdp cp"),
        ({"cp": 4, "dp_shard": 1}, "fsdp cp"),  # both have all ranks, and torch gives them one group
        ({"cp": 2, "cp_method": "ring", "dp_shard": 1, "tp": 2}, "fsdp cp tp"),
        ({"dp_replicate": 2}, "fsdp dp_replicate"),
        ({"dp_replicate": 4, "dp_shard": 1, "zero_stage": 1}, "dp_replicate"),
        ({"dp_replicate": 2, "zero_stage": 0}, "dp_cp"),
        ({"pp": 2}, "fsdp pp"),
        ({"pp": 4, "dp_shard": 1}, "pp"),
    ],
    ids=str,
)
def test_traffic_has_the_same_name_in_each_layout(layout, axes):
    setup = Case(4, layout, n_microbatches=4).setup(device="cuda")
    sent = dry_run(setup, step).largest.sent_bytes()
    # Sums of single numbers go over whatever has the ranks that they are for.
    assert {axis for axis, n_bytes in sent.items() if n_bytes > 1000} == set(axes.split())
    account = account_for(Work(setup.job, setup.layout), NODES["h100-80gb"])
    assert set(account.gib_per_axis(account.cluster)) == set(axes.split())


# Of a whole step of llama2-7b, or its first 16 layers, on one GPU: what torch's allocator for CUDA had
# allocated at its peak.
SEVEN_B = [
    # layers, ZeRO stage, recompute, sequences of a microbatch, microbatches, placement, GiB
    (32, 3, "selective", 1, 2, "off", 113.7),
    (32, 2, "selective", 1, 2, "off", 125.8),
    (32, 3, "full", 4, 1, "off", 103.7),
    (16, 3, "selective", 1, 2, "off", 59.8),
    (16, 3, "none", 1, 2, "static", 61.6),
    (16, 3, "none", 2, 2, "static", 69.7),
    (32, 3, "selective", 1, 2, "static", 113.2),
    (32, 3, "selective", 2, 2, "static", 124.7),
    (32, 3, "none", 1, 2, "static", 117.8),
    (32, 3, "none", 2, 2, "static", 134.0),
    (32, 3, "full", 4, 1, "static", 90.4),
]


def peak_of_7b(layers, zero_stage, recompute, per_microbatch, n_microbatches, placement) -> float:
    model = replace(LlamaConfig.preset("llama2-7b"), num_hidden_layers=layers)
    layout = ParallelConfig(zero_stage=zero_stage).resolve(1)
    job = Job(model, 4096, per_microbatch * n_microbatches, per_microbatch, recompute=recompute, compile=True)
    computation = Computation(torch.device("cuda"), torch.bfloat16, recompute, compile=True)
    memory = MemoryConfig(**RESIDENT) if placement == "static" else MemoryConfig(placement="off")
    setup = Setup(layout, job, computation, offload=Offload(memory, per_microbatch, 4096))
    return dry_run(setup, step).largest.peak_bytes / GIB


@pytest.mark.parametrize("row", [pytest.param(row, marks=pytest.mark.slow) for row in SEVEN_B], ids=str)
def test_peaks_of_compiled_7b_steps_are_those_of_the_cuda_allocator(row):
    *of, measured_gib = row
    (peak_gib,) = run_on(1, peak_of_7b, *of, group=False, timeout=900)
    assert peak_gib == pytest.approx(measured_gib, rel=0.02)


def test_a_rank_of_70b_on_512_takes_seconds_and_little_memory():
    """Of 80 layers 8, so that the test is short; docs/dry-run.md has the time of all."""
    began = sum(os.times()[:4])  # seconds of this process and of its children
    model = replace(LlamaConfig.preset("llama2-70b"), num_hidden_layers=8)
    layout = ParallelConfig(tp=8).resolve(512)
    setup = Setup(layout, Job(model, 4096, 256), Computation(torch.device("cuda"), torch.bfloat16))
    counted = dry_run(setup, step)
    assert sum(os.times()[:4]) - began < 30
    assert counted.largest.held_bytes["optimizer"] >= 2 * 4 * model.n_parameters / 512
    # q, k, v, o, gate, up and down of each block, and the head: 6 FLOPs per token and weight, over tp
    n_weights = model.n_parameters - model.vocab_size * model.hidden_size
    tokens = 4096 * setup.n_microbatches
    products = sum(2 * one.m * one.n * one.k * n for one, n in counted.largest.products.items())
    assert products == pytest.approx(6 * n_weights * tokens / 8, rel=0.001)


# ---- the recipe ----


LAYOUT = ["--data.seq-len", 64, "--parallel.tp", 2, "--parallel.pp", 2, "--train.global-batch-size", 8]


def test_the_recipe_prints_what_a_rank_holds_and_writes_the_keys_of_its_contract(tmp_path):
    flags = ["--model", "tiny-1m", "--gpus", 8, "--gpu", "a100-40gb", *LAYOUT]
    ended = recipe("dryrun", *flags, "--json", tmp_path / "facts.json")
    assert ended.status == 0, ended
    assert "pp rank 1 holds" in ended.out and "it fits" in ended.out and "predicted: a step" in ended.out
    facts = json.loads((tmp_path / "facts.json").read_text())
    per_rank = {"parameters_gib", "gradients_gib", "optimizer_gib", "activations_gib", "peak_gib"}
    assert per_rank <= set(facts["per_rank"]) and facts["fits"] is True
    assert facts["layout"]["tp"] == 2 and set(facts["traffic_gib_per_step"]) >= {"pp", "tp", "fsdp"}
    tokens_per_second = facts["tokens_per_second_per_gpu"]
    assert tokens_per_second == pytest.approx(8 * 64 / 8 / facts["step_seconds"]) and 0 < facts["mfu"] < 1
    assert sum(facts["seconds"].values()) == pytest.approx(facts["step_seconds"])


def test_a_layout_that_was_left_open_is_searched_and_the_best_is_counted(tmp_path):
    flags = ["--model", "tiny-1m", "--gpus", 8, "--gpu", "a100-40gb", "--data.seq-len", 64]
    flags += [
        "--train.global-batch-size",
        16,
        "--json",
        tmp_path / "facts.json",
        "--png",
        tmp_path / "plan.png",
    ]
    ended = recipe("dryrun", *flags)
    assert ended.status == 0, ended
    assert "layouts on 8 x a100-40gb" in ended.out and ": the fastest" in ended.out
    facts = json.loads((tmp_path / "facts.json").read_text())
    best = facts["plan"]["candidates"][0]
    assert facts["layout"] == best["layout"] and facts["step_seconds"] == pytest.approx(best["step_seconds"])
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    (typed,) = [line for line in ended.out.splitlines() if "in flags: " in line]
    same = parse_cli(dryrun.DryrunConfig, typed.partition("in flags: ")[2].split())
    assert asdict(same.parallel.resolve(8)) == best["layout"]
    assert (same.train.micro_batch_size, same.train.recompute) == (
        best["micro_batch_size"],
        best["recompute"],
    )


def test_a_layout_that_the_planner_proposes_and_the_count_refutes_is_passed_over(monkeypatch, capsys):
    """The second proposal is taken where the first one does not fit as counted."""
    settings = dryrun.DryrunConfig("tiny-1m", gpus=8, gpu="a100-40gb")
    settings = replace(
        settings,
        data=replace(settings.data, seq_len=64),
        train=replace(settings.train, global_batch_size=16),
    )
    needs = iter([40.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(dry_run_report, "needed_gib", lambda rank: next(needs))
    facts = dry_run_report.report(settings, step, None)
    assert facts["layout"] == facts["plan"]["candidates"][1]["layout"]
    assert "Proposals before this one do not fit as counted" in capsys.readouterr().out


def test_pretrain_counts_its_own_command_and_trains_nothing(tmp_path):
    flags = ["--model", "tiny-1m", "--dry-run", "--gpus", 8, "--gpu", "a100-40gb", *LAYOUT]
    ended = recipe("pretrain", *flags, "--run-dir", tmp_path / "run")
    assert ended.status == 0, ended
    same = recipe("dryrun", *[flag for flag in flags if flag != "--dry-run"])
    assert ended.out == same.out and not (tmp_path / "run").exists()


def test_pretrain_without_a_layout_counts_its_defaults_and_names_what_the_planner_would_choose():
    flags = ["--model", "tiny-1m", "--gpus", 8, "--data.seq-len", 64]
    ended = recipe("pretrain", *flags, "--dry-run")
    assert ended.status == 0 and "with ZeRO stage 3" in ended.out, ended
    assert "8 dp ranks x 4 microbatches x 1 sequence x" in ended.out and "layouts on" not in ended.out
    own, _, planned = ended.out.partition("\nNo layout was given")
    assert own == recipe("dryrun", *flags, "--parallel.dp-shard", 8).out
    assert "The planner would choose dp 8, zero 2, 1 x 4 sequences" in planned
    typed = planned.splitlines()[-1].split()
    assert typed == "--parallel.dp-shard 8 --parallel.zero-stage 2 --train.micro-batch-size 4".split()
    planned = recipe("pretrain", *flags, "--dry-run", "--parallel.auto")
    assert planned.status == 0 and "layouts on 8 x h100-80gb" in planned.out, planned
    assert "with ZeRO stage 2" in planned.out and f"in flags: {' '.join(typed)}\n" in planned.out
    assert planned.out == recipe("dryrun", *flags).out
    same = recipe("pretrain", *flags, "--dry-run", *typed).out
    assert planned.out.endswith("\n".join(line for line in same.split("\n") if line[:3] != "..."))


def test_a_budget_that_no_run_would_keep_is_refused_before_the_search(monkeypatch):
    monkeypatch.setattr(dry_run_report, "search", None)  # it is not to be called
    with pytest.raises(UsageError, match="device_budget_gib=20 would do nothing"):
        dryrun.main(
            dryrun.DryrunConfig("tiny-1m", gpus=8, memory=MemoryConfig(device_budget_gib=20)),
        )


def test_a_budget_beyond_the_gpu_is_the_gpu():
    flags = ["--model", "tiny-1m", "--gpus", 8, "--data.seq-len", 64, "--parallel.auto"]
    ended = recipe("dryrun", *flags, "--memory.placement", "auto", "--memory.device-budget-gib", 500)
    assert "fit all 79 GiB of the GPU (--memory.device-budget-gib 500 is more); " in ended.out, ended
    assert "within 78.0 GiB of the device" in ended.out


def test_a_budget_of_some_kib_is_told_in_digits_that_count():
    flags = ["--model", "tiny-1m", "--gpus", 1, "--data.seq-len", 64, "--parallel.dp-shard", 1]
    ended = recipe("dryrun", *flags, "--memory.placement", "auto", "--memory.device-budget-gib", 1e-5)
    assert ended.status == 2 and " 0.0 " not in ended.err and "and 9.7e-06 can be used" in ended.err, ended
    assert "1 dp rank x 32 microbatches x 1 sequence x 64 tokens" in ended.out


def test_more_gpus_than_a_dry_run_can_list_are_refused():
    ended = recipe("dryrun", "--model", "tiny-1m", "--gpus", 2**20)
    assert ended.status == 2 and "--gpus 1048576 are too many to list the ranks of" in ended.err, ended


def test_a_search_keeps_what_was_given_beside_auto():
    flags = ["--model", "tiny-1m", "--gpus", 8, "--data.seq-len", 64, "--parallel.auto"]
    given = ["--parallel.zero-stage", 1, "--train.micro-batch-size", 2, "--train.recompute", "full"]
    ended = recipe("dryrun", *flags, *given)
    assert ended.status == 0 and f"keep {' '.join(map(str, given))}, as given" in ended.out, ended
    (typed,) = [line for line in ended.out.splitlines() if "in flags: " in line]
    assert typed.endswith(" ".join(map(str, given)))


def test_an_output_that_cannot_be_written_is_refused_before_anything_starts(tmp_path, monkeypatch):
    def check(**outputs) -> str:
        outputs = {name: str(tmp_path / path) for name, path in outputs.items()}
        with pytest.raises(UsageError) as refused:
            dryrun.main(dryrun.DryrunConfig("tiny-1m", **outputs))
        return str(refused.value)

    monkeypatch.setattr(dryrun, "calibrate", None)  # neither is to be called
    monkeypatch.setattr(dryrun, "report", None)
    for name in ("json", "png", "calibrate"):
        assert "it is a folder; name a file in it" in check(**{name: "."})
        assert "File name too long" in check(**{name: 300 * "a"})
    assert ".foo does not say which kind of picture" in check(png="x.foo")
    assert "a name without a suffix does not say" in check(png="x")
    assert "`gpu` reads only files that end in .json" in check(calibrate="ours")
    assert "would overwrite the file of json=" in check(png="x.png", json="x.png")
    assert "would overwrite the file of gpu=" in check(json="ours.json", gpu="ours.json")
    assert "nothing to write for `json`; leave one" in check(calibrate="ours.json", json="facts.json")
    assert not list(tmp_path.iterdir())


def test_float32_has_a_time_where_its_rate_is_known_and_else_a_sentence(tmp_path):
    unknown = replace(NODES["a100-40gb"], gpu=replace(NODES["a100-40gb"].gpu, float32_flops=None))
    (tmp_path / "ours.json").write_text(unknown.to_json())
    flags = ["--model", "tiny-1m", "--gpus", 8, *LAYOUT, "--train.dtype", "float32"]
    known = recipe("dryrun", *flags, "--gpu", "a100-40gb")
    assert known.status == 0 and "predicted: a step takes" in known.out, known
    ended = recipe("dryrun", *flags, "--gpu", tmp_path / "ours.json")
    assert ended.status == 0 and "has no float32_flops, so that no time is predicted" in ended.out, ended


def test_a_machine_is_measured_into_a_file_that_the_next_dry_run_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(dryrun, "calibrate", lambda device, n_gpus, seconds: NODES["a100-80gb"])
    dryrun.main(dryrun.DryrunConfig(calibrate=str(tmp_path / "ours.json")))
    ended = recipe("dryrun", "--model", "tiny-1m", "--gpus", 8, "--gpu", tmp_path / "ours.json", *LAYOUT)
    assert ended.status == 0 and "on 8 a100-80gb" in ended.out


@pytest.mark.parametrize(
    "flags,said",
    [
        (["--gpu", "b300"], "--gpu b300 is not a GPU whose cluster is known; use a100-40gb"),
        (["--gpus", 12], "--gpus 12 do not fill nodes of 8"),
        (["--gpu", "no.json"], "no.json is not a JSON file that can be read"),
        (["--parallel.auto", "--parallel.tp", 2], "--parallel.tp 2 is given too"),
        (["--parallel.tp", 3], "4 GPUs cannot form --parallel.tp 3"),
        (["--parallel.tp", 8], "or use --gpus 8."),
        (["--rank", 4], "--rank 4 is not one of --gpus 4"),
        (["--json", "no/where.json"], "--json no/where.json: there is no folder no"),
        (["--png", "x.png", "--parallel.tp", 2], "--png x.png draws the planner's search"),
        (["--parallel.auto", "--train.micro-batch-size", 3], "leave --train.micro-batch-size out"),
        (["--parallel.auto", "--parallel.dp-shard", 4], "--parallel.dp-shard 4 is given too"),
        (["--calibrate", "no/where.json"], "--calibrate no/where.json: there is no folder no"),
        (["--lora.rank", -1], "--lora.rank -1 is not possible"),
        (["--memory.placement", "static"], "--memory.placement static needs"),
    ],
)
def test_what_cannot_be_counted_is_one_line(flags, said):
    ended = recipe("dryrun", "--model", "tiny-1m", "--gpus", 4, *flags)
    assert ended.status == 2 and said in ended.err and ended.err.count("\n") == 1, ended


SKIPS = ["--train.max-grad-norm", "inf", "--train.skip-nonfinite", 3]
FLASH = ["--train.attention", "flash"]


@pytest.mark.parametrize(
    "flags,said",
    [
        (["--memory.placement", "auto", *SKIPS], "skip_nonfinite=3 cannot skip a step under a chunk manager"),
        (["--gpus", 1, *SKIPS], "skip_nonfinite=3 cannot skip a step under a chunk manager"),
        (["--train.min-lr", 1.0], "min_lr=1.0 is above lr=0.0003"),
        (["--train.attention", "varlen"], "attention=varlen cannot run here: varlen_attn is for packed"),
        ([*FLASH, "--train.dtype", "float32"], "attention=flash cannot run here: flash-attn computes in"),
        ([*FLASH, "--parallel.cp", 2, "--parallel.cp-method", "ring"], "attention=flash cannot run under"),
        (["--random-init"], "random_init=True takes the shape of a Hugging Face folder, and model=tiny-1m"),
        (["--memory.device-budget-gib", 10], "device_budget_gib=10 would do nothing"),
    ],
)
def test_what_a_run_refuses_before_it_starts_its_dry_run_refuses(flags, said):
    words = [str(word) for word in ["--model", "tiny-1m", "--gpus", 2, *flags]]
    with pytest.raises(UsageError, match=re.escape(said)):
        dryrun.main(parse_cli(dryrun.DryrunConfig, words))
    with pytest.raises(UsageError, match=re.escape(said)):
        pretrain.main(parse_cli(pretrain.PretrainConfig, [*words, "--dry-run"]))


def test_states_that_are_too_large_are_counted_and_the_refusal_is_told():
    computation = Computation(torch.device("cuda"), torch.bfloat16)
    model, offload = LlamaConfig.preset("llama2-7b"), Offload(MemoryConfig(**RESIDENT))
    setup = Setup(ParallelConfig().resolve(1), Job(model, 4096, 1), computation, offload=offload)
    (told,) = dry_run_report.refused(setup, NODES["a100-40gb"])
    assert told.startswith("pretrain.py would refuse it: weights, gradients and AdamW's states of 6.7G")
    assert dry_run_report.refused(setup, NODES["h200-141gb"]) == []


def test_a_dry_run_keeps_the_budget_and_counts_the_placement_that_it_times(capsys):
    """All of the states fit a GPU, and 0.35 GiB do not hold them."""
    settings = dryrun.DryrunConfig("tiny-15m", gpus=1)
    train = replace(settings.train, micro_batch_size=32)  # one microbatch: a step that is counted once
    settings = replace(settings, data=replace(settings.data, seq_len=64), train=train)
    facts = {}
    for gib in (None, 0.35):
        memory = MemoryConfig("auto", device_budget_gib=gib)
        facts[gib] = dry_run_report.report(replace(settings, memory=memory), step, foresee)
    assert facts[0.35]["per_rank"]["peak_gib"] < 0.35 < facts[None]["per_rank"]["peak_gib"]
    assert facts[0.35]["step_seconds"] > facts[None]["step_seconds"]
    assert facts[0.35]["per_rank"]["host_gib"] > 0 == facts[None]["per_rank"]["host_gib"]
    said = capsys.readouterr().out
    assert "100.0% are resident" in said and "device_budget_gib=0.35 is kept" in said


def print_table() -> None:
    """Print the table of docs/dry-run.md."""
    print("| layout | pp rank | dry run, bytes | real processes | |")
    print("| --- | --- | --- | --- | --- |")
    for name in CASES:
        for one in compare(name):
            print(f"| {name} | {one.pp_rank} | {one.dry:,} | {one.real:,} | {one.error:+.2%} |", flush=True)


if __name__ == "__main__":
    print_table()
