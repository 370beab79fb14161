"""Tries without a GPU what is measured on one: the plan is possible, and figures mean what they say."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from recipe import ROOT

sys.path.append(str(ROOT / "recipes"))
sys.path.append(str(ROOT / "recipes" / "bench"))

import benchmark
import gpu
import host_adam
import machine
import memory_rates
import offload
import step_kernels
import step_price
from gpu_plan import (
    CALL_SECONDS,
    CARDS,
    STEP_TOKENS,
    Expected,
    Measurement,
    Part,
    Setting,
    choose_card,
    config_of,
    expected_step,
    our_seconds,
    plan,
    step_seconds,
    warm_up,
    write_models,
)
from offload import START_SECONDS

from dtensor_llama import LlamaConfig, UsageError, flops, metrics
from dtensor_llama.cli import parse_cli
from dtensor_llama.metrics import GIB
from memory.tracer import Counters, MachineRates

STEPS = ("recipes/benchmark.py", "recipes/bench/step_kernels.py")  # both take the flags of pretrain.py
CONFIGS = dict.fromkeys(STEPS, benchmark.BenchmarkConfig) | {
    f"recipes/bench/{module.__name__}.py": module.Config
    for module in (host_adam, machine, memory_rates, offload, step_price)
}
TIMES_STEPS = {*STEPS, "recipes/bench/offload.py", "recipes/bench/step_price.py"}
SEVEN_B = LlamaConfig.preset("llama2-7b")


# ---- The plan ----


@pytest.fixture(params=CARDS)
def setting(request, tmp_path) -> Setting:
    return Setting(CARDS[request.param], tmp_path, host_budget_gib=200)


def test_every_part_ends_within_a_call_and_has_its_reason(setting):
    parts = plan(setting)
    assert len({part.name for part in parts}) == len(parts)
    for part in parts:
        assert 0 < part.limit_s <= CALL_SECONDS, (part.name, part.limit_s)
        assert part.why and part.measurements
        names = [measurement.name for measurement in part.measurements]
        assert len(set(names)) == len(names)


def test_every_command_is_one_that_its_recipe_takes(setting):
    write_models(setting)
    for part in plan(setting):
        for measurement in part.measurements:
            script, *flags = measurement.command
            if script == "-m":
                continue
            cfg = parse_cli(CONFIGS[script], flags)
            if script in STEPS:
                cfg.memory.check()
                assert cfg.train.global_batch_size % cfg.train.micro_batch_size == 0
                path = Path(cfg.model)
                config = LlamaConfig.from_hf(path) if path.exists() else LlamaConfig.preset(cfg.model)
                assert config.n_parameters * 16 < setting.card.memory_gib * GIB
            if script == "recipes/bench/offload.py":
                assert cfg.host_budget_gib == 200 and all(n % cfg.seq_len == 0 for n in cfg.tokens)


def test_the_turns_of_every_offload_measurement_fit_its_limit_also_with_64k_tokens(setting):
    seen = set()
    for part in plan(setting):
        for measurement in part.measurements:
            if measurement.command[0] != "recipes/bench/offload.py":
                continue
            cfg = parse_cli(offload.Config, list(measurement.command[1:]))
            config = LlamaConfig.preset(cfg.model)
            config = replace(config, num_hidden_layers=cfg.layers or config.num_hidden_layers)
            turns_s = [
                offload.turn_seconds(cfg, config, name, n) for n in cfg.tokens for name in cfg.contenders
            ]
            assert sum(turns_s) < measurement.limit_s and cfg.timeout_s == max(turns_s)
            assert max(expected.high for expected in measurement.expects) * 8 < max(turns_s)
            seen.add(cfg.tokens)
    assert (65536,) in seen


def test_a_warm_up_compiles_each_kind_of_step_that_is_timed_once_with_two_layers(setting):
    write_models(setting)
    runs = warm_up(setting, [measurement for part in plan(setting) for measurement in part.measurements])
    configs = [parse_cli(benchmark.BenchmarkConfig, list(run.command[1:])) for run in runs]
    assert len({run.command for run in runs}) == len(runs) == len({run.name for run in runs})
    compiled = set()
    for cfg in configs:
        cfg.memory.check()
        assert LlamaConfig.from_hf(cfg.model).num_hidden_layers == 2 and cfg.train.compile
        assert cfg.data.cache_dir == str(setting.out / "warm-up")  # rates of a busy machine are not kept
        width = LlamaConfig.from_hf(cfg.model).hidden_size
        compiled.add((width, cfg.train.recompute, cfg.train.micro_batch_size, cfg.memory.placement))
    assert compiled >= {
        (4096, "none", 2, "static"),
        (4096, "selective", 1, "off"),
        (4096, "full", 1, "static"),
        (4096, "full", 4, "static"),
        (5120, "full", 4, "static"),
    }
    with_microbatches = [cfg for cfg in configs if cfg.train.global_batch_size > cfg.train.micro_batch_size]
    assert with_microbatches and all(
        cfg.train.global_batch_size == 2 * cfg.train.micro_batch_size for cfg in with_microbatches
    )


def test_the_runs_of_a_warm_up_are_under_way_at_once_and_tests_that_ran_beside_them_have_their_results(
    monkeypatch, tmp_path, capsys
):
    """Each of two runs waits for the other's file."""
    wait = (
        "import pathlib, sys, time\nmine, other = map(pathlib.Path, sys.argv[1:])\nmine.touch()\n"
        "while not other.exists(): time.sleep(0.01)\nprint('{\"met\": true}')"
    )
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    beside = Measurement("numbers", ("-c", wait, b, a), 30)
    monkeypatch.setattr(gpu, "warm_up_runs", lambda *asked: [Measurement("kind 1", ("-c", wait, a, b), 30)])
    timed, tests = Part("x", "y", (Measurement("z", ("-c", ""), 9),)), Part("tests", "y", (beside,))
    results = gpu.Results(tmp_path / "h200.jsonl")
    card, cfg = Setting(CARDS["h200"], tmp_path), gpu.Config(out=tmp_path)
    gpu.warm_up(card, [timed, tests], results, cfg, deadline=time.monotonic() + 60)
    assert not results.lines and "may take 180 s of" in capsys.readouterr().out
    gpu.warm_up(card, [timed, tests], results, cfg, deadline=float("inf"))
    ended = {line["part"]: line["ended"] for line in gpu.Results(results.path).lines if "ended" in line}
    assert ended == {"warm-up": "done", "tests": "done"}
    assert results.endings(tests, beside) == ["done"] and not results.endings(timed, timed.measurements[0])


def test_every_timed_run_warms_up_and_its_limit_allows_for_what_the_first_step_compiles(setting):
    compiling_s = sum(seconds for what, seconds in START_SECONDS.items() if "compiling" in what)
    assert START_SECONDS["compiling the loss"] >= 30  # on a GPU without compile=True as well
    seen = set()
    for part in plan(setting):
        for measurement in part.measurements:
            script, *flags = measurement.command
            if script not in TIMES_STEPS:
                continue
            cfg = parse_cli(CONFIGS[script], flags)
            assert cfg.warmup >= 2 and getattr(cfg, "peer_warmup", 2) >= 2
            turns = getattr(cfg, "contenders", [script])
            assert measurement.limit_s > compiling_s * len(turns) + 60
            seen.add(script)
    assert seen == TIMES_STEPS


@pytest.mark.parametrize("flag", ["--warmup", "--peer-warmup"])
def test_a_run_without_a_step_to_warm_up_is_refused_as_it_would_time_the_compiler(flag):
    with pytest.raises(UsageError, match="as the first step compiles"):
        offload.main(parse_cli(offload.Config, [flag, "0"]))


def test_the_promise_comes_first_and_what_is_promised_is_predicted(setting):
    parts = plan(setting)
    assert parts[0].name == "resident"
    for part in parts:
        if part.name in ("host", "step-price"):
            continue  # these are ratios of interleaved runs, for which there is no prediction
        assert all(measurement.expects for measurement in part.measurements), part.name


def test_a_rehearsal_replaces_every_model_by_a_small_one_and_has_more_time(tmp_path):
    setting = Setting(CARDS["h100"], tmp_path, layers=2)
    write_models(setting)
    for part, in_earnest in zip(plan(setting), plan(replace(setting, layers=None)), strict=True):
        assert part.limit_s == setting.patience * in_earnest.limit_s > in_earnest.limit_s
        for measurement in part.measurements:
            text = " ".join(measurement.command)
            assert "--model llama2-7b " not in text or "--layers 2" in text, text


@pytest.mark.parametrize(
    "gib,name",
    [
        (79.1, "h100"),
        (79.6, "h100"),
        (93.1, "h100"),
        (139.8, "h200"),
        (138.5, "h200"),
        (178.0, "h200"),
        (47.4, None),
        (0.0, None),
    ],
)
def test_the_card_is_chosen_by_the_memory_there_is(gib, name):
    card = choose_card(gib)
    assert (card and card.name) == name


@pytest.mark.parametrize(
    "way,seconds", [("zero3 selective", 1.52), ("resident selective", 1.36), ("resident none", 1.23)]
)
def test_predicted_seconds_add_up_to_the_steps_of_the_review(way, seconds):
    assert step_seconds(way, CARDS["h200"], STEP_TOKENS) == pytest.approx(seconds, abs=0.01)


def test_predictions_scale_with_tokens_and_with_the_card():
    h100, h200 = CARDS["h100"], CARDS["h200"]
    per_token = [
        step_seconds("resident none", h200, n) / n for n in (STEP_TOKENS, 2 * STEP_TOKENS, 4 * STEP_TOKENS)
    ]
    assert per_token == sorted(per_token, reverse=True)  # the update is paid once a step
    seconds, _, mfu = expected_step("resident none", h200, 2 * STEP_TOKENS)
    assert 2.3 <= seconds.low <= seconds.high <= 2.5
    assert 0.62 <= mfu.low <= mfu.high <= 0.67
    _, _, mfu = expected_step("resident none", h100, STEP_TOKENS)  # half the layers, slower memory
    assert 0.53 <= mfu.low <= 0.60


def test_the_order_to_show_a_plan_needs_no_gpu_and_names_every_part(capsys):
    gpu.main(gpu.Config(parts=("plan",), card="h100"))
    said = capsys.readouterr().out
    assert all(part.name in said for part in plan(Setting(CARDS["h100"], Path("x"))))
    assert "an H100 cannot hold 7B's 100.4 GiB" in said
    with pytest.raises(UsageError, match="there is no part 7c; there are resident, "):
        gpu.choose(plan(Setting(CARDS["h100"], Path("x"))), ("7c",))


def test_the_door_takes_wheels_and_a_python(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$PYTHONPATH" "$@"\n')
    python.chmod(0o755)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "a.whl").touch()
    environment = {**os.environ, "PYTHON": str(python), "WHEELS": str(wheels), "PYTHONPATH": "before"}
    said = subprocess.run(
        ["bash", "recipes/bench/gpu.sh", "plan"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    path, script, word = said.stdout.split()
    assert path == f"{wheels / 'a.whl'}:before" and script.endswith("gpu.py") and word == "plan"


# ---- Nothing is lost ----


def measurement_of(code: str, tmp_path: Path, limit_s: int = 20) -> tuple[Part, Measurement]:
    script = tmp_path / "script.py"
    script.write_text(code)
    measurement = Measurement("one", (str(script),), limit_s, (Expected("x", 1.0, 2.0),))
    return Part("part", "why", (measurement,)), measurement


def test_a_line_is_on_the_disk_before_its_command_ends_and_a_restart_skips_what_ended_well(tmp_path, capsys):
    code = (
        "import json, pathlib\nprint('words')\nprint(json.dumps({'x': 3.0}))\n"
        f"seen = pathlib.Path({str(tmp_path / 'h200.jsonl')!r})\n"
        "while not (seen.exists() and '3.0' in seen.read_text()):\n    pass\n"  # else past its limit
    )
    part, measurement = measurement_of(code, tmp_path)
    cfg = gpu.Config(out=tmp_path)
    results = gpu.Results(tmp_path / "h200.jsonl")
    gpu.measure_all([part], results, cfg, deadline=float("inf"))
    assert [line.get("ended") for line in results.lines] == [None, "done"], results.lines
    assert results.lines[0]["result"] == {"x": 3.0} and results.lines[0]["command"] == [
        str(tmp_path / "script.py")
    ]

    with (tmp_path / "h200.jsonl").open("a") as file:
        file.write('{"part": "part", "resu')  # the machine went away
    again = gpu.Results(tmp_path / "h200.jsonl")
    assert len(again.lines) == 2 and again.endings(part, measurement) == ["done"]
    capsys.readouterr()
    gpu.measure_all([part], again, cfg, deadline=float("inf"))
    assert "has its results" in capsys.readouterr().out and len(again.lines) == 2
    gpu.measure_all([part], again, replace(cfg, again=True), deadline=float("inf"))
    assert len(again.lines) == 4
    other_flags = replace(measurement, command=("other.py",))
    assert not again.endings(part, other_flags)
    assert len(gpu.Results(tmp_path / "h200.jsonl").lines) == 4


def test_what_runs_past_its_limit_is_ended_with_all_it_started_and_what_it_said_is_kept(tmp_path):
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        'print(\'{"x": 1.5, "child": %d}\' % child.pid, flush=True)\ntime.sleep(60)\n'
    )
    part, measurement = measurement_of(code, tmp_path, limit_s=3)
    results = gpu.Results(tmp_path / "h200.jsonl")
    began = time.monotonic()
    gpu.measure_all([part], results, gpu.Config(out=tmp_path), deadline=float("inf"))
    assert time.monotonic() - began < 20
    line, ended = results.lines
    assert results.endings(part, measurement) == [ended["ended"]] == ["stopped after its 3 s"]
    child = line["result"]["child"]
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() - began < 20
        time.sleep(0.05)


def test_a_failure_is_kept_in_its_own_words_and_what_has_no_time_left_is_not_started(tmp_path, capsys):
    part, measurement = measurement_of("raise RuntimeError('no kernel')\n", tmp_path)
    results = gpu.Results(tmp_path / "h200.jsonl")
    gpu.measure_all([part], results, gpu.Config(out=tmp_path), deadline=time.monotonic() + 5)
    assert "not started, it may take 20 s of " in capsys.readouterr().out and not results.lines
    gpu.measure_all([part], results, gpu.Config(out=tmp_path), deadline=float("inf"))
    assert results.lines[-1]["ended"] == "failed with status 1" and "no kernel" in results.lines[-1]["said"]
    assert "**look**" in gpu.summary([part], results.lines)


def test_who_broke_is_asked_again_after_all_others_and_who_was_refused_is_not(tmp_path, capsys):
    def contenders(name: str, *lines: dict) -> Measurement:
        code = [f"print({json.dumps(json.dumps(line))})\n" for line in lines]
        (tmp_path / f"{name}.py").write_text("".join(code))
        return Measurement(name, (str(tmp_path / f"{name}.py"),), 20)

    broke = contenders("broke", {"contender": "ours", "x": 1}, {"contender": "theirs", "error": "no kernel"})
    refused = contenders("refused", {"contender": "theirs", "error": "does not fit", "refused": True})
    part, results = Part("part", "why", (broke, refused)), gpu.Results(tmp_path / "h200.jsonl")
    cfg = gpu.Config(out=tmp_path)
    gpu.measure_all([part], results, cfg, deadline=float("inf"))
    assert results.endings(part, broke) == ["failed in part"] and results.endings(part, refused) == ["done"]
    never_tried = contenders("new", {"x": 2})
    part = replace(part, measurements=(broke, refused, never_tried))
    n_before = len(results.lines)
    gpu.measure_all([part], results, cfg, deadline=float("inf"))
    assert [line["measurement"] for line in results.lines[n_before:] if "ended" in line] == ["new", "broke"]


def test_the_table_says_what_was_predicted_and_what_came_and_marks_what_is_far_off():
    ours, theirs = {"contender": "ours"}, {"contender": "theirs"}
    expects = (
        Expected("step_seconds", 1.0, 2.0, ours),
        Expected("step_seconds", 4.0, 4.0, theirs),
        Expected("mfu", 0.5, 0.5, ours),
        Expected("tokens_per_second", 12000.0, 12000.0, ours),
    )
    part = Part(
        "7b", "why", (Measurement("4k", ("x.py",), 9, expects), Measurement("16k", ("x.py",), 9, expects[:1]))
    )
    about = {"part": "7b", "measurement": "4k"}
    lines = [
        {
            **about,
            "result": {"contender": "ours", "step_seconds": 9.0},
        },  # an earlier round: the last line counts
        {**about, "result": {"contender": "ours", "step_seconds": 2.3, "mfu": 0.47}},
        {**about, "result": {"contender": "theirs", "error": "does not fit"}},
        {**about, "ended": "done", "said": ""},
    ]
    assert gpu.summary([part], lines).splitlines()[2:6] == [
        "| 7b | 4k | ours step_seconds | 1 to 2 | 2.3 | **+15%** |",
        "| 7b | 4k | theirs step_seconds | 4 | does not fit |  |",
        "| 7b | 4k | ours mfu | 0.5 | 0.47 | -6% |",
        "| 7b | 4k | ours tokens_per_second | 12,000 | not yet |  |",
    ]
    assert (
        gpu.difference(Expected("x", 1.0, 2.0), 1.5) == 0
        and gpu.difference(Expected("x", 1.0, 2.0), 0.5) == -0.5
    )
    assert gpu.difference(Expected("status", 0, 0), 0) == 0 and gpu.difference(
        Expected("status", 0, 0), 1
    ) == float("inf")


# ---- Offload and its peers ----


def test_a_step_under_a_budget_takes_the_time_that_was_measured_on_an_h200():
    """The machine's rates were measured on their own, but `dram_in_update` in this run."""
    lines = (ROOT / "recipes/bench/results/h200.jsonl").read_text().splitlines()
    results = [
        row["result"] for row in map(json.loads, lines) if row["part"] == "3.5b-24-4k" and "result" in row
    ]
    (ours,) = [result for result in results if result["contender"] == "ours"]
    setting = Setting(CARDS["h200"], Path("x"), host_budget_gib=100)
    assert our_seconds(config_of("3.5b"), 24, setting, 4096) == pytest.approx(ours["step_seconds"], rel=0.05)


def test_fsdp2s_offload_is_predicted_as_a_sum_because_nothing_overlaps_on_one_rank():
    rates = MachineRates(
        h2d=50e9,
        d2h=25e9,
        duplex=75e9,
        dram_in_update=200e9,
        host_adam=7e9,
        device_adam=1e11,
    )
    n, compute_s = 10**9, 2.0
    # three microbatches: weights twice for each, gradients once a step, all float32
    link_s = 3 * 8 / 50 + 4 / 25
    assert offload.predict_peer("fsdp2_offload", n, compute_s, rates, 3) == pytest.approx(
        compute_s + link_s + 40 / (offload.TORCHS_SHARE_OF_DRAM * 200)
    )


@pytest.mark.parametrize("n_bytes,pinned", [(1, 1), (2, 2), (3, 4), (2**20, 2**20), (2**20 + 1, 2**21)])
def test_pinned_memory_comes_in_powers_of_two(n_bytes, pinned):
    assert offload.pinned_bytes(n_bytes) == pinned


def test_a_peer_that_the_host_cannot_hold_is_refused_in_one_line_with_the_sum(monkeypatch):
    monkeypatch.setattr(
        offload.subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a process was started")
    )
    monkeypatch.setattr(offload.psutil, "virtual_memory", lambda: SimpleNamespace(available=120 * GIB))
    needed, _ = offload.peer_host_bytes("fsdp2_offload", SEVEN_B)
    n_mlp, n_head = 4096 * 11008, 32000 * 4096  # 172 and 500 MiB, for which torch pins 256 and 512
    rounding = 2 * (96 * (2**28 - 4 * n_mlp) + 2 * (2**29 - 4 * n_head))
    assert needed == 16 * SEVEN_B.n_parameters + rounding
    with pytest.raises(
        RuntimeError, match=r"^does not fit the host: it needs 116.2 GiB \(66.0 GiB pinned .* 120.0 are free"
    ):
        offload.take_turn(offload.Config(), SEVEN_B, "fsdp2_offload", "folder", 4096)
    with pytest.raises(RuntimeError, match="and 64.0 --host-budget-gib allows"):
        offload.take_turn(offload.Config(host_budget_gib=64), SEVEN_B, "deepspeed_zero3", "folder", 4096)
    offload.refuse_if_the_host_is_too_small("fsdp2_offload", SEVEN_B, host_budget_gib=200)
    with pytest.raises(pytest.fail.Exception, match="a process was started"):  # ours refuses by its plan
        offload.take_turn(offload.Config(host_budget_gib=1), SEVEN_B, "ours", "folder", 4096)


def test_budgets_reach_the_planner_and_a_peer_gets_flags_that_it_takes():
    cfg = offload.Config(device_budget_gib=24, host_budget_gib=100, compile=True)
    ours = offload.ours_command(cfg, "ours", "folder", 16384)
    assert ours[ours.index("--memory.host-budget-gib") + 1] == 100 and "--train.compile" in ours
    parse_cli(benchmark.BenchmarkConfig, list(map(str, ours[1:]))).memory.check()
    resident = parse_cli(
        benchmark.BenchmarkConfig, list(map(str, offload.ours_command(cfg, "all_resident", "x", 4096)[1:]))
    )
    assert resident.memory.resident == 1
    theirs = parse_cli(offload.Config, list(map(str, offload.peer_command(cfg, "fsdp2_offload", 65536)[1:])))
    assert theirs.turn == "fsdp2_offload" and theirs.tokens == (65536,) and theirs.micro_batch_size == 4
    assert theirs.compile and theirs.warmup == cfg.peer_warmup


def test_each_contenders_line_appears_after_its_turn_and_who_failed_is_not_asked_again(monkeypatch, capsys):
    asked, seen = [], []
    plan_facts = {
        "seconds": {"forward": 0.1, "backward": 0.2, "step": 0.5},
        "parameters": {},
        "bound": "link",
        "rates": asdict(MachineRates(1e9, 1e9, 2e9, 1e10, 1e9, 1e9)),
        "host_update_seconds": 0.1,
        "host_dram_bytes": 1e9,
    }

    def take_turn(cfg, config, name, folder, n_tokens):
        seen.append(len(capsys.readouterr().out.splitlines()))  # lines since the turn before
        asked.append(name)
        if name == "deepspeed_zero3":
            raise RuntimeError("no module named deepspeed")
        memory = {
            f"{which}_gib": 1.0
            for which in ("device_memory", "device_reserved", "host_memory", "host_pinned")
        }
        turn = {"step_seconds": float(len(asked)), "losses": [2.0, 1.0], **memory}
        return turn | {"memory_plan": plan_facts} if name == "ours" else turn

    monkeypatch.setattr(offload, "take_turn", take_turn)
    contenders = ("deepspeed_zero3", "fsdp2_offload", "ours")
    lines = offload.at(offload.Config(contenders=contenders, rounds=2), SEVEN_B, "folder", 4096)
    assert asked == ["ours", "fsdp2_offload", "deepspeed_zero3", "ours", "fsdp2_offload"]
    assert seen == [0, 1, 1, 1, 1]
    by_name = {line["contender"]: line for line in lines}
    assert by_name["ours"]["rounds"] == 2 and by_name["ours"]["step_seconds"] == 2.5  # the median of 1 and 4
    assert by_name["fsdp2_offload"]["predicted_step_seconds"] > 0.3
    assert by_name["deepspeed_zero3"]["error"] == "no module named deepspeed"
    offload.table(lines)


def test_a_turn_that_is_late_says_where_it_stood_and_which_phase_of_its_start_had_ended(monkeypatch, capfd):
    script = """
import sys, time
print("start     1.5 s for imports", file=sys.stderr, flush=True)
def wait_for_memory():
    time.sleep(60)
wait_for_memory()
"""
    monkeypatch.setattr(offload, "ours_command", lambda *asked: ["-c", script])
    with pytest.raises(
        RuntimeError,
        match=r"not done after 3 s; it stood in <string>:5 wait_for_memory < .*after start 1.5 s for imports",
    ):
        offload.take_turn(offload.Config(timeout_s=3), SEVEN_B, "ours", "folder", 4096)
    assert "wait_for_memory" in capfd.readouterr().err  # the whole stack, for the log


# ---- Peaks and rates ----


class OneCounter:
    """torch.cuda's allocator: one peak, which anybody resets."""

    def __init__(self, monkeypatch):
        self.now = self.peak = 0
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(
            torch.cuda,
            "memory_stats",
            lambda device=None: {
                "allocated_bytes.all.current": self.now,
                "allocated_bytes.all.peak": self.peak,
                "reserved_bytes.all.current": 2 * self.now,
                "reserved_bytes.all.peak": 2 * self.peak,
            },
        )
        monkeypatch.setattr(
            torch.cuda, "reset_peak_memory_stats", lambda device=None: self.use(self.now, peak=0)
        )
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (0, 0))
        monkeypatch.setattr(torch.cuda, "host_memory_stats", lambda: {"allocated_bytes.peak": 7 * GIB})
        monkeypatch.setattr(torch.cuda, "reset_peak_host_memory_stats", lambda: None)

    def use(self, now: int, peak: int | None = None) -> None:
        self.peak = max(self.peak if peak is None else peak, now)
        self.now = now


def test_the_peak_of_a_step_survives_the_tracers_resets(monkeypatch):
    counter = OneCounter(monkeypatch)
    monkeypatch.setattr(metrics, "pinned_memory_is_resident", lambda: True)
    memory = metrics.PeakMemory(torch.device("cuda"))
    traced = Counters(torch.device("cuda", 0))
    for group in (10, 50, 20):
        counter.use(group)
        counter.use(0)
        assert traced.read().peak == group  # of this group alone
        traced.reset()
    peaks = memory.take()
    assert (peaks.device, peaks.device_reserved) == (50, 100)
    counter.use(5)
    assert memory.take().device == 5  # the next step starts anew
    assert traced.read().peak == 5  # and takes nothing from the tracer


@pytest.mark.parametrize("resident,added_gib", [(True, 0), (False, 7)])
def test_host_memory_includes_pinned_memory_whether_linux_counts_it_or_not(monkeypatch, resident, added_gib):
    OneCounter(monkeypatch)
    monkeypatch.setattr(metrics, "pinned_memory_is_resident", lambda: resident)
    monkeypatch.setattr(metrics, "_peak_resident_bytes", lambda: 3 * GIB)
    peaks = metrics.PeakMemory(torch.device("cuda", 0)).take()
    assert peaks.host == (3 + added_gib) * GIB and peaks.host_pinned == 7 * GIB


def test_smaps_says_how_much_of_a_mapping_is_resident():
    text = (
        "7f00000-7f10000 rw-p 00000000 00:00 0\nSize: 64 kB\nRss:  12 kB\nVmFlags: rd\n"
        "7f20000-7f30000 rw-s 00000000 00:05 7 /dev/nvidiactl\nSize: 64 kB\nRss:  0 kB\n"
    )
    assert metrics.resident_bytes_at(0x7F0FFFF, text) == 12 * 1024
    assert metrics.resident_bytes_at(0x7F20000, text) == 0 == metrics.resident_bytes_at(0x7F10000, text)
    own = torch.ones(2**21, dtype=torch.uint8)
    assert metrics.resident_bytes_at(own.data_ptr(), Path("/proc/self/smaps").read_text()) >= own.nbytes


def test_the_rate_of_matrix_products_is_taken_on_random_numbers_and_leaves_the_runs_own_alone(monkeypatch):
    factors, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: (factors.append((a, b)), mm(a, b, out=out)))
    before = torch.get_rng_state()
    rate = flops.matmul_flops(torch.device("cpu"), torch.float32, seconds=0.05)
    assert torch.equal(torch.get_rng_state(), before)
    assert rate > 1e9 and len(factors) >= 2  # at least one product to warm up
    assert all(x.std() > 0.9 for x in factors[0]) and not torch.equal(*factors[0])


def test_the_machine_is_described_on_a_cpu_too(capsys):
    machine.main(machine.Config(seconds=0.01))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0]["machine"] == "no GPU" and lines[0]["versions"]["torch"] == torch.__version__
    assert [line["kernel"].split()[0] for line in lines[1:]] == [
        "pinning",
        "pinning",
        "matmul",
        "attention",
        "copies",
    ]


# ---- The tests' own marks ----


def test_the_time_of_a_step_is_summed_by_kind_and_overlapping_kernels_count_once_as_busy(capsys):
    """Two streams overlap for 10 us, 30 us are idle, and what clip_grad_norm launched is the clip's."""
    step_kernels.report(
        [
            {"cat": "gpu_user_annotation", "name": "clip", "ts": 100, "dur": 10},
            {"cat": "gpu_user_annotation", "name": "Torch-Compiled Region", "ts": 0, "dur": 200},
            {"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 50},
            {"cat": "kernel", "name": "nvjet_sm90", "ts": 10, "dur": 50},
            {"cat": "gpu_memcpy", "name": "Memcpy DtoD", "ts": 50, "dur": 20},
            {"cat": "kernel", "name": "triton_poi", "ts": 100, "dur": 5},
        ]
    )
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    by_kind = {line["kind"]: line["ms"] for line in lines if "kind" in line}
    assert by_kind == {
        "matrix products": 0.05,
        "copies": 0.02,
        "clip": 0.005,
        "idle": pytest.approx(0.03),
        "in all": pytest.approx(0.095),
    }
    assert [line["kernel"] for line in lines if "kernel" in line] == [
        "nvjet_sm90",
        "Memcpy DtoD",
        "triton_poi",
    ]
    with pytest.raises(UsageError, match="no kernel"):
        step_kernels.report([])


def test_a_folder_called_gpu_does_not_mark_its_tests(tmp_path):
    tests = tmp_path / "gpu" / "tests"
    tests.mkdir(parents=True)
    (tests / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tests / "test_one.py").write_text(
        "import pytest\n\ndef test_plain(): pass\n\n@pytest.mark.gpu\ndef test_asked(): pass\n"
    )
    (tmp_path / "gpu" / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--rootdir",
            tmp_path,
            "-c",
            tmp_path / "gpu/pyproject.toml",
            tests,
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "1 passed, 1 skipped" in ended.stdout, ended.stdout + ended.stderr
