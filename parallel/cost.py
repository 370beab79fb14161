"""The one account of what a layout costs: bytes, traffic and time of a step, in closed form.

    account = account_for(work, cluster)       work: a job, its layout, and what its parameters hold

Nothing is built and nothing runs, so thousands of layouts take seconds. (The dry run builds the model and
takes its step without memory; it knows bytes and traffic exactly, and this file is held against it.)

    Bytes     parameters, gradients and optimizer states as the table in zero.py shares them; activations by
              what recompute.py keeps; and the buffers of the block at work.
    Traffic   each collective of a step: its axis, how often it comes, how large it is, and what it can hide
              behind. Those of tp are the rows of the plan in tensor.py.
    Time      work / rate. A matrix product needs its FLOPs at the sustained rate and its bytes at the rate
              of the memory, which partly overlap, so that thin products are slower. Kernels that only read
              and write need their bytes. A collective needs its hops and its bytes (alpha and beta). What
              hides behind computation costs only what it takes from it.

Rates are those of a Cluster, times what the software reaches of them, which is a Stack: a few efficiencies,
one for each kind of kernel. They were measured in a step of this trainer, or fitted on half of the runs that
others have published; the other half tests them. docs/planning.md has the rows, and
recipes/bench/published.py makes it.

B sequences, T tokens, D width, H query heads, K key/value heads of width E, F feed-forward width, V
vocabulary, L layers, M microbatches, N parameters, n ranks.
"""

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from math import ceil, prod
from typing import Any, NamedTuple

from dtensor_llama import loss
from dtensor_llama.config import LlamaConfig
from dtensor_llama.errors import UsageError
from dtensor_llama.flops import model_flops_per_token
from dtensor_llama.metrics import GIB
from parallel.cluster import Cluster
from parallel.config import AXES, ParallelConfig
from parallel.pipeline import SCHEDULES, split_layers, stage_indices
from parallel.rules import Case, Job
from parallel.schedule_clock import idle_units, order_of_rank
from parallel.stage import SENDS_UNDER_WAY
from parallel.tensor import Row, tensor_plan

FP32 = 4
FITS_SHARE = 0.9  # of a GPU's memory that a plan may fill, because allocators round up and fragment

# ---- What is accounted for ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class States:
    """Holds what decides how many bytes a parameter takes."""

    itemsize: int = 2  # bytes of the numbers that compute
    n_adapter: int = 0  # trained parameters if all others are frozen, else 0
    offloads: bool = False  # a chunk manager has the optimizer states, and may keep them on the host
    # On one GPU, which has nothing to gather, the bfloat16 weights are what computes, and the lower halves of
    # their masters lie beside the moments (MemoryConfig.settle). False: placement=off, and FSDP has both.
    settles_one_gpu: bool = True
    inputs_on_host: bool = False  # the inputs of blocks wait on the host (memory/activations.py)
    # Shares of the states that the chunk manager steps on the device: those that stay there, and those that
    # pass through it. The placement auto chooses them.
    resident: float = 0.0
    stream: float = 0.0
    clips: bool = True  # False: the manager steps while gradients arrive
    memory: Any = None  # the memory.MemoryConfig of the run; None: auto, without budgets

    @classmethod
    def under(cls, memory: Any, itemsize: int, n_adapter: int = 0, clips: bool = True) -> "States":
        """Return the states of a run with this memory.MemoryConfig, whose placement may be open."""
        return cls(
            itemsize,
            n_adapter,
            offloads=memory.is_on,
            settles_one_gpu=memory.placement != "off",
            inputs_on_host=memory.activations,
            resident=memory.resident or 0.0,
            stream=memory.stream or 0.0,
            clips=clips,
            memory=memory,
        )

    @property
    def uses_host(self) -> bool:
        """Return whether states leave the device, or may leave it."""
        return self.offloads and self.resident < 1


@dataclass(frozen=True)
class Work:
    """Holds a job, the layout that does it (resolved), and what a parameter holds."""

    job: Job
    layout: ParallelConfig
    states: States = States()

    @property
    def model(self) -> LlamaConfig:
        return self.job.model

    @property
    def n_gpus(self) -> int:
        return prod(self.layout.sizes.values())

    @cached_property
    def n_microbatches(self) -> int:
        return Case(self.layout, self.job).n_microbatches

    @cached_property
    def tokens(self) -> int:
        """Return the tokens of a microbatch on one cp rank."""
        return self.job.micro_batch_size * self.job.seq_len // self.layout.cp

    @property
    def tokens_per_step(self) -> int:
        return self.job.global_batch_size * self.job.seq_len

    @cached_property
    def hidden_bytes(self) -> int:
        """Return the bytes of the hidden states of those tokens, (B, T/cp, D)."""
        return self.tokens * self.model.hidden_size * self.states.itemsize

    @cached_property
    def n_block(self) -> int:
        """Return the parameters of a block that one tp rank has. Norms, and heads that tp ranks share, are
        whole on each."""
        rows = tensor_plan_of(self.model, self.layout.tp, self.layout.sequence_parallel)
        numbers = 0
        for name, shape in self.model.block_weights().items():
            row = rows[f"model.layers.*.{name.rpartition('.')[0]}"]
            numbers += prod(shape) if row.weight == "R" else prod(shape) // self.layout.tp
        return numbers

    @cached_property
    def n_adapters(self) -> float:
        """Return how many parameters of adapters a tp rank of each stage has.

        Of each adapter one matrix is split as the weight beside it is, and the other is whole (LORA in
        lora.py). All matrices of a block are taken to have adapters, which is the default."""
        rows = tensor_plan_of(self.model, self.layout.tp, self.layout.sequence_parallel)
        here, whole = 0.0, 0
        for name, shape in self.model.block_weights().items():
            if len(shape) == 2:
                row = rows[f"model.layers.*.{name.rpartition('.')[0]}"]
                split_dim = {"S(0)": 0, "S(1)": 1}.get(row.weight)
                whole += sum(shape)
                here += sum(n / self.layout.tp if dim == split_dim else n for dim, n in enumerate(shape))
        return self.states.n_adapter / self.layout.pp * here / whole

    @cached_property
    def n_matrix(self) -> int:
        """Return the parameters of the embedding, or of the head, that one tp rank has."""
        return ceil(self.model.vocab_size / self.layout.tp) * self.model.hidden_size

    def n_ends(self, share: "Share") -> int:
        """Return the parameters outside the blocks that a tp rank of this pp rank has: the embedding, and the
        last norm with the head."""
        n_matrices = share.has_embedding + share.has_head
        if self.model.tie_word_embeddings and n_matrices == 2:
            n_matrices = 1
        return self.n_matrix * n_matrices + self.model.hidden_size * share.has_head

    def n_whole(self, share: "Share") -> float:
        """Return the parameters, without adapters, that a tp rank of this pp rank has in all its shards."""
        return share.n_layers * self.n_block + self.n_ends(share)

    def trained_share(self, share: "Share") -> float:
        """Return what is trained of a pp rank's weights; of adapters, their size beside those weights."""
        return self.n_adapters / self.n_whole(share) if self.states.n_adapter else 1.0

    @cached_property
    def shards(self) -> int:
        """Return how many ranks share optimizer states."""
        return self.layout.fsdp if self.layout.zero_stage else 1

    @cached_property
    def is_plain(self) -> bool:
        """Return whether bfloat16 weights are what computes, with no others to gather them from."""
        states = self.states
        one_gpu = self.n_gpus == 1 and self.job.device_type != "cpu" and states.itemsize != FP32
        return one_gpu and states.settles_one_gpu and not states.n_adapter and not states.offloads

    @cached_property
    def is_managed(self) -> bool:
        """Return whether a chunk manager steps the weights that compute, and FSDP has no others."""
        return self.is_plain or self.states.offloads

    @cached_property
    def on_device(self) -> tuple[float, float]:
        """Return the shares of the parameters whose states are resident, and of those that pass through."""
        return (1.0, 0.0) if self.is_plain else (self.states.resident, self.states.stream)

    @cached_property
    def gathers(self) -> bool:
        """Return whether FSDP has weights of its own that compute, beside the shards."""
        if self.is_managed and not self.states.n_adapter:
            return self.shards > 1
        return self.layout.gradient_ranks > 1 or self.states.itemsize != FP32

    @cached_property
    def accumulates(self) -> bool:
        """Return whether the chunk manager itself sums the gradients of microbatches (zero.py)."""
        sums_first = self.layout.pp > 1 or (self.layout.gradient_ranks > 1 and self.layout.zero_stage < 2)
        return self.n_microbatches > 1 and not sums_first

    @cached_property
    def keeps_weights(self) -> bool:
        """Return whether gathered weights stay through the step; in a pipeline they do at any stage."""
        return self.layout.zero_stage < 3 or self.layout.pp > 1

    @cached_property
    def keeps_gradients(self) -> bool:
        """Return whether whole gradients wait for the last microbatch."""
        waits = self.layout.zero_stage < 2 or self.layout.pp > 1
        return waits and self.n_microbatches > 1


@lru_cache(maxsize=4096)
def tensor_plan_of(model: LlamaConfig, tp: int, sequence_parallel: bool) -> dict[str, Row]:
    return tensor_plan(model, tp, sequence_parallel)


@dataclass(frozen=True)
class Share:
    """Holds what one pp rank has: how many layers, and which ends of the model; and how many of its stages'
    neighbours are on other ranks."""

    n_layers: float
    has_embedding: bool
    has_head: bool
    pp_rank: int = 0
    n_neighbours: int = 0
    layers_of_stages: tuple[float, ...] = ()  # that n_layers is the sum of
    stages: tuple[int, ...] = (0,)


@lru_cache(maxsize=4096)
def layers_of_stages(model: LlamaConfig, n_stages: int) -> list[float]:
    return [len(layers) for layers in split_layers(model, n_stages)]


@lru_cache(maxsize=4096)
def shares(model: LlamaConfig, layout: ParallelConfig, evenly: bool = False) -> tuple[Share, ...]:
    """Return the share of each pp rank. evenly: as Megatron cuts, which gives each stage as many layers,
    instead of giving fewer to the stage that has the head."""
    per_rank = layout.stages_per_rank if layout.pp > 1 else 1
    stages = stage_indices(layout.schedule, layout.pp, per_rank) if layout.pp > 1 else [[0]]
    last = layout.pp * per_rank - 1
    counts = layers_of_stages(model, last + 1)
    if evenly:
        counts = [model.num_hidden_layers / (last + 1)] * (last + 1)
    rank_of = {stage: rank for rank, own in enumerate(stages) for stage in own}
    found = []
    for rank, own in enumerate(stages):
        neighbours = [stage + step for stage in own for step in (-1, 1)]
        n_elsewhere = sum(rank_of.get(stage, rank) != rank for stage in neighbours)
        n_layers = sum(counts[stage] for stage in own)
        own_layers = tuple(counts[stage] for stage in own)
        found.append(Share(n_layers, 0 in own, last in own, rank, n_elsewhere, own_layers, tuple(own)))
    return tuple(found)


def kinds_of_shares(model: LlamaConfig, layout: ParallelConfig, evenly: bool = False) -> list[Share]:
    """Return one share of each kind of pp rank.

    Of equal ranks it is the first, which keeps most activations. If backward is split it is the last: then
    all keep as many activations, and later ranks defer the gradients of more weights."""
    kinds: dict[tuple, Share] = {}
    splits = splits_backward(layout)
    for share in shares(model, layout, evenly):
        kind = (share.layers_of_stages, share.has_embedding, share.has_head)
        if splits:
            kinds[kind] = share
        else:
            kinds.setdefault(kind, share)
    return list(kinds.values())


def splits_backward(layout: ParallelConfig) -> bool:
    return layout.pp > 1 and SCHEDULES[layout.schedule].splits_backward


# ---- Bytes -------------------------------------------------------------------------------------------------


def kept_per_token(work: Work) -> float:
    """Return how many numbers a block keeps of each token from forward to backward: see recompute.py.

    Under sequence parallelism what lies between the matrices is a tp rank's own tokens; what enters a column-
    wise matrix, or leaves a row-wise one, is whole. Measured on a run without arithmetic for LLaMA-2-7B:
    66.3k numbers with `none` and 43.0k with `selective`; these formulas give 65.8k and 42.5k.
    """
    model, tp = work.model, work.layout.tp
    D, F, E = model.hidden_size, model.intermediate_size, model.head_dim
    own = D / work.layout.sequence_shards
    heads = (2 * model.num_attention_heads + 2 * max(model.num_key_value_heads, tp)) * E / tp
    if work.job.recompute == "full":
        return own
    if work.layout.cp > 1 and not work.layout.is_ring:
        heads += model.num_attention_heads * E / tp  # what attention gives, before and after it is sent back
    if work.job.recompute == "none" and model.family.qk_norm:  # what enters the norms of heads
        heads += (model.num_attention_heads + max(model.num_key_value_heads, tp)) * E / tp
    if work.job.recompute == "selective":
        return own + D + heads + 2 * F / tp
    # The stream before each of the two norms, what enters the matrices, and gate, up and their product.
    streams, widths = 2, 3
    if not work.job.compile:
        widths += 1  # silu(gate)
        if work.job.device_type == "cpu":  # there the norm is no kernel of its own, and works in fp32
            streams = 2 * FP32 * 2 / work.states.itemsize
    return streams * own + 2 * D + heads + widths * F / tp


def at_work_bytes(work: Work) -> float:
    """Return the bytes that the backward of a block needs beside what the block keeps.

    These are what recompute.py computes again, and gradients. There are most of them inside the feed-forward
    part, or in attention if that is a ring."""
    model, tp, itemsize = work.model, work.layout.tp, work.states.itemsize
    D, F, E = model.hidden_size, model.intermediate_size, model.head_dim
    as_none = replace(work, job=replace(work.job, recompute="none"))
    again = kept_per_token(as_none) - kept_per_token(work)
    down_proj = 0 if work.states.n_adapter else D * F / tp
    gradients = 2 * F / tp + D
    if work.states.n_adapter and tp > 1:
        # The gradient of what down_proj gives is gathered for the weight, and again for the adapter.
        gradients = max(gradients, F / tp + 2 * D + 2 * D / work.layout.sequence_shards)
    if work.job.compile:  # the compiler lets gradients take the places of what they were made of
        gradients = 0 if work.job.recompute == "full" else 2 * D
    inside = itemsize * (work.tokens * (again + gradients) + down_proj)
    if not work.layout.is_ring:
        return inside
    # The feed-forward part is done, and the gradients of its weights wait for the block's. Those of q, k and
    # v are fp32; keys, values and their gradients are each there twice, to be sent and received.
    H, K = model.num_attention_heads / tp, max(1, model.num_key_value_heads / tp)
    in_fp32 = H * E + 2 * K * E
    pairs = 2 * 2 * K * E
    numbers = again - (3 if work.job.compile else 4) * F / tp + pairs
    weights = 3 * down_proj + (0 if work.states.n_adapter else D * H * E)
    attention = itemsize * (work.tokens * numbers + weights) + FP32 * work.tokens * (in_fp32 + pairs)
    return max(inside, attention)


def in_flight(work: Work, share: Share) -> float:
    """Return how many microbatches a pp rank keeps activations of, each for its share of the layers."""
    layout, m = work.layout, work.n_microbatches
    if layout.pp == 1:
        return 1
    if layout.schedule == "gpipe":
        return m
    if layout.schedule == "1f1b":
        return min(m, layout.pp - share.pp_rank)  # until the first of them comes back
    # The stages of a rank may have different numbers of layers, so it matters which of them are full at once.
    blocks = [
        sum(n * layers for n, layers in zip(now.kept, share.layers_of_stages, strict=True))
        for now in fullest_occupancies(work, share)
    ]
    return max(blocks) / share.n_layers


# ---- Bytes of a backward in two halves ----
#
# I, the gradient of a stage's input, frees nothing: W, the gradients of its weights, needs what forward kept.
# It also needs the gradients of the outputs of all modules with weights, which I leaves behind. A schedule
# may defer several Ws, so a rank holds several sets of both. How many depends on the rank, and is found from
# the order of its actions.


class Occupancy(NamedTuple):
    """Describes what a pp rank holds in memory while it runs an action.

    kept, deferred, has_gradients: for each of the rank's stages, of how many microbatches activations are
        kept, how many Is wait for their W, and whether there are gradients of weights. The action's own
        microbatch counts as kept, and in W as waiting.
    """

    kind: str  # of the action: F, B, I or W
    place: int  # of the action's stage among those of the rank
    kept: tuple[int, ...]
    deferred: tuple[int, ...]
    has_gradients: tuple[bool, ...]

    @property
    def amounts(self) -> tuple[int, ...]:
        """Return everything that takes memory, in one tuple."""
        return (*self.kept, *self.deferred, *self.has_gradients)


def fullest_occupancies(work: Work, share: Share) -> list[Occupancy]:
    """Return what a rank holds in those actions of a step that can be the fullest."""
    layout = work.layout
    return _fullest(layout.schedule, layout.pp, share.stages, share.pp_rank, work.n_microbatches)


@lru_cache(maxsize=4096)
def _fullest(
    schedule: str, pp: int, stages: tuple[int, ...], rank: int, n_microbatches: int
) -> list[Occupancy]:
    """Return the occupancies that no other one of the same action surpasses in everything."""
    by_action: dict[tuple[str, int], list[Occupancy]] = {}
    # The middle rounds of a long step repeat each other.
    n_rounds = max(1, n_microbatches // pp)
    n_followed = n_microbatches if n_rounds <= 5 else 5 * n_microbatches // n_rounds
    for one in _occupancies(schedule, pp, stages, rank, n_followed):
        by_action.setdefault((one.kind, one.place), []).append(one)
    fullest = []
    for of_action in by_action.values():
        best: list[Occupancy] = []
        # In this order whatever surpasses another comes before it.
        for one in sorted(of_action, key=lambda one: one.amounts, reverse=True):
            if not any(all(map(operator.le, one.amounts, other.amounts)) for other in best):
                best.append(one)
        fullest += best
    return fullest


def _occupancies(
    schedule: str, pp: int, stages: tuple[int, ...], rank: int, n_microbatches: int
) -> set[Occupancy]:
    """Follow the actions of a rank through a step, and return each different occupancy."""
    places = range(len(stages))
    kept, deferred, has_gradients = [0 for _ in places], [0 for _ in places], [False for _ in places]
    seen: set[Occupancy] = set()
    for kind, stage, _ in order_of_rank(schedule, pp, len(stages), n_microbatches, rank):
        place = stages.index(stage)
        if stage == 0:  # it has no gradient of an input: its I is empty, and its W is a whole B
            if kind == "I":
                continue
            kind = "B" if kind == "W" else kind
        if kind == "F":
            kept[place] += 1
        seen.add(Occupancy(kind, place, tuple(kept), tuple(deferred), tuple(has_gradients)))
        # What the action leaves behind:
        if kind == "I":
            deferred[place] += 1
        elif kind != "F":
            kept[place] -= 1
            has_gradients[place] = True
            deferred[place] -= kind == "W"
    return seen


def made_again(work: Work, share: Share) -> float:
    """Return how many blocks, over all microbatches of a step, are recomputed twice: in I, and again in W."""
    if work.job.recompute != "full" or not splits_backward(work.layout):
        return 0.0
    layout, m = work.layout, work.n_microbatches
    n_rounds = max(1, m // layout.pp)
    count = partial(_halved, layout.schedule, layout.pp, share.stages, share.pp_rank)
    if n_rounds <= 5:
        halved = count(m)
    else:
        few, more = count(4 * m // n_rounds), count(5 * m // n_rounds)
        halved = [n + (n - before) * (n_rounds - 5) for before, n in zip(few, more, strict=True)]
    return sum(n * layers for n, layers in zip(halved, share.layers_of_stages, strict=True))


@lru_cache(maxsize=4096)
def _halved(schedule: str, pp: int, stages: tuple[int, ...], rank: int, n_microbatches: int) -> list[int]:
    """Return how many microbatches have a backward in two halves, for each stage of a rank."""
    order = order_of_rank(schedule, pp, len(stages), n_microbatches, rank)
    # The first stage has no gradient of an input: its I is empty.
    return [sum(one[:2] == ("I", stage) for one in order) if stage else 0 for stage in stages]


def deferred_per_token(work: Work) -> float:
    """Return how many numbers of each token the I of a block leaves for its W: the gradients of what q, k, v,
    gate and up give, and o and down, and the two norms. Those of o and down are whole on each tp rank."""
    model, tp = work.model, work.layout.tp
    D, F, E = model.hidden_size, model.intermediate_size, model.head_dim
    heads = (model.num_attention_heads + 2 * max(model.num_key_value_heads, tp)) * E / tp
    if model.family.qk_norm:
        heads += (model.num_attention_heads + max(model.num_key_value_heads, tp)) * E / tp
    return 2 * F / tp + heads + 2 * D + 2 * D / work.layout.sequence_shards


@dataclass(frozen=True)
class SplitBackward:
    """Counts what a rank holds in an action of a schedule that splits backward, beside parameters, optimizer
    states and gathered weights."""

    work: Work
    share: Share

    def bytes_of(self, now: Occupancy) -> dict[str, float]:
        """Return the bytes by kind, with the loss on the rank that has the head."""
        kinds = {"activations": self.activations(now), "gradients": self.gradients(now)}
        if self.share.has_head:
            kinds["loss"] = self.loss(now)
        return kinds

    @cached_property
    def per_token(self) -> int:
        """Return the bytes of one number of each token."""
        return self.work.states.itemsize * self.work.tokens

    @cached_property
    def trains_weights(self) -> bool:
        return not self.work.states.n_adapter

    @cached_property
    def first(self) -> int | None:
        """Return the place of the stage with the embedding among this rank's, if it is here."""
        return 0 if self.share.has_embedding else None

    @cached_property
    def last(self) -> int | None:
        """Return the place of the stage with the head among this rank's, if it is here."""
        return len(self.share.stages) - 1 if self.share.has_head else None

    # ---- Activations ----

    @cached_property
    def kept(self) -> float:
        return _kept_bytes(self.work)

    @cached_property
    def deferred(self) -> float:
        """Return the bytes that the I of a block leaves for its W."""
        return self.per_token * deferred_per_token(self.work)

    @cached_property
    def in_b(self) -> float:
        """Return the bytes that a block's whole backward needs while it runs."""
        return at_work_bytes(self.work)

    def n_outputs(self, now: Occupancy) -> int:
        """Return of how many microbatches the outputs of stages are kept, beside the inputs of blocks: an
        output that stays on the rank, at the turn of a V, is the input of the next stage."""
        stages, n_outputs = self.share.stages, sum(now.kept)
        if self.last is not None:
            n_outputs -= now.kept[self.last]
        if len(stages) == 2 and stages[1] == stages[0] + 1:
            n_outputs -= now.kept[1]
        return n_outputs

    @cached_property
    def in_i(self) -> float:
        """Return the bytes that the I of a block needs while it runs."""
        model, tp = self.work.model, self.work.layout.tp
        D, F, E = model.hidden_size, model.intermediate_size, model.head_dim
        H, K = model.num_attention_heads / tp, max(1, model.num_key_value_heads / tp)
        in_mlp = self.in_b - self.work.states.itemsize * D * F / tp * self.trains_weights
        if self.work.job.recompute == "full":
            return in_mlp
        # The gradient of q passes RoPE in fp32.
        in_rope = self.per_token * (2 * F / tp + 3 * D + 2 * K * E) + FP32 * self.work.tokens * 3 * H * E
        return max(in_mlp, in_rope)

    @cached_property
    def in_w(self) -> tuple[float, float]:
        """Return the bytes that the W of a block makes again, and how many of them, with the gradients of its
        weights, stay until the W of the whole stage is done. Only what products alone need does not."""
        model, tp = self.work.model, self.work.layout.tp
        D, F, E = model.hidden_size, model.intermediate_size, model.head_dim
        H = model.num_attention_heads / tp
        as_none = replace(self.work, job=replace(self.work.job, recompute="none"))
        again = self.per_token * (kept_per_token(as_none) - kept_per_token(self.work))
        of_weights = self.work.states.itemsize * self.work.n_block * self.trains_weights
        return again, again - self.per_token * (F / tp + 2 * D + H * E) + of_weights

    def activations(self, now: Occupancy) -> float:
        """Return the bytes of what forwards keep and Is leave, of messages, and of the block at work."""
        layers = self.share.layers_of_stages
        n_kept = sum(map(operator.mul, now.kept, layers))
        n_deferred = sum(map(operator.mul, now.deferred, layers))
        messages = _message_bytes(self.work, self.share, self.n_outputs(now))
        held = n_kept * self.kept + n_deferred * self.deferred + messages
        n_others = layers[now.place] - 1  # blocks of the stage that are not at work
        if now.kind == "B":
            return held + self.in_b
        if now.kind == "I":
            return held + n_others * self.deferred + self.in_i
        if now.kind == "W" and self.work.job.recompute == "full":
            # What I left goes block by block.
            again, stays = self.in_w
            return held + again + n_others * max(0.0, stays - self.deferred)
        return held

    # ---- Gradients and loss ----

    @cached_property
    def gradients_of_stages(self) -> list[float]:
        """Return the bytes of the gradients of each stage's weights."""
        gradients = [FP32 * layers * self.work.n_block for layers in self.share.layers_of_stages]
        for end in {self.first, self.last} - {None}:
            gradients[end] += FP32 * self.work.n_matrix
        return gradients

    def gradients(self, now: Occupancy) -> float:
        """Return the bytes of the gradients of weights, or of adapters."""
        if not self.trains_weights:
            return FP32 * self.work.n_adapters
        gradients = sum(map(operator.mul, self.gradients_of_stages, now.has_gradients))
        if self.share.has_head and now.kind != "F":
            # The gradient of the head waits for that of the embedding.
            gradients += self.work.states.itemsize * self.work.n_matrix
        return gradients

    def loss(self, now: Occupancy) -> float:
        """Return the bytes of the head, the loss and the last norm; the last stage is here."""
        kept, beside = _loss_bytes(self.work, self.trains_weights)
        # The last norm's weight waits for its gradient too.
        of_norm = self.per_token * self.work.model.hidden_size
        held = now.kept[self.last] * kept + now.deferred[self.last] * of_norm
        return held + beside if (now.kind, now.place) == ("F", self.last) else held


# ---- Bytes of a rank ----


def bytes_of_rank(work: Work, share: Share | None = None) -> dict[str, float]:
    """Return the bytes on the device of a rank, by kind, at the fullest moment of a step.

    share: of a pp rank; None: the one that needs the most."""
    if share is None:
        ranks = [bytes_of_rank(work, each) for each in kinds_of_shares(work.model, work.layout)]
        return max(ranks, key=lambda kinds: sum(kinds.values()))
    moments = [_end_of_backward(work, share)]
    if splits_backward(work.layout):
        gathered, halves = _gathered_bytes(work, share, 1), SplitBackward(work, share)
        occupied = fullest_occupancies(work, share)
        moments += [{"gathered": gathered} | halves.bytes_of(now) for now in occupied]
    else:
        moments += [_last_loss(work, share), *_first_backwards(work, share)]
    states = _state_bytes(work, share)
    return max((states | moment for moment in moments), key=lambda kinds: sum(kinds.values()))


def _last_loss(work: Work, share: Share) -> dict[str, float]:
    """Return what is held in the loss of the last microbatch, when all activations are there."""
    kinds = {
        "gathered": _gathered_bytes(work, share, 1),
        "gradients": _waiting_gradient_bytes(work, share),
        "activations": _activation_bytes(work, share),
    }
    if share.has_head:
        kept, beside = _loss_bytes(work, trains_head=not work.states.n_adapter)
        n_kept = in_flight(work, share) if work.layout.schedule == "gpipe" else 1
        kinds["loss"] = kept * n_kept + beside
    return kinds


def _first_backwards(work: Work, share: Share) -> Iterator[dict[str, float]]:
    """Yield what is held in the backward of the first block, and of the second, while the gradients of the
    first are reduced."""
    trained = work.trained_share(share)
    activations = _activation_bytes(work, share) + at_work_bytes(work)
    # The gradient of the head waits for that of the embedding.
    of_head = work.states.itemsize * work.n_matrix * share.has_head * trained
    first = {
        "gathered": _gathered_bytes(work, share, 2),
        "gradients": _waiting_gradient_bytes(work, share) + of_head,
        "activations": activations,
    }
    yield first
    # A block's gradients are whole and fp32 until they are reduced; in a pipeline that is after the step.
    reduces = work.gathers and work.layout.pp == 1
    reduced = FP32 * work.n_block * reduces * trained
    yield first | {"activations": activations - _kept_bytes(work), "reduced": reduced}


def _end_of_backward(work: Work, share: Share) -> dict[str, float]:
    """Return what is held while the gradients of embedding, norm and head are reduced."""
    of_ends = work.n_ends(share) * work.trained_share(share)
    return {
        "gathered": _gathered_bytes(work, share, 1),
        "gradients": _gradient_bytes(work, share) + work.states.itemsize * of_ends,
        "reduced": FP32 * of_ends * work.gathers,
    }


def _state_bytes(work: Work, share: Share) -> dict[str, float]:
    """Return the bytes of parameters and optimizer states, which are there in every moment."""
    states, itemsize, here = work.states, work.states.itemsize, work.n_whole(share) / work.shards
    if states.n_adapter:  # frozen weights have no states
        adapters = FP32 * work.n_adapters / work.shards
        on_device = states.resident if states.offloads else 1.0
        return {"parameters": itemsize * here + adapters, "optimizer": 2 * adapters * on_device}
    if work.is_managed:
        # What a master has more bytes than the weight that computes is kept beside the two moments.
        per_parameter = 2 * FP32 + FP32 - itemsize
        resident, _ = work.on_device
        return {"parameters": itemsize * here, "optimizer": per_parameter * here * resident}
    # A tied matrix is stepped on the first pp rank alone; the last has a copy.
    is_copy = work.model.tie_word_embeddings and share.has_head and not share.has_embedding
    stepped = here - is_copy * work.n_matrix / work.shards
    return {"parameters": FP32 * here, "optimizer": 2 * FP32 * stepped}


def _gradient_bytes(work: Work, share: Share) -> float:
    """Return the bytes of the gradients when all are there."""
    whole = work.n_whole(share)
    if work.states.n_adapter:
        return FP32 * work.n_adapters / (1 if work.keeps_gradients else work.shards)
    if work.is_managed and (work.accumulates or not work.keeps_gradients):  # otherwise FSDP sums them
        per_parameter = FP32 if work.accumulates else work.states.itemsize
        return per_parameter * whole / work.shards * sum(work.on_device)
    return FP32 * (whole if work.keeps_gradients else whole / work.shards)


def _waiting_gradient_bytes(work: Work, share: Share) -> float:
    """Return the bytes of gradients that earlier microbatches left, when all activations are there."""
    is_gpipe = work.layout.pp > 1 and work.layout.schedule == "gpipe"  # all forwards, then all backwards
    return 0.0 if work.n_microbatches == 1 or is_gpipe else _gradient_bytes(work, share)


def _gathered_bytes(work: Work, share: Share, n_blocks: int) -> float:
    """Return the bytes of gathered weights: of what is outside the blocks, and of `n_blocks` at a time or, if
    they stay gathered, of all."""
    if not work.gathers:
        return 0.0
    n_block = work.n_block + work.n_adapters / max(1, share.n_layers)
    n_here = share.n_layers if work.keeps_weights else min(n_blocks, share.n_layers)
    return work.states.itemsize * (work.n_ends(share) + n_here * n_block)


def _activation_bytes(work: Work, share: Share) -> float:
    """Return the bytes that the blocks keep of all microbatches in flight, and the buffers of messages."""
    n_in_flight = in_flight(work, share)
    n_outputs = n_in_flight * (len(share.stages) - share.has_head)
    kept = _kept_bytes(work) * share.n_layers * n_in_flight + _message_bytes(work, share, n_outputs)
    if not work.states.inputs_on_host:
        return kept
    n_gone = max(0, share.n_layers - 2) * n_in_flight  # the inputs of two blocks stay
    return kept - n_gone * work.hidden_bytes / work.layout.sequence_shards


def _kept_bytes(work: Work) -> float:
    """Return the bytes that a block keeps, with what attention and the norms keep of each token in fp32."""
    numbers = work.tokens * kept_per_token(work)
    if work.job.recompute == "full" or work.job.device_type == "cpu":
        return work.states.itemsize * numbers
    of_tokens = work.tokens * (work.model.num_attention_heads / work.layout.tp + 2)
    return work.states.itemsize * numbers + FP32 * of_tokens


def _message_bytes(work: Work, share: Share, n_outputs: float) -> float:
    """Return the bytes of what a pipeline rank receives and sends, beside the inputs that blocks keep: the
    outputs of stages, which torch keeps until their backward, and in backward the gradient that came in and
    the one that will go out.

    n_outputs: of how many microbatches outputs are kept"""
    if work.layout.pp == 1:
        return 0.0
    n_gradients = (not share.has_embedding) + (not share.has_head) + _sends_under_way(work, share)
    return (n_outputs + n_gradients) * work.hidden_bytes / work.layout.sequence_shards


def _sends_under_way(work: Work, share: Share) -> int:
    """Return how many gradients a pipeline rank has sent on and still holds when it is fullest.

    Where a rank has several stages, and in schedules that split backward, a stage waits for all but its last
    SENDS_UNDER_WAY sends (parallel/stage.py). Counted steps of all schedules hold as many as said here, or
    one or two more or fewer."""
    layout = work.layout
    if layout.schedule in ("gpipe", "1f1b"):
        return 0
    n_senders = sum(stage > 0 and stage - 1 not in share.stages for stage in share.stages)
    if SCHEDULES[layout.schedule].v_shaped:
        return SENDS_UNDER_WAY * n_senders
    return max(0, n_senders + (share.pp_rank == layout.pp - 1) - (share.pp_rank == 0))


def _loss_bytes(work: Work, trains_head: bool) -> tuple[float, float]:
    """Return two numbers of bytes: what the last norm and the loss keep of a microbatch, and what they need
    beside it for a while (dtensor_llama/loss.py).

    Kept are hidden states, their gradient, and the gradient of the head in fp32. Beside them there is in
    forward a chunk of logits with its gradient, and in backward the scaled gradient of the head."""
    layout, itemsize, D = work.layout, work.states.itemsize, work.model.hidden_size
    n_columns = ceil(work.model.vocab_size / layout.tp)
    logits = min(work.tokens, loss.tokens_per_chunk(n_columns)) * n_columns
    per_logit = 2 * itemsize
    if work.job.device_type == "cpu":  # there it is eager, and computes in fp32
        logits = min(work.tokens * n_columns, loss.EAGER_ELEMENTS)
        per_logit = 2.5 * FP32
    whole = itemsize * work.tokens * D
    own = whole / layout.sequence_shards
    kept = own + whole + FP32 * work.n_matrix * trains_head
    before_norm = own + whole if layout.sequence_shards > 1 else whole
    beside = max(before_norm + per_logit * logits, (FP32 + itemsize) * work.n_matrix * trains_head)
    return kept, beside


def in_gib(n_bytes: float) -> str:
    """Return a number of GiB with one digit after the point or, below 1 GiB, with three digits that count."""
    gib = n_bytes / GIB
    return f"{gib:.1f}" if gib >= 1 else f"{gib:.3g}"


def in_billions(config: LlamaConfig) -> str:
    """Return the number of parameters as 69.0G, or of a small model as 11.2M."""
    n = config.n_parameters
    return f"{n / 1e9:.1f}G" if n >= 1e8 else f"{n / 1e6:.1f}M"


def bytes_needed(job: Job, layout: ParallelConfig, states: States) -> int:
    """Return about how many bytes of device memory a rank needs."""
    return int(sum(bytes_of_rank(Work(job, layout, states)).values()))


def check_states(
    config: LlamaConfig, layout: ParallelConfig, device_bytes: int, bytes_per_parameter: float
) -> None:
    """Raise UsageError if weights, gradients and AdamW's states alone are more than the device of a rank has.

    layout: resolved. bytes_per_parameter: 16 if all of them are in float32 on the device (4 of the 16 are
        gradients), fewer if a chunk manager keeps states on the host. Activations are not counted here.
    """
    here = config.n_parameters / (layout.tp * layout.pp)
    if layout.zero_stage == 0:
        needed = bytes_per_parameter * here
    elif layout.zero_stage == 1:
        needed = 4 * here + (bytes_per_parameter - 4) * here / layout.fsdp
    else:
        needed = bytes_per_parameter * here / layout.fsdp
    if needed > device_bytes:
        n_gpus = ceil(bytes_per_parameter * config.n_parameters / device_bytes)
        raise UsageError(
            f"weights, gradients and AdamW's states of {in_billions(config)} parameters take "
            f"{in_gib(needed)} GiB of each device ({bytes_per_parameter:g} bytes a parameter), which has "
            f"{in_gib(device_bytes)} GiB; use placement=auto, which keeps on the host what the device "
            f"cannot hold, or share them over more ranks: at least {n_gpus} with zero_stage=3."
        )


# ---- Traffic -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CollectiveCost:
    """Holds the collectives of one kind in a step of a rank, which all have the same size."""

    axis: str
    kind: str
    what: str
    count: float
    whole_bytes: float  # of the tensor on all ranks together; for an all-to-all or a send what this rank has
    n_ranks: int
    stride: int  # neighbours on the axis are so many GPUs apart
    behind: str = ""  # what it runs beside: "forward", "backward", "product", "attention", or nothing

    @property
    def sent_bytes(self) -> float:
        """Return what one rank sends in a step if each collective goes round a ring."""
        times = 2 if self.kind == "all-reduce" else 1
        return self.count * times * self.whole_bytes * self._share

    @property
    def _share(self) -> float:
        return 1.0 if self.kind == "send" else (self.n_ranks - 1) / self.n_ranks

    def seconds(self, cluster: Cluster, stack: "Stack") -> float:
        """Return the time of all of them, alone: hops, and bytes at the rate of the slowest wire.

        Between nodes a ring passes each node's wires once, and all ranks of the axis in the node have one
        each: so eight ranks of a node have eight cards together, and one rank has its own."""
        in_node = cluster.ranks_in_node(self.n_ranks, self.stride)
        n_nodes = ceil(self.n_ranks / in_node)
        rate = cluster.node_bytes_s * stack.link
        hops = (in_node - 1) * HOP_S
        if n_nodes > 1:
            rate = min(rate, in_node * cluster.network_bytes_s * stack.network)
            hops += (n_nodes - 1) * NETWORK_HOP_S
        if self.kind == "all-to-all" and n_nodes > 1:  # no ring: each rank sends to each, over its own card
            rate = cluster.network_bytes_s * stack.network
        times = 2 if self.kind == "all-reduce" else 1
        return self.sent_bytes / rate + self.count * (times * hops + LAUNCH_S)


def stride_of(layout: ParallelConfig, axis: str) -> int:
    """Return how many GPUs apart the neighbours on an axis are: tp is innermost."""
    inner = {"fsdp": "cp", "dp_cp": "cp", "dp": "dp_shard"}.get(axis, axis)
    return prod(layout.sizes[name] for name in AXES[AXES.index(inner) + 1 :])


def traffic(work: Work, share: Share) -> list[CollectiveCost]:
    """Return what a pp rank with this share sends in a step."""
    found = [
        *_zero_traffic(work, share),
        *_tp_traffic(work, share),
        *_cp_traffic(work, share),
        *_pp_traffic(work, share),
    ]
    return [each for each in found if each.count and each.n_ranks > 1]


def _zero_traffic(work: Work, share: Share) -> Iterator[CollectiveCost]:
    """Yield what ZeRO sends: see zero.py. A block at a time, and what is outside the blocks as one unit."""
    layout, stage, n = work.layout, work.layout.zero_stage, work.shards
    each = work.n_microbatches if layout.pp == 1 else 1
    gathers, reduces = (each if stage == 3 else 1), (each if stage >= 2 else 1)
    again = stage == 3 and layout.pp == 1
    ends = work.n_ends(share)
    trained = work.states.n_adapter / work.model.n_parameters if work.states.n_adapter else 1.0
    stride = stride_of(layout, "fsdp")
    for numbers, count, is_block in ((work.n_block, share.n_layers, True), (ends, 1, False)):
        weights, gradients = work.states.itemsize * numbers, FP32 * numbers * trained
        hides = is_block and "forward"
        if n > 1 and numbers:
            yield CollectiveCost(
                "fsdp", "all-gather", "weights", gathers * count, weights, n, stride, hides or ""
            )
            if again and is_block:
                yield CollectiveCost(
                    "fsdp", "all-gather", "weights", gathers * count, weights, n, stride, "backward"
                )
            yield CollectiveCost(
                "fsdp", "reduce-scatter", "gradients", reduces * count, gradients, n, stride, "backward"
            )
        replicas = layout.gradient_ranks // n
        axis = "dp_replicate"
        if not stage and layout.fsdp > 1:
            axis = "fsdp" if layout.dp_replicate == 1 else "dp_cp"
        stride_out = stride * n if stage else stride
        yield CollectiveCost(
            axis, "all-reduce", "gradients", count, gradients / n, replicas, stride_out, "backward"
        )


def _tp_traffic(work: Work, share: Share) -> Iterator[CollectiveCost]:
    """Yield what the rows of the tensor-parallel plan send."""
    layout, M = work.layout, work.n_microbatches
    if layout.tp == 1:
        return
    n_modules = {
        "model.embed_tokens": share.has_embedding,
        "model.norm": share.has_head,
        "token_loss": share.has_head,
        "lm_head": 0,  # its row is for logits, and with labels there are none
    }
    for name, row in tensor_plan_of(work.model, layout.tp, layout.sequence_parallel).items():
        in_block = ".*." in name
        # Recompute repeats the forward of a block, but for its last sum, which nothing in backward needs.
        repeats = in_block and work.job.recompute != "none" and not name.endswith("down_proj")
        n_here = M * (share.n_layers if in_block else n_modules[name])
        n_forwards = n_here * 2 + made_again(work, share) if repeats else n_here
        for collectives, is_forward in ((row.forward, True), (row.backward, False)):
            for kind, number in collectives.items():
                what, number, whole_bytes = _of_row(work, name, row, kind, number if is_forward else -number)
                count = number * (n_forwards if is_forward else n_here)
                behind = "product" if what == "activations" else ""
                yield CollectiveCost("tp", kind, what, count, whole_bytes, layout.tp, 1, behind)


def _of_row(work: Work, name: str, row: Row, kind: str, number: int) -> tuple[str, int, float]:
    """Return (what it carries, how many there are, bytes of the whole tensor) for a collective of a row and
    one microbatch. number: of them; below 0 in backward."""
    if name == "token_loss" and number > 0 and kind == "all-reduce":
        # Once per chunk of tokens; together they carry 3 fp32 numbers a token.
        chunk_tokens = loss.tokens_per_chunk(-(-work.model.vocab_size // work.layout.tp))
        n_sums = number * -(-work.tokens // chunk_tokens)
        return "sums of the loss", n_sums, 3 * FP32 * work.tokens / n_sums
    if row.weight == "R" and kind == "all-reduce":
        # Each rank used the whole weight for its own tokens, or for its own head.
        shapes = {f"model.layers.*.{own}": shape for own, shape in work.model.block_weights().items()}
        shapes["model.norm.weight"] = (work.model.hidden_size,)
        n_numbers = prod(shapes[f"{name}.weight"]) + prod(shapes.get(f"{name}.bias", (0,)))
        return "gradients of whole weights", abs(number), FP32 * n_numbers / abs(number)
    return "activations", abs(number), work.hidden_bytes


def _cp_traffic(work: Work, share: Share) -> Iterator[CollectiveCost]:
    """Yield what attention sends, by the formulas in context.py. Recompute repeats forward, but `selective`
    keeps what the ring gave."""
    layout, model, cp = work.layout, work.model, work.layout.cp
    if cp == 1:
        return
    passes, itemsize = share.n_layers * work.n_microbatches, work.states.itemsize
    H, K = model.num_attention_heads // layout.tp, max(1, model.num_key_value_heads // layout.tp)
    head, stride = work.tokens * model.head_dim, stride_of(layout, "cp")
    if layout.cp_method == "ulysses":
        n = passes * (2 if work.job.recompute == "none" else 3) + made_again(work, share)
        numbers = (2 * H + 2 * math.lcm(K, cp)) / 4  # of q, k, v and out in the mean
        yield CollectiveCost("cp", "all-to-all", "q, k, v, out", 4 * n, itemsize * head * numbers, cp, stride)
        return
    n = (passes * (3 if work.job.recompute == "full" else 2) + made_again(work, share)) * (cp - 1)
    pair = 2 * head * K
    yield CollectiveCost("cp", "send", "k, v", n, pair * itemsize, cp, stride, "attention")
    yield CollectiveCost("cp", "send", "gradients of k, v", passes * cp, pair * FP32, cp, stride, "attention")


def _pp_traffic(work: Work, share: Share) -> Iterator[CollectiveCost]:
    """Yield what stages send: hidden states to the stage after, gradients to the one before, where that stage
    is on another rank."""
    layout = work.layout
    if layout.pp == 1:
        return
    count, stride = work.n_microbatches * share.n_neighbours, stride_of(layout, "pp")
    whole = work.hidden_bytes / layout.sequence_shards
    yield CollectiveCost("pp", "send", "hidden states, gradients", count, whole, layout.pp, stride)
    if work.model.tie_word_embeddings and share.has_embedding != share.has_head:
        # The weight goes one way, and its gradient comes back.
        whole = FP32 * work.n_matrix / work.shards
        yield CollectiveCost("pp", "send", "the tied matrix", 1, whole, layout.pp, stride)


# ---- Time --------------------------------------------------------------------------------------------------

# Latencies of collectives over NVLink, as SimuMax measured them on 8 B200 (configs/system/
# b200_bf16_ceperm.json): 23 us until one begins and its ranks have met, and 8 to 9 us for each hop. A hop
# over the network is given a few us more.
LAUNCH_S = 23e-6
HOP_S = 8e-6
NETWORK_HOP_S = 12e-6
ATTENTION_BACKWARD = 0.8  # of the forward's rate: FlashAttention-2 and 3, arXiv:2307.08691 and 2407.08608


@dataclass(frozen=True)
class Stack:
    """Holds what one kind of software reaches of the hardware's rates."""

    name: str
    matmul: float  # of matmul_flops, in matrix products
    attention: float  # of matmul_flops, in attention's forward
    memory: float  # of the memory's bandwidth, in kernels that only read and write
    passes: float  # how often these touch a number if they are not compiled, which touch it once
    link: float  # of NVLink's bandwidth, in collectives of a node
    network: float  # of the network's
    contention: float  # what a hidden second of communication takes from the computation beside it
    tp_hides: float  # share of tp's collectives that run beside products
    block_launch_s: float  # what the CPU needs to launch a block's forward: a GPU that is faster waits
    is_megatron: bool = False  # see the places that ask for it


# Measured in this trainer's step of 7B on one H200 (recipes/bench/README.md): PyTorch's matmul and attention,
# 687 and 475 of 794 TFLOP/s, and memory, 3.8 to 3.9 of 4.8 TB/s in AdamW and in sums of gradients. Taken from
# others: link, what SimuMax measured of B200's NVLink (0.67 to 0.74), and network, what nccl-tests reach of
# 400 Gbit/s (42 to 48 GB/s). Fitted on half of the published rows (docs/planning.md): passes, contention, and
# all but these of Megatron's. block_launch_s stands for about 50 kernels of 20 us in eager PyTorch, and for
# half as many where they are fused.
PYTORCH = Stack(
    "pytorch",
    matmul=0.865,
    attention=0.598,
    memory=0.8,
    passes=2.51,
    link=0.67,
    network=0.85,
    contention=0.25,
    tp_hides=0.0,
    block_launch_s=1e-3,
)
MEGATRON = Stack(
    "megatron",
    matmul=0.976,
    attention=0.9,
    memory=0.8,
    passes=1.66,
    link=0.67,
    network=0.85,
    contention=0.132,
    tp_hides=0.54,
    block_launch_s=0.5e-3,
    is_megatron=True,
)
STACKS = {stack.name: stack for stack in (PYTORCH, MEGATRON)}


@dataclass(frozen=True)
class Seconds:
    """Holds the seconds of one microbatch on one pp rank, without what waits for other ranks."""

    products: float = 0.0
    attention: float = 0.0
    memory_bound: float = 0.0
    head: float = 0.0

    @property
    def total(self) -> float:
        return self.products + self.attention + self.memory_bound + self.head


def flops_rate(work: Work, cluster: Cluster) -> float:
    """Return what large matrix products sustain in the type that computes. Where the rate of float32 is
    unknown, that of bfloat16 stands for it: it decides the order of layouts alone."""
    in_float32 = work.states.itemsize == FP32 and cluster.gpu.float32_flops
    return in_float32 or cluster.gpu.matmul_flops


def product_seconds(work: Work, cluster: Cluster, stack: Stack, shape: tuple[float, float, float]) -> float:
    """Return the time of a matrix product (m, k) x (k, n), from its FLOPs and its bytes."""
    m, k, n = shape
    flops = 2 * m * k * n / (flops_rate(work, cluster) * stack.matmul)
    n_bytes = work.states.itemsize * (m * k + k * n + m * n) / (cluster.gpu.memory_bytes_s * stack.memory)
    return math.hypot(flops, n_bytes)


def block_seconds(work: Work, cluster: Cluster, stack: Stack) -> tuple[Seconds, Seconds]:
    """Return the time of a block's forward and of its backward, for one microbatch."""
    model, layout, tp = work.model, work.layout, work.layout.tp
    D, F, E = model.hidden_size, model.intermediate_size, model.head_dim
    H, K = model.num_attention_heads, model.num_key_value_heads
    heads = (H + 2 * max(K, tp)) * E / tp
    products = sum(
        product_seconds(work, cluster, stack, (work.tokens, rows, columns))
        for rows, columns in ((D, heads), (H * E / tp, D), (D, F / tp), (D, F / tp), (F / tp, D))
    )
    attention, attention_backward = attention_seconds(work, cluster, stack)
    # Two norms (read, write) and two sums (read twice, write); RoPE (read, write q and k); SwiGLU.
    numbers = 10 * D / layout.sequence_shards + 2 * (H + K) * E / tp + 3 * F / tp
    memory_rate = cluster.gpu.memory_bytes_s * stack.memory
    passes = 1.0 if work.job.compile else stack.passes
    memory_bound = passes * work.states.itemsize * numbers * work.tokens / memory_rate
    forward = Seconds(products, attention, memory_bound)
    again = {"none": (0, 0), "selective": (0, 1), "full": (1, 1)}[work.job.recompute]
    gradients = 1 if work.states.n_adapter else 2  # frozen weights have none
    backward = Seconds(
        products * (gradients + again[0]),
        attention_backward + attention * again[0],
        memory_bound * (2 + again[1]),
    )
    # Backward has twice the kernels of forward, and about half of a forward's are not matrix products.
    launches = 2 + max(again[0], again[1] / 2)
    launch_s = stack.block_launch_s
    return _launched(forward, launch_s), _launched(backward, launches * launch_s)


def attention_seconds(work: Work, cluster: Cluster, stack: Stack) -> tuple[float, float]:
    """Return the time of attention in a block's forward and in its backward, for one microbatch.

    Forward has two products over the keys of each token, backward has five. The kernel math stores its scores
    and makes none of them again, so that its backward has four. By its operations it writes or reads float32
    scores 9 times in forward and 11 times in backward, and makes them in a float32 product."""
    model = work.model
    scores = work.tokens * keys_per_token(work) * model.num_attention_heads / work.layout.tp
    flops = 4 * scores * model.head_dim
    if kernel_of(work.job, work.layout, work.states.itemsize) == "math":
        rates = cluster.gpu.float32_flops or cluster.gpu.matmul_flops, flops_rate(work, cluster)
        products_s = sum(flops / 2 / (rate * stack.matmul) for rate in rates)
        pass_s = FP32 * scores / (cluster.gpu.memory_bytes_s * stack.memory)
        return products_s + 9 * pass_s, 2 * products_s + 11 * pass_s
    rate = cluster.gpu.attention_flops
    if rate is None or (work.states.itemsize == FP32 and work.job.device_type != "cpu"):  # measured in bf16
        rate = flops_rate(work, cluster) * stack.attention
    forward = flops / rate
    return forward, 2.5 * forward / ATTENTION_BACKWARD


def kernel_of(job: Job, layout: ParallelConfig, itemsize: int) -> str:
    """Return the attention kernel of a job. For auto it is what choose_attention takes where flash-attn is
    not installed. itemsize: bytes of the numbers that compute."""
    if job.attention != "auto":
        return job.attention
    has_varlen = job.device_type == "cuda" and itemsize < FP32 and not layout.is_ring
    return "varlen" if job.document_tokens and has_varlen else "sdpa"


def keys_per_token(work: Work) -> float:
    """Return how many keys a kernel multiplies a query with, in the mean of all queries and blocks.

    A causal kernel leaves out the later half. flash and varlen also leave out other documents and what is
    beyond a sliding window; a mask of these hides scores that are computed all the same."""
    job, model, T = work.job, work.model, work.job.seq_len
    kernel = kernel_of(job, work.layout, work.states.itemsize)
    length = min(job.document_tokens or T, T)
    if kernel == "math":
        return T
    if kernel == "flash" or (kernel == "varlen" and job.document_tokens):
        widths = [min(length, model.window(layer) or length) for layer in range(model.num_hidden_layers)]
        return sum(width - width**2 / (2 * length) for width in widths) / len(widths)
    if work.layout.is_ring:
        # A rank's own share of the keys comes first, and half of it is hidden. Of the other shares a rank
        # computes only the half that it sees.
        cp = work.layout.cp
        return T * (cp + 1) / (2 * cp) if job.document_tokens else T / 2
    masked = [job.document_tokens or (model.window(i) or T) < T for i in range(model.num_hidden_layers)]
    return sum(T if is_masked else T / 2 for is_masked in masked) / len(masked)


def _launched(seconds: Seconds, launch_s: float) -> Seconds:
    """Return what a block takes if the CPU needs so long to launch its kernels."""
    return replace(seconds, memory_bound=seconds.memory_bound + max(0.0, launch_s - seconds.total))


def head_seconds(work: Work, cluster: Cluster, stack: Stack) -> float:
    """Return the time of the head and of the loss, forward and backward: three products, and fp32 logits
    that are written once and read and written twice."""
    vocabulary = work.model.vocab_size / work.layout.tp
    product = product_seconds(work, cluster, stack, (work.tokens, work.model.hidden_size, vocabulary))
    logits = 5 * FP32 * work.tokens * vocabulary / (cluster.gpu.memory_bytes_s * stack.memory)
    return 3 * product + logits


def step_update_seconds(work: Work, share: Share, cluster: Cluster, stack: Stack) -> float:
    """Return the time of clipping and AdamW. Per parameter AdamW reads and writes 28 bytes, the norm 4."""
    trained = work.n_adapters or work.n_whole(share)
    return 32 * trained / work.shards / (cluster.gpu.memory_bytes_s * stack.memory)


def gather_copy_seconds(work: Work, share: Share, cluster: Cluster, stack: Stack) -> float:
    """Return the time of the copies around ZeRO's collectives in one microbatch.

    Before weights are gathered, a rank casts its own from float32 (6 bytes a parameter) and copies them into
    the buffer that is sent (4); afterwards all are copied into their places (4). Gradients are cast into a
    flat float32 buffer (6), and their sums are added to those of earlier microbatches (12)."""
    n, M = work.n_whole(share), work.n_microbatches
    own = n / work.shards
    if work.states.n_adapter:
        n_bytes = 8 * n if work.layout.zero_stage == 3 else 0
    elif work.is_managed and work.layout.gradient_ranks == work.layout.pp == 1:  # nothing is gathered
        n_bytes = 10 * n if M > 1 else 0
    elif work.keeps_weights and work.keeps_gradients:
        n_bytes = 10 * n  # a bf16 gradient is added to an fp32 one
    else:
        gathers = 1 / M if work.keeps_weights else 2
        casts = 0 if work.is_managed else 6
        n_bytes = gathers * ((casts + 4) * own + 4 * n) + 6 * n + 12 * own * (1 - 1 / M)
    return n_bytes / (cluster.gpu.memory_bytes_s * stack.memory)


# ---- The account -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Account:
    """Holds what a layout costs: bytes of the fullest rank, traffic and seconds of a step."""

    work: Work
    cluster: Cluster
    bytes: dict[str, float]  # on the device, by kind
    traffic: list[CollectiveCost]
    # of a step, by what they are spent on: they sum to step_seconds
    seconds: dict[str, float]
    host_bytes: float = 0.0

    @property
    def peak_gib(self) -> float:
        return sum(self.bytes.values()) / GIB

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.work.tokens_per_step / self.step_seconds / self.work.n_gpus

    @property
    def mfu(self) -> float:
        """Return the MFU, of the peak in the type that computes."""
        flops = model_flops_per_token(self.work.model, self.work.job.seq_len)
        gpu, peak = self.cluster.gpu, self.cluster.gpu.peak_flops
        if self.work.states.itemsize == FP32:
            peak = gpu.float32_flops or peak
        return self.tokens_per_second_per_gpu * flops / peak

    @property
    def bubble(self) -> float:
        return self.seconds["bubble"] / self.step_seconds

    @property
    def exposed(self) -> float:
        """Return the share of the step in which a rank waits for communication."""
        return sum(self.seconds[f"waiting for {axis}"] for axis in WAITS) / self.step_seconds

    def gib_per_axis(self, cluster: Cluster) -> dict[str, dict[str, float]]:
        """Return GiB sent in a step by axis, within nodes and between them."""
        sums: dict[str, dict[str, float]] = {}
        for each in self.traffic:
            spans = cluster.ranks_in_node(each.n_ranks, each.stride) < each.n_ranks
            where = sums.setdefault(each.axis, {"within nodes": 0.0, "between nodes": 0.0})
            where["between nodes" if spans else "within nodes"] += each.sent_bytes / GIB
        return sums


WAITS = ("dp", "tp", "cp", "pp")


def account_for(work: Work, cluster: Cluster, stack: Stack = PYTORCH) -> Account:
    """Return what a layout costs on a cluster, without asking whether its rules or its bytes allow it."""
    # Megatron gives each pipeline stage as many layers, whoever has the head.
    ranks = kinds_of_shares(work.model, work.layout, evenly=stack.is_megatron)
    timed = [(_rank_seconds(work, share, cluster, stack), share) for share in ranks]
    seconds, slowest = max(timed, key=lambda each: sum(each[0].values()))
    host_bytes = max(inputs_on_host_bytes(work, share) for share in ranks)
    return Account(work, cluster, bytes_of_rank(work), traffic(work, slowest), seconds, host_bytes)


def numbers_of_rank(work: Work) -> int:
    """Return how many parameters the fullest rank keeps states of."""
    if work.states.n_adapter:
        return int(work.n_adapters / work.shards)
    return int(max(work.n_whole(share) for share in shares(work.model, work.layout)) / work.shards)


def machine_rates(cluster: Cluster, stack: Stack = PYTORCH) -> dict[str, float]:
    """Return the fields of memory.tracer.MachineRates for one GPU of the cluster and its share of a host."""
    link = cluster.gpu.host_link_bytes_s
    return {
        "h2d": link,
        "d2h": link,
        "duplex": 2 * link,
        "dram_in_update": cluster.host_dram_bytes_s,
        "host_adam": cluster.host_adam_per_s,
        "device_adam": cluster.gpu.memory_bytes_s * stack.memory / 28,
    }


def budgets_of(memory: Any, cluster: Cluster) -> dict[str, int]:
    """Return how many bytes of its GPU and of its host a rank may take: what a memory.MemoryConfig allows, or
    what is there."""
    device, host = cluster.gpu.memory_gib * FITS_SHARE, cluster.host_memory_gib
    if memory is not None:
        device = min(memory.device_budget_gib or device, cluster.gpu.memory_gib)
        host = memory.host_budget_gib or host
    return {"device": int(device * GIB), "host": int(host * GIB)}


def account_with_offload(
    work: Work,
    cluster: Cluster,
    foresee: Callable,
    stack: Stack = PYTORCH,
    other_bytes: int | None = None,
) -> Account:
    """Return what a layout costs if a chunk manager has the states and places them as `work.states.memory`
    says, or as its own planner foresees it. The work of the account has the shares on the device.

    foresee: memory.auto.foresee, which this package does not import. other_bytes: on the device whatever the
    placement, beside the weights; None: as accounted for. Raises UsageError if no plan fits."""
    states = replace(work.states, offloads=True, resident=0.0, stream=0.0)
    account = account_for(replace(work, states=states), cluster, stack)
    seconds = dict(account.seconds)
    computing = sum(seconds.values()) - seconds.pop("optimizer")
    forwards = 4 if work.job.recompute == "full" else 3  # that a forward and its backward take
    if other_bytes is None:
        other_bytes = int(sum(account.bytes.values()) - account.bytes["parameters"])
    traced = {
        "non_model_peak_bytes": other_bytes,
        "forward_seconds": computing / forwards,
        "backward_seconds": computing * (forwards - 1) / forwards,
        "host_bytes": int(account.host_bytes),
    }
    run = {"itemsize": states.itemsize, "accumulates": work.accumulates, "clips": states.clips}
    budgets, rates = budgets_of(states.memory, cluster), machine_rates(cluster, stack)
    n = numbers_of_rank(work)
    plan = foresee(n, states.memory, budgets, rates, traced, run)
    placed = replace(states, resident=plan.split.resident / n, stream=plan.split.stream / n)
    account = replace(account, work=replace(work, states=placed))
    kinds = bytes_of_rank(account.work)
    kinds["optimizer"] += plan.device_bytes["ring"]
    of_plan = plan.seconds
    # The norm of the gradients is taken on the device, wherever they go from there.
    norm_s = 4 * n / (cluster.gpu.memory_bytes_s * stack.memory)
    seconds["optimizer"] = of_plan["resident_adam"] + norm_s
    seconds["waiting for host"] += max(0.0, of_plan["step"] - computing - of_plan["resident_adam"])
    seconds["contention"] += stack.contention * min(of_plan["update"], of_plan["beside_update"])
    return replace(account, bytes=kinds, seconds=seconds, host_bytes=float(sum(plan.host_bytes.values())))


def inputs_on_host_bytes(work: Work, share: Share) -> float:
    """Return the bytes of block inputs that a rank has on the host: of all blocks of a stage but the last."""
    n_inputs = sum(max(0.0, n - 1) for n in share.layers_of_stages or (share.n_layers,))
    n_inputs *= work.n_microbatches if work.layout.pp > 1 else 1
    return work.states.inputs_on_host * n_inputs * work.hidden_bytes / work.layout.sequence_shards


def _rank_seconds(work: Work, share: Share, cluster: Cluster, stack: Stack) -> dict[str, float]:
    """Return the seconds of a step on a pp rank, by what they are spent on."""
    M, layout = work.n_microbatches, work.layout
    forward, backward = block_seconds(work, cluster, stack)
    head = head_seconds(work, cluster, stack) if share.has_head else 0.0
    n_blocks, n_again = M * share.n_layers, made_again(work, share)
    n_forwards = n_blocks + n_again
    spent = {
        "matrix products": n_forwards * forward.products + n_blocks * backward.products,
        "attention": n_forwards * forward.attention + n_blocks * backward.attention,
        "memory-bound kernels": n_forwards * forward.memory_bound + n_blocks * backward.memory_bound,
        "head and loss": M * head,
        "copies": M * gather_copy_seconds(work, share, cluster, stack),
    }
    beside = {  # what collectives can hide behind, in a step
        "forward": n_blocks * forward.total,
        "backward": n_blocks * backward.total + n_again * forward.total,
        "product": stack.tp_hides * spent["matrix products"],
        "attention": spent["attention"],
        "": 0.0,
    }
    sent = traffic(work, share)
    if stack.is_megatron:
        sent += _gathers_again(work, share)
    waits = dict.fromkeys(WAITS, 0.0)
    contended = 0.0
    for behind, total in beside.items():
        here = [each for each in sent if each.behind == behind]
        by_axis = dict.fromkeys(WAITS, 0.0)
        for each in here:
            axis = each.axis if each.axis in WAITS else "dp"
            by_axis[axis] += each.seconds(cluster, stack)
        for axis, needed in by_axis.items():
            possible = _hideable(work, axis, behind, needed, total, stack)
            waits[axis] += needed - possible
            contended += stack.contention * possible
    spent["contention"] = contended
    spent |= {f"waiting for {axis}": seconds for axis, seconds in waits.items()}
    # An input of a block goes to the host while the next block computes, and comes back in backward, while
    # the block after it does.
    copy_s = work.hidden_bytes / layout.sequence_shards / cluster.gpu.host_link_bytes_s
    exposed_s = max(0.0, copy_s - forward.total) + max(0.0, copy_s - backward.total)
    spent["waiting for host"] = work.states.inputs_on_host * n_blocks * exposed_s
    # The ranks of a pipeline wait for each other as often as microbatches pass.
    per_step = spent["waiting for dp"]
    pipelined = sum(spent.values()) - per_step
    spent["bubble"] = 0.0
    if layout.pp > 1:
        idle = idle_units(layout.schedule, layout.pp, layout.stages_per_rank)
        spent["bubble"] = pipelined * idle / (3 * M)  # a forward and its backward are three units
    spent["optimizer"] = step_update_seconds(work, share, cluster, stack)
    return spent


def _gathers_again(work: Work, share: Share) -> list[CollectiveCost]:
    """Return the all-gathers of Megatron's backward. It keeps its tp rank's own tokens of what enters a
    column-wise matrix, and gathers the others again for the weight's gradient.

    Source: Korthikanti et al. 2022, arXiv:2205.05198, sec. 4.2.2."""
    if work.layout.tp == 1:
        return []
    count = 2 * share.n_layers * work.n_microbatches
    return [
        CollectiveCost(
            "tp", "all-gather", "activations", count, work.hidden_bytes, work.layout.tp, 1, "product"
        )
    ]


def _hideable(work: Work, axis: str, behind: str, needed: float, total: float, stack: Stack) -> float:
    """Return how many seconds of what an axis sends can run beside the computation named by `behind`."""
    if axis == "tp":
        return min(stack.tp_hides * needed, total) if behind else 0.0
    if axis == "dp" and behind:
        # What comes once a step has one microbatch to hide behind.
        once = work.layout.zero_stage < 2 or work.layout.pp > 1
        return min(needed, total / work.n_microbatches if once else total)
    return min(needed, total)
