"""Tensor and sequence parallelism: every matrix is split over the tp axis.

The tables below say how each is split, and which collectives that costs.

    column-wise   the rows of W (its outputs) are split: x is whole, each rank computes its share of y, and
                  nothing travels: q k v gate up
    row-wise      the columns of W (its inputs) are split: a rank has its share of x and computes a partial
                  sum of y, to be added up over tp: o down
    vocabulary    the rows of the embedding and of the head are split: the row of a token is on one rank, and
                  the loss adds up its parts over tp
    sequence      between these (norms, residual stream) every rank would do the same work: split the tokens

A column-wise layer followed by a row-wise one needs one sum for the two (Shoeybi et al. 2019,
arXiv:1909.08053). With the stream split by tokens this sum (all-reduce) becomes a reduce-scatter after the
layers and an all-gather before them, of the same bytes together, and a rank keeps 1/tp of the activations
between the layers (Korthikanti et al. 2022, arXiv:2205.05198, sec. 4.2.2).

B sequences, T tokens, D width, H query and K key/value heads of width E, F feed-forward width, V vocabulary.
Partial: a partial sum over tp.
"""

import fnmatch
from collections.abc import Iterator
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

from dtensor_llama.config import LlamaConfig
from dtensor_llama.errors import UsageError
from dtensor_llama.loss import TokenLoss, Vocabulary, take_columns
from dtensor_llama.model import Llama


class Local(ParallelStyle):
    """Shards the weight as `placement` and computes on local tensors, as the class `kind` does: used where no
    style of torch fits.

    kind: a subclass of the module's class with a forward of its own. Its only new attributes are `tp_mesh`
        and the `settings`.
    """

    def __init__(self, placement: Placement, kind: type[nn.Module], **settings):
        self.placement = placement
        self.kind = kind
        self.settings = settings

    def _apply(self, module: nn.Module, tp_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters(recurse=False)):
            sharded = distribute_tensor(
                parameter, tp_mesh, [self.placement], src_data_rank=self.src_data_rank
            )
            module.register_parameter(name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))
        # The module changes its class, because torch.compile takes a method of a class to be the same in
        # every block. A function that is stored on the module would be an object of each block's own, and
        # every block would be compiled again.
        assert self.kind.__base__ is type(module), (
            f"{self.kind.__name__} cannot take the place of {type(module)}"
        )
        module.__class__ = self.kind
        module.tp_mesh = tp_mesh
        for name, value in self.settings.items():
            setattr(module, name, value)
        return module


def summed_over_tp(weight: DTensor) -> Tensor:
    """Return the whole of a weight that each rank uses for its own share of the work. Its gradients are
    summed over tp, in fp32."""
    return weight.redistribute(placements=[Replicate()], backward_dtype=torch.float32).to_local(
        grad_placements=[Partial()]
    )


class NormOfOwnTokens(nn.RMSNorm):
    """Maps (B, T/tp, D) to (B, T/tp, D), or q (B, T, H/tp, E) to the same shape.

    The weight is whole, and each rank norms its own tokens or heads. torch's SequenceParallel would sum the
    weight's gradients in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, summed_over_tp(self.weight), self.eps)


class NormOfAllTokens(nn.RMSNorm):
    """Maps (B, T, D) to (B, T, D). Every rank does the same work, so the weight's gradient needs no sum."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to_local(), self.eps)


class EmbeddingOfOwnRows(nn.Embedding):
    """Maps tokens (B, T) to (B, T, D) with the placement `output`. A rank looks up the tokens whose rows it
    has, and has zeros for the others.

    With torch's RowwiseParallel the gradient would be (V, D) on each rank; here it is (V/tp, D).
    """

    output: Placement

    def forward(self, tokens: Tensor) -> Tensor:
        tp = self.tp_mesh.size()
        if self.output.is_shard() and tokens.shape[1] % tp:
            raise UsageError(
                f"tp={tp} with sequence parallelism splits the tokens of a sequence, and a sequence has "
                f"{tokens.shape[1]}; use a multiple of {tp}, or sequence_parallel=False."
            )
        weight = self.weight.to_local()  # (V/tp, D)
        row = tokens - rows_per_rank(self.weight.shape[0], tp) * self.tp_mesh.get_local_rank()
        here = (row >= 0) & (row < weight.shape[0])  # (B, T)
        x = F.embedding(row.clamp(0, weight.shape[0] - 1), weight)
        x = x * here[..., None]  # (B, T, D) Partial
        x = DTensor.from_local(x, self.tp_mesh, [Partial()], run_check=False)
        return x.redistribute(placements=[self.output]).to_local()


class ProjectionToOneHead(nn.Linear):
    """Maps x (B, T, D) to (B, T, E), the one key or value head that this rank's query heads read; tp/K ranks
    share each head.

    The weight (K E, D) is whole on every rank; a rank's part of its gradient is zero but for E rows.
    """

    n_heads: int  # K

    def forward(self, x: DTensor | Tensor) -> Tensor:
        head_dim = self.weight.shape[0] // self.n_heads
        head = self.tp_mesh.get_local_rank() * self.n_heads // self.tp_mesh.size()
        rows = slice(head * head_dim, (head + 1) * head_dim)
        if isinstance(x, DTensor):
            x = x.to_local(grad_placements=[Partial()])
        bias = None if self.bias is None else summed_over_tp(self.bias)[rows]
        return F.linear(x, summed_over_tp(self.weight)[rows], bias)


def rows_per_rank(n_rows: int, tp: int) -> int:
    """Return how many rows of a Shard(0) each rank has, but the last, which has what remains."""
    return -(-n_rows // tp)


# ---- the plans ----


class Row(NamedTuple):
    """Says what tensor parallelism does to one module."""

    style: ParallelStyle | None
    weight: str  # placement of its weight over tp: S(0) split by rows, S(1) by columns, R whole on every rank
    shapes: str  # shape that goes in -> shape that comes out, as this rank has them
    forward: dict[str, int]  # collectives over tp in forward, and how many of each
    backward: dict[str, int]  # the same in backward


TensorPlan = dict[str, Row]  # by module name; `*` stands for every layer


def whole_input(layout: Placement, n_others: int = 0) -> PrepareModuleInput:
    """Return the style of a module whose first argument comes with this placement and is needed whole.

    Attention and feed-forward get x as a DTensor, so that the gradients from q, k and v (gate and up) are
    added up before they travel.
    """
    others = (None,) * n_others
    return PrepareModuleInput(input_layouts=(layout, *others), desired_input_layouts=(Replicate(), *others))


GATHER, ENTER = whole_input(Shard(1)), whole_input(Replicate())
# x comes with rope, attention, mask and cache.
GATHER_X, ENTER_X = whole_input(Shard(1), n_others=4), whole_input(Replicate(), n_others=4)
COLUMNS, ROWS, ROWS_SCATTER = ColwiseParallel(), RowwiseParallel(), RowwiseParallel(output_layouts=Shard(1))
NORM, NORM_SHARE = Local(Replicate(), NormOfAllTokens), Local(Replicate(), NormOfOwnTokens)
EMBED, EMBED_SCATTER = (
    Local(Shard(0), EmbeddingOfOwnRows, output=layout) for layout in (Replicate(), Shard(1))
)
HEAD, HEAD_GATHER = (
    ColwiseParallel(input_layouts=layout, output_layouts=Replicate()) for layout in (Replicate(), Shard(1))
)

# The traffic of a row: {collective: how many of them}.
AG, RS, AR = {"all-gather": 1}, {"reduce-scatter": 1}, {"all-reduce": 1}
AG2, AR2, AR3 = {"all-gather": 2}, {"all-reduce": 2}, {"all-reduce": 3}

# fmt: off
# The all-reduces of norms and shared heads are of weight gradients in fp32: (D) and (K E, D), for any T.
SEQUENCE_BLOCK = {              # a block maps (B, T/tp, D) to (B, T/tp, D)                 forward, backward
    "input_layernorm":          Row(NORM_SHARE,    "R",    "(B, T/tp, D), as it was",        {}, AR),
    "self_attn":                Row(GATHER_X,      "",     "(B, T/tp, D) -> (B, T, D)",      AG, RS),
    "self_attn.q_proj":         Row(COLUMNS,       "S(0)", "(B, T, D) -> (B, T, H/tp E)",    {}, {}),
    "self_attn.k_proj":         Row(COLUMNS,       "S(0)", "(B, T, D) -> (B, T, K/tp E)",    {}, {}),
    "self_attn.v_proj":         Row(COLUMNS,       "S(0)", "(B, T, D) -> (B, T, K/tp E)",    {}, {}),
    "self_attn.o_proj":         Row(ROWS_SCATTER,  "S(1)", "(B, T, H/tp E) -> (B, T/tp, D)", RS, AG),
    "post_attention_layernorm": Row(NORM_SHARE,    "R",    "(B, T/tp, D), as it was",        {}, AR),
    "mlp":                      Row(GATHER,        "",     "(B, T/tp, D) -> (B, T, D)",      AG, RS),
    "mlp.gate_proj":            Row(COLUMNS,       "S(0)", "(B, T, D) -> (B, T, F/tp)",      {}, {}),
    "mlp.up_proj":              Row(COLUMNS,       "S(0)", "(B, T, D) -> (B, T, F/tp)",      {}, {}),
    "mlp.down_proj":            Row(ROWS_SCATTER,  "S(1)", "(B, T, F/tp) -> (B, T/tp, D)",   RS, AG),
}
SEQUENCE_ENDS = {
    "model.embed_tokens":       Row(EMBED_SCATTER, "S(0)", "(B, T) -> (B, T/tp, D)",         RS, AG),
    "model.norm":               Row(NORM_SHARE,    "R",    "(B, T/tp, D), as it was",        {}, AR),
    "lm_head":                  Row(HEAD_GATHER,   "S(0)", "(B, T/tp, D) -> (B, T, V)",      AG2, RS),
    "token_loss":               Row(None,          "",     "(B, T/tp, D) -> scalar",         AG | AR3, RS),
}
WHOLE_BLOCK = {                 # without sequence parallelism a block maps (B, T, D) to (B, T, D)
    "input_layernorm":          Row(NORM,          "R",    "(B, T, D), as it was",           {}, {}),
    "self_attn":                Row(ENTER_X,       "",     "(B, T, D), as it was",           {}, AR),
    "self_attn.q_proj":         Row(COLUMNS,       "S(0)", "(B, T, D) -> (B, T, H/tp E)",    {}, {}),
    "self_attn.k_proj":         Row(COLUMNS,       "S(0)", "(B, T, D) -> (B, T, K/tp E)",    {}, {}),
    "self_attn.v_proj":         Row(COLUMNS,       "S(0)", "(B, T, D) -> (B, T, K/tp E)",    {}, {}),
    "self_attn.o_proj":         Row(ROWS,          "S(1)", "(B, T, H/tp E) -> (B, T, D)",    AR, {}),
    "post_attention_layernorm": Row(NORM,          "R",    "(B, T, D), as it was",           {}, {}),
    "mlp":                      Row(ENTER,         "",     "(B, T, D), as it was",           {}, AR),
    "mlp.gate_proj":            Row(COLUMNS,       "S(0)", "(B, T, D) -> (B, T, F/tp)",      {}, {}),
    "mlp.up_proj":              Row(COLUMNS,       "S(0)", "(B, T, D) -> (B, T, F/tp)",      {}, {}),
    "mlp.down_proj":            Row(ROWS,          "S(1)", "(B, T, F/tp) -> (B, T, D)",      AR, {}),
}
WHOLE_ENDS = {
    "model.embed_tokens":       Row(EMBED,         "S(0)", "(B, T) -> (B, T, D)",            AR, {}),
    "model.norm":               Row(NORM,          "R",    "(B, T, D), as it was",           {}, {}),
    "lm_head":                  Row(HEAD,          "S(0)", "(B, T, D) -> (B, T, V)",         AG, AR),
    "token_loss":               Row(None,          "",     "(B, T, D) -> scalar",            AR3, AR),
}
# fmt: on
# "token_loss" is no module but the loss. Its three all-reduces, of the largest logit, the sum of exp and the
# logit of the label, come once per chunk of tokens (loss.py: a chunk has fewer tokens if it is not compiled).


# fmt: off
HEAD_NORMS = {                  # of models that norm each head of q and k; a rank has its own heads only
    "self_attn.q_norm":         Row(NORM_SHARE,    "R",    "(B, T, H/tp, E), as it was",     {}, AR),
    "self_attn.k_norm":         Row(NORM_SHARE,    "R",    "(B, T, K/tp, E), as it was",     {}, AR),
}
# fmt: on


def shared_heads(config: LlamaConfig) -> TensorPlan:
    """Return the rows of k_proj and v_proj when tp exceeds the number of key/value heads."""
    one_head = Local(Replicate(), ProjectionToOneHead, n_heads=config.num_key_value_heads)
    sums = AR2 if config.family.qkv_bias else AR  # weight and bias
    row = Row(one_head, "R", "(B, T, D) -> (B, T, E)", {}, sums)
    return {"self_attn.k_proj": row, "self_attn.v_proj": row}


def tensor_plan(config: LlamaConfig, tp: int, sequence_parallel: bool = True) -> TensorPlan:
    """Return the whole plan of a model: every layer's rows, and those of its ends."""
    block, ends = (SEQUENCE_BLOCK, SEQUENCE_ENDS) if sequence_parallel else (WHOLE_BLOCK, WHOLE_ENDS)
    if tp > config.num_key_value_heads:
        block = block | shared_heads(config)
    if config.family.qk_norm:
        block = block | HEAD_NORMS
    return {f"model.layers.*.{name}": row for name, row in block.items()} | ends


def apply_plan(model: Llama, tp_mesh: DeviceMesh, plan: TensorPlan) -> None:
    """Split the modules that have a row in `plan`; what is frozen stays so."""
    here = [name for name, _ in model.named_modules()]
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    styles = {pattern: row.style for pattern, row in plan.items() if fnmatch.filter(here, pattern)}
    parallelize_module(model, tp_mesh, styles)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)  # torch's styles may make new, trainable parameters


def apply_tensor_parallel(model: Llama, tp_mesh: DeviceMesh, sequence_parallel: bool = True) -> None:
    """Split `model` in place over the 1-D mesh; all its parameters become DTensors on it.

    It works on `meta`, and on a pipeline stage (modules of other stages are None). On a real device every
    rank must hold the same weights. Every tp rank gets the tokens and labels of whole sequences, and the loss
    is the same on all of them. Under sequence parallelism a stage hands on (B, T/tp, D).
    """
    apply_plan(model, tp_mesh, tensor_plan(model.config, tp_mesh.size(), sequence_parallel))
    model.tie()  # both ends are Shard(0)
    model.vocabulary = SplitVocabulary(model.config.vocab_size, tp_mesh, sequence_parallel)
    if sequence_parallel and model.model.embed_tokens is None:
        model.model.sequence_shards = tp_mesh.size()  # a later stage gets (B, T/tp, D)
    unplanned = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    assert not unplanned, (
        f"the plan has no row for {unplanned}: mixed with DTensors they break optimizers and clipping"
    )


# ---- the vocabulary of the loss, split over tp ----


class SplitVocabulary(Vocabulary):
    """Answers for the whole vocabulary where each tp rank has V/tp columns of the logits. Source of the
    reductions: Shoeybi et al. 2019, arXiv:1909.08053, sec. 3."""

    def __init__(self, size: int, tp_mesh: DeviceMesh, sequence_parallel: bool):
        super().__init__(size)
        self.n_columns = rows_per_rank(size, tp_mesh.size())
        self.first_column = self.n_columns * tp_mesh.get_local_rank()
        self.tp_mesh, self.group = tp_mesh, tp_mesh.get_group()
        self.hidden_layout = Shard(1) if sequence_parallel else Replicate()

    def inputs(self, hidden: Tensor, weight: DTensor) -> tuple[Tensor, Tensor]:
        x = DTensor.from_local(hidden, self.tp_mesh, [self.hidden_layout], run_check=False)
        x = x.redistribute(placements=[Replicate()])  # (B, T, D)
        return x.to_local(grad_placements=[Partial()]), weight.to_local()

    def pick(self, x: Tensor, labels: Tensor) -> Tensor:
        column = labels - self.first_column
        # One rank has the column of a label, and the others add 0: there its number is negative.
        return self.total(take_columns(x, torch.where(column < x.shape[1], column, -1)))

    def largest(self, x: Tensor) -> Tensor:
        return self._reduced(x, dist.ReduceOp.MAX)

    def total(self, x: Tensor) -> Tensor:
        # x - x.detach() is zero: it makes the gradient of the total this rank's gradient of x. That is right,
        # since every rank computes the same loss from the total.
        return self._reduced(x, dist.ReduceOp.SUM) + (x - x.detach())

    def _reduced(self, x: Tensor, op: dist.ReduceOp) -> Tensor:
        reduced = x.detach().clone()
        dist.all_reduce(reduced, op, self.group)
        return reduced


class _Rehearsed(Vocabulary):
    """Keeps its answers on whole logits, and gives them again where it is asked on some of the columns."""

    def __init__(self, size: int):
        super().__init__(size)
        self.kept: list[Tensor] = []
        self.again: Iterator[Tensor] | None = None

    def _answer(self, x: Tensor) -> Tensor:
        if self.again is not None:
            return next(self.again)
        self.kept.append(x)
        return x

    def pick(self, x: Tensor, labels: Tensor) -> Tensor:
        return self._answer(super().pick(x, labels) if self.again is None else x)

    def largest(self, x: Tensor) -> Tensor:
        return self._answer(x)

    def total(self, x: Tensor) -> Tensor:
        return self._answer(x)


def check_token_loss(token_loss: TokenLoss, size: int, device: torch.device) -> None:
    """Raise UsageError if a token loss cannot work on logits whose columns are split over tp.

    It is called on the logits of four tokens, (4, V) float32 on the device, and then on their first half,
    with the answers of the whole vocabulary. A loss that asks `vocab` for whatever depends on other columns
    gives the same both times. size: V. On `meta`, where numbers have no values, nothing is judged; nor is a
    loss that raises an error of its own on whole logits, which its user will see in the first step."""
    if device.type == "meta":
        return
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(4, size, generator=random).to(device)
    labels = torch.tensor([0, size // 3, size // 2, size - 1], device=device)
    vocab = _Rehearsed(size)
    try:
        whole = token_loss(logits, labels, vocab)
    except Exception:
        return
    vocab.again, vocab.n_columns = iter(vocab.kept), size // 2
    try:
        is_same = torch.allclose(token_loss(logits[:, : size // 2], labels, vocab), whole)
    except Exception:
        is_same = False
    if not is_same:
        raise UsageError(
            "model.token_loss needs columns of the logits that other tp ranks have; use vocab.logsumexp, "
            "vocab.pick, vocab.sum or vocab.mean for whatever looks at the whole vocabulary "
            "(dtensor_llama/loss.py), or tp=1."
        )
