"""Runs a training step for any number of GPUs on a laptop, and says what each rank holds, sends and computes.

    setup = Setup(layout, job, computation)
    counted = dry_run(setup, step)          # step: the recipe's own, on a Training and microbatches
    counted.largest.peak_bytes, counted.largest.peak_moment, counted.largest.sent_bytes()

No formula describes the step: the model is built, spread and stepped by the code that trains, as one rank of
a pretended process group, on tensors that hold no memory (pretend.py), while a StepCounter watches. Ranks
that have other pipeline stages hold other bytes, so a step is run once for each kind of rank. Of the other
axes the first rank is taken, whose shards are the largest if they are unequal.

A step of many microbatches repeats itself. So two steps of few are counted, and what one more microbatch adds
is added as often as needed. The tests hold this against all of them.
"""

import ctypes
import gc
import math
import multiprocessing
import operator
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from torch import Tensor

from dtensor_llama import Llama
from dtensor_llama.chat.lora import LoraConfig, apply_lora
from dtensor_llama.data.reader import Batch
from dtensor_llama.errors import UsageError
from dtensor_llama.shards import local
from parallel.apply import Computation
from parallel.assemble import Offload, Training, adamw, assemble
from parallel.config import ParallelConfig
from parallel.cost import in_gib
from parallel.mesh import Layout, build_mesh
from parallel.pipeline import SCHEDULES, Pipeline, split_layers, stage_indices
from parallel.pretend import META, pretended_device, pretended_manager, pretended_rank, take_shards
from parallel.rules import Case, Job
from parallel.step_counter import (
    CUDA_BLOCK,
    HOST,
    OPTIMIZER,
    OTHER,
    PARAMETERS,
    Attention,
    Collective,
    Product,
    StepCounter,
    groups_of,
    ring_bytes,
)

Step = Callable[[Training, list[Batch]], object]
FP32 = 4
FORK = multiprocessing.get_context("fork")
PR_SET_PDEATHSIG = 1  # of linux/prctl.h: the signal that a process gets when its parent ends


@dataclass(frozen=True)
class Setup:
    """Holds what a run would be: its layout, resolved and checked, its job, and how it computes.

    computation: its device says what for: `cuda` stands for any GPU, `cpu` for the processes of a test.
    offload: as for `assemble`; None: the states live on the device.
    """

    layout: ParallelConfig
    job: Job
    computation: Computation
    lora: LoraConfig = LoraConfig()
    offload: Offload | None = None

    @property
    def world_size(self) -> int:
        return math.prod(self.layout.sizes.values())

    @property
    def n_microbatches(self) -> int:
        return Case(self.layout, self.job).n_microbatches

    @property
    def is_gpu(self) -> bool:
        return self.computation.device.type == "cuda"

    @property
    def tokens_per_step(self) -> int:
        job = self.job
        return job.seq_len * job.micro_batch_size * self.n_microbatches * self.layout.dp


@dataclass(frozen=True)
class RankCount:
    """Holds what one step does on a rank, and on all others with the same place on the pp axis.

    held_bytes: between two steps. at_peak: when most is held. most: of each kind, whenever that is. All are
        bytes on the device by kind (step_counter.py), and under `host` those that are offloaded.
    checkpoint_bytes: what an asynchronous checkpoint adds on the host.
    traffic, products, attention: how often each is done in a step. groups: the ranks of each axis in use.
    """

    pp_rank: int
    held_bytes: dict[str, int]
    at_peak: dict[str, int]
    most: dict[str, int]
    peak_bytes: int
    peak_moment: str
    checkpoint_bytes: int
    traffic: dict[Collective, int]
    products: dict[Product, int]
    attention: dict[Attention, int]
    groups: dict[str, list[int]] = field(repr=False)

    @property
    def host_bytes(self) -> int:
        return self.most.get(HOST, 0)

    @property
    def flops(self) -> int:
        """Return the FLOPs of matrix products and attention, recomputation included."""
        products = sum(2 * one.m * one.n * one.k * count for one, count in self.products.items())
        return products + sum(one.flops * count for one, count in self.attention.items())

    def sent_bytes(self) -> dict[str, int]:
        """Return what this rank sends in a step by axis, if collectives go round rings."""
        sent: Counter[str] = Counter()
        for one, count in self.traffic.items():
            sent[one.axis] += round(count * ring_bytes(one.kind, one.whole_bytes, len(self.groups[one.axis])))
        return dict(sent)

    def sent_between_nodes(self, gpus_per_node: int) -> dict[str, int]:
        """Return how much of that leaves a node: of a send to another node all, of an all-to-all what goes to
        ranks of other nodes, and of what goes round a ring the share of a mean rank."""
        between: Counter[str] = Counter()
        for one, count in self.traffic.items():
            nodes = [rank // gpus_per_node for rank in self.groups[one.axis]]
            n_ranks = len(nodes)
            n_bytes = count * ring_bytes(one.kind, one.whole_bytes, n_ranks)
            if one.kind == "send":
                sender, receiver = one.hop
                share = float(nodes[sender] != nodes[receiver])
            elif one.kind == "all-to-all":
                n_pairs = sum(node != other for node in nodes for other in nodes)
                share = n_pairs / (n_ranks * (n_ranks - 1))
            else:
                share = sum(map(operator.ne, nodes, nodes[1:] + nodes[:1])) / n_ranks
            between[one.axis] += round(n_bytes * share)
        return dict(between)


@dataclass(frozen=True)
class Counted:
    """Holds what a step does: `ranks` has one of each kind, in the order of their pp ranks."""

    setup: Setup
    ranks: list[RankCount]

    @property
    def largest(self) -> RankCount:
        """Return the rank with the highest peak."""
        return max(self.ranks, key=lambda rank: rank.peak_bytes)


def dry_run(setup: Setup, step: Step, say: Callable[[str], None] = lambda text: None) -> Counted:
    """Count a step of `setup`. Call it where no process group exists.

    step: runs forwards, backwards, clipping and the optimizer's step of the microbatches; the recipes' own.
    say: is told which rank is being counted.
    """
    kinds = kinds_of_ranks(setup)
    if len(kinds) > 1:
        say(f"counting a step of pp ranks {', '.join(map(str, kinds))} of {setup.layout.pp}")
    if setup.is_gpu:
        import_module("parallel.pretended_compiler")  # for seconds, and so once, before the processes fork
    counts = _side_by_side([partial(_count_rank, setup, kind, step) for kind in kinds])
    return Counted(setup, [_whole_step(setup, of_rank) for of_rank in counts])


def _side_by_side(tasks: list[Callable[[], list[RankCount]]]) -> list[list[RankCount]]:
    """Return the results of tasks, for which the cores of this computer share the work.

    Each core has a process that is forked, so that it knows the tasks and has torch imported. Where that is
    not possible, the tasks run one after another. Whatever ends this function ends those processes too."""
    n_processes = min(len(tasks), len(os.sched_getaffinity(0))) if _forks_can_step() else 1
    if n_processes == 1:
        return list(_with_progress((task() for task in tasks), len(tasks)))
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(n_processes, FORK, _begin_process, (tasks, os.getpid())) as pool:
        try:
            # This forks, before the progress bar has a thread.
            futures = [pool.submit(_run_task, i) for i in range(len(tasks))]
            return list(_with_progress((future.result() for future in futures), len(tasks)))
        except BaseException as error:  # such as Ctrl-C: the pool would wait for steps that are being counted
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
            if isinstance(error, BrokenProcessPool) and error.__cause__ is None:
                raise UsageError(
                    "a process that counted a step was ended from outside, as Linux does where no memory is "
                    "left. Make some free, or let one core count the steps one after another: taskset -c 0."
                ) from None
            raise


def _with_progress(results: Iterable[RankCount], n_results: int) -> Iterable[RankCount]:
    """Yield results, with a progress bar if a person is looking."""
    console = Console(stderr=True)
    off = not sys.stderr.isatty()
    return track(results, "counting steps", n_results, console=console, transient=True, disable=off)


def _forks_can_step() -> bool:
    """Return whether a process that is forked from this one can run a step.

    Elsewhere than on Linux a fork is not safe, and a daemonic process may have no children. torch refuses
    backward in a fork of a process whose autograd has started its threads, one for each GPU. torch does not
    say whether it has, and so a fork tries."""
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return False
    trial = FORK.Process(target=_try_autograd, args=(os.getpid(),))
    try:
        trial.start()
    except OSError:  # there is no memory for another process, or there are as many as the user may have
        return False
    trial.join()
    return trial.exitcode == 0


def _try_autograd(parent: int) -> None:
    _end_with(parent)
    try:
        x = torch.zeros((), requires_grad=True)
        torch.autograd.grad(2 * x, x)
    except RuntimeError:
        sys.exit(1)


_tasks: list[Callable[[], RankCount]] = []  # of a forked process


def _begin_process(tasks: list[Callable[[], RankCount]], parent: int) -> None:
    _tasks[:] = tasks
    torch.set_num_threads(1)
    _end_with(parent)


def _end_with(parent: int) -> None:
    """Let this process, which was forked, end without a word when its parent does, however that ends.

    Otherwise it would wait for tasks forever, and whoever reads its parent's output would wait with it."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a job in the background lives through Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def _run_task(i: int) -> RankCount:
    return _tasks[i]()


def settle_auto(
    setup: Setup, step: Step, device_bytes: int, place: Callable[[int], tuple[float, float]]
) -> tuple[Setup, str]:
    """Return a setup whose placement is static instead of auto, and a sentence about it.

    A run measures its machine and its steps, and plans from both. Here the step is counted with all states on
    the host. place: takes the bytes of the device that it then needs beside the weights, and returns the
    shares of the parameters that a plan keeps resident and streams. UsageError if `device_bytes` cannot hold
    even that step."""

    def placed(resident: float, stream: float) -> Setup:
        config = replace(
            setup.offload.config,
            placement="static",
            resident=resident,
            stream=stream,
            cpu=1 - resident - stream,
            device_budget_gib=None,
            host_budget_gib=None,
        )
        return replace(setup, offload=replace(setup.offload, config=config))

    least = dry_run(placed(0.0, 0.0), step).largest
    if least.peak_bytes > 0.97 * device_bytes:  # a plan keeps so much in reserve: memory/placement.py
        raise UsageError(
            f"placement=auto cannot help: with all states on the host a rank needs "
            f"{in_gib(least.peak_bytes)} GiB of the device, and {in_gib(0.97 * device_bytes)} can be used. "
            "Use recompute=full, a lower `micro_batch_size` or more ranks."
        )
    resident, stream = place(least.peak_bytes - least.held_bytes[PARAMETERS])
    said = (
        f"placement auto: of the states {resident:.1%} are resident, {stream:.1%} pass through the device, "
        f"and {max(0.0, 1 - resident - stream):.1%} are stepped on the host, within "
        f"{in_gib(device_bytes)} GiB of the device"
    )
    return placed(resident, stream), said


def kinds_of_ranks(setup: Setup) -> list[int]:
    """Return one pp rank of each kind: the first, the last, and of those between one with each number of
    layers. Of equal ones an earlier rank holds the activations of as many microbatches, or more; where
    backward is split, a later one does, since it defers more gradients of weights."""
    layout = setup.layout
    stages = stage_indices(layout.schedule, layout.pp, layout.stages_per_rank)
    layers = split_layers(setup.job.model, layout.pp * layout.stages_per_rank)
    kinds = {}
    ranks = list(enumerate(stages))
    if SCHEDULES[layout.schedule].splits_backward:
        ranks.reverse()
    for pp_rank, own in ranks:
        n_layers = tuple(len(layers[stage]) for stage in own)
        is_end = pp_rank in (0, layout.pp - 1)
        kinds.setdefault(pp_rank if is_end else n_layers, pp_rank)
    return sorted(set(kinds.values()))


def few_microbatches(setup: Setup) -> tuple[int, int]:
    """Return two numbers of microbatches. The difference of two such steps says how much traffic and
    arithmetic a microbatch adds, and the second step is as full as a longer one. (gpipe alone keeps more with
    each microbatch, and the difference says how much.)"""
    layout = setup.layout
    if layout.pp == 1:
        return 1, 2  # the second microbatch is the first that finds gradients
    if layout.schedule == "gpipe":
        return 2, 3
    if layout.schedule == "1f1b":
        return 1, layout.pp + 1
    # Schedules of several stages a rank take whole rounds of pp microbatches, and the peak of the third round
    # is the first that later ones repeat. If backward is split, how often depends on the round.
    splits = SCHEDULES[layout.schedule].splits_backward
    return (3 * layout.pp, 4 * layout.pp) if splits else (1, 3 * layout.pp)


def _steps_to_count(setup: Setup) -> list[tuple[ParallelConfig, int]]:
    """Return the steps to count, each as a layout and its number of microbatches: the setup's own step, or
    two shorter ones, of which the longer one comes first."""
    n, (few, more) = setup.n_microbatches, few_microbatches(setup)
    if n <= more:
        return [(setup.layout, n)]
    shorter = setup.layout
    if shorter.schedule == "1f1b":  # which needs as many microbatches as ranks
        shorter = replace(shorter, schedule="gpipe")
    return [(setup.layout, more), (shorter, few)]


def _whole_step(setup: Setup, counted: list[RankCount]) -> RankCount:
    """Return the count of the whole step of a rank from its counts of `_steps_to_count`."""
    if len(counted) == 1:
        return counted[0]
    (other, one), n, (few, more) = counted, setup.n_microbatches, few_microbatches(setup)

    def extended(first: int, second: int) -> int:
        return second + (second - first) * (n - more) // (more - few)

    def extended_all(first: dict, second: dict) -> dict:
        keys = dict.fromkeys([*first, *second])
        return {key: extended(first.get(key, 0), second.get(key, 0)) for key in keys}

    if setup.layout.pp > 1 and setup.layout.schedule == "gpipe":  # it keeps all microbatches until backward
        at_peak, most = extended_all(one.at_peak, other.at_peak), extended_all(one.most, other.most)
        most = {kind: max(n_bytes, at_peak.get(kind, 0)) for kind, n_bytes in most.items()}
        peak_bytes = extended(one.peak_bytes, other.peak_bytes)
    else:
        added = _bytes_of_each_microbatch(setup, other.pp_rank) * (n - more)
        at_peak = {**other.at_peak, OTHER: other.at_peak.get(OTHER, 0) + added}
        most = {**other.most, OTHER: other.most.get(OTHER, 0) + added}
        peak_bytes = other.peak_bytes + added
    return replace(
        other,
        at_peak=at_peak,
        most=most,
        peak_bytes=peak_bytes,
        traffic=extended_all(one.traffic, other.traffic),
        products=extended_all(one.products, other.products),
        attention=extended_all(one.attention, other.attention),
    )


def _bytes_of_each_microbatch(setup: Setup, pp_rank: int) -> int:
    """Return the bytes of a microbatch that a rank has to the end of a step: the tokens on the first stage of
    a pipeline, the labels on the last, and a block of the allocator for the loss and for each message, which
    is a tensor of one element while it has no buffer."""
    layout, job = setup.layout, setup.job
    if layout.pp == 1:
        return 0
    own = stage_indices(layout.schedule, layout.pp, layout.stages_per_rank)[pp_rank]
    last = layout.pp * layout.stages_per_rank - 1
    n_messages = sum((stage > 0) + (stage < last) for stage in own)  # hidden states and gradients
    n_blocks = (n_messages + (last in own)) * setup.is_gpu
    token_bytes = torch.int64.itemsize * job.micro_batch_size * job.seq_len // layout.cp
    return token_bytes * ((0 in own) + (last in own)) + CUDA_BLOCK * n_blocks


def _count_rank(setup: Setup, pp_rank: int, step: Step) -> list[RankCount]:
    """Return the counts of `_steps_to_count`, of one rank."""
    layout, job = setup.layout, setup.job
    rank = pp_rank * (setup.world_size // layout.pp)
    computation = replace(setup.computation, device=META)
    counter = StepCounter("meta", {}, CUDA_BLOCK if setup.is_gpu else 1, job.document_tokens)
    pretending = pretended_device(setup.computation.device, counter)
    with pretended_rank(rank, setup.world_size), pretending, pretended_manager(), counter.following_resizes():
        mesh = build_mesh(layout, "meta" if setup.is_gpu else "cpu")
        counter.axes = groups_of(mesh)
        with META:
            model = Llama(job.model)
        if setup.lora.rank:
            apply_lora(model, setup.lora, setup.computation.dtype)
        steps = _steps_to_count(setup)
        # Without a pipeline as many microbatches as decide whether gradients are accumulated.
        n_planned = steps[0][1] if layout.pp > 1 else min(setup.n_microbatches, 2)
        spread = Layout(layout, mesh, n_planned)
        training = assemble(model, spread, computation, adamw(lr=1e-3, weight_decay=0.1), setup.offload)
        take_shards(training.stages)
        count_states(counter, training)
        held_bytes = dict(counter.by_kind)
        counter.watch(training.stages, training.optimizer)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        counts = []
        for one, n_microbatches in steps:
            microbatches = [_microbatch(setup) for _ in range(n_microbatches)]
            gc.collect()  # a cycle that holds tensors would be counted for a while
            counter.reset()
            with counter:
                step(_with_microbatches(training, one, n_microbatches), microbatches)
            counts.append(
                RankCount(
                    pp_rank,
                    held_bytes,
                    counter.at_peak,
                    dict(counter.most),
                    counter.peak_bytes,
                    counter.peak_moment,
                    3 * FP32 * sum(local(parameter).numel() for parameter in trained),
                    dict(counter.traffic),
                    dict(counter.products),
                    dict(counter.attention),
                    _ranks_of_groups(mesh, counter.axes),
                )
            )
        counter.forget_all()
        return counts


def _with_microbatches(training: Training, layout: ParallelConfig, n_microbatches: int) -> Training:
    """Return a Training whose pipeline, if it has one, runs so many microbatches in a step."""
    if training.pipeline is None:
        return training
    spread = replace(training.layout, config=layout, n_microbatches=n_microbatches)
    pipeline = Pipeline(training.stages, spread, training.computation)
    return replace(training, layout=spread, pipeline=pipeline)


def count_states(counter: StepCounter, training: Training) -> None:
    """Let the counter know what is there between two steps: parameters and the optimizer's states, which
    AdamW makes in its first step."""
    on_device, on_host = memory_of_manager(training)
    if not _has_manager(training):
        for parameter in training.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        training.optimizer.step()
        training.optimizer.zero_grad()
        states = training.optimizer.state.values()
        on_device = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    parts = {training.model, *training.stages}
    counter.tag([parameter for part in parts for parameter in part.parameters()], PARAMETERS)
    counter.tag(on_device, OPTIMIZER)
    counter.tag(on_host, HOST)
    counter.now("between two steps", OTHER)


def _has_manager(training: Training) -> bool:
    return hasattr(training.optimizer, "manager")


def memory_of_manager(training: Training) -> tuple[list[Tensor], list[Tensor]]:
    """Return what the chunk manager keeps on the device and on the host, and the slots of the activation
    offload, which are on the host."""
    on_device, on_host = [], []
    for offload in training.activation_offloads:
        on_host += [slot for slot, _ in offload.free]
    if _has_manager(training):
        manager = training.optimizer.manager
        for chunk in manager.chunks:
            for name, (account, _) in chunk.format.tensors(chunk.home).items():
                (on_host if account == "host" else on_device).append(chunk.tensors[name])
        on_device += [tensor for slot, _ in manager.ring for tensor in slot.values()]
        on_host += [buffer for buffer, _ in manager.weight_buffers]
    return on_device, on_host


def _microbatch(setup: Setup) -> Batch:
    shape = setup.job.micro_batch_size, setup.job.seq_len
    tokens, labels = torch.zeros(2, *shape, dtype=torch.int64)
    if setup.job.document_tokens is None:
        return Batch(tokens, labels, None)
    positions = torch.arange(setup.job.seq_len) % setup.job.document_tokens
    return Batch(tokens, labels, positions.expand(shape).contiguous())


def _ranks_of_groups(mesh, axes: dict[tuple[str, bool], str]) -> dict[str, list[int]]:
    groups = {"world": list(range(dist.get_world_size()))}
    for axis in axes.values():
        if axis != "world":
            groups[axis] = dist.get_process_group_ranks(mesh[axis].get_group())
    return groups
