"""Family: all that the Booster knows of one model class of transformers, as data."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from math import gcd

from torch import Tensor, nn

from dtensor_llama.errors import UsageError
from parallel.plans.styles import Style
from parallel.tensor import Row, TensorPlan


@dataclass(frozen=True)
class Stages:
    """Says how a decoder is cut into pipeline stages, by names of modules outside the blocks.

    first: what the first stage alone has; later ones hand their input on in its place. added: modules of the
        first stage whose output is added to something; elsewhere that is 0. last: what the last stage alone
        has, beside the head.
    block_returns_tuple: a block returns (hidden states, something else).
    """

    first: tuple[str, ...]
    last: tuple[str, ...]
    added: tuple[str, ...] = ()
    block_returns_tuple: bool = False


@dataclass(frozen=True)
class Family:
    """Describes how the models of one class are spread.

    blocks: the lists of transformer blocks. block: the rows of a block, by module name inside it. ends: the
        rows of everything else, and of the token loss.
    local_heads: {module inside a block: its attributes that count heads, or features of all heads}; each tp
        rank has 1/tp of them.
    embedding, head: the two that may share a matrix.
    shifts_labels: position t predicts label t + 1. False: label t.
    stages: None: the family has no pipeline.
    inputs: makes the arguments of forward, of (model, the columns of a batch, its labels); None: the columns.
    splits_kv_heads: each tp rank attends with heads of its own. False: all attend with all.
    """

    architecture: str
    blocks: tuple[str, ...]
    block: TensorPlan
    ends: TensorPlan
    embedding: str
    head: str = "lm_head"
    local_heads: dict[str, tuple[str, ...]] = field(default_factory=dict)
    shifts_labels: bool = True
    stages: Stages | None = None
    inputs: Callable[[nn.Module, dict[str, Tensor], Tensor], dict[str, Tensor]] | None = None
    splits_kv_heads: bool = True

    @property
    def plan(self) -> TensorPlan:
        """Return all rows, by pattern of module names."""
        inside = {f"{blocks}.*.{name}": row for blocks in self.blocks for name, row in self.block.items()}
        return inside | self.ends

    def rows(self, model: nn.Module) -> Iterator[tuple[nn.Module, Row]]:
        """Yield the modules of a model, or of its share on this rank, that have a row with a style. What is
        in the place of another stage's module is empty, and has none."""
        for name, module in model.named_modules():
            is_empty = not module._parameters and not module._modules
            for pattern, row in self.plan.items():
                if not is_empty and isinstance(row.style, Style) and matches(name, pattern):
                    yield module, row

    def blocks_of(self, model: nn.Module) -> list[nn.Module]:
        """Return the transformer blocks, in the order in which they run."""
        return [block for blocks in self.blocks for block in model.get_submodule(blocks)]


@dataclass(frozen=True)
class Shape:
    """Holds what the rules of a layout ask about a model, by the names of LlamaConfig."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    weights: dict[str, tuple]

    def block_weights(self) -> dict[str, tuple]:
        """Return {name: shape} of the weights of one block."""
        return self.weights


def shape_of(model: nn.Module, family: Family) -> Shape:
    """Return the shape of a model. Of several lists of blocks (T5), that of the first."""
    config, blocks = model.config, family.blocks_of(model)
    found = (getattr(config, name, None) for name in ("intermediate_size", "n_inner", "ffn_dim", "d_ff"))
    widths = next(filter(None, found), 4 * config.hidden_size)
    # Some configs have a width for each layer, and some one that no layer has, because all have experts.
    used = {n for block in blocks for parameter in block.parameters() for n in parameter.shape}
    widths = [n for n in (widths if isinstance(widths, list) else [widths]) if {n, 2 * n} & used]
    return Shape(
        vocab_size=model.get_submodule(family.embedding).num_embeddings,
        hidden_size=config.hidden_size,
        intermediate_size=gcd(*widths),
        num_hidden_layers=len(blocks),
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,  # family.py refuses what does not divide them
        weights={name: tuple(parameter.shape) for name, parameter in blocks[0].named_parameters()},
    )


def matches(name: str, pattern: str) -> bool:
    """Return whether a module's name has the pattern, in which a `*` stands for one part of the name."""
    return name.count(".") == pattern.count(".") and fnmatch(name, pattern)


def shape_problem(model: nn.Module, family: Family, tp: int) -> str:
    """Describe what tp cannot divide; empty if it divides all heads."""
    config, name = model.config, type(model).__name__
    n_heads = config.num_attention_heads
    if not family.splits_kv_heads:
        return ""
    if n_heads % tp:
        return f"tp={tp} does not divide the {n_heads} attention heads of {name}; a rank needs whole heads."
    n_kv_heads = getattr(config, "num_key_value_heads", None) or n_heads
    if n_kv_heads % tp:
        return (
            f"tp={tp} does not divide the {n_kv_heads} key/value heads of {name}; use a divisor, or our own "
            "Llama if the model is LLaMA-shaped, which can share a head."
        )
    return ""


def refuse(model: nn.Module, what: str) -> None:
    raise UsageError(f"{type(model).__name__}: {what}")
