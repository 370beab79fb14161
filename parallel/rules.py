"""The rules of a layout, as data, and the one place that turns a broken rule into a message.

A rule names the field that it is about, decides whether it holds, describes the problem, and proposes values
to try instead. The first rule that does not hold becomes one line, for example:

    tp=3 does not divide the 4 query heads; every tp rank needs whole heads. Use tp=1 or 2 or 4.

Each proposed value is tried against all the rules before it is printed: only values that satisfy the broken
rule are named, and among them only those that satisfy the most of the rules after it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch

from dtensor_llama.config import LlamaConfig
from dtensor_llama.errors import UsageError
from parallel.context import METHODS, n_slices
from parallel.pipeline import SCHEDULES

if TYPE_CHECKING:
    from parallel.config import ParallelConfig


@dataclass(frozen=True)
class Job:
    """Holds what a layout shall train: the model, the batch, and how a rank computes."""

    model: LlamaConfig
    seq_len: int
    global_batch_size: int = 1  # rows of one optimizer step, on all ranks together
    micro_batch_size: int | None = 1  # rows of one forward, on one dp rank; None: parallel/fit.py chooses
    attention: str = "sdpa"  # one of the kernels of dtensor_llama/attention.py
    recompute: str | None = "none"  # None: parallel/fit.py chooses
    compile: bool = False
    device_type: str = "cpu"


@dataclass(frozen=True)
class Case:
    """Holds what a rule decides about: a layout, and its job or the number of processes that it is for."""

    layout: "ParallelConfig"
    job: Job | None = None
    world_size: int | None = None  # given while an axis of the layout may still be -1

    @property
    def model(self) -> LlamaConfig:
        return self.job.model

    @property
    def stride(self) -> int:
        """Return how many rows all dp ranks together read for one microbatch each."""
        return self.job.micro_batch_size * self.layout.dp

    @property
    def n_microbatches(self) -> int:
        """Return how many microbatches a dp rank runs in one step."""
        return self.job.global_batch_size // self.stride

    @property
    def n_stages(self) -> int:
        return self.layout.pp * self.layout.stages_per_rank

    @property
    def heads(self) -> int:
        """Return the number of query heads of a tp rank."""
        return self.model.num_attention_heads // self.layout.tp

    @property
    def token_slices(self) -> int:
        """Return how many slices cp, and tp under sequence parallelism, cut a row into."""
        return n_slices(self.layout.cp_method, self.layout.cp) * self.layout.sequence_shards

    @property
    def vocabulary_slices(self) -> tuple[int, int]:
        """Return how many rows of the vocabulary each tp rank but the last has, and how many the last has."""
        n_rows, tp = self.model.vocab_size, self.layout.tp
        first = -(-n_rows // tp)
        return first, n_rows - first * (tp - 1)

    def owner(self, field: str) -> object:
        """Return the object that has the field: the layout, the job, or this case itself."""
        return next(owner for owner in (self.layout, self.job, self) if hasattr(owner, field))

    def value(self, field: str) -> object:
        return getattr(self.owner(field), field)

    def changed(self, field: str, value: object) -> "Case":
        """Return this case with another value of one field."""
        owner = replace(self.owner(field), **{field: value})
        if isinstance(owner, Case):
            return owner
        if isinstance(owner, Job):
            return replace(self, job=owner)
        if field == "microbatches" and value is not None:
            # Only the Booster sets it, whose batch may have any number of rows: the batch grows with it.
            job = replace(self.job, global_batch_size=value * self.stride)
            return replace(self, layout=owner, job=job)
        return replace(self, layout=owner)


class Rule(NamedTuple):
    """Describes one thing that must hold. It is only asked about cases for which all rules before it hold."""

    field: str
    holds: Callable[[Case], bool]
    says: Callable[
        [Case], str
    ]  # what is wrong, as the predicate of a sentence with the subject `field=value`
    works: Callable[[Case], dict[str, Iterable]]  # {field: values to try instead}


# ---- From a broken rule to a message -----------------------------------------------------------------------


def check(rules: Sequence[Rule], case: Case) -> None:
    """Raise UsageError for the first rule that does not hold: field, values, rule, and what would work."""
    at = _first_broken(rules, case)
    if at == len(rules):
        return
    rule, value = rules[at], case.value(rules[at].field)
    subject = f"{rule.field}={value}"
    if rule.field == "world_size":
        subject = "one process" if value == 1 else f"{value} processes"
    message = f"{subject} {rule.says(case)}."
    ways = ", or ".join(_in_words(case, *way) for way in what_works(rules, case).items())
    if ways:
        message += f" {ways[0].upper()}{ways[1:]}."
    raise UsageError(message)


def what_works(rules: Sequence[Rule], case: Case) -> dict[str, list]:
    """Return {field: values}: each single change that satisfies the first broken rule, and that no other such
    change surpasses in how many of the rules after it hold."""
    at = _first_broken(rules, case)
    reached = {}
    for field, values in rules[at].works(case).items():
        for value in values:
            if value != case.value(field):
                reached[field, value] = _first_broken(rules, case.changed(field, value))
    furthest = max(reached.values(), default=at)
    ways: dict[str, list] = {}
    for (field, value), place in reached.items():
        if place == furthest > at:
            ways.setdefault(field, []).append(value)
    return ways


def _first_broken(rules: Sequence[Rule], case: Case) -> int:
    """Return the index of the first rule that does not hold; the number of rules if all of them hold."""
    return next((i for i, rule in enumerate(rules) if not rule.holds(case)), len(rules))


def _in_words(case: Case, field: str, values: list) -> str:
    if field == "world_size":
        return " or ".join(
            f"launch with torchrun --nproc-per-node {n}" if n > 1 else "launch with plain python"
            for n in values
        )
    is_default = getattr(type(case.owner(field)), field, None) is values[0]
    if is_default and (values[0] is None or values[0] is False):
        return f"leave `{field}` out"
    runs: list[list] = []
    for value in values:
        if runs and isinstance(value, int) and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    spans = [f"{run[0]} to {run[-1]}" if len(run) > 2 else " or ".join(map(str, run)) for run in runs]
    return f"use {field}={' or '.join(spans)}"


# ---- The number of processes -------------------------------------------------------------------------------


def axis_rules(axes: Sequence[str]) -> list[Rule]:
    """Return, for each axis, the rule that its size is a number of processes, or -1 where that is still
    open."""

    def rule(axis: str) -> Rule:
        return Rule(
            axis,
            holds=lambda c: c.value(axis) >= 1 or (c.value(axis) == -1 and c.world_size is not None),
            says=lambda c: (
                "is not possible; it must be a number of processes, or -1 for all that are left over"
            ),
            works=lambda c: {axis: [1, -1]},
        )

    return [rule(axis) for axis in axes]


def world_rules(axes: Sequence[str]) -> list[Rule]:
    """Return the rules by which a number of processes becomes a mesh with these axes."""

    def only_one_is_open(axis: str) -> Rule:
        def others(c: Case) -> list[str]:
            return [f"{other}=-1" for other in axes if other != axis and c.value(other) == -1]

        return Rule(
            axis,
            holds=lambda c: c.value(axis) != -1 or not others(c),
            says=lambda c: (
                f"and {' and '.join(others(c))} cannot both be what is left over; only one axis can"
            ),
            works=lambda c: {axis: _divisors(c.world_size)},
        )

    def fixed(c: Case) -> dict[str, int]:
        return {axis: c.value(axis) for axis in axes if c.value(axis) not in (1, -1)}

    def is_open(c: Case) -> bool:
        return any(c.value(axis) == -1 for axis in axes)

    def fits(c: Case) -> bool:
        needed = prod(fixed(c).values())
        return c.world_size % needed == 0 if is_open(c) else c.world_size == needed

    def says(c: Case) -> str:
        asked = " x ".join(f"{axis}={size}" for axis, size in fixed(c).items())
        needed = f"{'a multiple of' if is_open(c) else 'exactly'} {prod(fixed(c).values())}"
        return f"cannot form {asked or 'a mesh of size 1'}, which needs {needed}"

    def works(c: Case) -> dict[str, Iterable]:
        sizes = [-1, *_divisors(c.world_size)]
        tried = {axis: sizes for axis in axes if axis in fixed(c) or axis == "dp_shard"}
        return {**tried, "world_size": [prod(fixed(c).values())]}

    return [
        *axis_rules(axes),
        *(only_one_is_open(axis) for axis in axes),
        Rule("world_size", fits, says, works),
    ]


def _divisors(n: int) -> list[int]:
    return [divisor for divisor in range(1, n + 1) if n % divisor == 0]


# ---- The batch ---------------------------------------------------------------------------------------------

BATCH = [
    Rule(
        "global_batch_size",
        holds=lambda c: c.job.global_batch_size % c.stride == 0,
        says=lambda c: (
            f"is not a multiple of micro_batch_size={c.job.micro_batch_size} x {c.layout.dp} data-parallel "
            f"ranks = {c.stride}"
        ),
        works=lambda c: {"global_batch_size": _multiples_around(c.job.global_batch_size, c.stride)},
    ),
    Rule(
        "microbatches",
        holds=lambda c: c.layout.microbatches in (None, c.n_microbatches),
        says=lambda c: (
            f"is not what global_batch_size={c.job.global_batch_size} / "
            f"micro_batch_size={c.job.micro_batch_size} / {c.layout.dp} data-parallel ranks = "
            f"{c.n_microbatches} make"
        ),
        works=lambda c: {"microbatches": [None]},
    ),
]


def _multiples_around(n: int, factor: int) -> list[int]:
    """Return the nearest multiples of a factor below and above n, without 0."""
    lower = n // factor * factor
    return [multiple for multiple in (lower, lower + factor) if multiple > 0]


# ---- Tensor parallelism, and the vocabulary ----------------------------------------------------------------


def _other_tp(c: Case) -> dict[str, Iterable]:
    return {"tp": range(1, c.model.num_attention_heads + 1)}


def _shards_lie_right(c: Case) -> bool:
    """Decide whether DTensor places what ZeRO shares of a slice of the vocabulary where FSDP looks for it.

    It does not where the last slice is smaller and would be dealt to the same ranks in smaller shares, except
    for two slices over two ranks, as tests show.
    """
    shards = c.layout.fsdp
    first, last = c.vocabulary_slices
    uneven = shards > 1 and first != last and -(-first // shards) != -(-last // shards)
    return not uneven or c.layout.zero_stage == 0 or (c.layout.tp, shards) == (2, 2)


TENSOR = [
    Rule(
        "tp",
        holds=lambda c: c.model.num_attention_heads % c.layout.tp == 0,
        says=lambda c: (
            f"does not divide the {c.model.num_attention_heads} query heads; every tp rank needs whole heads"
        ),
        works=_other_tp,
    ),
    Rule(
        "tp",
        holds=lambda c: (
            0 in (c.model.num_key_value_heads % c.layout.tp, c.layout.tp % c.model.num_key_value_heads)
        ),
        says=lambda c: (
            f"neither divides the {c.model.num_key_value_heads} key/value heads nor is a multiple of them; a "
            "rank needs whole heads, or one that it shares"
        ),
        works=_other_tp,
    ),
    Rule(
        "tp",
        holds=lambda c: c.model.intermediate_size % c.layout.tp == 0,
        says=lambda c: f"does not divide the feed-forward width {c.model.intermediate_size}",
        works=_other_tp,
    ),
    Rule(
        "tp",
        holds=lambda c: c.vocabulary_slices[1] > 0,
        says=lambda c: (
            f"leaves the last rank without a row of the {c.model.vocab_size} tokens of the vocabulary"
        ),
        works=_other_tp,
    ),
    Rule(
        "tp",
        holds=lambda c: c.job.seq_len % c.layout.sequence_shards == 0,
        says=lambda c: f"does not divide seq_len={c.job.seq_len}, whose tokens sequence parallelism splits",
        works=lambda c: {**_other_tp(c), "sequence_parallel": [False]},
    ),
    Rule(
        "tp",
        holds=_shards_lie_right,
        says=lambda c: (
            "cuts the vocabulary of {} into slices of {} and {} rows, which {} ranks (dp_shard x cp) cannot "
            "share alike; a vocabulary padded to a multiple of tp would do"
        ).format(c.model.vocab_size, *c.vocabulary_slices, c.layout.fsdp),
        works=lambda c: {**_other_tp(c), "zero_stage": [0]},
    ),
    Rule(
        # torch 2.13: the compiler saves a random state with the CPU kernel, which it never uses, and trips
        # over the mesh.
        "compile",
        holds=lambda c: (
            not (
                c.layout.tp > 1
                and c.job.compile
                and c.job.recompute == "full"
                and c.job.attention in ("sdpa", "varlen")
                and c.job.device_type == "cpu"
            )
        ),
        says=lambda c: f"with recompute=full and tp={c.layout.tp} fails inside torch on a CPU",
        works=lambda c: {"recompute": ["selective"], "attention": ["math"]},
    ),
]


# ---- Context parallelism -----------------------------------------------------------------------------------

_BACKWARD_OF = {"flash": "the flash-attn package", "varlen": "torch's varlen_attn"}


def _says_token_slices(c: Case) -> str:
    factors = ["2"] * (c.layout.cp_method == "ring") + [f"cp={c.layout.cp}"]
    if c.layout.sequence_shards > 1:
        factors.append(f"tp={c.layout.tp} (sequence parallel)")
    rule = " x ".join(factors)
    return f"is not a multiple of {rule} = {c.token_slices}, which cp_method={c.layout.cp_method} needs"


CONTEXT = [
    Rule(
        "cp_method",
        holds=lambda c: c.layout.cp_method in METHODS,
        says=lambda c: f"is not one of {', '.join(METHODS)}",
        works=lambda c: {"cp_method": METHODS},
    ),
    Rule(
        "attention",
        holds=lambda c: (
            c.layout.cp == 1 or c.layout.cp_method != "ring" or c.job.attention not in _BACKWARD_OF
        ),
        says=lambda c: (
            f"cannot run under cp_method=ring: {_BACKWARD_OF[c.job.attention]} has no backward that takes "
            "the log-sum-exp of all ranks, as torch's own FlashAttention has"
        ),
        works=lambda c: {"attention": ["sdpa"], "cp_method": ["ulysses"]},
    ),
    Rule(
        "seq_len",
        holds=lambda c: c.layout.cp == 1 or c.job.seq_len % c.token_slices == 0,
        says=_says_token_slices,
        works=lambda c: {"seq_len": _multiples_around(c.job.seq_len, c.token_slices)},
    ),
    Rule(
        "cp",
        holds=lambda c: c.layout.cp_method != "ulysses" or c.heads % c.layout.cp == 0,
        says=lambda c: (
            f"does not divide the {c.heads} query heads of a rank ({c.model.num_attention_heads} heads / "
            f"tp={c.layout.tp}), and with cp_method=ulysses each cp rank attends with whole heads"
        ),
        works=lambda c: {"cp": range(1, c.heads + 1), "cp_method": ["ring"]},
    ),
]


# ---- The pipeline ------------------------------------------------------------------------------------------

_STAGES_PER_RANK = {  # how many stages of a schedule a rank may have
    "gpipe": (range(1, 2), "exactly one stage per rank"),
    "1f1b": (range(1, 2), "exactly one stage per rank"),
    "interleaved-1f1b": (range(2, 1000), "at least two stages per rank; with one it would be 1f1b"),
    "zero-bubble": (range(1, 1000), "at least one stage per rank"),
    "zbv": (range(2, 3), "exactly two stages per rank"),
    "dualpipev": (range(2, 3), "exactly two stages per rank"),
}


def _least_microbatches(c: Case) -> int:
    """Return how many microbatches the schedule needs."""
    return {"1f1b": c.layout.pp, "dualpipev": c.n_stages}.get(c.layout.schedule, 1)


def _rounds(c: Case) -> int:
    """Return in how many rounds of about pp microbatches the schedule sends them."""
    in_rounds = c.layout.schedule in ("interleaved-1f1b", "zero-bubble")
    return max(1, c.n_microbatches // c.layout.pp) if in_rounds else 1


def _counted(c: Case) -> str:
    if c.layout.microbatches is not None:
        return f"there are microbatches={c.layout.microbatches}"
    return (
        f"global_batch_size={c.job.global_batch_size}, micro_batch_size={c.job.micro_batch_size} and "
        f"{c.layout.dp} data-parallel ranks make {c.n_microbatches} microbatches"
    )


def _other_counts(c: Case) -> dict[str, Iterable]:
    """Propose other numbers of microbatches, by other batches or smaller microbatches, and other
    schedules."""
    least = _least_microbatches(c)
    counts = [least] if c.n_microbatches < least else _multiples_around(c.n_microbatches, c.layout.pp)
    return {
        "microbatches": [] if c.layout.microbatches is None else counts,
        "global_batch_size": [count * c.stride for count in counts],
        "micro_batch_size": range(1, c.job.micro_batch_size),
        "schedule": SCHEDULES,
    }


def _splits_backward(c: Case) -> bool:
    return c.layout.pp > 1 and SCHEDULES[c.layout.schedule].splits_backward


def _what_cannot_split(c: Case) -> str:
    """Name the setting that a backward in two halves cannot go with: a compiled block has one graph for both
    gradients and would run it whole, twice; selective recomputation frees what it kept after the first
    half."""
    if c.job.compile:
        return "compile=True"
    return "recompute=selective" if c.job.recompute == "selective" else ""


PIPELINE = [
    Rule(
        "schedule",
        holds=lambda c: c.layout.schedule in SCHEDULES,
        says=lambda c: f"is not one of {', '.join(SCHEDULES)}",
        works=lambda c: {"schedule": SCHEDULES},
    ),
    Rule(
        "draw_schedule",
        holds=lambda c: c.layout.pp > 1 or not c.layout.draw_schedule,
        says=lambda c: "draws what pipeline ranks do when, and with pp=1 there are none",
        works=lambda c: {"draw_schedule": [False], "pp": [2]},
    ),
    Rule(
        "virtual_stages",
        holds=lambda c: c.layout.pp > 1 or c.layout.virtual_stages in (None, 1),
        says=lambda c: "splits the layers of pipeline ranks, and with pp=1 there are none",
        works=lambda c: {"virtual_stages": [None], "pp": [2]},
    ),
    Rule(
        "virtual_stages",
        holds=lambda c: (
            c.layout.pp == 1
            or c.layout.virtual_stages is None
            or c.layout.virtual_stages in _STAGES_PER_RANK[c.layout.schedule][0]
        ),
        says=lambda c: (
            f"is not possible with schedule={c.layout.schedule}, which runs "
            f"{_STAGES_PER_RANK[c.layout.schedule][1]}"
        ),
        works=lambda c: {"virtual_stages": [1, 2], "schedule": SCHEDULES},
    ),
    Rule(
        "pp",
        holds=lambda c: c.layout.pp == 1 or c.n_stages <= c.model.num_hidden_layers,
        says=lambda c: (
            f"x {c.layout.stages_per_rank} stages per rank = {c.n_stages} stages, and the model has "
            f"{c.model.num_hidden_layers} layers; each stage needs one"
        ),
        works=lambda c: {
            "pp": range(1, c.layout.pp),
            "virtual_stages": range(1, c.layout.stages_per_rank),
            "schedule": SCHEDULES,
        },
    ),
    Rule(
        "schedule",
        holds=lambda c: c.layout.pp == 1 or c.n_microbatches >= _least_microbatches(c),
        says=lambda c: f"needs a microbatch for each of its {c.n_stages} stages, and {_counted(c)}",
        works=_other_counts,
    ),
    Rule(
        "schedule",
        holds=lambda c: c.layout.pp == 1 or c.n_microbatches % _rounds(c) == 0,
        says=lambda c: (
            f"sends microbatches in rounds of about pp={c.layout.pp}, all of one size, and {_counted(c)}, "
            f"which {_rounds(c)} rounds do not divide"
        ),
        works=_other_counts,
    ),
    Rule(
        # In torch 2.11 the halves cannot pass through an autograd.Function, and the loss is one.
        "schedule",
        holds=lambda c: not (_splits_backward(c) and torch.__version__.startswith("2.11.")),
        says=lambda c: (
            f"runs backward in two halves, which fails inside torch {torch.__version__} and works inside "
            "newer ones"
        ),
        works=lambda c: {"schedule": SCHEDULES},
    ),
    Rule(
        "schedule",
        holds=lambda c: not (_splits_backward(c) and _what_cannot_split(c)),
        says=lambda c: f"runs backward in two halves, which {_what_cannot_split(c)} cannot do",
        works=lambda c: {"schedule": SCHEDULES, "recompute": ["full"], "compile": [False]},
    ),
]
