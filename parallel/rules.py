"""The rules of a layout, as data, and the one place that turns a broken rule into a message.

A rule names the field that it is about, decides whether it holds, describes the problem, and proposes values
to try instead. The first rule that does not hold becomes one line, for example:

    tp=3 does not divide the 4 query heads; every tp rank needs whole heads. Use tp=1 or 2 or 4.

Each proposed value is tried against all the rules before it is printed: only values that satisfy the broken
rule are named, and among them only those that satisfy the most of the rules after it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch

from dtensor_llama.config import LlamaConfig
from dtensor_llama.errors import UsageError
from parallel.context import METHODS
from parallel.pipeline import SCHEDULES

if TYPE_CHECKING:
    from parallel.config import ParallelConfig


# What is assumed of packed documents before the data is read: their mean length. See Job.document_tokens.
DOCUMENT_TOKENS = 512


@dataclass(frozen=True)
class Job:
    """Holds what a layout shall train: the model, the batch, and how a rank computes."""

    model: LlamaConfig
    seq_len: int
    global_batch_size: int = 1  # sequences of one optimizer step, on all ranks together
    # sequences of one forward, on one dp rank; None: parallel/planner.py chooses
    micro_batch_size: int | None = 1
    attention: str = "sdpa"  # a kernel of dtensor_llama/attention.py, or auto: the fastest that can run
    recompute: str | None = "none"  # None: parallel/planner.py chooses
    compile: bool = False
    device_type: str = "cpu"
    document_tokens: int | None = None  # of a document in a packed sequence; None: no document mask


@dataclass(frozen=True)
class Case:
    """Holds what a rule decides about: a layout, and its job or the number of processes that it is for.

    A rule reads every setting by its bare name, so that it looks like the formula that it is and so that its
    message can show the values. `c` is the case:

        c.tp, c.dp      the same as c.layout.tp, c.layout.dp     a field or property of ParallelConfig
        c.seq_len       the same as c.job.seq_len                of Job
        c.vocab_size    the same as c.job.model.vocab_size       of LlamaConfig

    No name stands in two of these classes (tests/test_rules.py). The properties below are what several rules,
    or the message of one, need beside the settings.
    """

    layout: "ParallelConfig"
    job: Job | None = None
    world_size: int | None = None  # given while an axis of the layout may still be -1

    def __getattr__(self, name: str):
        """Return a setting by its bare name. Python asks this for names that Case itself does not have."""
        owners = [self.layout] if self.job is None else [self.layout, self.job, self.job.model]
        for owner in owners:
            if hasattr(owner, name):
                return getattr(owner, name)
        raise AttributeError(name)

    def changed(self, field: str, value: object) -> "Case":
        """Return this case with another value of one field."""
        if field == "world_size":
            return replace(self, world_size=value)
        if hasattr(self.job, field):
            return replace(self, job=replace(self.job, **{field: value}))
        case = replace(self, layout=replace(self.layout, **{field: value}))
        if field == "microbatches" and value is not None:
            # Only the Booster sets it, whose batch may have any number of sequences: the batch grows with it.
            return case.changed("global_batch_size", value * self.stride)
        return case

    @property
    def open_axes(self) -> str:
        return ", ".join(axis for axis, size in self.sizes.items() if size == -1)

    @property
    def fixed_axes(self) -> dict[str, int]:
        return {axis: size for axis, size in self.sizes.items() if size not in (1, -1)}

    @property
    def given_axes(self) -> str:
        """Return the axes whose size is not the default, 1, or -1 for dp_shard."""
        given = [axis for axis, size in self.sizes.items() if size != (-1 if axis == "dp_shard" else 1)]
        return " and ".join(f"{axis}={self.sizes[axis]}" for axis in given)

    @property
    def n_fixed(self) -> int:
        """Return how many processes the axes of a given size need."""
        return prod(self.fixed_axes.values())

    @property
    def asked(self) -> str:
        return " x ".join(f"{axis}={size}" for axis, size in self.fixed_axes.items()) or "a mesh of size 1"

    @property
    def needed(self) -> str:
        return f"{'a multiple of' if self.open_axes else 'exactly'} {self.n_fixed}"

    @property
    def stride(self) -> int:
        """Return how many sequences all dp ranks together read for one microbatch each."""
        return self.micro_batch_size * self.dp

    @property
    def n_microbatches(self) -> int:
        """Return how many microbatches a dp rank runs in one step."""
        return self.global_batch_size // self.stride

    @property
    def counted(self) -> str:
        if self.microbatches is not None:
            return f"there are microbatches={self.microbatches}"
        return (
            f"global_batch_size={self.global_batch_size}, micro_batch_size={self.micro_batch_size} and "
            f"{self.dp} data-parallel ranks make {self.n_microbatches} microbatches"
        )

    @property
    def vocabulary_slices(self) -> tuple[int, int]:
        """Return how many rows of the vocabulary each tp rank but the last has, and how many the last has."""
        first = -(-self.vocab_size // self.tp)
        return first, self.vocab_size - first * (self.tp - 1)

    @property
    def heads(self) -> int:
        """Return the number of query heads of a tp rank."""
        return self.num_attention_heads // self.tp

    @property
    def token_factors(self) -> str:
        ring = "2 x " if self.cp_method == "ring" else ""
        sequence = f" x tp={self.tp} (sequence parallel)" if self.sequence_shards > 1 else ""
        return f"{ring}cp={self.cp}{sequence}"

    @property
    def without_log_sum_exp(self) -> str:
        """Return the package of an attention kernel that ring attention cannot use; empty if it can."""
        packages = {"flash": "the flash-attn package", "varlen": "torch's varlen_attn"}
        return packages.get(self.attention, "")

    @property
    def n_stages(self) -> int:
        return self.pp * self.stages_per_rank

    @property
    def stages_in_words(self) -> str:
        return STAGES_PER_RANK[self.schedule][1]

    @property
    def least_microbatches(self) -> int:
        """Return how many microbatches the schedule needs."""
        return {"1f1b": self.pp, "dualpipev": self.n_stages}.get(self.schedule, 1)

    @property
    def rounds(self) -> int:
        """Return in how many rounds of about pp microbatches the schedule sends them."""
        in_rounds = self.schedule in ("interleaved-1f1b", "zero-bubble")
        return max(1, self.n_microbatches // self.pp) if in_rounds else 1

    @property
    def splits_backward(self) -> bool:
        return self.pp > 1 and SCHEDULES[self.schedule].splits_backward

    @property
    def torch_version(self) -> str:
        return torch.__version__

    @property
    def not_in_halves(self) -> str:
        """Return the setting that a backward in two halves cannot go with, or nothing: a compiled block has
        one graph for both gradients and would run it whole, twice; selective recomputation frees what it kept
        after the first half."""
        if self.compile:
            return "compile=True"
        return "recompute=selective" if self.recompute == "selective" else ""


Values = Iterable | Callable[[Case], Iterable]


class Rule(NamedTuple):
    """Describes one thing that must hold. It is only asked about cases for which all rules before it hold."""

    field: str
    holds: Callable[[Case], bool]
    # what is wrong: the predicate of a sentence with the subject `field=value`; {c...} is of the case
    says: str
    works: dict[str, Values]  # {field: values to try instead}


# ---- From a broken rule to a message -----------------------------------------------------------------------


def check(rules: Sequence[Rule], case: Case) -> None:
    """Raise UsageError for the first rule that does not hold: field, values, rule, and what would work."""
    at = _first_broken(rules, case)
    if at == len(rules):
        return
    rule, value = rules[at], getattr(case, rules[at].field)
    subject = f"{rule.field}={value}"
    if rule.field == "world_size":
        subject = "one process" if value == 1 else f"{value} processes"
    problem = f"{subject} {rule.says.format(c=case)}."
    remedy = ", or ".join(_in_words(*way) for way in what_works(rules, case).items())
    if not remedy:  # no single change helps
        both = what_works_together(rules, case)
        remedy = " and ".join(_in_words(field, [value]) for field, value in both)
    raise UsageError(f"{problem} {remedy[0].upper()}{remedy[1:]}." if remedy else problem)


def all_hold(rules: Sequence[Rule], case: Case) -> bool:
    """Return whether `check` would let the case pass."""
    return _first_broken(rules, case) == len(rules)


def what_works(rules: Sequence[Rule], case: Case) -> dict[str, list]:
    """Return {field: values} with each single change that satisfies the first broken rule. Of these changes,
    only those are returned after which the most of the later rules hold."""
    broken = _first_broken(rules, case)
    # {(field, value): the index of the first rule that does not hold after this change}
    next_broken = {
        change: _first_broken(rules, case.changed(*change)) for change in _changes(rules[broken], case)
    }
    furthest = max(next_broken.values(), default=broken)
    ways = {}
    for (field, value), index in next_broken.items():
        if index == furthest > broken:
            ways.setdefault(field, []).append(value)
    return ways


def what_works_together(rules: Sequence[Rule], case: Case) -> list[tuple[str, object]]:
    """Return the first two changes, each a (field, value), that satisfy the first broken rule together: for a
    case that no single one helps, because of another rule. Empty if there are none."""
    broken = _first_broken(rules, case)
    for first in _changes(rules[broken], case):
        halfway = case.changed(*first)
        for second in _changes(rules[_first_broken(rules, halfway)], halfway):
            if _first_broken(rules, halfway.changed(*second)) > broken:
                return [first, second]
    return []


def _changes(rule: Rule, case: Case) -> Iterator[tuple[str, object]]:
    """Yield each (field, value) that a broken rule proposes, whether it helps or not."""
    for field, values in rule.works.items():
        for value in values(case) if callable(values) else values:
            if value != getattr(case, field):
                yield field, value


def _first_broken(rules: Sequence[Rule], case: Case) -> int:
    """Return the index of the first rule that does not hold; the number of rules if all of them hold."""
    return next((i for i, rule in enumerate(rules) if not rule.holds(case)), len(rules))


def _in_words(field: str, values: list) -> str:
    """Return what to do so that the field has one of the values, for example `use tp=1 or 2 or 4`."""
    if field == "world_size":
        launches = ["plain python" if n == 1 else f"torchrun --nproc-per-node {n}" for n in values]
        return f"launch with {' or '.join(launches)}"
    if values[0] is None or field in LEFT_OUT:
        return f"leave `{field}` out"
    runs = []  # values that follow each other, as 3, 4, 5, are one run and become `3 to 5`
    for value in values:
        if runs and isinstance(value, int) and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    spans = [f"{run[0]} to {run[-1]}" if len(run) > 2 else " or ".join(map(str, run)) for run in runs]
    return f"use {field}={' or '.join(spans)}"


# These are off unless they are set, so messages say to leave them out, and never to set them to False.
LEFT_OUT = (
    "auto",
    "compile",
    "draw_schedule",
)


# ---- The number of processes -------------------------------------------------------------------------------


def axis_rules(axes: Sequence[str]) -> list[Rule]:
    """Return one rule per axis: its size is a number of processes, or -1 while that is still open."""

    def rule_of(axis: str) -> Rule:
        return Rule(
            axis,
            lambda c: c.sizes[axis] >= 1 or (c.sizes[axis] == -1 and c.world_size is not None),
            "is not possible; it must be a number of processes, or -1 for all that are left over",
            {axis: [1, -1]},
        )

    return [rule_of(axis) for axis in axes]


def world_rules(axes: Sequence[str]) -> list[Rule]:
    """Return the rules by which a number of processes becomes a mesh with these axes."""
    auto_chooses_every_axis = Rule(
        "auto",
        lambda c: not (c.auto and c.given_axes),
        "chooses every axis, and {c.given_axes} is given too; leave one of them out",
        {},
    )

    def only_one_axis_is_open(axis: str) -> Rule:
        return Rule(
            axis,
            lambda c: c.sizes[axis] != -1 or c.open_axes == axis,
            "cannot be what is left over, because several axes are -1: {c.open_axes}",
            {axis: _divisors_of_world},
        )

    def sizes_to_try(axis: str) -> Callable[[Case], list[int]]:
        # An axis that is 1 stays so, as nobody asked for it, but for dp_shard, which takes what is left over.
        return lambda c: [-1, *_divisors_of_world(c)] if axis in c.fixed_axes or axis == "dp_shard" else []

    sizes_make_the_world = Rule(
        "world_size",
        lambda c: c.world_size % c.n_fixed == 0 and (c.open_axes or c.world_size == c.n_fixed),
        "cannot form {c.asked}, which needs {c.needed}",
        {**{axis: sizes_to_try(axis) for axis in axes}, "world_size": lambda c: [c.n_fixed]},
    )
    open_axis_rules = [only_one_axis_is_open(axis) for axis in axes]
    return [auto_chooses_every_axis, *axis_rules(axes), *open_axis_rules, sizes_make_the_world]


def _divisors_of_world(c: Case) -> list[int]:
    return [n for n in range(1, c.world_size + 1) if c.world_size % n == 0]


AUTO = [
    Rule(
        "auto",
        lambda c: not c.auto,
        "asks the planner for a layout, which is not done here; pretrain.py and sft.py do it",
        {"auto": [False]},
    ),
]


# ---- The batch ---------------------------------------------------------------------------------------------


def _multiples_around(n: int, factor: int) -> list[int]:
    """Return the nearest multiples of a factor below and above n, without 0."""
    lower = n // factor * factor
    return [multiple for multiple in (lower, lower + factor) if multiple > 0]


BATCH = [
    Rule(
        "global_batch_size",
        lambda c: c.global_batch_size % c.stride == 0,
        "is not a multiple of micro_batch_size={c.micro_batch_size} x {c.dp} data-parallel ranks = "
        "{c.stride}",
        {"global_batch_size": lambda c: _multiples_around(c.global_batch_size, c.stride)},
    ),
    Rule(
        "microbatches",
        lambda c: c.microbatches in (None, c.n_microbatches),
        "is not what global_batch_size={c.global_batch_size} / micro_batch_size={c.micro_batch_size} / "
        "{c.dp} data-parallel ranks = {c.n_microbatches} make",
        {"microbatches": [None]},
    ),
]


# ---- Tensor parallelism, and the vocabulary ----------------------------------------------------------------

OTHER_TP = {"tp": lambda c: range(1, c.num_attention_heads + 1)}


def _shards_lie_right(c: Case) -> bool:
    """Decide whether DTensor puts the shards of a vocabulary slice where FSDP looks for them.

    It does not if the last slice is smaller than the others, so that the ranks of ZeRO would get smaller
    shards of it. Two slices over two ranks are an exception, as tests show.
    """
    first, last = c.vocabulary_slices
    uneven = c.fsdp > 1 and first != last and -(-first // c.fsdp) != -(-last // c.fsdp)
    return not uneven or c.zero_stage == 0 or (c.tp, c.fsdp) == (2, 2)


TENSOR = [
    Rule(
        "tp",
        lambda c: c.num_attention_heads % c.tp == 0,
        "does not divide the {c.num_attention_heads} query heads; every tp rank needs whole heads",
        OTHER_TP,
    ),
    Rule(
        "tp",
        lambda c: c.num_key_value_heads % c.tp == 0 or c.tp % c.num_key_value_heads == 0,
        "neither divides the {c.num_key_value_heads} key/value heads nor is a multiple of them; a rank needs "
        "whole heads, or one that it shares",
        OTHER_TP,
    ),
    Rule(
        "tp",
        lambda c: c.intermediate_size % c.tp == 0,
        "does not divide the feed-forward width {c.intermediate_size}",
        OTHER_TP,
    ),
    Rule(
        "tp",
        lambda c: c.vocabulary_slices[1] > 0,
        "leaves the last rank without a row of the {c.vocab_size} tokens of the vocabulary",
        OTHER_TP,
    ),
    Rule(
        "tp",
        lambda c: c.seq_len % c.sequence_shards == 0,
        "does not divide seq_len={c.seq_len}, whose tokens sequence parallelism splits",
        {**OTHER_TP, "sequence_parallel": [False]},
    ),
    Rule(
        "tp",
        _shards_lie_right,
        "cuts the vocabulary of {c.vocab_size} into slices of {c.vocabulary_slices[0]} and "
        "{c.vocabulary_slices[1]} rows, which {c.fsdp} ranks (dp_shard x cp) cannot share alike; a "
        "vocabulary padded to a multiple of tp would do",
        {**OTHER_TP, "zero_stage": [0]},
    ),
    Rule(
        # torch 2.13: the compiler saves a random state with these CPU kernels, which it never uses, and trips
        # over the mesh.
        "compile",
        lambda c: (
            c.tp == 1
            or not c.compile
            or (c.recompute, c.device_type) != ("full", "cpu")
            or c.attention == "math"
        ),
        "with recompute=full and tp={c.tp} fails inside torch on a CPU",
        {"recompute": ["selective"], "attention": ["math"]},
    ),
]


# ---- Context parallelism -----------------------------------------------------------------------------------

CONTEXT = [
    Rule(
        "cp_method",
        lambda c: c.cp_method in METHODS,
        f"is not one of {', '.join(METHODS)}",
        {"cp_method": METHODS},
    ),
    Rule(
        "attention",
        lambda c: not (c.is_ring and c.without_log_sum_exp),
        "cannot run under cp_method=ring: {c.without_log_sum_exp} has no backward that takes the log-sum-exp "
        "of all ranks, as torch's own FlashAttention has",
        {"attention": ["sdpa"], "cp_method": ["ulysses"]},
    ),
    Rule(
        "cp_method",
        lambda c: not (c.is_ring and c.job.model.hides_tokens(c.seq_len)),
        "knows no sliding window, and the model has sliding_window={c.sliding_window} for "
        "sequences of seq_len={c.seq_len}",
        {"cp_method": ["ulysses"], "seq_len": lambda c: [c.sliding_window]},
    ),
    Rule(
        "seq_len",
        lambda c: c.seq_len % c.token_slices == 0,
        "is not a multiple of {c.token_factors} = {c.token_slices}, which cp_method={c.cp_method} needs",
        {"seq_len": lambda c: _multiples_around(c.seq_len, c.token_slices)},
    ),
    Rule(
        "cp",
        lambda c: c.cp_method != "ulysses" or c.heads % c.cp == 0,
        "does not divide the {c.heads} query heads of a rank ({c.num_attention_heads} heads / tp={c.tp}), "
        "and with cp_method=ulysses each cp rank attends with whole heads",
        {"cp": lambda c: range(1, c.heads + 1), "cp_method": ["ring"]},
    ),
]


# ---- The pipeline ------------------------------------------------------------------------------------------

STAGES_PER_RANK = {  # how many stages of a schedule a rank may have
    "gpipe": (range(1, 2), "exactly one stage per rank"),
    "1f1b": (range(1, 2), "exactly one stage per rank"),
    "interleaved-1f1b": (range(2, 1000), "at least two stages per rank; with one it would be 1f1b"),
    "zero-bubble": (range(1, 1000), "at least one stage per rank"),
    "zbv": (range(2, 3), "exactly two stages per rank"),
    "dualpipev": (range(2, 3), "exactly two stages per rank"),
}


def _stages_are_possible(c: Case) -> bool:
    possible, _ = STAGES_PER_RANK[c.schedule]
    return c.pp == 1 or c.virtual_stages is None or c.virtual_stages in possible


def _other_counts(c: Case) -> list[int]:
    """Return other numbers of microbatches that may suit the schedule."""
    if c.n_microbatches < c.least_microbatches:
        return [c.least_microbatches]
    return _multiples_around(c.n_microbatches, c.pp)


OTHER_COUNTS = {
    "microbatches": lambda c: [] if c.microbatches is None else _other_counts(c),
    "global_batch_size": lambda c: [count * c.stride for count in _other_counts(c)],
    "micro_batch_size": lambda c: range(1, c.micro_batch_size),
    "schedule": SCHEDULES,
}

PIPELINE = [
    Rule(
        "schedule",
        lambda c: c.schedule in SCHEDULES,
        f"is not one of {', '.join(SCHEDULES)}",
        {"schedule": SCHEDULES},
    ),
    Rule(
        "virtual_stages",
        _stages_are_possible,
        "is not possible with schedule={c.schedule}, which runs {c.stages_in_words}",
        {"virtual_stages": [1, 2], "schedule": SCHEDULES},
    ),
    Rule(
        "pp",
        lambda c: c.pp == 1 or c.n_stages <= c.num_hidden_layers,
        "x {c.stages_per_rank} stages per rank = {c.n_stages} stages, and the model has "
        "{c.num_hidden_layers} layers; each stage needs one",
        {
            "pp": lambda c: range(1, c.pp),
            "virtual_stages": lambda c: range(1, c.stages_per_rank),
            "schedule": SCHEDULES,
        },
    ),
    # The next two follow the rule of the layers, so that it may propose pp=1 whatever else is set.
    Rule(
        "draw_schedule",
        lambda c: c.pp > 1 or not c.draw_schedule,
        "draws what pipeline ranks do when, and with pp=1 there are none",
        {"draw_schedule": [False], "pp": [2]},
    ),
    Rule(
        "virtual_stages",
        lambda c: c.pp > 1 or c.virtual_stages in (None, 1),
        "splits the layers of pipeline ranks, and with pp=1 there are none",
        {"virtual_stages": [None], "pp": [2]},
    ),
    Rule(
        "schedule",
        lambda c: c.pp == 1 or c.n_microbatches >= c.least_microbatches,
        "needs a microbatch for each of its {c.n_stages} stages, and {c.counted}",
        OTHER_COUNTS,
    ),
    Rule(
        "schedule",
        lambda c: c.pp == 1 or c.n_microbatches % c.rounds == 0,
        "sends microbatches in rounds of about pp={c.pp}, all of one size, and {c.counted}, which {c.rounds} "
        "rounds do not divide",
        OTHER_COUNTS,
    ),
    Rule(
        # In torch 2.11 the halves cannot pass through an autograd.Function, and the loss is one.
        "schedule",
        lambda c: not (c.splits_backward and c.torch_version.startswith("2.11.")),
        "runs backward in two halves, which fails inside torch {c.torch_version} and works inside newer ones",
        {"schedule": SCHEDULES},
    ),
    Rule(
        "schedule",
        lambda c: not (c.splits_backward and c.not_in_halves),
        "runs backward in two halves, which {c.not_in_halves} cannot do",
        {"schedule": SCHEDULES, "recompute": ["full"], "compile": [False]},
    ),
]
