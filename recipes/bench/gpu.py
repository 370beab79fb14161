"""Measure what gpu_plan.py lists, part by part, and write each figure down as soon as it is there.

    bash recipes/bench/gpu.sh [PART...] [--out FOLDER] [--card h100|h200] [--seconds N] [--warm-up] [--again]

gpu.sh is the entry point. FOLDER/h200.jsonl (or h100.jsonl) gets a line for the machine and its versions, one
for each JSON line that a command prints, together with the command, and one when the command has ended.
FOLDER/logs/ keeps the standard error of each command, and FOLDER/h200.md has the table of predicted and
measured figures. A measurement that ended well is not repeated, so the script can be started as often as a
machine is lent, until the table is full.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone works without being installed

from gpu_plan import (
    CARDS,
    WARM_UP_S,
    Card,
    Expected,
    Measurement,
    Part,
    Setting,
    choose_card,
    plan,
    write_models,
)
from gpu_plan import warm_up as warm_up_runs

from dtensor_llama.cli import run_recipe
from dtensor_llama.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
FAR_OFF = 0.10  # a figure further than this from its prediction wants an explanation


@dataclass(frozen=True)
class Config:
    """Measure what can only be known on a GPU. `plan` and `summary` in place of parts only print."""

    # the parts to measure, by default all of them; or one of the words plan and summary
    parts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    out: Path = ROOT / "recipes/bench/results"  # the folder for results, logs and tables
    card: Literal["auto", "h100", "h200"] = "auto"  # whose plan to follow; auto decides by the GPU's memory
    seconds: int | None = None  # start nothing that could run longer than so many seconds from now
    again: bool = False  # also repeat measurements that have their results
    # first compile all that will be timed, side by side and with two layers, and run the part tests beside it
    warm_up: bool = False
    # the GiB that every command may plan with on the host, for machines whose memory grows on demand
    host_budget_gib: float | None = None
    # give every model so many layers and every command more time: a rehearsal, whose figures mean nothing
    rehearse_layers: int | None = None


def main(cfg: Config) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the commands end too
    check(cfg)
    deadline = float("inf") if cfg.seconds is None else time.monotonic() + cfg.seconds
    cfg = replace(cfg, out=cfg.out.resolve())  # commands run in the root of the repository
    facts, card = machine(cfg)
    setting = Setting(card, cfg.out, cfg.host_budget_gib, cfg.rehearse_layers)
    parts = plan(setting)
    if cfg.parts == ("plan",):
        print(describe(parts))
        return
    name = f"{card.name}-rehearsal" if cfg.rehearse_layers else card.name
    results = Results(cfg.out / f"{name}.jsonl")
    if cfg.parts != ("summary",):
        chosen = choose(parts, cfg.parts)
        write_models(setting)
        results.add({"part": "machine", **facts, "host_budget_gib": cfg.host_budget_gib})
        if card.layers < 32:
            print(
                f"This GPU has {facts['device_gib']:.1f} GiB and cannot hold 7B, which takes 100.4. The "
                f"parts resident, zero3 and variants measure {card.layers} of its layers, and the parts "
                "7b-* measure 7B with states on the host.",
                flush=True,
            )
        if cfg.warm_up:
            warm_up(setting, chosen, results, cfg, deadline)
        measure_all(chosen, results, cfg, deadline)
    table = summary(parts, results.lines)
    cfg.out.mkdir(parents=True, exist_ok=True)
    (cfg.out / f"{name}.md").write_text(table + "\n")
    print(table)


def check(cfg: Config) -> None:
    """Raise UsageError for numbers that mean nothing and for a folder that cannot be made."""
    least = {"--seconds": (cfg.seconds, 0), "--rehearse-layers": (cfg.rehearse_layers, 1)}
    for flag, (value, low) in least.items():
        if value is not None and value < low:
            raise UsageError(f"{flag} {value} is not possible; use at least {low}, or leave it out.")
    if cfg.host_budget_gib is not None and not cfg.host_budget_gib > 0:
        raise UsageError(f"--host-budget-gib {cfg.host_budget_gib:g} is not possible; use GiB above 0.")
    try:
        cfg.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {cfg.out} cannot be made ({error.strerror}); name another folder.") from None


def machine(cfg: Config) -> tuple[dict, Card]:
    """Return facts about the GPU, and its card. A process of its own looks: this one takes no GPU memory."""
    known = [name for name in CARDS if (cfg.out / f"{name}.jsonl").exists()]
    if cfg.parts in (("plan",), ("summary",)) and cfg.card != "auto":
        return {}, CARDS[cfg.card]
    if cfg.parts == ("summary",) and len(known) == 1:
        return {}, CARDS[known[0]]
    asked = subprocess.run(
        [sys.executable, "recipes/bench/machine.py", "--facts"], cwd=ROOT, capture_output=True, text=True
    )
    if asked.returncode:
        raise UsageError(
            f"recipes/bench/machine.py does not run here: {(asked.stderr.strip().splitlines() or ['?'])[-1]}"
        )
    facts = json.loads(asked.stdout.splitlines()[-1])
    card = choose_card(facts["device_gib"])
    if cfg.card != "auto":
        card = CARDS[cfg.card]
    if card is None:
        raise UsageError(
            f"--card auto needs a GPU of at least {CARDS['h100'].memory_gib} GiB, and the one here "
            f"({facts['machine']}) has {facts['device_gib']:.1f}; use --card to see a plan."
        )
    return facts, card


def choose(parts: list[Part], names: tuple[str, ...]) -> list[Part]:
    """Return the named parts in the plan's order, or all of them."""
    known = {part.name: part for part in parts}
    unknown = [name for name in names if name not in known]
    if {"plan", "summary"} & set(names):
        raise UsageError(f"{' '.join(names)}: plan and summary each stand alone, without the name of a part.")
    if unknown:
        raise UsageError(
            f"there is no part {' '.join(unknown)}; there are {', '.join(known)}, and plan and summary."
        )
    return [part for part in parts if not names or part.name in names]


# ---- results: one file of JSON lines -------------------------------------------------------------


class Results:
    """Holds the result lines so far, and writes each of them to a file as soon as it is added."""

    def __init__(self, path: Path):
        self.path = path
        self.lines: list[dict] = []
        text = path.read_text() if path.exists() else ""
        for line in text.splitlines():
            try:
                self.lines.append(json.loads(line))
            except json.JSONDecodeError:
                pass  # the machine went away while this line was written
        torn = bool(text) and not text.endswith("\n")
        self.before = "\n" if torn else ""  # so that the next result starts on a line of its own
        self.lock = threading.Lock()  # the runs of a warm-up come in side by side

    def add(self, line: dict) -> None:
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), **line}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.lock, self.path.open("a") as file:
            self.lines.append(line)
            file.write(self.before + json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
            self.before = ""

    def endings(self, part: Part, measurement: Measurement) -> list[str]:
        """Return how the measurement ended, each time that it was made with its present command."""
        key = {"part": part.name, "measurement": measurement.name, "command": list(measurement.command)}
        return [line["ended"] for line in self.lines if "ended" in line and key.items() <= line.items()]


# ---- measuring -----------------------------------------------------------------------------------


def measure_all(parts: list[Part], results: Results, cfg: Config, deadline: float) -> None:
    """Make every measurement that has no results yet.

    Measurements that were never tried come before those that failed: a failure may repeat itself, and time is
    short."""
    todo = [(part, measurement) for part in parts for measurement in part.measurements]
    todo.sort(key=lambda each: bool(results.endings(*each)))
    for part, measurement in todo:
        name = f"{part.name}, {measurement.name}"
        left_s = deadline - time.monotonic()
        if "done" in results.endings(part, measurement) and not cfg.again:
            print(f"== {name}: has its results", flush=True)
        elif measurement.limit_s > left_s:
            limit_s = measurement.limit_s
            print(f"== {name}: not started, it may take {limit_s} s of {max(0, left_s):.0f} left", flush=True)
        else:
            print(f"== {name}, at most {measurement.limit_s} s: {' '.join(measurement.command)}", flush=True)
            for expected in measurement.expects:
                print(f"   expected: {words(expected)}", flush=True)
            measure(part, measurement, results, cfg.out / "logs")


def warm_up(setting: Setting, parts: list[Part], results: Results, cfg: Config, deadline: float) -> None:
    """Run, all at once, what takes long on a fresh machine and is not timed: compiling and the part tests."""
    limit_s, left_s = WARM_UP_S * setting.patience, deadline - time.monotonic()
    if limit_s > left_s:
        print(f"== warm-up: not started, it may take {limit_s} s of {max(0, left_s):.0f} left", flush=True)
        return
    pairs = [(part, measurement) for part in parts for measurement in part.measurements]
    todo = [each for each in pairs if cfg.again or "done" not in results.endings(*each)]
    about = Part("warm-up", "what it compiles is found compiled later; its figures mean nothing", ())
    timed = [measurement for part, measurement in todo if part.name != "tests"]
    runs = [(about, run) for run in warm_up_runs(setting, timed)]
    runs += [(part, replace(run, limit_s=limit_s)) for part, run in todo if part.name == "tests"]
    print(f"== warm-up: {len(runs)} runs side by side, at most {limit_s} s", flush=True)
    with ThreadPoolExecutor(max(1, len(runs))) as pool:
        under_way = [pool.submit(measure, *each, results, cfg.out / "logs") for each in runs]
    for run in under_way:
        run.result()


def python_path() -> str:
    """Return PYTHONPATH with this checkout in front."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def measure(part: Part, measurement: Measurement, results: Results, logs: Path) -> None:
    """Run the command within its limit. Keep each JSON line as it comes, and how the command ended."""
    about = {"part": part.name, "measurement": measurement.name, "command": list(measurement.command)}
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{part.name} {measurement.name}.log".replace(" ", "_").replace(",", "")
    began, said, failures = time.monotonic(), "", []
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-u", *measurement.command],
            cwd=ROOT,
            # The recipes import the packages, which need not be installed here.
            env={**os.environ, "PYTHONPATH": python_path(), **measurement.environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
        timer = threading.Timer(measurement.limit_s, end, (process,))
        timer.start()
        try:
            for line in process.stdout:
                print(f"   {line}", end="", flush=True)
                result = parsed(line)
                if result is None:
                    said = line.strip() or said
                else:
                    results.add({**about, "result": result})
                    # That a contender does not fit this machine is a result; that it broke is none.
                    failures += [result["error"]] if "error" in result and not result.get("refused") else []
            status = process.wait()
        finally:
            timer.cancel()
            end(process)
    seconds = time.monotonic() - began
    ended = "done"
    if seconds >= measurement.limit_s:
        ended = f"stopped after its {measurement.limit_s} s"
    elif status:
        ended, said = f"failed with status {status}", last_error(log) or said
    elif failures:
        ended, said = "failed in part", failures[-1]
    if measurement.command[0] == "-m":  # this is pytest, whose result is the last line that it prints
        results.add({**about, "result": {"status": status, "said": said}})
    if ended != "done":
        print(f"   {ended}: {said}", flush=True)
    results.add({**about, "ended": ended, "seconds": round(seconds, 1), "said": said[-500:]})


def parsed(line: str) -> dict | None:
    """Return the JSON object on the line, or None for a line of text."""
    try:
        result = json.loads(line)
    except json.JSONDecodeError:
        return None
    return result if isinstance(result, dict) else None


def end(process: subprocess.Popen) -> None:
    """End the command and all processes that it started: they are one process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def last_error(log: Path) -> str:
    """Return the last line of the log that names an error, or else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line]
    return (errors or lines or [""])[-1]


# ---- tables --------------------------------------------------------------------------------------


def describe(parts: list[Part]) -> str:
    """Return the plan as text: parts, commands and expected figures."""
    lines = []
    for part in parts:
        lines.append(f"{part.name} (at most {part.limit_s} s): {part.why}")
        for measurement in part.measurements:
            lines.append(f"    {measurement.name}: {' '.join(measurement.command)}")
            lines += [f"        {words(expected)}" for expected in measurement.expects]
    return "\n".join(lines)


def words(expected: Expected) -> str:
    of = " ".join(str(value) for value in expected.line.values())
    return f"{of + ': ' if of else ''}{expected.figure} {number_range(expected)}"


def number_range(expected: Expected) -> str:
    low, high = number(expected.low), number(expected.high)
    return low if low == high else f"{low} to {high}"


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value == 0 else f"{value:.4g}"


def difference(expected: Expected, measured: float) -> float:
    """Return how far the figure lies outside the predicted range, as a share of the nearer end."""
    nearer = min(max(measured, expected.low), expected.high)
    if nearer == 0:
        return 0.0 if measured == 0 else float("inf")
    return measured / nearer - 1


def summary(parts: list[Part], lines: list[dict]) -> str:
    """Return a Markdown table of all predicted figures, with a row for each measurement that failed."""
    rows = [
        "| part | measurement | figure | predicted | measured | difference |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for part in parts:
        for measurement in part.measurements:
            key = {"part": part.name, "measurement": measurement.name}
            own = [line for line in lines if key.items() <= line.items()]
            results = [line["result"] for line in own if "result" in line]
            for expected in measurement.expects:
                rows.append(row(part, measurement, expected, results))
            endings = [line for line in own if "ended" in line]
            if endings and endings[-1]["ended"] != "done":
                said = f"{endings[-1]['ended']}: {endings[-1]['said']}".replace("|", "/")
                rows.append(
                    f"| {part.name} | {measurement.name} | how it ended | done | {said[:160]} | **look** |"
                )
    machines = [line for line in lines if line["part"] == "machine"]
    return "\n".join([*rows, "", *(about_machine(machines[-1]) if machines else [])])


def row(part: Part, measurement: Measurement, expected: Expected, results: list[dict]) -> str:
    """Return one line of the table. Of several results the last one counts."""
    named = " ".join([*map(str, expected.line.values()), expected.figure])
    fitting = [result for result in results if expected.line.items() <= result.items()]
    measured, off = "not yet", ""
    if fitting and isinstance(fitting[-1].get(expected.figure), int | float):
        value = fitting[-1][expected.figure]
        share = difference(expected, value)
        measured, off = number(value), f"{share:+.0%}"
        if not abs(share) <= FAR_OFF:  # a figure that is not a number is far off too
            off = f"**{off}**"
    elif fitting and "error" in fitting[-1]:
        measured = fitting[-1]["error"].replace("|", "/")[:160]
    return f"| {part.name} | {measurement.name} | {named} | {number_range(expected)} | {measured} | {off} |"


def about_machine(line: dict) -> list[str]:
    versions = ", ".join(
        f"{name} {version}" for name, version in line["versions"].items() if name in ("torch", "triton")
    )
    return [
        f"{line['machine']}, {line['device_gib']:.1f} GiB, driver {line['driver']}, CUDA {line['cuda']}; "
        f"{line['cores']} cores, {line['host_gib']:.0f} GiB for them; Python {line['python']}, {versions}; "
        f"{line['time'][:10]}. Differences over 10 % are in bold."
    ]


if __name__ == "__main__":
    run_recipe(main, Config)
