"""Searches the layouts of a job on a cluster for the fastest that fits, and says why the others are not.

    found = plan(Question(model, seq_len=4096, global_batch_size=1024, cluster=find_cluster("h100-80gb", 64)))
    found.best.account.tokens_per_second_per_gpu
    found.describe(), found.to_json(), draw_plan(found, "plan.png")

The search goes over pp x dp x cp x tp, ZeRO's stage, whole copies between nodes, the size of a microbatch,
recomputation and schedule. (Schedules that run backward in two halves are tried only without compilation.)
It drops what breaks a rule (rules.py) and what does not fit (cost.py). Where a memory placement was asked
for, each layout is taken with it, within the budgets that were given. If none was, and nothing fits, the
layouts are tried with the placement auto. What is left is ranked by predicted tokens per second. Nothing is
built and nothing runs, so thousands of layouts take seconds.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from math import ceil, inf
from pathlib import Path
from typing import Any

import torch

from dtensor_llama.config import LlamaConfig
from dtensor_llama.errors import UsageError
from dtensor_llama.host import host_memory
from dtensor_llama.metrics import GIB
from parallel.cluster import NODES, Cluster, cluster_here, with_gpus
from parallel.config import RULES, ParallelConfig
from parallel.cost import (
    FITS_SHARE,
    PYTORCH,
    Account,
    Stack,
    States,
    Work,
    account_for,
    account_with_offload,
    budgets_of,
    bytes_needed,
    bytes_of_rank,
    in_billions,
    in_gib,
    numbers_of_rank,
    splits_backward,
)
from parallel.rules import DOCUMENT_TOKENS, Case, Job, all_hold, check

MOST_GPUS = 16384  # where the search for what a model would take ends
N_BEST = 5  # layouts that a plan shows
MICRO_BATCH_SIZES = (1, 2, 4, 8, 16)
MAX_MICRO_TOKENS = 16384  # a forward of more tokens is no faster on any device
LEAST_CP_TOKENS = 4096  # of a sequence on a cp rank: instead of shorter slices, dp would do as well
RECOMPUTE = ("none", "selective", "full")
MAX_TP = 8  # GPUs of a node: between nodes tensor parallelism would mostly wait for its traffic
PURPOSES = {  # the kinds of bytes_of_rank, in a sentence
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "gathered": "gathered weights",
    "activations": "activations",
    "loss": "the loss",
    "reduced": "gradients on their way",
}
NEAR = 1.005  # times the fastest step: predictions cannot tell such layouts apart


# ---- A question and its answer -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """Holds what shall be trained, and on what."""

    model: LlamaConfig
    seq_len: int
    global_batch_size: int
    cluster: Cluster
    states: States = States()
    compile: bool = True
    device_type: str = "cuda"
    # The search keeps what differs from the defaults here, and chooses the axes and all else (`given`).
    layout: ParallelConfig = ParallelConfig()
    micro_batch_size: int | None = None  # None: open
    recompute: str | None = None  # None: open
    attention: str = "auto"
    document_tokens: int | None = None
    # memory.auto.foresee, if states may be on the host: because it was asked for, or where nothing fits
    foresee: Callable | None = None
    stack: Stack = PYTORCH

    @property
    def may_offload(self) -> bool:
        return self.foresee is not None and self.states.settles_one_gpu  # else placement=off was asked for

    @property
    def budgets(self) -> dict[str, int]:
        return budgets_of(self.states.memory, self.cluster)

    @property
    def budget_bytes(self) -> int:
        return self.budgets["device"]

    @property
    def limits(self) -> str:
        """Return in words what a layout has to fit."""
        memory, gpu_gib = self.states.memory, self.cluster.gpu.memory_gib
        words = f"{FITS_SHARE:.0%} of {gpu_gib:.4g} GiB"
        if memory is not None and memory.device_budget_gib:
            asked_gib = memory.device_budget_gib
            words = f"device_budget_gib={asked_gib:g}"
            if asked_gib > gpu_gib:
                words = f"all {gpu_gib:.4g} GiB of the GPU ({words} is more)"
        if memory is not None and memory.host_budget_gib:
            words += f" and host_budget_gib={memory.host_budget_gib:g}"
        return words

    @property
    def given(self) -> dict[str, Any]:
        """Return {field: value} of what every layout of the search keeps because the user set it.

        A value that was typed and is the default cannot be told from one that was left out. It stays open."""
        plain, chosen = ParallelConfig(), {*self.layout.sizes, "auto"}
        layout = {
            name: value
            for name, value in asdict(self.layout).items()
            if name not in chosen and value != getattr(plain, name)
        }
        computation = {"micro_batch_size": self.micro_batch_size, "recompute": self.recompute}
        return layout | {name: value for name, value in computation.items() if value is not None}

    @property
    def given_in_words(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.given.items())

    def without(self, name: str) -> "Question":
        """Return this question with one of the given fields open again."""
        if name in ("micro_batch_size", "recompute"):
            return replace(self, **{name: None})
        return replace(self, layout=replace(self.layout, **{name: getattr(ParallelConfig(), name)}))


@dataclass(frozen=True)
class Candidate:
    """Holds a layout with its account, and why it is not the best; of the best, why it is."""

    account: Account
    reason: str = ""

    @property
    def work(self) -> Work:
        return self.account.work

    def facts(self) -> dict:
        """Return the layout and its account as data for JSON."""
        account, job = self.account, self.work.job
        cluster = account.cluster
        return {
            "layout": asdict(self.work.layout),
            "micro_batch_size": job.micro_batch_size,
            "microbatches": self.work.n_microbatches,
            "recompute": job.recompute,
            "offload": self.work.states.uses_host,
            "peak_gib": round(account.peak_gib, 2),
            "host_gib": round(account.host_bytes / GIB, 2),
            "gib_by_kind": {kind: round(n_bytes / GIB, 3) for kind, n_bytes in account.bytes.items()},
            "traffic_gib_per_step": account.gib_per_axis(cluster),
            "step_seconds": account.step_seconds,
            "seconds": account.seconds,
            "tokens_per_second_per_gpu": account.tokens_per_second_per_gpu,
            "mfu": account.mfu,
            "bubble": account.bubble,
            "exposed_communication": account.exposed,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Found:
    """Holds the answer: the best layouts, one of each mesh, and how many were tried."""

    question: Question
    candidates: list[Candidate]  # the best first
    n_tried: int
    n_fitting: int
    points: list[tuple[float, float, str]] = field(default_factory=list)  # (GiB, tokens/s/GPU, name) that fit
    too_large: Candidate | None = None  # the fastest that does not fit, if it is faster than the best

    @property
    def best(self) -> Candidate:
        return self.candidates[0]

    def to_json(self) -> str:
        question = self.question
        facts = {
            "gpu": question.cluster.gpu.name,
            "gpus": question.cluster.n_gpus,
            "seq_len": question.seq_len,
            "global_batch_size": question.global_batch_size,
            "layouts_tried": self.n_tried,
            "layouts_that_fit": self.n_fitting,
            "candidates": [candidate.facts() for candidate in self.candidates],
        }
        return json.dumps(facts, indent=2)

    def describe(self) -> str:
        """Return the best layouts as a table, and the reasons below it."""
        cluster = self.question.cluster
        name = "layout, microbatches x sequences"
        rows = [(name, "GiB", "on the host", "tokens/s/GPU", "MFU", "bubble", "waits")]
        for candidate in self.candidates:
            account = candidate.account
            rows.append(
                (
                    name_of(candidate.work, in_table=True),
                    f"{account.peak_gib:.1f}",
                    f"{account.host_bytes / GIB:.1f}",
                    f"{account.tokens_per_second_per_gpu:,.0f}",
                    f"{account.mfu:.1%}",
                    f"{account.bubble:.1%}",
                    f"{account.exposed:.1%}",
                )
            )
        if not any(candidate.account.host_bytes for candidate in self.candidates):
            rows = [(*row[:2], *row[3:]) for row in rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        nodes = f" in nodes of {cluster.gpus_per_node}" if cluster.n_gpus > cluster.gpus_per_node else ""
        lines = [
            f"{self.n_tried:,} layouts on {cluster.n_gpus} x {cluster.gpu.name}{nodes}, of which "
            f"{self.n_fitting:,} fit {self.question.limits}; the fastest of each mesh:"
        ]
        if self.question.given:
            lines.append(f"  (all of them keep {self.question.given_in_words}, as given)")
        for name, *numbers in rows:
            cells = [f"{number:>{width}}" for number, width in zip(numbers, widths[1:], strict=True)]
            lines.append(f"  {name:{widths[0]}}  {'  '.join(cells)}")
        lines += [f"  {name_of(each.work, in_table=True)}: {each.reason}" for each in self.candidates]
        if self.too_large:
            lines.append(f"  {name_of(self.too_large.work, in_table=True)}: {self.too_large.reason}")
        return "\n".join(lines)


def name_of(work: Work, in_table: bool = False) -> str:
    """Return a layout and its job in a few words: axes of one rank are left out.

    in_table: write `64 x 2` for `64 x 2 sequences`, because the heading of the table says what it is."""
    layout, job = work.layout, work.job
    axes = [f"{axis} {size}" for axis, size in layout.sizes.items() if size > 1] or ["one GPU"]
    words = [" x ".join(axes).replace("dp_replicate", "copies").replace("dp_shard", "dp")]
    if layout.gradient_ranks > 1:
        words.append(f"zero {layout.zero_stage}")
    if layout.pp > 1:
        stages = f" x {layout.stages_per_rank}" if layout.stages_per_rank > 1 else ""
        words.append(f"{layout.schedule}{stages}")
    counted = f"{work.n_microbatches} x {job.micro_batch_size}"
    if not in_table:
        counted += " sequence" if job.micro_batch_size == 1 else " sequences"
    words.append(counted)
    words.append(f"recompute {job.recompute}")
    return ", ".join(words) + (", offload" if work.states.uses_host else "")


# ---- The search --------------------------------------------------------------------------------------------


def powers_of_two(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length()) if 2**i <= most]


def divisors(number: int, most: int) -> list[int]:
    return [size for size in range(1, min(number, most) + 1) if number % size == 0]


def meshes(question: Question) -> Iterator[ParallelConfig]:
    """Yield the layouts to try, resolved. tp stays inside a node, where the fast wires are."""
    cluster, model = question.cluster, question.model
    for tp in powers_of_two(min(cluster.gpus_per_node, cluster.n_gpus)):
        if cluster.gpus_per_node % tp:
            continue
        for pp in divisors(cluster.n_gpus // tp, model.num_hidden_layers):
            most_cp = max(1, min(16, question.seq_len // LEAST_CP_TOKENS, cluster.n_gpus // tp // pp))
            for cp in powers_of_two(most_cp):
                dp, left_over = divmod(cluster.n_gpus, tp * pp * cp)
                if left_over == 0:
                    asked = replace(question.layout, auto=False, dp_replicate=1)
                    mesh = replace(asked, pp=pp, dp_shard=dp, cp=cp, tp=tp)
                    yield from _ways_of_mesh(question, mesh)


# A schedule and its stages a rank. gpipe is left out: it has the bubble of 1f1b and keeps the activations of
# all microbatches. The last ones run backward in two halves, which compiled blocks cannot do (rules.py).
PIPELINED = [("1f1b", None), ("interleaved-1f1b", 2), ("interleaved-1f1b", 4)]
IN_HALVES = [("zero-bubble", 1), ("zero-bubble", 2), ("zbv", None), ("dualpipev", None)]


def _ways_of_mesh(question: Question, mesh: ParallelConfig) -> Iterator[ParallelConfig]:
    """Yield ZeRO's stages, copies between nodes, and schedules for the sizes of a mesh."""
    cluster, given = question.cluster, question.given
    # Under pp stages 2 and 3 do as stage 1 does within a step (zero.py).
    stages = (3, 2, 1) if mesh.pp == 1 else (1,)
    if "zero_stage" in given:
        stages = (mesh.zero_stage,)
    inside = max(1, cluster.gpus_per_node // (mesh.tp * mesh.cp))
    shards = {mesh.dp_shard, min(inside, mesh.dp_shard)} if mesh.pp == 1 else {mesh.dp_shard}
    schedules = _schedules(question, mesh)
    methods = ("ulysses", "ring") if mesh.cp > 1 and "cp_method" not in given else (mesh.cp_method,)
    for shard in sorted(shards):
        if mesh.dp_shard % shard == 0:
            for stage in stages if shard * mesh.cp > 1 else (stages[-1],):
                for schedule, virtual_stages in schedules:
                    for method in methods:
                        yield replace(
                            mesh,
                            dp_replicate=mesh.dp_shard // shard,
                            dp_shard=shard,
                            zero_stage=stage,
                            schedule=schedule,
                            virtual_stages=virtual_stages,
                            cp_method=method,
                        )


def _schedules(question: Question, mesh: ParallelConfig) -> list[tuple[str, int | None]]:
    """Return the schedules to try, each with its stages a rank. One that was given asks for a pipeline."""
    is_given, every = "schedule" in question.given, PIPELINED + IN_HALVES
    if mesh.pp == 1:
        return [] if is_given else [(mesh.schedule, mesh.virtual_stages)]
    tried = PIPELINED if question.compile else every
    if is_given:
        tried = [way for way in every if way[0] == mesh.schedule] or [(mesh.schedule, None)]
    if mesh.virtual_stages is not None:
        tried = list(dict.fromkeys((schedule, mesh.virtual_stages) for schedule, _ in tried))
    return tried


def works(question: Question) -> Iterator[Work]:
    """Yield everything to try that the rules allow."""
    job = Job(
        question.model,
        question.seq_len,
        question.global_batch_size,
        attention=question.attention,
        compile=question.compile,
        device_type=question.device_type,
        document_tokens=question.document_tokens,
    )
    for layout in meshes(question):
        sequences_of_rank = question.global_batch_size // layout.dp
        given = question.micro_batch_size
        if given is None and layout.microbatches:
            given = max(1, sequences_of_rank // layout.microbatches)
        for per_microbatch in [given] if given else MICRO_BATCH_SIZES:
            tokens = per_microbatch * question.seq_len // (layout.cp * layout.tp)
            is_large = per_microbatch > 1 and tokens > MAX_MICRO_TOKENS and not given
            if per_microbatch > sequences_of_rank or is_large:
                break
            tried = replace(job, micro_batch_size=per_microbatch)
            case = Case(layout, tried)
            # With fewer microbatches than stages a pipeline is mostly a bubble.
            if case.n_microbatches >= layout.pp and all_hold(RULES, case):
                for recompute in [question.recompute] if question.recompute else RECOMPUTE:
                    # Only halves of backward ask for a kind of recompute.
                    if recompute != "selective" or not splits_backward(layout):
                        yield Work(replace(tried, recompute=recompute), layout, question.states)


class DoesNotFitHost(UsageError):
    """Says of a job whose states may be on the host that device and host cannot hold them together."""


def plan(question: Question) -> Found:
    """Return the best layouts. UsageError says what the job would take if it fits nowhere."""
    works_that_fit, larger, n_tried = [], [], 0
    for work in works(question):
        n_tried += 1
        needed = sum(bytes_of_rank(work).values())
        if needed <= question.budget_bytes:
            works_that_fit.append(work)
        elif needed <= 2 * question.budget_bytes:
            larger.append(work)
    if not n_tried:
        raise _no_layout(question)
    fitting, refusals = _accounts(question, works_that_fit)
    on_host = ""
    if not fitting and question.may_offload and not question.states.offloads:
        try:
            return plan(replace(question, states=replace(question.states, offloads=True)))
        except DoesNotFitHost as refusal:
            on_host = f" With optimizer states on the host it does not fit either: {refusal}"
        except UsageError:
            pass  # what is said of the job without a placement says more
    if refusals and not fitting:
        raise DoesNotFitHost(refusals[0])
    if not fitting:
        raise UsageError(what_it_would_take(question) + on_host)
    fitting = _sorted(fitting)
    points = [
        (account.peak_gib, account.tokens_per_second_per_gpu, name_of(account.work)) for account in fitting
    ]
    best, meshes_seen = [], set()
    for account in fitting:
        mesh = tuple(account.work.layout.sizes.values())
        if mesh not in meshes_seen and len(best) < N_BEST:
            meshes_seen.add(mesh)
            best.append(account)
    candidates = [Candidate(best[0], _why_best(best[0]))]
    candidates += [Candidate(account, why_slower(account, best[0])) for account in best[1:]]
    too_large = _fastest_too_large(question, larger, best[0])
    return Found(question, candidates, n_tried, len(fitting), points, too_large)


def _sorted(accounts: list[Account]) -> list[Account]:
    """Return the fastest first; but of those that are as fast, the one with the fewest axes and bytes."""
    by_speed = sorted(accounts, key=lambda account: account.step_seconds)
    as_fast = [each for each in by_speed if each.step_seconds <= NEAR * by_speed[0].step_seconds]

    def simplicity(account: Account) -> tuple[int, float]:
        return sum(size > 1 for size in account.work.layout.sizes.values()), account.peak_gib

    best = min(as_fast, key=simplicity)
    return [best, *(each for each in by_speed if each is not best)]


def _accounts(question: Question, works_that_fit: list[Work]) -> tuple[list[Account], list[str]]:
    """Return the accounts of layouts whose least bytes fit the device. If states may be on the host, those
    are left out whose states device and host cannot hold together; also returned is why, of those first that
    share the states over the most ranks."""
    if not (question.states.offloads and question.may_offload):
        return [account_for(work, question.cluster, question.stack) for work in works_that_fit], []
    fitting, refusals, budgets = [], [], question.budgets
    for work in sorted(works_that_fit, key=numbers_of_rank):
        try:
            account = account_with_offload(work, question.cluster, question.foresee, question.stack)
        except UsageError as error:
            refusals.append(f"{name_of(work)}: {error}")
            continue
        held = {"device": sum(account.bytes.values()), "host": account.host_bytes}
        if all(held[where] <= budgets[where] for where in budgets):
            fitting.append(account)
        else:
            refusals.append(
                f"{name_of(work)}: placement=static needs {in_gib(held['device'])} GiB of the device and "
                f"{in_gib(held['host'])} of the host, and {in_gib(budgets['device'])} and "
                f"{in_gib(budgets['host'])} can be used. Use placement=auto, or other shares."
            )
    return fitting, refusals


def _why_best(account: Account) -> str:
    spent = account.seconds
    most = max((name for name in spent if name != "matrix products"), key=spent.get)
    return (
        f"the fastest; of a step of {account.step_seconds:.3g} s matrix products take "
        f"{spent['matrix products'] / account.step_seconds:.0%} and {most} "
        f"{spent[most] / account.step_seconds:.0%}."
    )


def why_slower(account: Account, best: Account) -> str:
    """Return in a sentence what a layout spends its time on that the best one does not."""
    more = {
        name: account.seconds.get(name, 0.0) - best.seconds.get(name, 0.0)
        for name in account.seconds | best.seconds
    }
    slower = account.step_seconds / best.step_seconds - 1
    worst = max(more, key=more.get)
    if slower < NEAR - 1:
        more_gib = account.peak_gib - best.peak_gib
        return f"as fast, within {NEAR - 1:.1%}, with more axes or memory ({more_gib:+.1f} GiB)."
    return f"{slower:.1%} slower; of a step, {worst} {_takes(worst)} {more[worst]:.3g} s more."


def _takes(what: str) -> str:
    return "take" if what.endswith("s") or what == "head and loss" else "takes"


def _fastest_too_large(question: Question, larger: list[Work], best: Account) -> Candidate | None:
    """Return the fastest layout that does not fit, if it would be faster than the best one."""
    timed = [account_for(work, question.cluster, question.stack) for work in larger]
    fastest = min(timed, key=lambda account: account.step_seconds, default=None)
    if fastest is None or fastest.step_seconds * NEAR > best.step_seconds:
        return None
    largest = max(fastest.bytes, key=fastest.bytes.get)
    most_gib = fastest.bytes[largest] / GIB
    faster = best.step_seconds / fastest.step_seconds - 1
    return Candidate(
        fastest,
        f"would be {faster:.1%} faster and does not fit: it needs {fastest.peak_gib:.1f} GiB, "
        f"{most_gib:.1f} of them for {PURPOSES[largest]}.",
    )


def _no_layout(question: Question) -> UsageError:
    n_gpus, batch = question.cluster.n_gpus, question.global_batch_size
    if question.given:
        return _no_layout_as_given(question)
    return UsageError(
        f"no layout of {n_gpus} GPUs that the planner tries (tp and cp are powers of 2, and pp leaves each "
        f"stage a layer) can share global_batch_size={batch} sequences of seq_len={question.seq_len}. Use "
        f"a multiple of {n_gpus} sequences, or give the layout yourself."
    )


def _no_layout_as_given(question: Question) -> UsageError:
    """Name what was given, the first rule that it breaks, and which of it would have to be left out."""
    job = Job(
        question.model,
        question.seq_len,
        question.global_batch_size,
        question.micro_batch_size or 1,
        attention=question.attention,
        recompute=question.recompute or "none",
        compile=question.compile,
        device_type=question.device_type,
    )
    broken = "none of them has a pipeline with as many microbatches as stages"
    for layout in meshes(question):
        try:
            check(RULES, Case(layout, job))
        except UsageError as error:
            broken = str(error).removesuffix(".")
            break
    names = [f"`{name}`" for name in question.given if any(True for _ in works(question.without(name)))]
    remedy = f"leave {' or '.join(names)} out" if names else "give the layout yourself"
    return UsageError(
        f"auto=True keeps {question.given_in_words}, as given, and no layout of {question.cluster.n_gpus} "
        f"GPUs for global_batch_size={question.global_batch_size} sequences of seq_len={question.seq_len} "
        f"that the planner tries can: {broken}. To let it choose, {remedy}."
    )


def what_it_would_take(question: Question) -> str:
    """Return, for a model that fits in no layout, what would help: more GPUs, or larger ones."""
    cluster = question.cluster
    smallest = min((bytes_of_rank(work) for work in works(question)), key=lambda kinds: sum(kinds.values()))
    needed = sum(smallest.values()) / GIB
    ways = []
    n_gpus = max(cluster.gpus_per_node, cluster.n_gpus)
    while n_gpus < MOST_GPUS and not ways:
        n_gpus *= 2
        batch = ceil(question.global_batch_size / n_gpus) * n_gpus
        more = replace(question, cluster=with_gpus(cluster, n_gpus), global_batch_size=batch)
        if any(sum(bytes_of_rank(work).values()) <= more.budget_bytes for work in works(more)):
            ways.append(f"{n_gpus} of these GPUs")
    lacks = needed > cluster.gpu.memory_gib * FITS_SHARE  # else a budget is too small
    for name, node in NODES.items():
        larger = lacks and node.gpu.memory_gib > cluster.gpu.memory_gib
        if larger and needed <= node.gpu.memory_gib * FITS_SHARE:
            ways.append(f"{cluster.n_gpus} x {name}")
            break
    largest = max(smallest, key=smallest.get)
    if not lacks:
        ways.append(f"device_budget_gib={ceil(needed) + 1}")
    elif not question.may_offload:
        ways.append("placement=auto, which keeps optimizer states on the host")
    elif largest == "activations":
        ways.append("a smaller `seq_len`")
    elif not question.states.n_adapter:
        ways.append("adapters (lora.rank=16), which train a small part of the parameters")
    kept = f" that keeps {question.given_in_words}, as given" if question.given else ""
    return (
        f"{in_billions(question.model)} parameters and sequences of seq_len={question.seq_len} fit no layout "
        f"of {cluster.n_gpus} x {cluster.gpu.name}{kept}: the smallest needs {in_gib(needed * GIB)} GiB a "
        f"GPU, {in_gib(smallest[largest])} of them for {PURPOSES[largest]}, and "
        f"{in_gib(question.budget_bytes)} can be used ({question.limits}). Use {', or '.join(ways)}."
    )


# ---- What a recipe left open -------------------------------------------------------------------------------


def choose_open(
    job: Job,
    layout: ParallelConfig,
    cluster: Cluster,
    states: States,
    tries_tp: bool,
    foresee: Callable | None = None,
) -> tuple[Job, ParallelConfig, str]:
    """Return job and layout with what was open chosen, and why; UsageError if nothing fits.

    job: its recompute and its micro_batch_size are None where they are open. layout: resolved. cluster: what
        the job runs on (cluster.cluster_here). tries_tp: whether data-parallel ranks of the layout may become
        tp ranks, which stay inside a node. foresee: memory.auto.foresee, for layout.auto; otherwise what a
        memory placement keeps on the device beyond the weights is not known here. Of what fits the fastest is
        taken, and of equally fast ones the one with less tensor parallelism, no recomputation and the largest
        microbatch.
    """
    if layout.auto:
        return _choose_all(job, layout, cluster, states, foresee)
    budget_bytes = budgets_of(states.memory, cluster)["device"]
    limit_gib = getattr(states.memory, "device_budget_gib", None) or cluster.gpu.memory_gib
    fitting, first, needed = [], "", 0
    for tried, tried_layout in _open_candidates(job, layout, cluster.gpus_per_node if tries_tp else 0):
        needed = bytes_needed(tried, tried_layout, states)
        if needed <= budget_bytes:
            seconds = account_for(Work(tried, tried_layout, states), cluster).step_seconds
            fitting.append((seconds, tried, tried_layout, needed))
        elif not fitting:
            what = _in_words(tried, tried_layout)
            first = first or f" ({what} would need {in_gib(needed)})"
    if fitting:
        fastest = min(seconds for seconds, *_ in fitting)
        _, tried, tried_layout, needed = next(each for each in fitting if each[0] <= NEAR * fastest)
        what = _in_words(tried, tried_layout)
        memory = f"{in_gib(needed)} of {in_gib(limit_gib * GIB)} GiB a rank{first}"
        why = f"{what}: about {memory}, on {cluster.gpu.name}"
        return tried, tried_layout, why
    ways = ["more processes", "a smaller `seq_len`"]
    if not states.n_adapter and not states.offloads:
        ways.append("placement=auto")
    if not states.n_adapter:
        ways.append("lora.rank=16")
    raise UsageError(
        f"the model and sequences of seq_len={job.seq_len} do not fit {in_gib(limit_gib * GIB)} GiB a rank: "
        f"at least {in_gib(needed)} are needed. Use {', or '.join(ways)}."
    )


def _choose_all(
    job: Job, layout: ParallelConfig, cluster: Cluster, states: States, foresee: Callable | None
) -> tuple[Job, ParallelConfig, str]:
    """Return job and layout of the best plan, and the plan in words. Fields of the layout that were given,
    and micro_batch_size and recompute of the job where they are not None, are kept."""
    if cluster.n_gpus % cluster.gpus_per_node:
        raise UsageError(
            f"auto=True plans for nodes of equally many processes, and {cluster.n_gpus} do not fill nodes of "
            f"{cluster.gpus_per_node}; start as many on each node, or give the layout yourself."
        )
    question = Question(
        job.model,
        job.seq_len,
        job.global_batch_size,
        cluster,
        states,
        compile=job.compile,
        device_type=job.device_type,
        layout=layout,
        micro_batch_size=job.micro_batch_size,
        recompute=job.recompute,
        attention=job.attention,
        document_tokens=job.document_tokens,
        foresee=foresee,
    )
    found = plan(question)
    best = found.best.work
    chosen = replace(job, micro_batch_size=best.job.micro_batch_size, recompute=best.job.recompute)
    return chosen, best.layout, found.describe()


def plan_settings(
    settings: Any, model: LlamaConfig, seq_len: int, launch: Any, foresee: Callable
) -> tuple[Any, str]:
    """Return a recipe's settings with the layout, the size of a microbatch and the recomputation of the best
    plan, and the plan in words. If the placement is open and nothing fits without one, it becomes auto.

    What the user gave another value than the default is kept, and the search goes over the rest: whoever sets
    zero_stage=2 beside auto=True has a reason for it, and a refusal would only make them plan by hand. Axes
    are what the planner is asked for, so that one that is given too is refused (rules.py).

    settings: has the fields `parallel`, `train` and `memory` of pretrain.py. launch: of the recipe. Every
        rank comes to the same plan, since it depends on what all of them have in common.
    """
    train = settings.train
    job = Job(
        model,
        seq_len,
        train.global_batch_size,
        **given_computation(train),
        attention=train.attention,
        compile=train.compile,
        device_type=launch.take_device().type,
        document_tokens=DOCUMENT_TOKENS if settings.data.document_mask else None,
    )
    cluster = cluster_here(launch, host_memory())
    itemsize, clips = getattr(torch, train.dtype).itemsize, train.max_grad_norm < inf
    states = States.under(settings.memory, itemsize, clips=clips)
    layout = settings.parallel.resolve(launch.world_size)
    job, layout, why = choose_open(job, layout, cluster, states, tries_tp=False, foresee=foresee)
    train = replace(train, micro_batch_size=job.micro_batch_size, recompute=job.recompute)
    settings = replace(settings, parallel=layout, train=train)
    budget = min(FITS_SHARE * cluster.gpu.memory_gib, settings.memory.device_budget_gib or inf) * GIB
    if not states.offloads and bytes_needed(job, layout, states) > budget:  # nothing fits without the host
        settings = replace(settings, memory=replace(settings.memory, placement="auto"))
    return settings, why


def given_computation(train: Any) -> dict[str, Any]:
    """Return micro_batch_size and recompute of a recipe's settings; one at its default is None, for open."""
    plain, names = type(train)(), ("micro_batch_size", "recompute")
    asked = {name: getattr(train, name) for name in names}
    return {name: None if value == getattr(plain, name) else value for name, value in asked.items()}


def _in_words(job: Job, layout: ParallelConfig) -> str:
    return (
        f"tp {layout.tp} x dp {layout.dp}, recompute {job.recompute}, microbatches of {job.micro_batch_size}"
    )


def _open_candidates(job: Job, layout: ParallelConfig, most_tp: int) -> Iterator[tuple[Job, ParallelConfig]]:
    """Yield each choice of what is open, the preferred ones first. most_tp: 0 leaves tp as it is."""
    ranks, model = layout.dp_shard * layout.tp, job.model
    for tp in powers_of_two(min(most_tp, MAX_TP)) or (layout.tp,):
        if ranks % tp or most_tp % tp or model.num_key_value_heads % tp or model.intermediate_size % tp:
            continue
        tried = replace(layout, tp=tp, dp_shard=ranks // tp)
        most = max(1, job.global_batch_size // layout.pp // tried.dp)
        for recompute in [job.recompute] if job.recompute else ["none", "full"]:
            for micro_batch_size in [job.micro_batch_size] if job.micro_batch_size else (8, 4, 2, 1):
                fits_batch = (
                    most % micro_batch_size == 0 and micro_batch_size * job.seq_len <= MAX_MICRO_TOKENS
                )
                if job.micro_batch_size or micro_batch_size == 1 or fits_batch:
                    yield replace(job, recompute=recompute, micro_batch_size=micro_batch_size), tried


# ---- A picture ---------------------------------------------------------------------------------------------


def frontier(points: list[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Return the points that no other surpasses in both, from the smallest to the fastest."""
    best, kept = 0.0, []
    for point in sorted(points, key=lambda point: (point[0], -point[1])):
        if point[1] > best:
            best = point[1]
            kept.append(point)
    return kept


def draw_plan(found: Found, path: str | Path) -> None:
    """Draw memory against throughput of all layouts that fit, with the frontier marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cluster, edge = found.question.cluster, frontier(found.points)
    figure, axes = pyplot.subplots(figsize=(10, 6))
    axes.scatter(
        *zip(*[point[:2] for point in found.points], strict=True), s=14, color="#c8c8c8", linewidths=0
    )
    axes.plot(*zip(*[point[:2] for point in edge], strict=True), "-o", color="#4c78a8", markersize=5)
    for candidate in found.candidates:
        at = candidate.account.peak_gib, candidate.account.tokens_per_second_per_gpu
        axes.plot(*at, "o", color="#e45756", markersize=7)
    best = found.best.account
    axes.annotate(
        name_of(best.work),
        (best.peak_gib, best.tokens_per_second_per_gpu),
        xytext=(0, 12),
        textcoords="offset points",
        ha="right" if best.peak_gib > found.question.budget_bytes / GIB / 2 else "left",
        color="#e45756",
    )
    limit, largest = found.question.budget_bytes / GIB, max(gib for gib, *_ in found.points)
    # A model that leaves most of a GPU empty is drawn without the empty part.
    axes.set_xlim(0, 1.15 * limit if largest > limit / 4 else 1.5 * largest)
    axes.set_ylim(0, best.tokens_per_second_per_gpu * 1.15)
    axes.axvline(limit, color="#888888", linestyle="--", linewidth=1)
    top = axes.get_ylim()[1]
    axes.text(limit, top, "the limit ", color="#666666", rotation=90, ha="right", va="top", clip_on=True)
    axes.set_xlabel("GiB of a GPU (predicted peak)")
    axes.set_ylabel("tokens per second and GPU (predicted)")
    model = f"{in_billions(found.question.model)} parameters"
    gpus = f"{cluster.n_gpus} x {cluster.gpu.name}"
    axes.set_title(f"{model} on {gpus}: {found.n_fitting:,} layouts fit {found.question.limits}")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
