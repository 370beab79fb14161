"""The plan of which chunk lives where: pure functions of sizes, budgets and rates. Nothing here touches a
tensor or a device.

chunk      a run of parameters with their optimizer state, the unit that is placed (chunk.py)
plan       a home for each chunk of a rank (home.py)
ring       device slots through which the states of STREAM chunks pass
update U   the time from the last gradient of a step until its last new weight is on the device. Host and
           device work at it at the same time, and it hides behind the next forward

With N parameters on this rank, x_r of them RESIDENT, x_s STREAM and x_c CPU:

    device     weight N + (state + grad) x_r + grad x_s + ring + traced + reserve  <=  device budget
    host       cpu_state x_c + state x_s + weight buffers + traced  <=  host budget
    U          the slowest of: the link in each direction and in both, host DRAM, host Adam
    step       backward + max(next forward, U) + resident Adam    with clipping: it needs all gradients' norm
               max(backward + next forward, U) + resident Adam    without: chunks are stepped in backward
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from math import ceil, floor, log10
from typing import Any, NamedTuple

import numpy as np

from dtensor_llama.errors import UsageError
from dtensor_llama.metrics import GIB
from memory.home import ByAccount, Home, StateFormat
from memory.tracer import MachineRates, StepTrace

RESERVE = 0.03  # of the device budget: for fragments in the allocator, and for what the warm-up did not see
# Plans whose step is within this share of the fastest are ties; the one with the most RESIDENT chunks is
# taken. Without the tie-break, whenever a long forward hides the whole update, everything would be offloaded
# to save a negligible resident Adam step.
CLOSE_ENOUGH = 0.0025
NEVER = 2**62  # bytes: more than any budget
DRIFT = 0.20  # an update that is further than this share from its prediction is planned anew
RING_SLOTS = 4  # STREAM chunks that are on the device at once
WEIGHT_BUFFERS = 2  # chunks of new weights that leave the host at once: one is written, one is sent

WHY = {
    Home.RESIDENT: "stepped on the device; the first layers, so the next forward finds them ready",
    Home.STREAM: "states pass through the device ring each step",
    Home.CPU: "stepped by the host's cores; only gradients and weights travel",
}


class Split(NamedTuple):
    """Parameters by home, in Home's order: numbers, or arrays that hold one entry per plan."""

    resident: Any
    stream: Any
    cpu: Any


@dataclass(frozen=True)
class ChunkSizes:
    """The chunks of a rank, in forward order. layers: the first and the last parameter of each; may be
    empty."""

    n_elements: tuple[int, ...]
    state: StateFormat = StateFormat()
    layers: tuple[tuple[str, str], ...] = ()

    @property
    def weight_bytes(self) -> int:
        return self.state.weight_dtype.itemsize * sum(self.n_elements)

    def bytes_held(self, split: Split) -> dict[str, dict[str, Any]]:
        """Return {account: {purpose: bytes}} of gradients, states and buffers; the weights are not in it."""
        largest = max(self.n_elements, default=0)
        held = {"device": {}, "host": {}}
        for home, n in zip(Home, split, strict=True):
            for account, n_bytes in self.state.bytes_per_parameter(home).items():
                held[account][home.value] = n_bytes * n
        held["device"]["ring"] = RING_SLOTS * self.state.state_bytes * largest * (split.stream > 0)
        buffers = WEIGHT_BUFFERS * self.state.weight_dtype.itemsize * largest
        held["host"]["cpu"] = held["host"]["cpu"] + buffers * (split.cpu > 0)
        return held

    def totals_held(self, split: Split) -> dict[str, Any]:
        return {account: sum(by_purpose.values()) for account, by_purpose in self.bytes_held(split).items()}


@dataclass(frozen=True)
class Plan:
    """A home for each chunk, and what follows from it; `describe` prints it, checkpoints keep `to_json`."""

    homes: tuple[Home, ...]  # one per chunk
    chunks: ChunkSizes = ChunkSizes(())
    policy: str = "given"  # given, static or auto
    why: str = "homes as given"
    other_device_bytes: int = 0  # activations, buffers, other libraries: traced
    other_host_bytes: int = 0
    device_budget_bytes: int | None = None
    host_budget_bytes: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # what `predict` returns; empty if unknown
    bound: str = ""  # what the predicted step waits for
    clips: bool = True  # False: the update begins during backward

    @property
    def split(self) -> Split:
        n_parameters = dict.fromkeys(Home, 0)
        for n, home in zip(self.chunks.n_elements, self.homes, strict=True):
            n_parameters[home] += n
        return Split(*n_parameters.values())

    @property
    def device_bytes(self) -> dict[str, int]:
        """Bytes by purpose; their sum is the most that this plan has on the device."""
        other = {
            "weights": self.chunks.weight_bytes,
            "other": self.other_device_bytes,
            "reserve": _reserve(self.device_budget_bytes),
        }
        return self.chunks.bytes_held(self.split)["device"] | other

    @property
    def host_bytes(self) -> dict[str, int]:
        return self.chunks.bytes_held(self.split)["host"] | {"other": self.other_host_bytes}

    @property
    def host_dram_bytes(self) -> int:
        return _host_dram_bytes(self.split, self.chunks.state)

    def to_json(self) -> str:
        stored = asdict(self)
        stored["n_elements"] = stored.pop("chunks")["n_elements"]
        stored["placements"] = stored.pop("homes")
        return json.dumps(stored)

    @classmethod
    def from_json(cls, text: str, chunks: ChunkSizes) -> "Plan | None":
        """Return the plan that was saved, or None if it is for other chunks than these."""
        stored = json.loads(text)
        if stored["n_elements"] != list(chunks.n_elements):
            return None
        known = {each.name for each in fields(cls)}
        values = {name: value for name, value in stored.items() if name in known}
        return cls(tuple(map(Home, stored["placements"])), chunks, **values)


def _reserve(budget_bytes: int | None) -> int:
    return ceil(RESERVE * (budget_bytes or 0))


# ---- the two policies --------------------------------------------------------------------------------------


def lay_out(n_chunks: int, n_resident: int, n_stream: int) -> tuple[Home, ...]:
    """Return the homes of n_chunks chunks. RESIDENT chunks come first, because the forward that follows an
    update needs them first. STREAM chunks are spread evenly among the CPU chunks, so that both engines finish
    the layers in forward order."""
    n_tail = n_chunks - n_resident
    tail = [Home.STREAM if _streams(i, n_stream, n_tail) else Home.CPU for i in range(n_tail)]
    return (Home.RESIDENT,) * n_resident + tuple(tail)


def _streams(i, n_stream, n_tail: int):
    """Return 1 if chunk i is one of the n_stream that are spread evenly among n_tail chunks, else 0. i and
    n_stream: numbers or arrays."""
    return (i + 1) * n_stream // n_tail - i * n_stream // n_tail


def splits(n_elements: Sequence[int]) -> Iterator[tuple[int, Split]]:
    """Yield (n_resident, split) for all that `lay_out` can make. The split's `stream` and `cpu` are arrays
    over n_stream.

    Nearly all chunks have one size, so x_s is n_stream times that size, less what the few smaller chunks
    among them lack. The whole scan is O(chunks^2 x smaller chunks) instead of O(chunks^3)."""
    sizes = np.asarray(n_elements, dtype=np.int64)
    full = sizes.max(initial=0)
    smaller = np.flatnonzero(sizes != full)
    x_r = np.concatenate([[0], np.cumsum(sizes)])
    for n_resident in range(len(sizes) + 1):
        n_tail = len(sizes) - n_resident
        n_stream = np.arange(n_tail + 1)
        at = smaller[smaller >= n_resident]
        is_stream = _streams((at - n_resident)[:, None], n_stream, max(n_tail, 1))  # (smaller, n_stream)
        x_s = n_stream * full - (full - sizes[at]) @ is_stream
        yield n_resident, Split(int(x_r[n_resident]), x_s, x_r[-1] - x_r[n_resident] - x_s)


def cheapest(chunks: ChunkSizes, cost: Callable[[Split], np.ndarray]) -> Iterator[tuple[float, int, int]]:
    """Yield (cost, n_resident, n_stream) of the cheapest plan with each n_resident. cost: of all plans of a
    split, as an array over n_stream."""
    for n_resident, split in splits(chunks.n_elements):
        costs = cost(split)
        yield float(costs.min()), n_resident, int(costs.argmin())


def least_held(chunks: ChunkSizes, account: str, other: str, other_room: int) -> tuple[float, int, int]:
    """Return (bytes, n_resident, n_stream) of the plan with the fewest bytes on an account among those that
    hold at most `other_room` on the other one. If there is none, the bytes are NEVER."""

    def held(split: Split) -> np.ndarray:
        totals = chunks.totals_held(split)
        return np.where(totals[other] <= other_room, totals[account], NEVER)

    return min(cheapest(chunks, held))


def static_plan(chunks: ChunkSizes, resident: float, stream: float, cpu: float) -> Plan:
    """Return the plan that is closest to these fractions of the parameters, which sum to 1: the sum of the
    three deviations is the least that whole chunks in forward order allow."""
    wanted = [fraction * sum(chunks.n_elements) for fraction in (resident, stream, cpu)]
    deviation = lambda split: sum(abs(n - wish) for n, wish in zip(split, wanted, strict=True))
    _, *counts = min(cheapest(chunks, deviation))
    homes = lay_out(len(chunks.n_elements), *counts)
    return Plan(homes, chunks, "static", f"as asked for: resident={resident:g} stream={stream:g} cpu={cpu:g}")


def auto_plan(
    chunks: ChunkSizes, budgets: ByAccount, rates: MachineRates, traced: StepTrace, clips: bool = True
) -> Plan:
    """Return the plan with the fastest predicted step within both budgets, found by a scan of all plans.

    If everything fits the device, all chunks are RESIDENT. Among plans within CLOSE_ENOUGH of the fastest the
    one with the most RESIDENT chunks is taken. budgets: bytes by account. If nothing fits, UsageError names
    the numbers and the nearest budgets that would do.
    """
    n_chunks, other = len(chunks.n_elements), traced.non_model_peak_bytes
    device_room = budgets["device"] - _reserve(budgets["device"]) - chunks.weight_bytes - other
    host_room = budgets["host"] - traced.host_bytes

    def step_seconds(split: Split) -> np.ndarray:
        held = chunks.totals_held(split)
        fits = (held["device"] <= device_room) & (held["host"] <= host_room)
        return np.where(fits, predict(split, chunks.state, rates, traced, clips)["step"], np.inf)

    found = [entry for entry in cheapest(chunks, step_seconds) if entry[0] < np.inf]
    if not found:
        least_device = least_held(chunks, "device", "host", host_room)[0]
        least_host = least_held(chunks, "host", "device", device_room)[0] + traced.host_bytes
        raise _nothing_fits(chunks, budgets, traced, least_device, least_host)
    fastest = min(found)[0]
    ties = [entry for entry in found if entry[0] <= fastest * (1 + CLOSE_ENOUGH)]
    _, n_resident, n_stream = max(ties, key=lambda entry: entry[1])
    why = f"the fastest that fits; {fastest:.3g} s a step are predicted"
    if found[-1][1] == n_chunks:
        n_resident, n_stream, why = n_chunks, 0, "everything fits the device"
    plan = Plan(
        lay_out(n_chunks, n_resident, n_stream),
        chunks,
        "auto",
        why,
        other_device_bytes=other,
        other_host_bytes=traced.host_bytes,
        device_budget_bytes=budgets["device"],
        host_budget_bytes=budgets["host"],
        clips=clips,
    )
    return with_prediction(plan, rates, traced)


def _nothing_fits(
    chunks: ChunkSizes, budgets: ByAccount, traced: StepTrace, least_device: float, least_host: float
) -> UsageError:
    """least_device, least_host: of the plans that the other budget allows."""
    n_total, other = sum(chunks.n_elements), traced.non_model_peak_bytes
    weights = chunks.weight_bytes
    all_cpu = chunks.totals_held(Split(0, 0, n_total))["host"] + traced.host_bytes
    device_budget = lambda n_bytes: (
        f"device_budget_gib={gib_up((weights + other + n_bytes + 1) / (1 - RESERVE))}"
    )
    ways = [device_budget(least_device)] if least_device < NEVER else []
    ways += [f"host_budget_gib={gib_up(least_host)}"] if least_host < NEVER else []
    both = f"{device_budget(0)} with host_budget_gib={gib_up(all_cpu)}"
    per_parameter = chunks.state.bytes_per_parameter(Home.CPU)["host"]
    return UsageError(
        f"device_budget_gib={budgets['device'] / GIB:.4g} and host_budget_gib={budgets['host'] / GIB:.4g} "
        f"(per rank) cannot hold {n_total:,} parameters. Before any optimizer state the device needs "
        f"{_gib(weights + other)} GiB ({_gib(weights)} for weights, {_gib(other)} for "
        f"activations and the rest), and {RESERVE:.0%} stay in reserve. What is not on the device takes "
        f"{chunks.state.state_bytes} to {per_parameter} bytes a parameter on the host. The nearest setting "
        f"that works is {' or '.join(ways) or both}."
    )


def least_device_plan(chunks: ChunkSizes, host_bytes: int) -> Plan:
    """Return the plan with the fewest bytes on the device among those that hold at most `host_bytes` on the
    host: for steps that run before it is known what else the device must hold. If the host can hold nothing,
    all chunks are RESIDENT.

    CPU chunks take nothing of the device and the most of the host. STREAM chunks take less of the host, where
    they have neither a whole master nor a gradient buffer."""
    _, *counts = least_held(chunks, "device", "host", host_bytes)
    homes = lay_out(len(chunks.n_elements), *counts)
    return Plan(homes, chunks, "static", "the device is as empty as the host can make it")


def gib_up(n_bytes: float) -> str:
    """Return GiB as a person would type them, rounded up so that the setting works."""
    gib = n_bytes / GIB
    digits = max(2, 2 - floor(log10(gib))) if gib > 0 else 2
    return f"{ceil(gib * 10**digits) / 10**digits:.{digits}f}"


# ---- time --------------------------------------------------------------------------------------------------


def _host_dram_bytes(split: Split, state: StateFormat):
    return state.cpu_dram_bytes * split.cpu + 2 * state.state_bytes * split.stream


def update_terms(split: Split, state: StateFormat, rates: MachineRates) -> dict[str, np.ndarray]:
    """Return how many seconds each part of the machine needs for one update, by its name."""
    one_way = state.state_bytes * split.stream + state.weight_dtype.itemsize * split.cpu  # and as much back
    return {
        "the link to the host": one_way / rates.d2h,
        "the link to the device": one_way / rates.h2d,
        "the link, both ways": 2 * one_way / rates.duplex,
        "host DRAM": _host_dram_bytes(split, state) / rates.dram_in_update,
        "host Adam": split.cpu / rates.host_adam,
    }


def predict(
    split: Split, state: StateFormat, rates: MachineRates, traced: StepTrace, clips: bool = True
) -> dict[str, np.ndarray]:
    """Return the seconds of a step, of its parts, and of what the update can hide behind: the next forward.
    Where no norm of all gradients has to be known before the first chunk is stepped, it hides behind backward
    too."""
    update = np.maximum.reduce(list(update_terms(split, state, rates).values()))
    resident_adam = split.resident / rates.device_adam
    forward, backward = traced.forward_seconds, traced.backward_seconds
    alone, beside = (backward, forward) if clips else (0.0, backward + forward)
    return {
        "forward": forward,
        "backward": backward,
        "beside_update": beside,
        "update": update,
        "resident_adam": resident_adam,
        "step": alone + np.maximum(beside, update) + resident_adam,
    }


def with_prediction(plan: Plan, rates: MachineRates, traced: StepTrace) -> Plan:
    parts = predict(plan.split, plan.chunks.state, rates, traced, plan.clips)
    seconds = {name: float(value) for name, value in parts.items()}
    terms = update_terms(plan.split, plan.chunks.state, rates)
    is_hidden = seconds["update"] <= seconds["beside_update"]
    return replace(
        plan, seconds=seconds, bound="forward and backward" if is_hidden else max(terms, key=terms.get)
    )


def reason_to_replan(plan: Plan, peak_device_bytes: int, update_seconds: float) -> str | None:
    """Return why a new plan should be made from a new trace, or None. Ask between steps; peak and update are
    those of a whole step."""
    budget, predicted = plan.device_budget_bytes, plan.seconds.get("update", 0)
    if budget and peak_device_bytes > (1 - RESERVE) * budget:
        return (
            f"the peak of {peak_device_bytes / GIB:.2f} GiB is within {RESERVE:.0%} of the budget of "
            f"{budget / GIB:.2f} GiB"
        )
    if predicted and abs(update_seconds / predicted - 1) > DRIFT:
        return f"the update took {update_seconds:.3g} s and was predicted to take {predicted:.3g} s"
    return None


# ---- in words ----------------------------------------------------------------------------------------------


def describe(plan: Plan) -> str:
    """Return the plan as a table: what lives where and why, bytes on device and host, the predicted step and
    what bounds it."""
    chunks, device, host = plan.chunks, plan.device_bytes, plan.host_bytes
    device |= {"sum": sum(device.values()), "budget": plan.device_budget_bytes}
    host |= {"sum": sum(host.values()), "budget": plan.host_budget_bytes}
    rows = []  # (name, chunks, parameters, words)
    for home, n_parameters in zip(Home, plan.split, strict=True):
        chosen = [i for i, its_home in enumerate(plan.homes) if its_home is home]
        if chosen:
            first, last = chosen[0], chosen[-1]
            covers = f"{chunks.layers[first][0]} .. {chunks.layers[last][1]}: " if chunks.layers else ""
            rows.append((home.value, len(chosen), f"{n_parameters:,}", covers + WHY[home]))
    traced = "activations and the rest, as traced; " if plan.policy == "auto" else ""
    passing = "on the host: block inputs until backward, and a parameter on its way to or from a file"
    rows += [
        ("ring", "", "", f"{RING_SLOTS} chunks that pass through"),
        ("weights", "", f"{sum(chunks.n_elements):,}", f"{chunks.state.weight_dtype.itemsize} bytes each"),
        ("other", "", "", traced + passing),
        ("reserve", "", "", f"{RESERVE:.0%} of the budget"),
        ("sum", len(plan.homes), "", ""),
        ("budget", "", "", "per rank"),
    ]
    lines = [f"memory plan, {plan.policy}: {plan.why}"]
    lines.append(f"  {'':8}  chunks  {'parameters':>13}  device GiB  host GiB")
    for name, n_chunks, n_parameters, words in rows:
        if device.get(name) or host.get(name):
            on_device, on_host = _gib(device.get(name)), _gib(host.get(name))
            line = f"  {name:8}  {n_chunks:6}  {n_parameters:>13}  {on_device:>10}  {on_host:>8}  {words}"
            lines.append(line.rstrip())
    if seconds := plan.seconds:
        hidden, behind = min(seconds["update"], seconds["beside_update"]), "it" if plan.clips else "both"
        lines.append(
            f"  predicted step {_at_least(plan)}{seconds['step']:.3g} s: backward {seconds['backward']:.3g}, "
            f"next forward {seconds['forward']:.3g}, update {seconds['update']:.3g} of which {hidden:.3g} "
            f"hide behind {behind}, resident Adam {seconds['resident_adam']:.3g}; bound by {plan.bound}"
        )
    return "\n".join(lines)


def describe_measured(
    plan: Plan, step_seconds: float, host_update_s: float | None, peak_bytes: ByAccount
) -> str:
    """Return what was measured under a plan, beside what was predicted. peak_bytes: of what the manager
    holds, by account."""

    def beside(name: str) -> str:
        return f" (predicted {_at_least(plan)}{plan.seconds[name]:.3g})" if plan.seconds else ""

    update = ""
    if host_update_s is not None:
        update = f"the host's update {host_update_s:.3g} s{beside('update')}, "
    return (
        f"memory    measured: a step takes {step_seconds:.3g} s{beside('step')}, {update}with at most "
        f"{_gib(peak_bytes['device'])} GiB of weights, gradients and states on the device and "
        f"{_gib(peak_bytes['host'])} GiB on the host"
    )


def _at_least(plan: Plan) -> str:
    """A static plan is made before any step was measured: its forward and backward count matrix products
    alone."""
    return "" if plan.policy == "auto" else "at least "


def _gib(n_bytes: int | None) -> str:
    if n_bytes is None:
        return ""
    return f"{n_bytes / GIB:.2f}" if n_bytes >= 0.1 * GIB or n_bytes == 0 else f"{n_bytes / GIB:.2g}"
