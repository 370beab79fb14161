"""parallelize: split a LLaMA over a mesh, from outside, pass by pass."""

import logging
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh

from dtensor_llama.attention import WholeSequences
from dtensor_llama.config import LlamaConfig
from dtensor_llama.errors import UsageError
from dtensor_llama.loss import token_nll
from dtensor_llama.model import Llama
from parallel.config import Job, ParallelConfig
from parallel.context import Ring, apply_context_parallel
from parallel.lora import apply_lora_parallel
from parallel.pipeline import split_stages
from parallel.recompute import apply_recompute
from parallel.tensor import apply_tensor_parallel, check_token_loss
from parallel.zero import apply_zero


@dataclass(frozen=True)
class Computation:
    """Describes how the model computes, whatever the mesh."""

    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32  # of weights, activations and collectives in forward and backward
    # Activation checkpointing, "none", "selective" or "full":
    # which activations are computed again in backward.
    recompute: str = "none"
    compile: bool = False  # torch.compile each block
    attention: str = "sdpa"  # the kernel, one of dtensor_llama/attention.py's

    def job(self, model: LlamaConfig, seq_len: int, global_batch_size: int, micro_batch_size: int) -> Job:
        """Return what check_parallel has to know of a run that computes like this."""
        return Job(
            model,
            seq_len,
            global_batch_size,
            micro_batch_size,
            self.attention,
            self.recompute,
            self.compile,
            self.device.type,
        )


def parallelize(
    model: Llama,
    mesh: DeviceMesh,
    config: ParallelConfig,
    computation: Computation = Computation(),
) -> list[Llama]:
    """Change `model` in place into this rank's share of it, and return its pipeline stages in order.

    model: on `meta` or on a real device. Split parameters become DTensors. On `meta` they stay there: call
        `to_empty` on each stage, then set initial or loaded weights.
    mesh: from build_mesh(config, ...), with config resolved and checked.
    computation: its attention kernel is for the library's own attention. An attention object of another
        class, set on the model, brings its own.

    Without pp the one stage is `model` itself. With pp the stages share their modules with `model`, which
    keeps all parameters of this rank under their Hugging Face names, for the optimizer, checkpoints and
    export. Every stage uses `model.token_loss` and `model.attention` as they are now. An attention that
    cannot work on split sequences is refused with cp, and a token loss that cannot work on split logits with
    tp: UsageError.
    """
    check_seams(model, config, computation)
    if type(model.attention) is WholeSequences:
        model.attention = WholeSequences(computation.attention)
    if config.cp > 1:  # first: which tokens this rank has, and how it attends to those of other ranks
        apply_context_parallel(model, mesh["cp"], config.cp_method)
    parts = [model]
    if config.pp > 1:  # then: which layers exist on this rank
        parts = split_stages(model, mesh["pp"], config.schedule, config.stages_per_rank)
    # Each mesh["tp"] makes a new object, and torch.compile would compile a block again for another one.
    # So all parts share this one.
    tp_mesh = mesh["tp"]
    for part in parts:
        blocks = [block for block in part.model.layers if block is not None]
        if config.tp > 1:  # then: which slice of each weight; its sequence shards are cut from cp's
            apply_lora_parallel(part, tp_mesh)
            apply_tensor_parallel(part, tp_mesh, config.sequence_parallel)
        # then: a recomputed block must replay the traffic of the passes above
        apply_recompute(blocks, computation.recompute, last_matrix="mlp.down_proj")
        if computation.compile:
            # then: one graph per block, recompute included
            apply_compile(blocks, dynamic=False if config.tp > 1 else None)
        # last: shards what the passes above left
        apply_zero(part, blocks, mesh, config.zero_stage, computation.dtype)
    for part in {model, *parts}:
        part.is_parallel = True
    return parts


def check_seams(model: Llama, config: ParallelConfig, computation: Computation) -> None:
    """Raise UsageError if what was set as `model.attention` or `model.token_loss` cannot work in this layout.

    parallelize calls it. A recipe also calls it before it starts a process group, so that one process
    refuses in one line."""
    own, kernel = model.attention, computation.attention
    if type(own) is WholeSequences:
        if own.kernel not in (kernel, WholeSequences().kernel):
            raise UsageError(
                f"model.attention was set to WholeSequences({own.kernel!r}) and attention={kernel}; set only "
                "one of them, or give both the same kernel."
            )
    elif config.cp > 1 and not getattr(own, "splits_sequence", False):
        name = type(own).__name__
        raise UsageError(
            f"model.attention is of class {name}, which needs whole sequences, and with cp={config.cp} no "
            f'rank has them: use cp=1, or set model.attention = Ulysses(mesh["cp"], {name}(...)).'
        )
    if config.tp > 1 and model.token_loss is not token_nll:
        check_token_loss(model.token_loss, model.config.vocab_size, computation.device)


def attention_in_words(model: Llama, kernel: str, why: str) -> str:
    """Return what a run prints about its attention: the kernel and why it was chosen, or the class of an
    attention that a user has set, which chooses its kernel itself."""
    own = getattr(model.attention, "whole", model.attention)  # Ulysses has the attention that computes
    return f"{kernel} ({why})" if type(own) in (WholeSequences, Ring) else f"of class {type(own).__name__}"


def apply_compile(blocks: list, dynamic: bool | None = None) -> None:
    """Compile each block's forward. All blocks share one code object, so the first compile serves all; FSDP's
    hooks stay outside the graph.

    A run compiles two graphs, whatever its layout: one that trains, at the first step, and one for
    validation, at the first validation. torch.compile distinguishes whether gradients are wanted, since a
    graph without backward keeps nothing for it. Under LoRA there is a third, at the first step: the input of
    the first block has no gradient, as the embedding is frozen.

    dynamic: as in torch.compile. By default it makes one graph for all lengths of sequences after the first,
    with a symbol in place of the number. Some of DTensor's rules fail on symbols (pytorch/pytorch#152963).
    False compiles every length by itself, and is for blocks that compute with DTensors; torch does so for
    eight lengths, then says that this is its limit and runs any other length without the compiler.
    """
    # Under selective recomputation torch warns in eleven lines, on every rank and for every graph, that a
    # block must not write in place. No block does.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=dynamic)
