"""Says what a command of a recipe would do on a cluster.

It counts what the step does, and predicts its time.

    facts = report(settings, step, foresee)     prints the report, and returns it as data that JSON can hold

Bytes, traffic and FLOPs are counted by dry_run.py, from the step itself. Seconds are predicted by cost.py. If
the layout was left open, planner.py proposes several, and the first one that fits as counted is taken. Only
pretrain.py, whose command has a layout in any case, is described as it would run; beside auto=True that is
the planner's layout too, and else the report ends with what the planner would choose.
"""

import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dtensor_llama.attention import choose_attention
from dtensor_llama.chat.lora import LoraConfig, n_adapter_parameters
from dtensor_llama.cli import in_flags
from dtensor_llama.config import LlamaConfig
from dtensor_llama.errors import UsageError
from dtensor_llama.metrics import GIB, amount
from parallel.apply import Computation
from parallel.assemble import Offload, check_skips
from parallel.cluster import Cluster, find_cluster, read_cluster
from parallel.config import AXES, ParallelConfig, check_parallel
from parallel.cost import (
    Account,
    States,
    Work,
    account_for,
    account_with_offload,
    check_states,
    in_gib,
    kernel_of,
)
from parallel.dry_run import Counted, RankCount, Setup, Step, dry_run, settle_auto
from parallel.explain import Run, explain
from parallel.planner import Candidate, Found, Question, draw_plan, given_computation, name_of, plan
from parallel.rules import DOCUMENT_TOKENS, Job
from parallel.schedule_clock import DURATION, draw
from parallel.step_counter import HOST, KINDS

# GiB that torch does not allocate: CUDA's context takes about half of it, NCCL's buffers the rest.
BESIDES_TORCH_GIB = 1.0
# torch's allocator reserves more than is allocated, as freed blocks do not fit what is needed next: 1 to 2 %
# more where parameters stay as they are, 6 to 10 % more where FSDP gathers and frees them.
RESERVED = (1.01, 1.10)
# A rule on the number of processes says how to launch them, and a dry run launches none.
IN_GPUS = {
    "launch with plain python": "use gpus=1",
    "launch with torchrun --nproc-per-node ": "use gpus=",
    "one process": "one GPU",
    "processes": "GPUs",
}
MOST_GPUS = 2**17  # of a dry run, which takes minutes then: it makes every group of ranks


def report(
    settings: Any,
    step: Step,
    foresee: Callable,
    rank: int = 0,
    picture: str | None = None,
    is_own_run: bool = False,
) -> dict:
    """Print what a command would do on each rank, and return it as data.

    Call it where no process group exists.

    settings: has the fields `model`, `data`, `train`, `parallel`, `memory`, `gpus` and `gpu` of dryrun.py,
        and maybe `lora`. step: as for `dry_run`. foresee: memory.auto.foresee. rank: whose parameters are
        listed. picture: the file for a drawing of a search. is_own_run: the settings are those of a run, so
        that what they leave out has its default there, and the planner chooses only if `auto` asks for it.
    UsageError if the cluster is unknown, or if nothing that was asked for can run there.
    """
    n_gpus = gpus_of(settings)
    if n_gpus > MOST_GPUS:
        raise UsageError(f"gpus={n_gpus} are too many to list the ranks of; use at most {MOST_GPUS}.")
    cluster = find_cluster(settings.gpu, n_gpus)
    model = read_model(settings.model)
    found, counted, note = None, None, ""
    is_open = leaves_layout_open(settings)
    if picture and not is_open:
        raise UsageError(
            f"png={picture} draws the planner's search, and there is none where the layout, the size of a "
            "microbatch, recomputation or memory is given; leave `png` out, or use auto=True."
        )
    if is_open and (settings.parallel.auto or not is_own_run):
        # What no proposal could run with, such as a budget without a placement, is refused before the search.
        settings.memory.settle(torch.device("cuda"), getattr(torch, settings.train.dtype), n_gpus)
        found = search(settings, model, cluster, foresee)
        print(in_flags(found.describe(), type(settings)), flush=True)
        if has_no_rate(getattr(torch, settings.train.dtype), cluster):
            print(f"  {NO_RATE} Those of bfloat16 decide the order of layouts alone.", flush=True)
        if picture:
            draw_plan(found, picture)
        settings, counted, note = first_that_fits(settings, found, cluster, step, foresee)
        print(f"  The layout that is counted below, in flags: {as_flags(settings)}\n", flush=True)
    setup, note = (counted.setup, note) if counted else setup_of(settings, model, cluster)
    facts = explain(Run(setup.layout, setup.job, setup.computation.dtype, setup.lora), rank)
    job, layout = setup.job, setup.layout
    unit, of_unit = ("B", 1e9) if model.n_parameters >= 1e9 else ("M", 1e6)
    n_parameters = f"{model.n_parameters / of_unit:.2f}{unit}"
    print(
        f"{settings.model}, {n_parameters} parameters, on {cluster.n_gpus} "
        f"{cluster.gpu.name} with ZeRO stage {layout.zero_stage}\n{setup.tokens_per_step:,} tokens a step: "
        f"{amount(layout.dp, 'dp rank')} x {amount(setup.n_microbatches, 'microbatch', 'es')} x "
        f"{amount(job.micro_batch_size, 'sequence')} x {amount(job.seq_len, 'token')}",
        *([note] if note else []),
        *mesh(facts),
        *parameters(facts),
        *pipeline(facts),
        sep="\n",
        flush=True,
    )
    if counted is None:
        counted, said = count(setup, cluster, step, foresee)
        if said:
            print(*said, sep="\n", flush=True)
    account = predict(counted.setup, cluster, foresee)
    print(
        *memory(counted, cluster, settings.memory.device_budget_gib),
        *refused(counted.setup, cluster),
        *traffic(counted, cluster.gpus_per_node),
        *computation(counted, account),
        sep="\n",
        flush=True,
    )
    if is_open and not found:
        searched = partial(search, settings, model, cluster, foresee)
        print(*other_choice(settings, setup, account, searched), sep="\n", flush=True)
    data = {"model": settings.model, **as_data(counted, cluster), **times(account), "mesh": facts}
    data["fits"] = fits(counted, cluster, settings.memory.device_budget_gib)
    return data | ({"plan": json.loads(found.to_json())} if found else {})


# ---- What is asked -----------------------------------------------------------------------------------------

PICTURES = (".png", ".svg", ".pdf", ".jpg")


def check_outputs(settings: Any) -> None:
    """Raise UsageError, before anything is measured or counted, for a file that could not be written.

    settings: has the fields `json`, `png` and `calibrate` of dryrun.py, each a path or None, and `gpu`."""
    for name in ("json", "png", "calibrate"):
        path = getattr(settings, name)
        if path and (problem := _why_not_written(Path(path))):
            raise UsageError(f"{name}={path}: {problem}.")
    for name, other in (("png", "json"), ("json", "gpu"), ("png", "gpu")):
        path, same = getattr(settings, name), getattr(settings, other)
        if path and same and Path(path).resolve() == Path(same).resolve():
            raise UsageError(f"{name}={path} would overwrite the file of {other}={same}; name another file.")
    suffix = Path(settings.png).suffix if settings.png else PICTURES[0]
    if suffix.lower() not in PICTURES:
        raise UsageError(
            f"png={settings.png}: {suffix or 'a name without a suffix'} does not say which kind of picture "
            f"to draw; end the name in {', '.join(PICTURES[:-1])} or {PICTURES[-1]}."
        )
    if settings.calibrate:
        if not settings.calibrate.endswith(".json"):
            raise UsageError(
                f"calibrate={settings.calibrate}: `gpu` reads only files that end in .json; end the name so."
            )
        others = [f"`{name}`" for name in ("json", "png") if getattr(settings, name)]
        if others:
            raise UsageError(
                f"calibrate={settings.calibrate} measures this machine and does nothing else, so that there "
                f"is nothing to write for {' and '.join(others)}; leave one of them out."
            )


def _why_not_written(path: Path) -> str:
    """Return what keeps a file from being written, or nothing. No file is made or changed."""
    try:
        if not path.parent.is_dir():
            return f"there is no folder {path.parent}; make it first"
        if path.is_dir():
            return "it is a folder; name a file in it"
        if path.is_file():
            path.open("ab").close()
        elif not path.exists():  # a pipe or a device is left alone
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:  # permissions, a read-only file system, a name that is too long
        return f"it cannot be written ({error.strerror}); name another file"
    return ""


def read_model(model: str) -> LlamaConfig:
    looks_like_path = os.sep in model or Path(model).exists()
    return LlamaConfig.from_hf(model) if looks_like_path else LlamaConfig.preset(model)


def gpus_of(settings: Any) -> int:
    """Return the number of GPUs: `gpus`, or as many as the axes that were given need together, or if none was
    given, as many as the cluster file says."""
    if settings.gpus is not None:
        return settings.gpus
    needed = math.prod(max(1, size) for size in settings.parallel.sizes.values())
    if needed == 1 and settings.gpu.endswith(".json"):
        return read_cluster(settings.gpu).n_gpus
    return needed


def leaves_layout_open(settings: Any) -> bool:
    """Return whether the planner shall choose: it is asked to, or nothing was said about the layout, the size
    of a microbatch, recomputation and memory."""
    train = settings.train
    says_nothing = (
        settings.parallel == ParallelConfig()
        and train.recompute == "none"
        and train.micro_batch_size == 1
        and not settings.memory.is_on
        and settings.memory.placement is None
    )
    return settings.parallel.auto or (says_nothing and gpus_of(settings) > 1)


def layout_of(settings: Any, cluster: Cluster) -> ParallelConfig:
    """Return the layout with -1 replaced by what the GPUs leave for it; UsageError if they cannot form it."""
    try:
        return settings.parallel.resolve(cluster.n_gpus)
    except UsageError as error:
        said = str(error)
        for of_processes, of_gpus in IN_GPUS.items():
            said = said.replace(of_processes, of_gpus)
        raise UsageError(said) from None


def states_of(model: LlamaConfig, dtype: torch.dtype, lora: LoraConfig, offload: Offload) -> States:
    n_adapter = n_adapter_parameters(model, lora) if lora.rank else 0
    return States.under(offload.config, dtype.itemsize, n_adapter, offload.clips)


def lora_of(settings: Any) -> LoraConfig:
    return getattr(settings, "lora", LoraConfig())


def search(settings: Any, model: LlamaConfig, cluster: Cluster, foresee: Callable) -> Found:
    """Return the layouts that the planner proposes."""
    layout = layout_of(settings, cluster)
    seq_len = settings.data.seq_len or model.max_position_embeddings
    batch, dtype = settings.train.global_batch_size, getattr(torch, settings.train.dtype)
    offload = Offload(settings.memory, clips=settings.train.max_grad_norm < math.inf)
    states = states_of(model, dtype, lora_of(settings), offload)
    question = Question(
        model,
        seq_len,
        batch,
        cluster,
        states,
        compile=settings.train.compile,
        layout=layout,
        **given_computation(settings.train),
        attention=settings.train.attention,
        document_tokens=DOCUMENT_TOKENS if settings.data.document_mask else None,
        foresee=foresee,
    )
    return plan(question)


def first_that_fits(
    settings: Any, found: Found, cluster: Cluster, step: Step, foresee: Callable
) -> tuple[Any, Counted, str]:
    """Return the settings of the first proposal that fits as counted, its count, and what was passed over. If
    none does, the first is returned; its report says by how much."""
    first, passed, refusal = (), "", None
    for candidate in found.candidates:
        proposed = settings_of(settings, candidate)
        setup, _ = setup_of(proposed, candidate.work.model, cluster)
        try:
            counted, said = count(setup, cluster, step, foresee)
        except UsageError as error:  # no place for the states beside what was counted
            refusal = refusal or error
            passed = f"Proposals before this one do not fit as counted: {error}"
            continue
        first = first or (proposed, counted)
        if fits(counted, cluster, settings.memory.device_budget_gib):
            return proposed, counted, "\n".join([*said, passed]).strip()
        passed = (
            f"Proposals before this one do not fit as counted: the last of them holds "
            f"{in_gib(counted.largest.peak_bytes)} GiB."
        )
    if not first:
        raise refusal
    return *first, passed


def settings_of(settings: Any, candidate: Candidate) -> Any:
    """Return the settings with what the planner proposes."""
    job = candidate.work.job
    train = replace(settings.train, micro_batch_size=job.micro_batch_size, recompute=job.recompute)
    memory = settings.memory
    if candidate.work.states.offloads and not memory.is_on:
        memory = replace(memory, placement="auto")
    return replace(settings, parallel=candidate.work.layout, train=train, memory=memory)


def as_flags(settings: Any) -> str:
    """Return the flags that give a layout, with the size of a microbatch, recomputation and memory: typed
    after the rest of a command, they make it this one."""
    plain = asdict(ParallelConfig()) | {"micro_batch_size": 1, "recompute": "none", "placement": None}
    train = settings.train
    chosen = asdict(settings.parallel) | {
        "micro_batch_size": train.micro_batch_size,
        "recompute": train.recompute,
        "placement": settings.memory.placement,
    }
    fields = [f"{name}={value}" for name, value in chosen.items() if value != plain[name]]
    return in_flags(" ".join(fields), type(settings))


def other_choice(
    settings: Any, setup: Setup, account: Account | None, searched: Callable[[], Found]
) -> list[str]:
    """Return lines with what the planner would choose instead of a layout of defaults, and its flags.

    setup: of the settings as they are. account: its prediction, or None. searched: asks the planner."""
    lines = ["\nNo layout was given, so that the above is what the run's own defaults make."]
    try:
        best = searched().best
    except UsageError as error:
        return [*lines, f"The planner has none to propose: {in_flags(str(error), type(settings))}"]
    planned, own = best.work.job, setup.job
    same_size = planned.micro_batch_size == own.micro_batch_size
    if best.work.layout == setup.layout and same_size and planned.recompute == own.recompute:
        return [*lines, "The planner would choose the same."]
    share = account.step_seconds / best.account.step_seconds - 1 if account else 0.0
    faster = f", which is predicted to be {share:.0%} faster" if share >= 0.005 else ""
    flags = as_flags(settings_of(settings, best))
    return [*lines, f"The planner would choose {name_of(best.work)}{faster}:", f"  {flags}"]


def setup_of(settings: Any, model: LlamaConfig, cluster: Cluster) -> tuple[Setup, str]:
    """Return what is to be counted, and a sentence on what was chosen if a placement was left open.

    Raises UsageError for what a run refuses before it starts, but for states that are too large: the report
    says so."""
    train, layout = settings.train, layout_of(settings, cluster)
    seq_len = settings.data.seq_len or model.max_position_embeddings
    device, dtype = torch.device("cuda"), getattr(torch, train.dtype)
    documents = settings.data.document_mask
    # A kernel that cannot do what was asked for is refused. flash-attn can in bfloat16, and need not be
    # installed here, since the run is on other machines: pretend.py has a stand-in.
    if train.attention != "flash" or dtype == torch.float32:
        choose_attention(train.attention, device, dtype, merges_blocks=layout.is_ring, documents=documents)
    job = Job(
        model,
        seq_len,
        train.global_batch_size,
        train.micro_batch_size,
        train.attention,
        train.recompute,
        train.compile,
        device.type,
        DOCUMENT_TOKENS if documents else None,
    )
    check_parallel(layout, job)
    kernel = kernel_of(job, layout, dtype.itemsize)
    computation = Computation(device, dtype, train.recompute, train.compile, kernel)
    memory, note = settings.memory.settle(device, dtype, cluster.n_gpus)
    check_skips(train.skip_nonfinite, train.max_grad_norm, memory)
    clips = train.max_grad_norm < math.inf
    ranks_per_host = min(cluster.n_gpus, cluster.gpus_per_node)
    offload = Offload(memory, train.micro_batch_size, seq_len, clips, ranks_per_host)
    return Setup(layout, job, computation, lora_of(settings), offload), note


# ---- What is counted and predicted -------------------------------------------------------------------------


def count(setup: Setup, cluster: Cluster, step: Step, foresee: Callable) -> tuple[Counted, list[str]]:
    """Return what a step does, and what was chosen for placement auto."""
    said = []
    config = setup.offload.config
    if config.placement == "auto":
        # The account leaves more of a GPU free, because it has counted nothing.
        budget_gib = cluster.gpu.memory_gib - BESIDES_TORCH_GIB
        budget_gib = min(config.device_budget_gib or budget_gib, budget_gib)
        work = work_of(setup)
        asked = replace(config, device_budget_gib=budget_gib)
        work = replace(work, states=replace(work.states, memory=asked))

        def place(other_bytes: int) -> tuple[float, float]:
            states = account_with_offload(work, cluster, foresee, other_bytes=other_bytes).work.states
            return states.resident, states.stream

        setup, chosen = settle_auto(setup, step, int(budget_gib * GIB), place)
        said.append(chosen)
    return dry_run(setup, step, lambda text: print(f"... {text}", flush=True)), said


NO_RATE = "The cluster's GPU has no float32_flops, so that no time is predicted for float32."


def has_no_rate(dtype: torch.dtype, cluster: Cluster) -> bool:
    return dtype == torch.float32 and cluster.gpu.float32_flops is None


def work_of(setup: Setup) -> Work:
    states = states_of(setup.job.model, setup.computation.dtype, setup.lora, setup.offload)
    return Work(setup.job, setup.layout, states)


def predict(setup: Setup, cluster: Cluster, foresee: Callable) -> Account | None:
    """Return the account of the setup, or None if the rate of its type is unknown."""
    if has_no_rate(setup.computation.dtype, cluster):
        return None
    work = work_of(setup)
    if work.states.offloads:
        return account_with_offload(work, cluster, foresee)
    return account_for(work, cluster)


def times(account: Account | None) -> dict:
    """Return what a step takes, under the names of --json; None where nothing is predicted."""
    if account is None:
        return dict.fromkeys(("step_seconds", "tokens_per_second_per_gpu", "mfu"))
    return {
        "step_seconds": account.step_seconds,
        "tokens_per_second_per_gpu": account.tokens_per_second_per_gpu,
        "mfu": account.mfu,
        "bubble": account.bubble,
        "exposed_communication": account.exposed,
        "seconds": account.seconds,
    }


# ---- What is printed ---------------------------------------------------------------------------------------


def some(items: list, most: int) -> list:
    """Return at most that many of the items: the first ones and the last."""
    return items if len(items) <= most else [*items[: most - 1], "  ...", items[-1]]


def mesh(facts: dict) -> list[str]:
    """Draw the ranks: a line for each place on the outer axes in use, a column for each on the innermost."""
    sizes = {axis: facts["layout"][axis] for axis in AXES if facts["layout"][axis] > 1} or {AXES[-1]: 1}
    *outer, inner = sizes
    lines = []
    for first in range(0, facts["world_size"], sizes[inner]):
        line, rest = f"  {inner} |", first // sizes[inner]
        for axis in reversed(outer):
            line, rest = f"  {axis} {rest % sizes[axis]:<3}{line}", rest // sizes[axis]
        ranks = some(list(range(first, first + sizes[inner])), 8)
        lines.append(line + "".join(f"{rank:>5}" for rank in ranks))
    groups = [
        f"  {axis:13}{size:>3}   {' '.join(map(str, some(facts['groups'][axis], 9)))}"
        for axis, size in sizes.items()
    ]
    return [
        "\nranks by their place on each axis",
        *some(lines, 10),
        f"\nthe ranks that rank {facts['rank']} meets on each axis",
        *groups,
    ]


def parameters(facts: dict) -> list[str]:
    title = f"parameters of rank {facts['rank']}"
    lines = [f"\n{title:51}{'whole':>15}{'here':>15}   split over (S: dim, R: not)"]
    for row in facts["parameters"]:
        whole, here = (" x ".join(map(str, row[key])) for key in ("shape", "local_shape"))
        placed = " ".join(f"{axis} {placement}" for axis, placement in row["placements"].items())
        lines.append(f"{row['count']:>4} {row['name']:46}{whole:>15}{here:>15}   {placed}")
    return lines


def unit_for(n_bytes: float) -> tuple[str, int]:
    """Return the unit in which so many bytes are easily read: GiB, or for less than one MiB."""
    return ("GiB", GIB) if n_bytes >= GIB else ("MiB", GIB // 1024)


def memory(counted: Counted, cluster: Cluster, budget_gib: float | None) -> list[str]:
    lines, gpu_gib = [], cluster.gpu.memory_gib
    unit, unit_bytes = unit_for(counted.largest.peak_bytes)
    for rank in counted.ranks:
        title = f"pp rank {rank.pp_rank}" if len(counted.ranks) > 1 else "a rank"
        title += f" holds, in {unit}"
        lines.append(f"\n{title:26}{'between steps':>14}{'at the peak':>14}{'most':>10}")
        for kind in [*KINDS, HOST]:
            parts = [held.get(kind, 0) / unit_bytes for held in (rank.held_bytes, rank.at_peak, rank.most)]
            if any(part >= 0.0005 for part in parts):
                name = "offloaded to the host" if kind == HOST else kind
                lines.append("  {:24}{:>14.3f}{:>14.3f}{:>10.3f}".format(name, *parts))
        lines.append(
            f"  its peak is {rank.peak_bytes / unit_bytes:.2f} {unit}: {rank.peak_moment}. A checkpoint adds "
            f"{rank.checkpoint_bytes / unit_bytes:.2f} {unit} on the host."
        )
    low, high = reserved_gib(counted.largest)
    verdict = "it fits" if fits(counted, cluster, None) else "it does NOT fit"
    if verdict == "it fits" and gpu_gib < high + BESIDES_TORCH_GIB:
        verdict = "it fits, if torch reserves little more (PYTORCH_ALLOC_CONF=expandable_segments:True helps)"
    if budget_gib is not None:
        keeps = fits(counted, cluster, budget_gib)
        verdict += f"; device_budget_gib={budget_gib:g} {'is kept' if keeps else 'is NOT kept'}"
    share = GIB / unit_bytes
    lines.append(
        f"\ntorch reserves {low * share:.1f} to {high * share:.1f} {unit}, and CUDA and NCCL take about "
        f"{BESIDES_TORCH_GIB:.0f} GiB more, of {gpu_gib:.1f} GiB: {verdict}"
    )
    return lines


def reserved_gib(rank: RankCount) -> tuple[float, float]:
    """Return between which numbers of GiB torch's allocator reserves."""
    low, high = (share * rank.peak_bytes / GIB for share in RESERVED)
    return low, high


def needed_gib(rank: RankCount) -> float:
    return reserved_gib(rank)[0] + BESIDES_TORCH_GIB


def refused(setup: Setup, cluster: Cluster) -> list[str]:
    """Return what a run says before it starts if its states alone are too large (assemble.settle_memory)."""
    per_parameter = setup.offload.config.device_bytes_per_parameter(
        setup.computation.dtype.itemsize, setup.n_microbatches
    )
    try:
        check_states(setup.job.model, setup.layout, int(cluster.gpu.memory_gib * GIB), per_parameter)
    except UsageError as error:
        return [] if setup.lora.rank else [f"pretrain.py would refuse it: {error}"]
    return []


def fits(counted: Counted, cluster: Cluster, budget_gib: float | None) -> bool:
    """Return whether the fullest rank fits a GPU, and torch the budget of the device if there is one: what
    torch does not allocate is not held against it (memory/lanes.py)."""
    least = reserved_gib(counted.largest)[0]
    return needed_gib(counted.largest) <= cluster.gpu.memory_gib and least <= (budget_gib or math.inf)


def traffic(counted: Counted, gpus_per_node: int) -> list[str]:
    rank = counted.largest
    between = rank.sent_between_nodes(gpus_per_node)
    all_sent = rank.sent_bytes()
    if not all_sent:
        return ["\nit sends nothing to other ranks"]
    unit, unit_bytes = unit_for(max(all_sent.values()))
    heads = f"  {'axis':14}{'sent':>12}{'between nodes':>16}   collectives"
    lines = [f"\nits traffic in a step, in {unit}\n{heads}"]
    for axis, sent in all_sent.items():
        kinds = {}
        for one, count in rank.traffic.items():
            if one.axis == axis:
                kinds[one.kind] = kinds.get(one.kind, 0) + count
        what = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
        sent, outside = sent / unit_bytes, between[axis] / unit_bytes
        lines.append(f"  {axis:14}{sent:>12.3f}{outside:>16.3f}   {what}")
    return lines


def computation(counted: Counted, account: Account | None) -> list[str]:
    busiest = max(counted.ranks, key=lambda rank: rank.flops)
    unit, size = ("TFLOP", 1e12) if busiest.flops >= 1e12 else ("GFLOP", 1e9)
    lines = [
        f"\nthe busiest rank computes {busiest.flops / size:,.1f} {unit} in a step, recomputation included"
    ]
    if account is None:
        return [*lines, f"{NO_RATE} Add the field to the file of --gpu, or let --calibrate measure it."]
    spent = sorted(account.seconds.items(), key=lambda item: -item[1])
    shares = ", ".join(
        f"{what} {seconds / account.step_seconds:.0%}"
        for what, seconds in spent
        if seconds >= 0.005 * account.step_seconds
    )
    if counted.setup.computation.dtype == torch.float32:
        lines.append("the rate of float32 is a data sheet's or --calibrate's; no run was held against it")
    job = counted.setup.job
    if job.document_tokens is not None:
        length = min(job.document_tokens, job.seq_len)
        lines.append(
            f"packed documents are taken to have {length} tokens each, which decides what attention costs"
        )
    return [
        *lines,
        f"predicted: a step takes {account.step_seconds:.3g} s, "
        f"{account.tokens_per_second_per_gpu:,.0f} tokens/s a GPU, MFU {account.mfu:.1%}",
        f"  of that {shares}",
    ]


def as_data(counted: Counted, cluster: Cluster) -> dict:
    """Return the result for --json: of the rank with the highest peak, and below `ranks` of every kind."""
    largest, layout = counted.largest, counted.setup.layout
    gib = lambda held: {kind.replace(" ", "_"): n_bytes / GIB for kind, n_bytes in held.items()}
    ranks = [
        {
            "pp_rank": rank.pp_rank,
            "held_gib": gib(rank.held_bytes),
            "at_peak_gib": gib(rank.at_peak),
            "most_gib": gib(rank.most),
            "peak_gib": rank.peak_bytes / GIB,
            "peak_moment": rank.peak_moment,
            "checkpoint_host_gib": rank.checkpoint_bytes / GIB,
            "flops": rank.flops,
            "traffic": [{**one._asdict(), "count": count} for one, count in rank.traffic.items()],
        }
        for rank in counted.ranks
    ]
    most = gib(largest.most)
    return {
        "layout": asdict(layout),
        "per_rank": {
            **{f"{kind}_gib": most.get(kind, 0.0) for kind in ("parameters", "gradients", "optimizer")},
            "activations_gib": most.get("activations", 0.0),
            "peak_gib": largest.peak_bytes / GIB,
            "reserved_gib": reserved_gib(largest),
            "host_gib": largest.host_bytes / GIB,
        },
        "traffic_gib_per_step": gib(largest.sent_bytes()),
        "between_nodes_gib_per_step": gib(largest.sent_between_nodes(cluster.gpus_per_node)),
        "flops_per_rank": max(rank.flops for rank in counted.ranks),
        "ranks": ranks,
    }


def pipeline(facts: dict) -> list[str]:
    if not (about := facts.get("pipeline")):
        return []
    lines = []
    width = min(28, max(work[-1][0] + DURATION[work[-1][1]] for work in about["work"]))
    for rank, (own, work) in enumerate(zip(about["stages_of_pp_ranks"], about["work"], strict=True)):
        layers = ", ".join("{}-{}".format(*about["layers_of_stages"][stage]) for stage in own)
        lines.append(f"  pp {rank:<3} layers {layers:13} |{draw(work, width)}")
    return [
        f"\nschedule {facts['layout']['schedule']}: {about['bubble']:.1%} bubbles, if backward takes as long "
        "as two forwards (F forward, B backward, I and W its halves)",
        *some(lines, 10),
    ]
