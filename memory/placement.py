"""Which chunk lives where: pure functions of sizes, budgets and rates. No tensor and no device is touched
here.

x_r, x_s, x_c   parameters of this rank whose chunks are RESIDENT, STREAM, CPU; they sum to N
update U        from the last gradient until the last weight is new, both engines at work; hidden behind the next forward
    device      weight N + (states + grad) x_r + grad x_s + ring + what was traced + reserve  <=  device budget
    host        cpu_states x_c + states x_s + outbox + what was traced  <=  host budget
    U           the slowest of: the link each way and both ways, host DRAM, host Adam
    step        backward + max(next forward, U) + resident Adam                     (the clip is exact: no update in backward)
                max(backward + next forward, U) + resident Adam                     (without a clip: as gradients arrive)
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from math import ceil, floor, log10

import numpy as np

from dtensor_llama.errors import UsageError
from memory.tracer import Rates, Traced

GIB = 2**30
RESERVE = 0.03  # of the device budget: fragments of the allocator, and what the warm-up did not see
# of a step; of plans so close the one with most residents is taken. Otherwise, where all hides behind a
CLOSE_ENOUGH = 0.0025
# long forward, the host would hold everything to save the 28 bytes of device traffic
# of a resident
NEVER = 2**62  # bytes
DRIFT = 0.20  # an update further than this from its prediction is planned again


class Placement(StrEnum):
    RESIDENT = "resident"  # on the device, stepped there
    STREAM = "stream"  # home on the host, passes through the device ring to be stepped there
    CPU = "cpu"  # on the host, stepped by its cores


WHY = {
    Placement.RESIDENT: "stepped on the device; the first layers, so the next forward finds them ready",
    Placement.STREAM: "states pass through the device ring each step",
    Placement.CPU: "host cores step; only gradients and weights travel",
}


@dataclass(frozen=True)
class Widths:
    """Bytes per parameter of each kind of tensor, and what follows from them; the ring is part of it."""

    weight: int = 2  # 2: bfloat16, beside a float32 master; 4: float32, and on the device it is the master
    grad: int = 2  # as it waits on the device for RESIDENT and STREAM; 4 where microbatches are summed
    slab: int = 2  # of CPU: as gradients arrive on the host, and as weights leave it through the outbox
    host_sum: int = 0  # of CPU: 4 where gradients arrive several times a step and are summed on the host
    # RESIDENT and STREAM keep the low half of the master only: the weight is its high half
    split_master: bool = False
    ring_slots: int = 4  # chunks that STREAM has on the device at once
    # chunks of new weights that CPU has on their way from the host: one written, one sent
    outbox_slots: int = 2

    def __post_init__(self):
        if self.split_master and self.weight != 2:
            raise ValueError(f"a split master's high half is a 2-byte weight, not one of {self.weight} bytes")

    @classmethod
    def of(cls, weight: int, sums: bool) -> "Widths":
        """As chunk.py lays them out: the master is the weight or, of a 2-byte weight, that and its low half.
        sums: gradients arrive several times a step and are added up in float32."""
        return cls(weight, 4 if sums else weight, weight, 4 if sums else 0, split_master=weight == 2)

    @property
    def states(self) -> int:
        """Of RESIDENT and STREAM: two float32 moments, and what the weight lacks of the master."""
        return 8 + (0 if self.weight == 4 else 2 if self.split_master else 4)

    @property
    def cpu_states(self) -> int:
        """Of CPU: the whole master, two moments, the slab and the sum."""
        return 12 + self.slab + self.host_sum

    @property
    def cpu_dram(self) -> int:
        """DRAM traffic of a CPU step: 12 read, 12 written; gradient and weight once by the cores, once by the
        link."""
        return 24 + 4 * self.slab + self.host_sum


@dataclass(frozen=True)
class Plan:
    """Where each chunk lives and what that takes; `describe` prints it, `to_json` goes into the
    checkpoint."""

    placements: tuple[Placement, ...]  # one per chunk, in forward order
    n_elements: tuple[int, ...] = ()  # of each chunk
    policy: str = "given"  # static, auto
    why: str = "placements as given"
    widths: Widths = Widths()
    layers: tuple[tuple[str, str], ...] = ()  # first and last parameter of each chunk; may be empty
    other_device_bytes: int = 0  # activations, buffers, other libraries: traced
    other_host_bytes: int = 0
    device_budget_bytes: int | None = None
    host_budget_bytes: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # of `predict`; {}: unknown
    bound: str = ""  # what the predicted step waits for
    clips: bool = True  # False: the update begins in backward

    def n_parameters(self, placement: Placement) -> int:
        return sum(n for n, where in zip(self.n_elements, self.placements, strict=True) if where is placement)

    @property
    def device_bytes(self) -> dict[str, int]:
        """By purpose; the sum is the most that this plan has on the device."""
        x_r, x_s = self.n_parameters(Placement.RESIDENT), self.n_parameters(Placement.STREAM)
        return {
            "weights": self.widths.weight * sum(self.n_elements),
            "resident": (self.widths.states + self.widths.grad) * x_r,
            "stream": self.widths.grad * x_s,
            "ring": ring_bytes(self.n_elements, self.widths) if x_s else 0,
            "other": self.other_device_bytes,
            "reserve": _reserve(self.device_budget_bytes),
        }

    @property
    def host_bytes(self) -> dict[str, int]:
        x_c = self.n_parameters(Placement.CPU)
        return {
            "cpu": self.widths.cpu_states * x_c + (outbox_bytes(self.n_elements, self.widths) if x_c else 0),
            "stream": self.widths.states * self.n_parameters(Placement.STREAM),
            "other": self.other_host_bytes,
        }

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        stored = json.loads(text)
        tuples = {"n_elements": tuple(stored["n_elements"]), "layers": tuple(map(tuple, stored["layers"]))}
        return cls(
            **stored
            | tuples
            | {
                "placements": tuple(map(Placement, stored["placements"])),
                "widths": Widths(**stored["widths"]),
            }
        )


def ring_bytes(n_elements: Sequence[int], widths: Widths) -> int:
    return widths.ring_slots * widths.states * max(n_elements, default=0)


def outbox_bytes(n_elements: Sequence[int], widths: Widths) -> int:
    return widths.outbox_slots * widths.slab * max(n_elements, default=0)


def _reserve(budget_bytes: int | None) -> int:
    return ceil(RESERVE * (budget_bytes or 0))


# ---- the two policies --------------------------------------------------------------------------------------


def lay_out(n_chunks: int, n_resident: int, n_stream: int) -> tuple[Placement, ...]:
    """Residents first, as the forward that follows an update needs them first; then STREAM spread evenly
    among CPU, so that both engines finish the layers in forward order."""
    n_tail = n_chunks - n_resident
    tail = (
        Placement.STREAM if (i + 1) * n_stream // n_tail > i * n_stream // n_tail else Placement.CPU
        for i in range(n_tail)
    )
    return (Placement.RESIDENT,) * n_resident + tuple(tail)


def splits(n_elements: Sequence[int]) -> Iterator[tuple[int, int, np.ndarray]]:
    """Every layout that `lay_out` can make: (n_resident, x_r, x_s), where x_s[n_stream] has an entry for each
    n_stream.

    Nearly all chunks have one size, so x_s is n_stream times that, less what the few smaller chunks among
    them lack: the whole scan is O(chunks^2 x smaller chunks) instead of O(chunks^3)."""
    sizes = np.asarray(n_elements, dtype=np.int64)
    full = sizes.max(initial=0)
    smaller = np.flatnonzero(sizes != full)
    x_r = np.concatenate([[0], np.cumsum(sizes)])
    for n_resident in range(len(sizes) + 1):
        n_tail = len(sizes) - n_resident
        n_stream = np.arange(n_tail + 1)
        at = smaller[smaller >= n_resident]
        i = (at - n_resident)[:, None]
        # (smaller, n_stream)
        is_stream = ((i + 1) * n_stream // max(n_tail, 1)) - (i * n_stream // max(n_tail, 1))
        yield n_resident, int(x_r[n_resident]), n_stream * full - (full - sizes[at]) @ is_stream


def static_plan(
    n_elements: Sequence[int],
    resident: float,
    stream: float,
    cpu: float,
    *,
    widths: Widths = Widths(),
    layers: Sequence[tuple[str, str]] = (),
) -> Plan:
    """Fractions of the parameters by layer order, as closely as whole chunks allow (least sum of the three
    deviations)."""
    fractions = {"resident": resident, "stream": stream, "cpu": cpu}
    said = " ".join(f"--memory.{name} {value:g}" for name, value in fractions.items())
    if not all(0 <= value <= 1 for value in fractions.values()):
        raise UsageError(f"{said}: each is a fraction of the parameters, from 0 to 1.")
    if abs(sum(fractions.values()) - 1) > 1e-6:
        rest = 1 - resident - stream
        works = (
            f"--memory.cpu {rest:.6g}" if rest >= 0 else f"--memory.stream {1 - resident:.6g} --memory.cpu 0"
        )
        raise UsageError(f"{said} sum to {sum(fractions.values()):.6g} and must sum to 1; use {works}.")
    n_total, best = sum(n_elements), (float("inf"), 0, 0)
    for n_resident, x_r, x_s in splits(n_elements):
        deviation = (
            abs(x_r - resident * n_total)
            + abs(x_s - stream * n_total)
            + abs(n_total - x_r - x_s - cpu * n_total)
        )
        n_stream = int(deviation.argmin())
        best = min(best, (float(deviation[n_stream]), n_resident, n_stream))
    return Plan(
        lay_out(len(n_elements), *best[1:]),
        tuple(n_elements),
        "static",
        f"asked for: {said}",
        widths,
        tuple(layers),
    )


def auto_plan(
    n_elements: Sequence[int],
    *,
    device_budget_bytes: int,
    host_budget_bytes: int,
    rates: Rates,
    traced: Traced,
    widths: Widths = Widths(),
    layers: Sequence[tuple[str, str]] = (),
    clips: bool = True,
) -> Plan:
    """The fastest predicted step within both budgets, by a scan of all layouts.

    n_elements: this rank's chunks in forward order. If all fits, all is RESIDENT. Of plans within
        CLOSE_ENOUGH of the fastest the one with most residents is taken. UsageError if nothing fits, with the
        numbers and the nearest budgets that would do.
    """
    n_total, other = sum(n_elements), traced.non_model_peak_bytes
    fixed = widths.weight * n_total + other
    spare = device_budget_bytes - _reserve(device_budget_bytes) - fixed
    ring, outbox = ring_bytes(n_elements, widths), outbox_bytes(n_elements, widths)
    least_device = least_host = NEVER  # of the layouts that the other budget allows
    found: list[tuple[float, int, int]] = []  # per number of residents: step seconds, n_resident, n_stream
    for n_resident, x_r, x_s in splits(n_elements):
        x_c = n_total - x_r - x_s
        device = (widths.states + widths.grad) * x_r + widths.grad * x_s + np.where(x_s > 0, ring, 0)
        host = (
            widths.cpu_states * x_c + widths.states * x_s + np.where(x_c > 0, outbox, 0) + traced.host_bytes
        )
        fits_device, fits_host = device <= spare, host <= host_budget_bytes
        least_host = min(least_host, int(np.where(fits_device, host, NEVER).min()))
        least_device = min(least_device, int(np.where(fits_host, device, NEVER).min()))
        if (fits := fits_device & fits_host).any():
            step = np.where(fits, predict(x_r, x_s, x_c, rates, traced, widths, clips)["step"], np.inf)
            found.append((float(step.min()), n_resident, int(step.argmin())))
    if not found:
        ways = [f"--memory.device-budget-gib {gib_up((fixed + least_device + 1) / (1 - RESERVE))}"] * (
            least_device < NEVER
        )
        ways += [f"--memory.host-budget-gib {gib_up(least_host)}"] * (least_host < NEVER)
        both = (
            f"--memory.device-budget-gib {gib_up((fixed + 1) / (1 - RESERVE))} with --memory.host-budget-gib "
            f"{gib_up(widths.cpu_states * n_total + outbox + traced.host_bytes)}"
        )
        raise UsageError(
            f"--memory.device-budget-gib {device_budget_bytes / GIB:.4g} and --memory.host-budget-gib "
            f"{host_budget_bytes / GIB:.4g} (per rank) cannot hold {n_total:,} parameters: before any optimizer state the "
            f"device needs {fixed / GIB:.2f} GiB (weights {widths.weight * n_total / GIB:.2f}, activations and the rest "
            f"{other / GIB:.2f}) and a reserve of {RESERVE:.0%}, and the host has what is not there, "
            f"{widths.states} to {widths.cpu_states} bytes a parameter. The nearest that works is {' or '.join(ways) or both}."
        )
    fastest = min(found)[0]
    _, n_resident, n_stream = max(
        (entry for entry in found if entry[0] <= fastest * (1 + CLOSE_ENOUGH)), key=lambda e: e[1]
    )
    why = f"fastest of all that fits: {fastest:.3g} s a step predicted"
    if found[-1][1] == len(n_elements):
        n_resident, n_stream, why = len(n_elements), 0, "everything fits the device"
    plan = Plan(
        lay_out(len(n_elements), n_resident, n_stream),
        tuple(n_elements),
        "auto",
        why,
        widths,
        tuple(layers),
        other,
        traced.host_bytes,
        device_budget_bytes,
        host_budget_bytes,
        clips=clips,
    )
    return with_prediction(plan, rates, traced)


def least_device_plan(n_elements: Sequence[int], host_bytes: int, widths: Widths) -> Plan:
    """The layout with the fewest bytes on the device of those that hold at most `host_bytes` on the host: for
    steps that are made before it is known what else the device must hold. All RESIDENT if the host can hold
    nothing.

    All CPU takes nothing of the device, and most of the host: STREAM has fewer bytes there, as the whole
    master and the slab are missing, and RESIDENT none."""
    n_total = sum(n_elements)
    ring, outbox = ring_bytes(n_elements, widths), outbox_bytes(n_elements, widths)
    best = NEVER, len(n_elements), 0  # bytes on the device, n_resident, n_stream
    for n_resident, x_r, x_s in splits(n_elements):
        x_c = n_total - x_r - x_s
        device = (widths.states + widths.grad) * x_r + widths.grad * x_s + np.where(x_s > 0, ring, 0)
        host = widths.cpu_states * x_c + widths.states * x_s + np.where(x_c > 0, outbox, 0)
        device = np.where(host <= host_bytes, device, NEVER)
        n_stream = int(device.argmin())
        best = min(best, (int(device[n_stream]), n_resident, n_stream))
    placements = lay_out(len(n_elements), *best[1:])
    return Plan(
        placements, tuple(n_elements), "static", "the device as empty as the host can make it", widths
    )


def gib_up(n_bytes: float) -> str:
    """GiB as one types them, rounded up so that the setting works."""
    gib = n_bytes / GIB
    digits = max(2, 2 - floor(log10(gib))) if gib > 0 else 2
    return f"{ceil(gib * 10**digits) / 10**digits:.{digits}f}"


# ---- time --------------------------------------------------------------------------------------------------


def update_terms(x_s, x_c, rates: Rates, widths: Widths) -> dict[str, np.ndarray]:
    """Seconds that each part of the machine needs for one update, by its name; numbers or arrays of
    parameters."""
    one_way = widths.states * x_s + widths.slab * x_c  # bytes, and as many the other way
    return {
        "the link to the host": one_way / rates.d2h,
        "the link to the device": one_way / rates.h2d,
        "the link, both ways": 2 * one_way / rates.duplex,
        "host DRAM": (widths.cpu_dram * x_c + 2 * widths.states * x_s) / rates.dram_under_dma,
        "host Adam": x_c / max(rates.host_adam.values()),
    }


def predict(
    x_r, x_s, x_c, rates: Rates, traced: Traced, widths: Widths, clips: bool = True
) -> dict[str, np.ndarray]:
    """Seconds of a step's parts, of the step, and of what the update can hide behind: the next forward and,
    where nothing has to be known of all gradients before the first chunk is stepped, backward."""
    update = np.maximum.reduce(list(update_terms(x_s, x_c, rates, widths).values()))
    resident_adam = x_r / rates.device_adam
    alone, beside = (
        (traced.backward_seconds, traced.forward_seconds)
        if clips
        else (0.0, traced.backward_seconds + traced.forward_seconds)
    )
    step = alone + np.maximum(beside, update) + resident_adam
    return {
        "forward": traced.forward_seconds,
        "backward": traced.backward_seconds,
        "beside_update": beside,
        "update": update,
        "resident_adam": resident_adam,
        "step": step,
    }


def with_prediction(plan: Plan, rates: Rates, traced: Traced) -> Plan:
    x_r, x_s, x_c = (plan.n_parameters(where) for where in Placement)
    seconds = {
        name: float(value)
        for name, value in predict(x_r, x_s, x_c, rates, traced, plan.widths, plan.clips).items()
    }
    terms = update_terms(x_s, x_c, rates, plan.widths)
    bound = (
        max(terms, key=terms.get) if seconds["update"] > seconds["beside_update"] else "forward and backward"
    )
    return replace(plan, seconds=seconds, bound=bound)


def replan(plan: Plan, *, peak_device_bytes: int, update_seconds: float) -> str | None:
    """Why the plan should be made anew from a new trace, or None. Ask between steps; peak and update of a
    whole step."""
    budget, predicted = plan.device_budget_bytes, plan.seconds.get("update", 0)
    if budget and peak_device_bytes > (1 - RESERVE) * budget:
        return f"the peak of {peak_device_bytes / GIB:.2f} GiB is within {RESERVE:.0%} of the budget of {budget / GIB:.2f} GiB"
    if predicted and abs(update_seconds / predicted - 1) > DRIFT:
        return f"the update took {update_seconds:.3g} s and was predicted to take {predicted:.3g} s"
    return None


# ---- in words ----------------------------------------------------------------------------------------------


def describe(plan: Plan) -> str:
    """The plan as a table: what lives where and why, bytes per device and host, the predicted step and what
    bounds it."""
    device, host = plan.device_bytes, plan.host_bytes
    rows = [("", "chunks", "parameters", "device GiB", "host GiB", "")]
    for where in Placement:
        chosen = [i for i, placement in enumerate(plan.placements) if placement is where]
        if not chosen:
            continue
        covers = f"{plan.layers[chosen[0]][0]} .. {plan.layers[chosen[-1]][1]}: " if plan.layers else ""
        rows.append(
            (
                where.value,
                str(len(chosen)),
                _count(plan.n_parameters(where)),
                _gib(device.get(where.value, 0)),
                _gib(host.get(where.value, 0)),
                covers + WHY[where],
            )
        )
    if device["ring"]:
        rows.append(
            (
                "ring",
                "",
                "",
                _gib(device["ring"]),
                "",
                f"{plan.widths.ring_slots} chunks on their way through",
            )
        )
    rows.append(
        (
            "weights",
            "",
            _count(sum(plan.n_elements)),
            _gib(device["weights"]),
            "",
            f"{plan.widths.weight} bytes each",
        )
    )
    if plan.policy == "auto" or host["other"]:
        traced = "activations and the rest, as traced; " if plan.policy == "auto" else ""
        passing = "on the host: block inputs until backward, a parameter on its way to a file or from it"
        rows.append(("other", "", "", _gib(device["other"]), _gib(host["other"]), traced + passing))
    if plan.policy == "auto":
        rows.append(("reserve", "", "", _gib(device["reserve"]), "", f"{RESERVE:.0%} of the budget"))
    rows.append(
        ("sum", str(len(plan.placements)), "", _gib(sum(device.values())), _gib(sum(host.values())), "")
    )
    if plan.device_budget_bytes is not None:
        rows.append(
            ("budget", "", "", _gib(plan.device_budget_bytes), _gib(plan.host_budget_bytes), "per rank")
        )
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [f"memory plan, {plan.policy}: {plan.why}"]
    for name, *numbers, words in rows:
        cells = [f"{number:>{width}}" for number, width in zip(numbers, widths[1:], strict=True)]
        lines.append(f"  {name:{widths[0]}}  {'  '.join(cells)}  {words}".rstrip())
    if t := plan.seconds:
        hidden, behind = min(t["update"], t["beside_update"]), "it" if plan.clips else "both"
        lines.append(
            f"  predicted step {_least(plan)}{t['step']:.3g} s: backward {t['backward']:.3g}, "
            f"next forward {t['forward']:.3g}, update {t['update']:.3g} of which {hidden:.3g} hide behind {behind}, "
            f"resident Adam {t['resident_adam']:.3g}; bound by {plan.bound}"
        )
    return "\n".join(lines)


def describe_measured(
    plan: Plan, step_seconds: float, host_update_seconds: float | None, peak_bytes: dict[str, int]
) -> str:
    """What came of a plan, beside what was predicted. peak_bytes: by account, of what the manager holds."""
    beside = lambda name: f" (predicted {_least(plan)}{plan.seconds[name]:.3g})" if plan.seconds else ""
    update = (
        f"the host's update {host_update_seconds:.3g} s{beside('update')}, "
        if host_update_seconds is not None
        else ""
    )
    return (
        f"memory    measured: a step {step_seconds:.3g} s{beside('step')}, {update}at most {_gib(peak_bytes['device'])} "
        f"GiB of weights, gradients and states on the device and {_gib(peak_bytes['host'])} on the host"
    )


def _least(plan: Plan) -> str:
    """Of a static plan forward and backward have not been seen; they were taken for matrix products alone."""
    return "" if plan.policy == "auto" else "at least "


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / GIB:.2f}" if n_bytes >= 0.1 * GIB or n_bytes == 0 else f"{n_bytes / GIB:.2g}"


def _count(n: int) -> str:
    return f"{n / 1e9:.2f} G" if n >= 1e8 else f"{n / 1e6:.2f} M" if n >= 1e5 else str(n)
