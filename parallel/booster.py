"""Booster: train under any layout in the few lines of a plain PyTorch loop.

    booster = Booster(ParallelConfig(tp=2, pp=2, microbatches=4, zero_stage=1))
    model, optimizer, dataloader, criterion = booster.boost(model, optimizer, dataloader, criterion)
    for batch in dataloader:           # Hugging Face's {"input_ids", "labels"} (B, T), labels not shifted
        loss = booster.step(batch)     # forward, backward: the mean loss of the global batch, on every rank
        booster.clip_grad_norm(1.0)
        optimizer.step()
        optimizer.zero_grad()
    booster.save_hf(model, "out")

The Booster does nothing that a recipe could not write: it calls what recipes/pretrain.py calls, in the same
order. Read that file to see the steps, and use the Booster if your own program has a model, an optimizer and
a dataloader already.

A model goes one of two ways. A LLaMA becomes our Llama (_AsOurLlama), and any other model of transformers
stays what it is and is spread by a table of parallel/plans/ (_AsItIs). Booster has what both share, and the
two classes have the same methods.
"""

import atexit
import gc
import socket
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dtensor_llama import Llama, LlamaConfig, UsageError, save_hf
from dtensor_llama.attention import choose_attention
from dtensor_llama.checkpoint import NAME, Checkpointer, restore_training_state, training_state
from dtensor_llama.config import config_from_fields
from dtensor_llama.data.reader import Batch
from dtensor_llama.errors import listed, mismatches
from dtensor_llama.generation_config import generation_config
from dtensor_llama.initial_weights import init_weights
from dtensor_llama.loss import IGNORE
from dtensor_llama.weights import copy_own_part, hf_parameters, values_to_write
from memory import MemoryConfig
from parallel.apply import Computation
from parallel.assemble import Offload, Training, assemble
from parallel.clip import clip_grad_norm
from parallel.config import ParallelConfig, check_parallel
from parallel.mesh import Layout, build_mesh, start_process_group
from parallel.plans import Family, family_of
from parallel.plans.batch import check_ids, check_tensors, columns_of
from parallel.plans.family import refuse, shape_of
from parallel.plans.loss import HfBatch, loss_sum, summed, targets_of
from parallel.plans.spread import check_family, has_dropout, kept_buffers, restore_buffers, shell_of

Criterion = Callable[[Tensor, Tensor], Tensor]
Columns = dict[str, Tensor]  # of a batch of Hugging Face, by name
EXIT_WAIT = timedelta(seconds=20)


@dataclass(eq=False)
class Booster:
    """Runs a model under one layout. Every rank makes a Booster, and all call its methods together.

    An existing process group is used. Otherwise one is made from what torchrun set, or a group of one without
    a launcher, and is left when the program ends without an error. UsageError names what cannot be done.
    """

    # An axis of -1 takes the processes that the others leave over. `microbatches` is how many parts `step`
    # cuts the sequences of a dp rank into; None means 1, or with pp two per pp rank.
    config: ParallelConfig
    memory: MemoryConfig | None = None  # None keeps all states on the device
    _: KW_ONLY
    # The type of the computation. Master weights, moments and reductions are fp32 in any case.
    dtype: torch.dtype = torch.float32
    # The next three are as the settings of these names in pretrain.py.
    recompute: str = "none"
    compile: bool = False
    attention: str = "auto"  # for our own Llama only
    seed: int = 0  # decides the initial weights of a model that is on `meta`, and what dropout draws
    device: torch.device | None = None  # None takes this process's accelerator or, without one, the CPU

    def __post_init__(self):
        _check_memory(self.memory)
        if self.dtype not in (torch.float32, torch.bfloat16):
            raise UsageError(
                f"Booster(dtype={self.dtype}) is not possible; use torch.bfloat16 or torch.float32."
            )
        local_rank = dist.get_node_local_rank(fallback_rank=-1)  # -1: there is no launcher
        if self.device is None:
            kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            self.device = torch.device(kind.type, max(local_rank, 0)) if kind else torch.device("cpu")
        if self.device.type != "cpu":
            torch.accelerator.set_device_index(self.device.index or 0)
        ring = self.config.cp != 1 and self.config.cp_method == "ring"
        kernel, _ = choose_attention(self.attention, self.device, self.dtype, merges_blocks=ring)
        self.computation = Computation(self.device, self.dtype, self.recompute, self.compile, kernel)
        if not dist.is_initialized():
            start_process_group(self.device, 1 if local_rank < 0 else None)
            atexit.register(_leave_group)
        resolved = self.config.resolve(dist.get_world_size())
        self.n_microbatches = resolved.microbatches or (2 * resolved.pp if resolved.pp > 1 else 1)
        self.config = replace(resolved, microbatches=self.n_microbatches)
        # A placement that was left open is off here, on one GPU too: the optimizer may be any, and gradients
        # may be accumulated over as many calls of `step` as the caller likes.
        if self.memory is not None and not self.memory.is_on:
            self.memory = None
        self.steps = 0  # calls of `step`
        # All of these come with `boost`.
        self.way: _AsOurLlama | _AsItIs | None = None
        self.training: Training | None = None
        self.model = self.optimizer = self.dataloader = None

    def boost(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        dataloader: Iterable | None = None,
        criterion: Criterion | None = None,
    ) -> tuple[nn.Module, torch.optim.Optimizer, Iterable | None, Criterion | None]:
        """Spread a training set-up over the mesh; returns what to use in place of the four.

        model: our Llama, an untouched transformers.LlamaForCausalLM, or an untouched model of a family of
            parallel/plans/README.md; whole, on any device, the same on every rank. For the first two our
            Llama of that shape is returned, for others a model of the same class and modules: with this
            rank's slices of your weights in fp32 under the same names. Your model is left as it was (drop it
            to free its memory). A Llama on `meta`: initial weights of `seed`, no memory at all.
        optimizer: any of torch.optim's interface, on all parameters of `model`, that has not stepped yet. It
            stays the same object with its groups and settings (so a scheduler on it goes on), but steps this
            rank's parameters. With memory: a torch AdamW; the chunk manager's optimizer takes its place, with
            the very same groups.
        dataloader: any iterable of global batches, the same on every rank (checked at each batch). The one
            that is returned gives this dp rank's sequences of each batch. None if you cut batches yourself.
        criterion: None: the model's own loss, the mean over the scored tokens of the global batch. Yours is
            called with the whole logits (B, T, V) fp32 of a microbatch and its labels, not shifted, and must
            return a mean over scored tokens: microbatches and ranks count by their labels[:, 1:] that are not
            -100 (of BERT and T5, by all labels). Not under cp: no rank has whole sequences.
        """
        is_llama = isinstance(model, Llama) or type(model).__name__ == "LlamaForCausalLM"
        self.way = _AsOurLlama(self, model, criterion) if is_llama else _AsItIs(self, model, criterion)
        config, self._checked_shape = self.way.config, None
        # This is the smallest batch that may come: a layout that fits none is refused here.
        self._check(config.token_slices, self.n_microbatches * config.dp)
        boosted, whole = self.way.on_meta(model)
        names = _names_in(optimizer, whole)

        def own_parameters(boosted: nn.Module) -> torch.optim.Optimizer:
            """Put into each group this rank's share of its parameters; with pp those of its stages."""
            here = hf_parameters(boosted)
            for group, names_of_group in zip(optimizer.param_groups, names, strict=True):
                group["params"] = [here[name] for name in names_of_group if name in here]
            return optimizer

        layout = Layout(config, build_mesh(config, self.device.type), self.n_microbatches)
        offload = Offload(self.memory, ranks_per_host=_ranks_of_this_host()) if self.memory else None
        say = print if dist.get_rank() == 0 else lambda text: None
        training = assemble(boosted, layout, self.way.computation, own_parameters, offload, say)
        self.way.finish(training, model)
        if next(iter(whole.values())).is_meta:
            init_weights(training.fp32_weights(), self.seed)
        else:
            copy_weights(whole, training.fp32_weights())
        self.training, self.model, self.optimizer = training, boosted, training.optimizer
        self.dataloader = None
        if dataloader is not None:
            self.dataloader = OwnSequences(dataloader, layout, self.way.read, self.device)
        return boosted, self.optimizer, self.dataloader, criterion

    def step(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Run forward and backward of this dp rank's sequences, {"input_ids", "labels"} (B, T); gradients add
        to what is there. A model of a family gets the other columns of the batch, too.

        Returns the mean loss of the global batch in nats, a float32 scalar, the same on every rank. If no
        label of the global batch is scored it is 0, and so are the gradients.
        """
        self._check_boosted("step")
        columns = self.way.read(batch)
        tokens, labels = columns["input_ids"], columns["labels"]
        if tokens.shape != self._checked_shape:
            if len(tokens) % self.n_microbatches:
                raise UsageError(
                    f"booster.step was given {len(tokens)} sequences, which microbatches="
                    f"{self.n_microbatches} does not divide; take batches from the dataloader that boost "
                    "returned, which fills them up."
                )
            self._check(tokens.shape[1], len(tokens) * self.config.dp)
            self._checked_shape = tokens.shape
        layout = self.training.layout
        targets = targets_of(self.way.family, labels)
        n_targets = (targets != IGNORE).sum().to(self.device)
        dist.all_reduce(n_targets, group=layout.mesh["dp"].get_group())
        microbatches = self.way.cut(columns, targets, layout)
        loss = self.way.forward_backward(self.training, microbatches, n_targets.clamp(min=1))
        dist.all_reduce(loss, group=layout.loss_group)  # each rank has its own tokens' share
        self.steps += 1
        return loss

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Clip all gradients to this norm over all ranks and axes. Returns the norm before, on every rank.

        The gradients in `parameter.grad` are scaled when this returns, as by torch.nn.utils.clip_grad_norm_;
        under a MemoryConfig they are not all there, and the optimizer's step scales them. If the norm is inf
        or nan the next optimizer.step() changes nothing. (An optimizer that is not fused makes every call
        wait for the device.)
        """
        self._check_boosted("clip_grad_norm")
        if not max_norm > 0:
            raise UsageError(f"max_norm={max_norm} is not possible; it must be above 0 (inf clips nothing).")
        return clip_grad_norm(self.model.parameters(), max_norm, self.optimizer)

    def save_hf(self, model: Llama, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a folder that transformers opens (save your tokenizer beside it); dtype None: fp32."""
        self._check_boosted("save_hf")
        save_hf(self.way.weights_to_save(self.training), folder, dtype)

    def save(self, folder: str | Path) -> None:
        """Write all that training needs to go on, as folder/step-00000042 after 42 calls of `step`.

        Call it between steps: gradients are not saved."""
        self._check_boosted("save")
        checkpoints = Checkpointer(folder)
        position = self.dataloader.n_dealt if self.dataloader is not None else 0
        checkpoints.save(
            self.steps, training_state(self.model, self.optimizer, self.steps, position), wait=True
        )
        checkpoints.close()

    def load(self, path: str | Path) -> int:
        """Load the newest checkpoint in a folder, or folder/step-00000042. Call it after boost.

        It may have been written under any layout. Returns the number of steps done. The next pass over the
        dataloader leaves out the batches that the saved pass had given already. It is up to you that they
        come in the same order again (shuffle with a seed that depends on the pass). The settings of the
        optimizer become the saved ones. A scheduler has its own load_state_dict.
        """
        self._check_boosted("load")
        path = Path(path)
        if not path.is_dir():
            raise UsageError(
                f"{path} does not exist; booster.load takes the folder that booster.save was given."
            )
        one = NAME.fullmatch(path.name)
        checkpoints = Checkpointer(path.parent if one else path)
        found = path if one else checkpoints.latest()
        if found is None:
            raise UsageError(
                f"{path} holds no complete checkpoint; it should have a folder like step-00000042."
            )
        state = training_state(self.model, self.optimizer)
        checkpoints.load(found, state)
        progress = restore_training_state(state, self.model, self.optimizer)
        checkpoints.close()
        self.steps = progress["step"]
        if self.dataloader is not None:
            self.dataloader.n_to_skip = progress["position"]
        return self.steps

    def _check_boosted(self, method: str) -> None:
        if self.training is None:
            raise UsageError(f"booster.{method} was called before booster.boost, which gives it the model.")

    def _check(self, seq_len: int, global_batch_size: int) -> None:
        """Raise UsageError if the layout cannot run such a batch of the boosted model."""
        way = self.way
        micro_batch_size = global_batch_size // (self.n_microbatches * way.config.dp)
        job = way.computation.job(way.shape, seq_len, global_batch_size, micro_batch_size)
        check_parallel(way.config, job)


# ---- The two ways ------------------------------------------------------------------------------------------


class _AsOurLlama:
    """Trains a LLaMA as our Llama of the same shape and names.

    config, computation: those of the Booster, as far as this way can follow them. shape: what the rules of a
    layout ask about a model. The user's model is passed in where it is needed, and never kept, so that the
    caller can free it.
    """

    family: Family | None = None

    def __init__(self, booster: Booster, model: nn.Module, criterion: Criterion | None):
        self.config, self.computation, self.criterion = booster.config, booster.computation, criterion
        self.shape = _config_of(model)
        if criterion is not None and self.config.cp > 1:
            raise UsageError(
                "a criterion of your own needs the logits of whole sequences, and under ParallelConfig("
                f"cp={self.config.cp}) no rank has them; use criterion=None (the causal-LM loss), or cp=1."
            )

    def on_meta(self, model: nn.Module) -> tuple[nn.Module, Columns]:
        """Return the model to spread, on `meta`, and the user's parameters by name."""
        with torch.device("meta"):
            boosted = Llama(self.shape).float()
        boosted.generation_config = _generation_config_of(model, self.shape)
        if isinstance(model, Llama):
            boosted.token_loss, boosted.attention = model.token_loss, model.attention
        return boosted, _matching_parameters(model, boosted)

    def finish(self, training: Training, model: nn.Module) -> None:
        """Take over from the user's model what is not a parameter, and set the loss of each stage."""
        if self.criterion is not None:
            for stage in training.stages:
                stage.loss_sum = _loss_by(self.criterion, stage)

    def read(self, batch: Mapping[str, Tensor]) -> Columns:
        """Return the columns of a batch that the model gets; UsageError if something is missing or odd."""
        return _columns(batch, self.shape.vocab_size)

    def cut(self, columns: Columns, targets: Tensor, layout: Layout) -> list[Batch]:
        """Cut the sequences of a dp rank into microbatches, with the tokens of this rank in each."""
        labels = targets if self.criterion is None else columns["labels"]
        parts = (column.chunk(layout.n_microbatches) for column in (columns["input_ids"], labels))
        return [layout.own_tokens(Batch(*part, None)) for part in zip(*parts, strict=True)]

    def forward_backward(self, training: Training, microbatches: list[Batch], n_targets: Tensor) -> Tensor:
        """Add up the gradients of all microbatches. Returns this rank's share of the loss."""
        return forward_backward(training, microbatches, n_targets)

    def weights_to_save(self, training: Training) -> nn.Module:
        """Return what save_hf writes."""
        return training.fp32_weights()


class _AsItIs:
    """Trains a model of transformers as the class that it is. Its methods are those of _AsOurLlama."""

    def __init__(self, booster: Booster, model: nn.Module, criterion: Criterion | None):
        self.criterion, self.seed, self.family = criterion, booster.seed, family_of(model)
        if booster.config.tp > 1 and booster.config.sequence_parallel and dist.get_rank() == 0:
            print(
                f"tp        {type(model).__name__}: no sequence parallelism, its blocks map whole sequences"
            )
        self.config = replace(booster.config, sequence_parallel=False)
        self.computation = check_family(model, self.family, self.config, booster.computation)
        if booster.attention != "auto":
            what = f"attention={booster.attention} is for our own Llama"
            refuse(model, f"{what}; make the model with the attn_implementation that you want.")
        self.shape = shape_of(model, self.family)

    def on_meta(self, model: nn.Module) -> tuple[nn.Module, Columns]:
        self.boosted = shell_of(model, self.family)
        self.boosted.family = self.family
        return self.boosted, dict(model.named_parameters())

    def finish(self, training: Training, model: nn.Module) -> None:
        restore_buffers(training.model, model, training.device)
        for stage in training.stages:
            stage.criterion = self.criterion
        if has_dropout(model) and dist.get_world_size() > 1:
            # Ranks of tp draw alike, where they have the same activations, and all others differently.
            other_tokens_or_layers = training.layout.mesh["loss"].get_local_rank()
            torch.manual_seed(self.seed + 1_000_003 * (1 + other_tokens_or_layers))

    def read(self, batch: Mapping[str, Tensor]) -> Columns:
        return columns_of(batch, self.boosted)

    def cut(self, columns: Columns, targets: Tensor, layout: Layout) -> list[HfBatch]:
        n, device = layout.n_microbatches, self.computation.device
        parts = {name: column.to(device).chunk(n) for name, column in columns.items()}
        tokens, labels = parts.pop("input_ids"), parts.pop("labels")
        others = [{name: part[i] for name, part in parts.items()} for i in range(n)]
        return [HfBatch(*microbatch) for microbatch in zip(tokens, labels, others, strict=True)]

    def forward_backward(self, training: Training, microbatches: list[HfBatch], n_targets: Tensor) -> Tensor:
        """Do what the function of this name does below, with the loss of a model of transformers."""
        if training.pipeline:
            return training.pipeline.step(microbatches, n_targets)
        loss = torch.zeros((), device=training.device)
        for i, batch in enumerate(microbatches):
            training.sync_gradients(last=i == len(microbatches) - 1)
            loss_i = loss_sum(training.model, self.family, batch, self.criterion) / n_targets
            # FSDP averages gradients over these ranks; we want their sum.
            (loss_i * training.layout.gradient_ranks).backward()
            loss += loss_i.detach()
        return loss

    def weights_to_save(self, training: Training) -> nn.Module:
        weights = training.fp32_weights()
        weights.convert_to_save = training.model.convert_to_save
        weights.kept_buffers = kept_buffers(training.model)
        return weights


def forward_backward(training: Training, microbatches: list[Batch], n_targets: Tensor) -> Tensor:
    """Run forward and backward of all microbatches, as recipes/pretrain.py does; gradients add up.

    Returns this rank's share of the loss, to be summed over layout.loss_group."""
    if training.pipeline:
        return training.pipeline.step(microbatches, n_targets)
    loss = torch.zeros((), device=training.device)
    for i, batch in enumerate(microbatches):
        training.sync_gradients(last=i == len(microbatches) - 1)
        tokens, labels, positions = batch.to(training.device)
        loss_i = training.model(tokens, labels=labels, positions=positions) / n_targets
        # FSDP averages gradients over these ranks; we want their sum.
        (loss_i * training.layout.gradient_ranks).backward()
        loss += loss_i.detach()
    return loss


class OwnSequences:
    """Iterates over the sequences of one dp rank in each global batch of a dataloader: {"input_ids",
    "labels"} (B/dp, T), and for a model of a family the other columns.

    A batch whose sequences or tokens do not divide evenly is filled up at its end with tokens that nothing is
    scored on and that no earlier token sees: neither loss nor gradients change, whatever the last batch of a
    pass holds.

    read: the method of the model's way that checks a batch.
    """

    def __init__(
        self,
        dataloader: Iterable,
        layout: Layout,
        read: Callable[[Mapping[str, Tensor]], Columns],
        device: torch.device,
    ):
        self.dataloader, self.layout, self.read, self.device = dataloader, layout, read, device
        self.n_dealt = 0  # batches of this pass that were handed out
        self.n_to_skip = 0  # of the next pass: set by Booster.load

    def __len__(self) -> int:
        return len(self.dataloader)

    def __iter__(self) -> Iterator[Columns]:
        skip, self.n_to_skip, self.n_dealt = self.n_to_skip, 0, 0
        for batch in self.dataloader:
            self.n_dealt += 1
            if self.n_dealt <= skip:
                continue
            columns = self.read(batch)
            self._refuse_other_batches(columns)
            yield {name: self._own_sequences(name, column) for name, column in columns.items()}

    def _own_sequences(self, name: str, column: Tensor) -> Tensor:
        """Pad a column, and return this dp rank's sequences of it. Padding tokens are not scored, but
        attention sees them, because the softmax of a sequence of padding alone would not be defined."""
        fill = IGNORE if name == "labels" else int("mask" in name)
        dp, dp_rank = self.layout.config.dp, self.layout.dp_rank
        n_sequences_missing = -len(column) % (dp * self.layout.n_microbatches)
        n_tokens_missing = -column.shape[1] % self.layout.config.token_slices
        column = F.pad(column, (0, n_tokens_missing, 0, n_sequences_missing), value=fill)
        return column[dp_rank * len(column) // dp : (dp_rank + 1) * len(column) // dp]

    def _refuse_other_batches(self, columns: Columns) -> None:
        """Raise UsageError if ranks see different batches: they would train on some sequences twice, and tp
        ranks on a mix of two."""
        if dist.get_world_size() == 1:
            return  # there is nothing to compare, and the host would wait for the previous step
        crc = 0
        for column in columns.values():
            crc = zlib.crc32(column.cpu().contiguous().numpy(), crc)
        ends = torch.tensor([crc, -crc], device=self.device)
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        if ends[0] != -ends[1]:
            raise UsageError(
                "the ranks' dataloaders gave different batches; each must see the same global batches, of "
                "which the Booster takes its share. Leave out distributed samplers, and shuffle with one "
                "seed: DataLoader(..., shuffle=True, generator=torch.Generator().manual_seed(0))."
            )


def copy_weights(whole: dict[str, Tensor], model: nn.Module) -> None:
    """Copy this rank's box of each whole tensor into the parameter of the same name, plain or DTensor.

    A packed parameter (parallel/plans/styles.py) has the elements of the whole one in another shape."""
    for name, parameter in hf_parameters(model).items():
        with values_to_write(model, name, parameter) as values:
            copy_own_part(whole[name].detach().reshape(values.shape), values)


def _check_memory(memory: MemoryConfig | None) -> None:
    if memory is None:
        return
    if not isinstance(memory, MemoryConfig):
        raise UsageError(
            f"Booster was given {type(memory).__name__} for memory; pass memory.MemoryConfig(...), or None."
        )
    # A placement that is left open is off here, where a budget would do nothing.
    replace(memory, placement=memory.placement or "off").check()
    if memory.draw:
        raise UsageError("draw=True is for the recipes that write pictures of a step; leave it out.")
    if memory.activations:
        raise UsageError(
            "activations=True needs to know the shape of a microbatch before the first one comes, and the "
            "Booster does not; leave it out and use recompute=full, or write the loop of recipes/pretrain.py."
        )


def _config_of(model: nn.Module) -> LlamaConfig:
    if isinstance(model, Llama):
        return model.config
    if not hasattr(getattr(model, "config", None), "to_dict"):
        raise UsageError(
            f"model is a {type(model).__name__}; the Booster takes dtensor_llama.Llama or "
            "transformers.LlamaForCausalLM."
        )
    return config_from_fields(model.config.to_dict(), Path("model.config"))


def _generation_config_of(model: nn.Module, shape: LlamaConfig) -> dict | None:
    """Return what save_hf shall write into generation_config.json: the settings of a transformers model, if
    it has any."""
    if isinstance(model, Llama):
        return model.generation_config
    settings = getattr(model, "generation_config", None)
    return None if settings is None else generation_config(settings.to_diff_dict(), shape, same_tokens=True)


def _matching_parameters(model: nn.Module, ours: Llama) -> dict[str, Tensor]:
    """Return the user's parameters by name; UsageError unless our model has the same ones, and all train."""
    theirs, wanted = dict(model.named_parameters()), dict(ours.named_parameters())
    shapes = [{name: parameter.shape for name, parameter in own.items()} for own in (theirs, wanted)]
    problems = mismatches(*shapes)
    for name, parameter in theirs.items():
        if not parameter.requires_grad:
            problems.append(f"{name}: requires_grad is False")
    if problems:
        raise UsageError(
            f"model is not a plain LLaMA of which all parameters train: {listed(problems, most=5)}. Give the "
            "model as LlamaForCausalLM made it, without adapters or frozen parts."
        )
    return theirs


def _names_in(optimizer: torch.optim.Optimizer, parameters: dict[str, Tensor]) -> list[list[str]]:
    """Return the names of the parameters in each group of the optimizer."""
    if optimizer.state:
        raise UsageError(
            "the optimizer has already stepped; give the Booster a new one, and boost before training. To go "
            "on with a run use booster.save and booster.load."
        )
    name_of = {parameter: name for name, parameter in parameters.items()}
    groups = [[name_of.get(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
    n_strange = sum(name is None for group in groups for name in group)
    trained = {name for parameter, name in name_of.items() if parameter.requires_grad}
    left_out = sorted(trained - {name for group in groups for name in group})
    if n_strange:
        raise UsageError(
            f"the optimizer has {n_strange} parameters that are not the model's; build it on the model given "
            "to boost: AdamW(model.parameters())."
        )
    if left_out:
        raise UsageError(
            f"the optimizer leaves out {len(left_out)} parameters of the model ({left_out[0]} ...), and all "
            "with requires_grad must train; put them into a group, or freeze them."
        )
    return groups


def _columns(batch: Mapping[str, Tensor], n_ids: int) -> Columns:
    """Return input_ids and labels of a Hugging Face batch; UsageError if it has more that would matter, or
    ids that a vocabulary of `n_ids` lacks."""
    missing = [name for name in ("input_ids", "labels") if name not in batch]
    strange = sorted(set(batch) - {"input_ids", "labels", "attention_mask"})
    if missing or strange:
        what = f"lacks {missing[0]}" if missing else f"has {strange[0]}, which would not be used"
        raise UsageError(
            f'a batch {what}; it must be {{"input_ids", "labels"}}, both (B, T), and may have attention_mask.'
        )
    check_tensors(batch)
    tokens, labels, mask = batch["input_ids"], batch["labels"], batch.get("attention_mask")
    if tokens.dim() != 2 or tokens.shape != labels.shape:
        raise UsageError(
            f"input_ids are {list(tokens.shape)} and labels {list(labels.shape)}; both must be (B, T)."
        )
    check_ids(batch, n_ids)
    if mask is not None and (mask[:, 1:] > mask[:, :-1]).any():
        raise UsageError(
            "attention_mask hides tokens before others that it shows; pad on the right "
            '(tokenizer.padding_side = "right"), where causal attention needs no mask.'
        )
    if mask is not None and (labels[:, 1:][mask[:, :-1] == 0] != IGNORE).any():
        raise UsageError(
            "labels are scored where attention_mask hides the token before; set labels of padding to -100."
        )
    return {"input_ids": tokens, "labels": labels}


def _ranks_of_this_host() -> int:
    """Return how many ranks share the memory of this machine. All ranks enter."""
    names = [None] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    return names.count(socket.gethostname())


def _loss_by(criterion: Criterion, part: Llama):
    """Return a function that takes the place of the model's `loss_sum`, with the user's criterion."""

    def loss_sum(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = part.lm_head(hidden).float()  # (B, T, V), whole also under tp
        return summed(criterion, logits, labels, n_targets=int((labels[:, 1:] != IGNORE).sum()))

    return loss_sum


def _leave_group() -> None:
    """Leave the process group at the end of a program that did not make it itself.

    Unlike stop_process_group this waits no longer than EXIT_WAIT. The other ranks may never come, because
    this one may have failed, or ended by sys.exit."""
    if not dist.is_initialized() or hasattr(sys, "last_value"):  # after an error the launcher ends the others
        return
    try:
        dist.barrier(async_op=True).wait(EXIT_WAIT)
    except RuntimeError:
        pass  # the others are busy, gone, or waiting for us elsewhere
    gc.collect()
    dist.destroy_process_group()
