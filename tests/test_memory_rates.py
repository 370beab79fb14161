"""A machine's rates are measured once and kept; the tracer measures what a step needs; the timeline draws
it."""

import itertools
import json
import os
import runpy
import time
from types import SimpleNamespace

import pytest
import torch
from recipe import ROOT
from torch import nn

from dtensor_llama.gantt import busy_seconds, text_row
from memory import tracer
from memory.timeline import LANES, draw_timeline
from memory.tracer import (
    MIB,
    Counters,
    Link,
    MachineRates,
    StepTrace,
    Tracer,
    Usage,
    load_rates,
    machine_key,
    per_second,
)
from parallel.recompute import apply_recompute

CPU = torch.device("cpu")
RATES = MachineRates(1e9, 2e9, 3e9, 5e9, 7e8, 8e9)


def test_rates_are_measured_once_per_machine_and_kept(tmp_path, monkeypatch):
    path, measured = tmp_path / "deep" / "rates.json", []
    monkeypatch.setattr("memory.tracer.measure_rates", lambda *asked: measured.append(asked) or RATES)
    said = []
    load = lambda kernel="blocks", ranks=1: load_rates(path, CPU, kernel, ranks, said.append)
    assert load() == load() == RATES and len(said) == 1 and str(path) in said[0]
    assert measured == [(CPU, "blocks", 1)]
    kept = json.loads(path.read_text())
    key = f"{machine_key(CPU)}; AdamW blocks"
    assert list(kept) == [key] and f"torch {torch.__version__}" in key
    path.write_text(json.dumps({"another machine": kept[key]}))
    assert load() == RATES and len(measured) == 2
    assert set(json.loads(path.read_text())) == {"another machine", key}  # nobody's rates are lost
    load("compiled"), load("blocks", 8), load("compiled")  # nor are they another kernel's
    assert measured[2:] == [(CPU, "compiled", 1), (CPU, "blocks", 8)]
    # Files once held another rate of DRAM, under another name.
    older = {"dram_under_dma" if name == "dram_in_update" else name: rate for name, rate in kept[key].items()}
    path.write_text(json.dumps({key: older}))
    assert load() == RATES and len(measured) == 5 and "measured again" in said[-2]


def test_a_link_copies_what_it_says():
    link = Link(CPU, 4096)
    link.host[0].fill_(7)
    link.on_device[1].fill_(9)
    assert link.copy("h2d", 1000) == 1000
    assert (link.on_device[0] == 7).sum() == 1000 and (link.host[1] == 1).all()
    assert link.copy("duplex") == 2 * 4096
    assert (link.on_device[0] == 7).all() and (link.host[1] == 9).all()
    assert all(link.rate(direction, 0.01) > 0 for direction in ("h2d", "d2h", "duplex"))


def test_the_stream_counts_what_it_reads_and_writes():
    stream = runpy.run_path(str(ROOT / "recipes" / "bench" / "memory_rates.py"))["dram_stream"](4 * MIB)
    assert stream() == 8 * MIB
    assert per_second(stream, 0.01) > 0


@pytest.mark.parametrize("link_bytes,n_parameters", [(10_000_000, 50), (1, 5_000_000)])
def test_the_rate_of_dram_in_an_update_adds_adamw_and_the_link(monkeypatch, link_bytes, n_parameters):
    n_copies, n_steps = itertools.count(), itertools.count()

    class SlowLink:
        dram_bytes_per_byte = 2

        def copy(self, direction):
            next(n_copies), time.sleep(0.01)
            return {"duplex": link_bytes}[direction]

    def slow_step(device, n_parameters, kernel):
        def step():
            assert torch.get_num_threads() == 1
            next(n_steps), time.sleep(0.01)
            return n_parameters

        return step

    monkeypatch.setattr(tracer, "_adam_step", slow_step)
    before, began = torch.get_num_threads(), time.perf_counter()
    rate = tracer.dram_rate_in_update(SlowLink(), 1, n_parameters, seconds=0.3)
    elapsed = time.perf_counter() - began
    in_all = 28 * n_parameters * next(n_steps) + 2 * link_bytes * next(n_copies)
    assert 0.4 * in_all / elapsed < rate < in_all / 0.3
    assert torch.get_num_threads() == before


def test_a_rate_is_the_best_of_several_goes():
    amounts = iter([1e9, 5, 1, 2, 3])  # the first is the warm-up's
    assert per_second(lambda: next(amounts) / 1e9, 0) < 1
    assert next(amounts) == 3


def run_bench(name: str, monkeypatch, capsys, *flags) -> dict:
    monkeypatch.setattr("sys.argv", [name, *map(str, flags)])
    runpy.run_path(str(ROOT / "recipes" / "bench" / f"{name}.py"), run_name="__main__")
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_the_benchmark_of_rates_prints_one_json_line(monkeypatch, capsys):
    result = run_bench(
        "memory_rates",
        monkeypatch,
        capsys,
        "--sizes-mib",
        1,
        2,
        "--dram-mib",
        4,
        "--adam-mi-elements",
        1,
        "--seconds",
        0.01,
        "--kernel",
        "blocks",
    )
    assert set(result["duplex_gb_s_by_mib"]) == {"1", "2"}
    assert {"1", str(len(os.sched_getaffinity(0)))} <= result["host_adam_g_parameters_s_by_threads"].keys()
    if not torch.cuda.is_available():
        assert result["link_is_a_wire"] is False and result["device_adam_gb_s"] is None


@pytest.mark.slow
def test_the_benchmark_of_host_adam_prints_one_json_line(monkeypatch, capsys):
    result = run_bench(
        "host_adam",
        monkeypatch,
        capsys,
        "--mi-elements",
        1,
        "--rounds",
        1,
        "--model",
        "tiny-1m",
        "--rows",
        1,
        "--tokens",
        32,
    )
    assert result["stream_gb_s"] > 0 and result["manager_all_resident"]["model"] == "tiny-1m"
    assert result["calls_per_second"]["beside_host_adam"] > 0
    assert all(
        result[name]["share_of_stream"] > 0
        for name in ("ours_compiled", "ours_blocks", "torch_fused", "torch_foreach")
    )


@pytest.mark.slow
def test_the_benchmark_of_offload_lets_contenders_take_turns_and_says_who_could_not(monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv",
        [
            "offload",
            *"--model tiny-1m --layers 2 --tokens 64 --seq-len 32 --micro-batch-size 1 "
            "--rounds 1 --steps 2 --dtype float32 --device-budget-gib 1".split(),
        ],
    )
    runpy.run_path(str(ROOT / "recipes" / "bench" / "offload.py"), run_name="__main__")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [(line["tokens_per_step"], line["contender"]) for line in lines] == [
        (64, name) for name in ("ours", "all_resident", "fsdp2_offload", "deepspeed_zero3")
    ]
    for line in lines[:2]:
        assert (
            line["layers"] == 2 and line["predicted_step_seconds"] > 0 and line["exposed_update_seconds"] >= 0
        )
        assert line["loss_difference"] < 2e-5 and line["tokens_per_second"] * line[
            "step_seconds"
        ] == pytest.approx(line["tokens_per_step"])
    if not torch.cuda.is_available():
        assert all("there is none" in line["error"] for line in lines[2:])


# ---- the tracer --------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x.sum()


class Clock:
    """Counts bytes that the test decides."""

    def __init__(self):
        self.now = self.high = 0

    def counters(self) -> SimpleNamespace:
        def reset():
            self.high = self.now

        return SimpleNamespace(read=lambda: Usage(self.high, 50), reset=reset)

    def set(self, now: int) -> None:
        self.now = now
        self.high = max(self.high, now)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_tracer_times_forward_and_backward_and_sees_the_peak_between_blocks(recompute, monkeypatch):
    model, bytes_in_use, clock = Net(), Clock(), itertools.count()
    monkeypatch.setattr("memory.tracer.moment", lambda device: float(next(clock)))
    apply_recompute(list(model.layers), recompute)
    tracer = Tracer(list(model.layers), CPU, bytes_in_use.counters())
    for i, layer in enumerate(model.layers):  # after the tracer's hook: what it sees came before
        layer.register_forward_pre_hook(lambda *_, i=i: bytes_in_use.set(100 * (i + 1)))
    x = torch.randn(2, 4)
    model(x).backward()  # outside a step: not traced
    for peak in (1000, 2000, 500):
        tracer.start_step()
        for _ in range(2):
            model(x).backward()
            bytes_in_use.set(peak)
            bytes_in_use.set(0)
        tracer.end_step()
    with torch.no_grad():
        model(x)
    # A moment where forward begins, where the first gradient arrives, where the second forward begins and so
    # on: four phases of one unit each, with two forwards and two backwards.
    assert [[phase for phase, _ in notes] for notes in tracer.steps] == [
        ["forward", "backward", "forward", "backward", "end"]
    ] * 3
    traced = tracer.result(model_bytes=30, host_bytes=7)
    assert traced == StepTrace(2000 + 50 - 30, forward_seconds=2.0, backward_seconds=2.0, host_bytes=7)
    n_hooks = sum(len(layer._forward_hooks) for layer in model.layers)
    tracer.close()
    assert n_hooks == 3 and not any(layer._forward_hooks for layer in model.layers)


def test_the_times_of_a_trace_are_those_of_its_quickest_step(monkeypatch):
    model, clock = Net(), iter([0.0, 5.0, 9.0, 10.0, 12.0, 20.0, 20.0, 26.0, 30.0])
    monkeypatch.setattr("memory.tracer.moment", lambda device: next(clock))
    tracer = Tracer(list(model.layers), CPU, Clock().counters())
    for _ in range(3):
        tracer.start_step()
        model(torch.randn(2, 4)).backward()
        tracer.end_step()
    tracer.close()
    assert tracer.result(0) == StepTrace(50, forward_seconds=5.0, backward_seconds=4.0)


def test_the_tracer_on_a_cpu_reads_the_resident_memory_of_the_process():
    """Where memory is short, Linux takes pages of files from a process at any moment: one of three counts."""
    seen = []
    for _ in range(3):
        counters = Counters(CPU)
        before = counters.read().peak
        held = torch.ones(64 * MIB, dtype=torch.uint8)
        seen.append(counters.read().peak - before)
        del held
    assert max(seen) > 60 * MIB


# ---- the timeline ------------------------------------------------------------------------------------------


def test_overlapping_work_counts_once():
    assert busy_seconds([(5.2, 5.3), (5.0, 5.06), (5.04, 5.1)]) == pytest.approx(0.2)
    assert busy_seconds([(0, 9), (1, 2)]) == 9 and busy_seconds([]) == 0


def test_a_row_of_text_shows_what_is_under_way_in_the_middle_of_each_cell():
    assert text_row([("F", 0, 2), ("B", 3, 7)], 0, 8, 8) == "FF.BBBB."
    assert text_row([("F0 ", 1.4, 3)], 1, 4, 3, idle=".. ") == "F0 F0 .. "


def test_a_timeline_is_drawn(tmp_path):
    events = [
        ("F0 layer", "compute", 5.0, 5.1),
        ("a", "d2h", 5.0, 5.06),
        ("b", "d2h", 5.04, 5.1),
        ("c", "d2h", 5.2, 5.3),
        ("d", "host adam", 5.1, 5.1),
    ]
    for case in (events, events[4:], [(lane, lane, 0.0, 20.0) for lane in LANES]):
        draw_timeline(case, tmp_path / "step.png", "a step")
        assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="empty"):
        draw_timeline([], tmp_path / "none.png")
    with pytest.raises(KeyError, match="elsewhere"):
        draw_timeline([("a", "elsewhere", 0, 1)], tmp_path / "none.png")
