"""Tensor and sequence parallelism: every matrix is split over the tp axis; the tables say where and at what
cost.

    column-wise   rows of W (outputs) are split: whole x in, this rank's share of y out, no traffic          q k v gate up
    row-wise      columns of W (inputs) are split: a share of x in, out comes an addend of y, to be summed   o down
    vocabulary    rows of the embedding and of the head are split: a token's row lies on one rank; the loss needs three sums
    sequence      what lies between (norms, residual stream) would be the same work on every rank; split it by tokens

A column-wise layer followed by a row-wise one needs one sum for the two (Shoeybi et al. 2019,
arXiv:1909.08053). Splitting the stream by tokens cuts that sum (all-reduce) into a reduce-scatter after and
an all-gather before, of the same bytes together, and keeps 1/tp of the activations between the layers
(Korthikanti et al. 2022, arXiv:2205.05198, sec. 4.2.2).

B rows, T tokens, D width, H query and K key/value heads of width E, F feed-forward width, V vocabulary.
sum:tp: an addend.
"""

from fnmatch import fnmatch
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from dtensor_llama import loss
from dtensor_llama.config import LlamaConfig
from dtensor_llama.errors import UsageError
from dtensor_llama.model import Llama


class Local(ParallelStyle):
    """Where no stock style fits: spread the weight as `placement`, and compute on local tensors as the class
    `kind` does.

    kind: a subclass of the module's class with a forward of its own, and no new state but `tp_mesh` and
        `settings`.
    """

    def __init__(self, placement: Placement, kind: type[nn.Module], **settings):
        self.placement = placement
        self.kind = kind
        self.settings = settings

    def _apply(self, module: nn.Module, tp_mesh: DeviceMesh) -> nn.Module:
        weight = distribute_tensor(module.weight, tp_mesh, [self.placement], src_data_rank=self.src_data_rank)
        module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
        # The module changes its class, because torch.compile takes a method of a class to be the same in
        # every block. A function stored on the module would be an object of each block's own, and every block
        # would be compiled again.
        assert self.kind.__base__ is type(module), (
            f"{self.kind.__name__} cannot take the place of {type(module)}"
        )
        module.__class__ = self.kind
        module.tp_mesh = tp_mesh
        for name, value in self.settings.items():
            setattr(module, name, value)
        return module


def summed_over_tp(weight: DTensor) -> Tensor:
    """The whole of a weight that each rank uses for its own share of the work: gradients are summed over tp,
    in fp32."""
    return weight.redistribute(placements=[Replicate()], backward_dtype=torch.float32).to_local(
        grad_placements=[Partial()]
    )


class NormOfOwnTokens(nn.RMSNorm):
    """(B, T/tp, D) -> (B, T/tp, D). Why not SequenceParallel: it leaves the sum of the gradients to be done
    in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, summed_over_tp(self.weight), self.eps)


class NormOfAllTokens(nn.RMSNorm):
    """(B, T, D) -> (B, T, D): the same work on every rank, hence the same gradient, with nothing to sum."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to_local(), self.eps)


class EmbeddingOfOwnRows(nn.Embedding):
    """Tokens (B, T) -> (B, T, D) as `output`: a rank looks up the tokens whose row it has, and adds zeros for
    the rest.

    Why not RowwiseParallel: its gradient is (V, D) on each rank; this one is (V/tp, D).
    """

    output: Placement

    def forward(self, tokens: Tensor) -> Tensor:
        tp = self.tp_mesh.size()
        if self.output.is_shard() and tokens.shape[1] % tp:
            raise UsageError(
                f"--parallel.tp {tp} with sequence parallelism splits the tokens of a row, and a row has "
                f"{tokens.shape[1]}; use a multiple of {tp}, or --parallel.no-sequence-parallel."
            )
        weight = self.weight.to_local()  # (V/tp, D)
        row = tokens - first_row(self.weight, self.tp_mesh)
        here = (row >= 0) & (row < weight.shape[0])  # (B, T)
        x = F.embedding(row.clamp(0, weight.shape[0] - 1), weight)
        x = x * here[..., None]  # (B, T, D) sum:tp
        x = DTensor.from_local(x, self.tp_mesh, [Partial()], run_check=False)
        return x.redistribute(placements=[self.output]).to_local()


class ProjectionToOneHead(nn.Linear):
    """x (B, T, D) -> (B, T, E): the one key or value head that this rank's query heads read; tp/K ranks share
    each head.

    The weight (K E, D) is whole on every rank; the addends of its gradient are zero but for E rows.
    """

    n_heads: int  # K

    def forward(self, x: DTensor | Tensor) -> Tensor:
        head_dim = self.weight.shape[0] // self.n_heads
        head = self.tp_mesh.get_local_rank() * self.n_heads // self.tp_mesh.size()
        weight = summed_over_tp(self.weight)  # (K E, D)
        if isinstance(x, DTensor):
            x = x.to_local(grad_placements=[Partial()])
        return F.linear(x, weight[head * head_dim : (head + 1) * head_dim])


# LoRA's thin matrices, y = B A x beside W x: A (r, inputs), B (outputs, r). They are split as W is, so that
# what they add to y lies as y does, with no traffic in forward. What is whole is used by each rank for its
# share of y, or of the sum y is.


class ProjectionOfAddend(nn.Linear):
    """x W^T of the local parts."""

    # how the result lies over tp, which makes it a DTensor as W x is; None: it is local
    output: Placement | None

    def forward(self, x: DTensor | Tensor) -> DTensor | Tensor:
        if isinstance(x, DTensor):  # whole, its gradients here are addends; split, they are complete
            x = x.to_local(grad_placements=[Partial() if p.is_replicate() else p for p in x.placements])
        is_whole = self.weight.placements[0].is_replicate()
        y = F.linear(x, summed_over_tp(self.weight) if is_whole else self.weight.to_local())
        return (
            y if self.output is None else DTensor.from_local(y, self.tp_mesh, [self.output], run_check=False)
        )


def first_row(weight: DTensor, tp_mesh: DeviceMesh) -> int:
    """The first row of this rank's Shard(0)."""
    return rows_per_rank(weight, tp_mesh) * tp_mesh.get_local_rank()


def rows_per_rank(weight: DTensor, tp_mesh: DeviceMesh) -> int:
    """Rows of a Shard(0) on every rank but the last, which has what remains."""
    return -(-weight.shape[0] // tp_mesh.size())


# ---- the plans ----


class Row(NamedTuple):
    style: ParallelStyle | None
    weight: str  # how its weight lies over tp: S(0) split by rows, S(1) by columns, R whole on every rank
    shapes: str  # what goes in and what comes out, as this rank holds it
    forward: str  # collective over tp in forward
    backward: str  # and in backward


# Attention and feed-forward get x as a DTensor, so that the gradients from q, k and v (gate and up) are
# summed in one go.
GATHER = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())
GATHER_X = PrepareModuleInput(
    input_layouts=(Shard(1), None, None, None),  # x, rope, documents, cache
    desired_input_layouts=(Replicate(), None, None, None),
)
ENTER = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate())
ENTER_X = PrepareModuleInput(
    input_layouts=(Replicate(), None, None, None), desired_input_layouts=(Replicate(), None, None, None)
)
COLUMNS, ROWS, ROWS_SCATTER = ColwiseParallel(), RowwiseParallel(), RowwiseParallel(output_layouts=Shard(1))
NORM, NORM_SHARE = Local(Replicate(), NormOfAllTokens), Local(Replicate(), NormOfOwnTokens)
EMBED, EMBED_SCATTER = (
    Local(Shard(0), EmbeddingOfOwnRows, output=layout) for layout in (Replicate(), Shard(1))
)
HEAD, HEAD_GATHER = (
    ColwiseParallel(input_layouts=layout, output_layouts=Replicate()) for layout in (Replicate(), Shard(1))
)

# fmt: off
# The all-reduces of norms and shared heads are of weight gradients in fp32: (D) and (K E, D), however many tokens.
SEQUENCE_BLOCK = {              # a block maps (B, T/tp, D) to (B, T/tp, D)           forward           backward
    "input_layernorm":          (NORM_SHARE,    "R",    "(B, T/tp, D), as it was",        "", "all-reduce"),
    "self_attn":                (GATHER_X,      "",     "(B, T/tp, D) -> (B, T, D)",      "all-gather", "reduce-scatter"),
    "self_attn.q_proj":         (COLUMNS,       "S(0)", "(B, T, D) -> (B, T, H/tp E)",    "", ""),
    "self_attn.k_proj":         (COLUMNS,       "S(0)", "(B, T, D) -> (B, T, K/tp E)",    "", ""),
    "self_attn.v_proj":         (COLUMNS,       "S(0)", "(B, T, D) -> (B, T, K/tp E)",    "", ""),
    "self_attn.o_proj":         (ROWS_SCATTER,  "S(1)", "(B, T, H/tp E) -> (B, T/tp, D)", "reduce-scatter", "all-gather"),
    "post_attention_layernorm": (NORM_SHARE,    "R",    "(B, T/tp, D), as it was",        "", "all-reduce"),
    "mlp":                      (GATHER,        "",     "(B, T/tp, D) -> (B, T, D)",      "all-gather", "reduce-scatter"),
    "mlp.gate_proj":            (COLUMNS,       "S(0)", "(B, T, D) -> (B, T, F/tp)",      "", ""),
    "mlp.up_proj":              (COLUMNS,       "S(0)", "(B, T, D) -> (B, T, F/tp)",      "", ""),
    "mlp.down_proj":            (ROWS_SCATTER,  "S(1)", "(B, T, F/tp) -> (B, T/tp, D)",   "reduce-scatter", "all-gather"),
}
SEQUENCE_ENDS = {
    "model.embed_tokens":       (EMBED_SCATTER, "S(0)", "(B, T) -> (B, T/tp, D)",         "reduce-scatter", "all-gather"),
    "model.norm":               (NORM_SHARE,    "R",    "(B, T/tp, D), as it was",        "", "all-reduce"),
    "lm_head":                  (HEAD_GATHER,   "S(0)", "(B, T/tp, D) -> (B, T, V)",      "2 all-gather", "reduce-scatter"),
    "cross_entropy":            (None,          "",     "(B, T/tp, D) -> scalar",         "all-gather, 2 all-reduce",
                                                                                          "reduce-scatter"),
}
WHOLE_BLOCK = {                 # without sequence parallelism (B, T, D) to (B, T, D): every rank has every token
    "input_layernorm":          (NORM,          "R",    "(B, T, D), as it was",           "", ""),
    "self_attn":                (ENTER_X,       "",     "(B, T, D), as it was",           "", "all-reduce"),
    "self_attn.q_proj":         (COLUMNS,       "S(0)", "(B, T, D) -> (B, T, H/tp E)",    "", ""),
    "self_attn.k_proj":         (COLUMNS,       "S(0)", "(B, T, D) -> (B, T, K/tp E)",    "", ""),
    "self_attn.v_proj":         (COLUMNS,       "S(0)", "(B, T, D) -> (B, T, K/tp E)",    "", ""),
    "self_attn.o_proj":         (ROWS,          "S(1)", "(B, T, H/tp E) -> (B, T, D)",    "all-reduce", ""),
    "post_attention_layernorm": (NORM,          "R",    "(B, T, D), as it was",           "", ""),
    "mlp":                      (ENTER,         "",     "(B, T, D), as it was",           "", "all-reduce"),
    "mlp.gate_proj":            (COLUMNS,       "S(0)", "(B, T, D) -> (B, T, F/tp)",      "", ""),
    "mlp.up_proj":              (COLUMNS,       "S(0)", "(B, T, D) -> (B, T, F/tp)",      "", ""),
    "mlp.down_proj":            (ROWS,          "S(1)", "(B, T, F/tp) -> (B, T, D)",      "all-reduce", ""),
}
WHOLE_ENDS = {
    "model.embed_tokens":       (EMBED,         "S(0)", "(B, T) -> (B, T, D)",            "all-reduce", ""),
    "model.norm":               (NORM,          "R",    "(B, T, D), as it was",           "", ""),
    "lm_head":                  (HEAD,          "S(0)", "(B, T, D) -> (B, T, V)",         "all-gather", "all-reduce"),
    "cross_entropy":            (None,          "",     "(B, T, D) -> scalar",            "2 all-reduce", "all-reduce"),
}                               # the loss: its two sums once per chunk of tokens
# fmt: on


def shared_heads(n_heads: int) -> dict[str, tuple]:
    """The rows of k_proj and v_proj when tp exceeds the number of key/value heads."""
    one_head = Local(Replicate(), ProjectionToOneHead, n_heads=n_heads)
    row = (one_head, "R", "(B, T, D) -> (B, T, E)", "", "all-reduce")
    return {"self_attn.k_proj": row, "self_attn.v_proj": row}


WHOLE_A, SPLIT_A = (Local(layout, ProjectionOfAddend, output=None) for layout in (Replicate(), Shard(1)))
WHOLE_B = Local(Replicate(), ProjectionOfAddend, output=Partial())
SPLIT_B = Local(Shard(0), ProjectionOfAddend, output=Shard(-1))
# fmt: off
LORA = {                        # the adapter of a layer, by how its weight lies; r: the rank. All-reduces: of weight gradients
    "S(0)": {"lora_A":         (WHOLE_A,       "R",    "(B, T, D) -> (B, T, r)",          "", "all-reduce"),
             "lora_B":         (SPLIT_B,       "S(0)", "(B, T, r) -> (B, T, F/tp)",       "", "")},
    "S(1)": {"lora_A":         (SPLIT_A,       "S(1)", "(B, T, F/tp) -> (B, T, r) sum:tp", "", ""),
             "lora_B":         (WHOLE_B,       "R",    "(B, T, r) -> (B, T, D) sum:tp",   "", "all-reduce")},
}
# fmt: on


def lora_plan(plan: dict[str, Row], n_kv_heads: int) -> dict[str, Row]:
    """Rows for the adapters of the layers in `plan`."""
    one_head = {"lora_A": LORA["S(0)"]["lora_A"], "lora_B": shared_heads(n_kv_heads)["self_attn.k_proj"]}
    return {
        f"{name}_lora.{matrix}": Row(*its)
        for name, row in plan.items()
        if name.endswith("_proj")
        for matrix, its in LORA.get(row.weight, one_head).items()
    }


def tensor_plan(config: LlamaConfig, tp: int, sequence_parallel: bool) -> dict[str, Row]:
    """The whole plan by module name; `*` stands for every layer."""
    block, ends = (SEQUENCE_BLOCK, SEQUENCE_ENDS) if sequence_parallel else (WHOLE_BLOCK, WHOLE_ENDS)
    if tp > config.num_key_value_heads:
        block = {**block, **shared_heads(config.num_key_value_heads)}
    return {
        name: Row(*row)
        for name, row in [*((f"model.layers.*.{name}", row) for name, row in block.items()), *ends.items()]
    }


def describe(
    config: LlamaConfig, tp: int, sequence_parallel: bool = True
) -> list[tuple[str, str, str, str, str]]:
    """The plan for printing: (module, placement of its weight over tp, shapes, collective in forward, in
    backward)."""
    return [(name, *row[1:]) for name, row in tensor_plan(config, tp, sequence_parallel).items()]


def apply_tensor_parallel(model: Llama, tp_mesh: DeviceMesh, sequence_parallel: bool = True) -> None:
    """Split `model` in place over the 1-D mesh; all its parameters become DTensors on it.

    Works on `meta`, and on a pipeline stage (what it lacks is None). On a real device every rank must hold
    the same weights. Tokens and labels are whole rows on every tp rank; the loss is the same on all of them.
    Under sequence parallelism a stage hands on (B, T/tp, D).
    """
    plan = tensor_plan(model.config, tp_mesh.size(), sequence_parallel)
    plan |= lora_plan(plan, model.config.num_key_value_heads)
    tied = (
        model.lm_head is not None
        and model.model.embed_tokens is not None
        and (model.lm_head.weight is model.model.embed_tokens.weight)
    )
    here = [name for name, _ in model.named_modules()]
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    parallelize_module(
        model,
        tp_mesh,
        {pattern: row.style for pattern, row in plan.items() if any(fnmatch(name, pattern) for name in here)},
    )
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight  # both are Shard(0)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)  # torch's styles may make new, trainable parameters
    model.cross_entropy = partial(
        vocab_parallel_cross_entropy,
        tp_mesh=tp_mesh,
        hidden_layout=Shard(1) if sequence_parallel else Replicate(),
    )
    if sequence_parallel and model.model.embed_tokens is None:
        locate = model.model.locate

        def locate_whole_rows(x: Tensor, positions: Tensor | None, cache):
            """A later stage gets (B, T/tp, D) where the first gets tokens (B, T); RoPE and masks are for all
            T."""
            return locate(x.new_empty(1, 1).expand(x.shape[0], x.shape[1] * tp_mesh.size()), positions, cache)

        model.model.locate = locate_whole_rows
    unplanned = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    assert not unplanned, (
        f"no row of the plan is for {unplanned}: mixed with DTensors they break optimizers and clipping"
    )


# ---- the loss over a vocabulary of which each rank has a slice ----


class SplitVocabulary:
    """A slice of the vocabulary's rows on each rank of `group`, this rank's beginning with `first_row`."""

    def __init__(self, first_row: int, group: dist.ProcessGroup):
        self.first_row = first_row
        self.group = group

    def place(self, labels: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
        """As loss.WholeVocabulary's; one rank has the logit of a target, and the others add zero."""
        row = labels - self.first_row
        here = (row >= 0) & (row < n_rows) & (labels != loss.IGNORE)
        return row.clamp(0, n_rows - 1), here

    def largest(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, dist.ReduceOp.MAX, self.group)
        return values

    def total(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, dist.ReduceOp.SUM, self.group)
        return values


def vocab_parallel_cross_entropy(
    hidden: Tensor, weight: DTensor, labels: Tensor, tp_mesh: DeviceMesh, hidden_layout: Placement
) -> Tensor:
    """dtensor_llama.loss.cross_entropy_sum with the rows of `weight` (V, D) split over tp; the same scalar on
    every rank.

    hidden (B, T/tp, D) if `hidden_layout` is Shard(1), else (B, T, D); labels (B, T), the whole of them. A
    rank has the logits of its V/tp tokens and of one chunk of positions; (B, T, V) exists nowhere. Source:
    arXiv:1909.08053, sec. 3.
    """
    x = DTensor.from_local(hidden, tp_mesh, [hidden_layout], run_check=False)
    x = x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])  # (B, T, D)
    chunk_tokens = loss.tokens_per_chunk(rows_per_rank(weight, tp_mesh))  # the same on every rank
    vocabulary = SplitVocabulary(first_row(weight, tp_mesh), tp_mesh.get_group())
    return loss.chunked_cross_entropy(
        x.flatten(0, -2), weight.to_local(), labels.flatten(), chunk_tokens, vocabulary
    )
