"""Styles of tensor parallelism for the modules of another library, which stay as they are.

    enter         the whole x meets split weights: nothing travels in forward; in backward every rank has a
                  partial sum of the gradient of x, and they are added up
    leave         partial sums of y become y: they are added up in forward, and nothing travels in backward
    packed        a weight that holds several matrices, one behind the other (q, k and v of GPT-2, gate and up
                  of GLM). A rank needs its share of each of them, which is not one box of the whole. So the
                  parameter is kept with a dimension more, (D, 3 D) as (D, 3, D), and is Shard(2): the bytes
                  of the whole are the same, only the shape differs, and save_hf writes Hugging Face's
    split region  what comes between a column-wise and a row-wise layer: each tp rank works on heads or
                  features of its own, so each draws its own dropout there. Everywhere else all tp ranks have
                  the same activations, and draw the same

Parameters become DTensors over tp. A module computes with its local tensors, by the forward of its own class:
so every module of any class can be split, and nothing of its arithmetic is written again.
"""

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from dtensor_llama.errors import UsageError
from parallel.tensor import rows_per_rank, summed_over_tp

# ---- enter and leave, and what is drawn between them ----


class _Enter(torch.autograd.Function):
    """Hands x on; in backward it adds up the gradients of all tp ranks."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Leave(torch.autograd.Function):
    """Adds up the partial sums of all tp ranks; a sum has the gradient of each of its terms."""

    @staticmethod
    def forward(ctx, partial: Tensor, group: dist.ProcessGroup) -> Tensor:
        # Not in place: selective recomputation may keep the matrix product, and would sum it twice.
        total = partial.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        # Without detach, torch 2.11 would compile it to no gradient, as the tensor was written to in place.
        return total.detach()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Boundary:
    """Stands where whole activations meet split weights; all split modules of a model share one.

    Layers that read the same tensor one after the other (q, k and v) enter once, and the gradients from all
    of them are added up before they travel.

    draws: the model has dropout. A split region then has a random stream of its own on each tp rank. Its seed
        is drawn from the common stream, so a recomputed block, which replays that, replays both.
    """

    def __init__(self, tp_mesh: DeviceMesh, draws: bool):
        self.mesh, self.group, self.draws = tp_mesh, tp_mesh.get_group(), draws
        self._entered: tuple = (None, None, None)  # x, whether gradients were wanted, what _Enter made of it
        self._common: Tensor | None = None  # state of the common stream, while in a split region

    def enter(self, x: Tensor) -> Tensor:
        """Return x for column-wise layers."""
        known, wanted, entered = self._entered
        if known is not x or wanted != torch.is_grad_enabled():
            entered = _Enter.apply(x, self.group)
            self._entered = x, torch.is_grad_enabled(), entered
        return entered

    def leave(self, partial: Tensor) -> Tensor:
        """Return the sum of the ranks' partial sums."""
        self.forget_entered()
        return _Leave.apply(partial, self.group)

    def forget_entered(self) -> None:
        """Hold no activation longer than its block; a compiled block has one graph for what it finds here."""
        self._entered = (None, None, None)

    def begin_split_region(self, device: torch.device) -> None:
        if not self.draws or self._common is not None:
            return
        seed = int(torch.randint(2**62, ()))  # by the CPU, for any device: a GPU would have to be waited for
        generator = generator_of(device)
        self._common = generator.get_state()
        generator.manual_seed(seed + 1 + self.mesh.get_local_rank())

    def end_split_region(self, device: torch.device) -> None:
        if self._common is not None:
            generator_of(device).set_state(self._common)
            self._common = None


def generator_of(device: torch.device) -> torch.Generator:
    """Return the generator that torch's dropout draws from on a device."""
    if device.type == "cpu":
        return torch.default_generator
    return torch.get_device_module(device.type).default_generators[device.index or 0]


@contextmanager
def local_parameters(module: nn.Module, is_share: bool = False) -> Iterator[None]:
    """Give a module its local tensors for parameters, packed ones in the shape that its forward expects.

    is_share: parameters that are whole on each rank serve this rank's share of the work only, so their
        gradients are summed over tp.
    """
    kept, unpacked = dict(module._parameters), getattr(module, "unpacked_dims", {})
    for name, parameter in kept.items():
        tensor = parameter
        if isinstance(parameter, DTensor):
            tensor = summed_over_tp(parameter) if is_share else parameter.to_local()
        if name in unpacked and tensor is not None:
            tensor = tensor.flatten(unpacked[name], unpacked[name] + 1)
        module._parameters[name] = tensor
    try:
        yield
    finally:
        module._parameters.update(kept)


# ---- kinds of modules: each is mixed into the class of the module that it serves ----


class Kind(nn.Module):
    """Computes with this rank's part of the parameters. `boundary` is None where tp is 1."""

    boundary: Boundary | None = None


class OnWhole(Kind):
    """Does what its class does, on local tensors."""

    def forward(self, *args, **kwargs):
        with local_parameters(self):
            return super().forward(*args, **kwargs)


class OnWholeBelow(Kind):
    """Does what its class does, on local tensors of its own and of the modules directly below it that are
    whole: some forwards read the weight of such a module without calling it."""

    def forward(self, *args, **kwargs):
        with ExitStack() as stack:
            for module in (self, *self.children()):
                if module is self or isinstance(module, OnWhole):
                    stack.enter_context(local_parameters(module))
            return super().forward(*args, **kwargs)


class OnShare(Kind):
    """Does what its class does with whole parameters, on this rank's share of the activations."""

    def forward(self, *args, **kwargs):
        with local_parameters(self, is_share=True):
            return super().forward(*args, **kwargs)


class ColumnWise(Kind):
    """Maps the whole x to this rank's columns of y."""

    def forward(self, x: Tensor) -> Tensor:
        if self.boundary is not None:
            x = self.boundary.enter(x)
            self.boundary.begin_split_region(x.device)
        with local_parameters(self):
            return super().forward(x)


class ColumnWiseGathered(Kind):
    """Maps the whole x to the whole y; each rank computes its columns of it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.boundary.enter(x)
        with local_parameters(self):
            y = super().forward(x)
        return whole_columns(y, self)


class RowWise(Kind):
    """Maps this rank's columns of x to the whole y, the sum over tp; a bias is added once, to the sum."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to_local()
        y = self.boundary.leave(
            nn.functional.linear(x, weight) if isinstance(self, nn.Linear) else x @ weight
        )
        self.boundary.end_split_region(x.device)
        return y if self.bias is None else y + self.bias.to_local()


class RowWiseSliced(RowWise):
    """Maps the whole x to the whole y; each rank multiplies its columns of x."""

    def forward(self, x: Tensor) -> Tensor:
        x = DTensor.from_local(x, self.boundary.mesh, [Replicate()], run_check=False)
        return super().forward(x.redistribute(placements=[Shard(x.dim() - 1)]).to_local())


class OfOwnTokens(Kind):
    """Looks up the tokens whose rows this rank has, and adds zeros for the others."""

    def forward(self, tokens: Tensor) -> Tensor:
        first, n_rows = self.first_row, self.weight.to_local().shape[0]
        row = tokens - first
        here = (row >= 0) & (row < n_rows)
        with local_parameters(self):
            x = super().forward(row.clamp(0, n_rows - 1))
        return self.boundary.leave(x * here[..., None])


class Head(Kind):
    """Maps the whole x to the logits: whole ones, or within `own_columns` those of this rank's tokens."""

    gathers = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.boundary.enter(x)
        self.boundary.forget_entered()
        with local_parameters(self):
            logits = super().forward(x)
        return whole_columns(logits, self) if self.gathers else logits


class SplitExperts(Kind):
    """Maps all tokens (N, D) to the sums (N, D) of what their experts make of them. Each rank has a part of
    the features of every expert: it sends nothing but its partial sums, and no token goes to another rank.

    The routing, (N, K) indices of experts and (N, K) their weights, is the same on all ranks. The gradient
    of the weights is a partial sum, as that of the tokens is.
    """

    def forward(self, x: Tensor, *routing: Tensor):
        if self.boundary is not None:
            x = self.boundary.enter(x)
            if len(routing) > 1:
                index, weights, *others = routing
                routing = index, _Enter.apply(weights, self.boundary.group), *others
            self.boundary.begin_split_region(x.device)
        with local_parameters(self):
            y = super().forward(x, *routing)
        if self.boundary is not None:
            y = self.boundary.leave(y)
            self.boundary.end_split_region(x.device)
        return y


class WholeWithSharedTail(Kind):
    """Maps the whole x to the whole y, whose last `n_tail` columns the heads of all ranks read as they are
    (DeepSeek's rotary key), without a layer between that would add up their gradients."""

    n_tail: int

    def forward(self, x: Tensor) -> Tensor:
        with local_parameters(self):
            y = super().forward(x)
        if self.boundary is None:
            return y
        head, tail = y.split([y.shape[-1] - self.n_tail, self.n_tail], dim=-1)
        return torch.cat([head, _Enter.apply(tail, self.boundary.group)], dim=-1)


class WithOwnHeads(Kind):
    """Gets, of an argument (B H, ...) that has something for each head, what is for this rank's heads."""

    def forward(self, *args, **kwargs):
        whole = kwargs[self.per_head]
        tp, rank = self.boundary.mesh.size(), self.boundary.mesh.get_local_rank()
        of_rows = whole.unflatten(0, (-1, self.num_heads * tp))  # num_heads is this rank's
        own = of_rows[:, rank * self.num_heads : (rank + 1) * self.num_heads]
        return super().forward(*args, **kwargs | {self.per_head: own.flatten(0, 1)})


def whole_columns(y: Tensor, module: Kind) -> Tensor:
    """Return the columns of all ranks. Every rank goes on with the same work, so the gradient of this rank's
    columns is its slice of the gradient of the whole."""
    shape = (*y.shape[:-1], module.n_columns)
    sharded = DTensor.from_local(
        y,
        module.boundary.mesh,
        [Shard(y.dim() - 1)],
        run_check=False,
        shape=torch.Size(shape),
        stride=torch.empty(shape, device="meta").stride(),
    )
    return sharded.redistribute(placements=[Replicate()]).to_local()


@contextmanager
def own_columns(head: nn.Module) -> Iterator[None]:
    """Let a head return this rank's columns of the logits, for a loss that adds up its parts over tp."""
    head.gathers = False
    try:
        yield
    finally:
        del head.gathers


@functools.cache
def mixed(kind: type[Kind], base: type[nn.Module]) -> type[nn.Module]:
    """Return the class of modules of class `base` that compute as `kind` does: one for all of them."""
    return type(f"{kind.__name__}{base.__name__}", (kind, base), {})


# ---- styles: what a row of a plan says of a module ----


class Style(ParallelStyle):
    """Places each parameter of a module over tp and gives the module its kind.

    weight, bias: their placement; None: Replicate. For a packed weight of `parts` matrices both are counted
        with the dimension more. Conv1D of transformers keeps its weight (inputs, outputs), transposed to that
        of nn.Linear: the placement follows.
    settings: attributes that the kind reads.
    """

    def __init__(
        self, kind: type[Kind], weight: Placement = Replicate(), bias=Replicate(), parts: int = 1, **settings
    ):
        self.kind, self.weight, self.bias, self.parts, self.settings = kind, weight, bias, parts, settings

    def unpack(self, module: nn.Module) -> None:
        """Keep packed parameters with a dimension more; with tp=1 too, so that a checkpoint fits any tp."""
        if self.parts == 1:
            return
        module.unpacked_dims = {"weight": module.weight.dim() - 1 if is_transposed(module) else 0, "bias": 0}
        for name, parameter in list(module.named_parameters(recurse=False)):
            unpacked = parameter.detach().unflatten(module.unpacked_dims[name], (self.parts, -1))
            module._parameters[name] = nn.Parameter(unpacked, requires_grad=parameter.requires_grad)
        module.__class__ = mixed(self.kind, type(module))

    def placement(self, module: nn.Module, name: str) -> Placement:
        """Return the placement of one of the module's parameters."""
        placement = self.weight if name == "weight" else self.bias
        if placement.is_shard() and name == "weight" and is_transposed(module):
            placement = Shard(module.weight.dim() - 1 - placement.dim) if self.parts == 1 else Shard(2)
        return placement

    def _apply(self, module: nn.Module, tp_mesh: DeviceMesh) -> nn.Module:
        tp = tp_mesh.size()
        module.n_columns = getattr(module, "out_features", None)
        for name, parameter in list(module.named_parameters(recurse=False)):
            placement = self.placement(module, name)
            uneven = placement.is_shard() and parameter.shape[placement.dim] % tp
            if uneven and self.kind not in (OfOwnTokens, Head):
                its_class = next(one for one in type(module).__mro__ if not issubclass(one, Kind))
                raise UsageError(
                    f"tp={tp} does not divide the {parameter.shape[placement.dim]} that it would have to "
                    f"split of the {name} {tuple(parameter.shape)} of a {its_class.__name__}."
                )
            sharded = distribute_tensor(parameter, tp_mesh, [placement], src_data_rank=self.src_data_rank)
            module.register_parameter(name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))
        if hasattr(module, "nf") and self.kind is ColumnWise:  # the outputs of a Conv1D, by which it shapes y
            module.nf //= tp
        if self.kind is OfOwnTokens:
            module.first_row = rows_per_rank(module.num_embeddings, tp) * tp_mesh.get_local_rank()
            if module.padding_idx is not None:  # the row that gets no gradient from the look-up
                own = module.padding_idx - module.first_row
                module.padding_idx = own if 0 <= own < module.weight.to_local().shape[0] else None
        for name, value in self.settings.items():
            setattr(module, name, value)
        if not isinstance(module, Kind):
            module.__class__ = mixed(self.kind, type(module))
        return module


class StyleByName(Style):
    """Places parameters of any name; those that it does not list are whole.

    dims: {name: (parts, dim)}. The parameter holds `parts` matrices, one behind the other along `dim`, and
        each of them is split along it. `dim` is counted from the end, so that it is the same before and
        after `unpack`.
    """

    def __init__(self, kind: type[Kind], dims: dict[str, tuple[int, int]]):
        super().__init__(kind)
        self.dims = dims

    def unpack(self, module: nn.Module) -> None:
        packed = {name: (parts, dim) for name, (parts, dim) in self.dims.items() if parts > 1}
        if not packed:
            return
        module.unpacked_dims = {}
        for name, (parts, dim) in packed.items():
            parameter = module._parameters[name]
            module.unpacked_dims[name] = parameter.dim() + dim
            unpacked = parameter.detach().unflatten(dim, (parts, -1))
            module._parameters[name] = nn.Parameter(unpacked, requires_grad=parameter.requires_grad)
        module.__class__ = mixed(self.kind, type(module))

    def placement(self, module: nn.Module, name: str) -> Placement:
        if name not in self.dims:
            return Replicate()
        return Shard(module._parameters[name].dim() + self.dims[name][1])


def is_transposed(module: nn.Module) -> bool:
    """Return whether the module is a Conv1D of transformers, whose weight is (inputs, outputs)."""
    return type(module).__name__.endswith("Conv1D")


COLUMNS, ROWS = Style(ColumnWise, Shard(0), Shard(0)), Style(RowWise, Shard(1))
COLUMNS_GATHER, ROWS_SLICE = Style(ColumnWiseGathered, Shard(0), Shard(0)), Style(RowWiseSliced, Shard(1))
EMBED, HEAD = Style(OfOwnTokens, Shard(0)), Style(Head, Shard(0), Shard(0))
WHOLE, WHOLE_BELOW, SHARE = Style(OnWhole), Style(OnWholeBelow), Style(OnShare)
PER_HEAD = Style(OnWhole, Shard(1))  # an embedding with a column for each head
NONE, AR, AR3, AG = {}, {"all-reduce": 1}, {"all-reduce": 3}, {"all-gather": 1}


def packed(parts: int) -> Style:
    """Return the style of a column-wise layer whose weight holds several matrices, one behind the other."""
    return Style(ColumnWise, Shard(1), Shard(1), parts)
