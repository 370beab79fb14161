"""Lesson 9: one mesh has all five axes, and one function applies lessons 1 to 8 to LLaMA.

    torchrun --nproc-per-node 4 recipes/lessons/09_everything.py    (two axes of size 2 at a time)

axis         pp: lesson 8   dp_replicate: lesson 2   dp_shard: lesson 3   cp: lessons 6, 7   tp: lessons 4, 5
parallelize  applies the lessons as passes, from outside; the model does not know how many ranks there are.
             The passes nest: pp comes first (which layers are here), then cp (which tokens), then tp (which
             slices of the weights), and ZeRO last (it shards what is left)

        which rank has which quarter of a weight's rows    which rank has which tokens, dp_shard 2 x cp 2
        under tp 2                  0 0 1 1                sequence 0   [ rank 0 | rank 1 ]
        under dp_shard 2 x tp 2     0 2 1 3                sequence 1   [ rank 2 | rank 3 ]

The loss is summed over the axes whose ranks saw different tokens, and over pp, because only the last stage
has it. A gradient is summed over the axes whose ranks have the same weight but saw different tokens. In the
output, `_S(0, 2)` stands for rows that tp has already cut in 2.
"""

import logging
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from common import print_once, run_lesson
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dtensor_llama import Llama, LlamaConfig
from dtensor_llama.data.reader import Batch
from dtensor_llama.initial_weights import init_weights
from parallel import ParallelConfig, build_mesh
from parallel.apply import Computation
from parallel.assemble import Training, adamw, assemble
from parallel.config import AXES, Job, check_parallel
from parallel.mesh import Layout

TINY = LlamaConfig(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4
)
B, T = 4, 16  # sequences and tokens of the global batch
LAYOUTS = [  # dp_shard gets the ranks, of 4, that the other axes leave
    ParallelConfig(tp=2),
    ParallelConfig(pp=2, tp=2),
    ParallelConfig(pp=2, cp=2, cp_method="ring"),
    ParallelConfig(cp=2, tp=2),
    ParallelConfig(dp_replicate=2),
]
KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "send",
    "recv",
    "ring-attention-backward",
    "ring-attention",
)
# This keeps the groups of all meshes so far, because DTensor may reuse those of an earlier, equal mesh.
axis_of_group: dict[str, str] = {}


class CountMessages(TorchDispatchMode):
    """Counts the collectives that pass through torch's dispatcher, by kind and mesh axis.

    Operators of c10d get their process group as an object, all others get its name.
    """

    counts = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.__name__.replace("_", "")
        kinds = [kind for kind in KINDS if name.startswith(kind.replace("-", ""))]
        if kinds:
            groups = [x for x in args if isinstance(x, str)]
            for x in args:
                if isinstance(x, torch.ScriptObject):
                    groups = [dist.ProcessGroup.unbox(x).group_name]
                    break
            for group in groups:
                if group in axis_of_group:
                    self.counts[f"{kinds[0]} over {axis_of_group[group]}"] += 1
        return op(*args, **(kwargs or {}))


def forward_backward(training: Training, microbatches: list[Batch], n_targets: Tensor) -> Tensor:
    """Run forward and backward as recipes/pretrain.py does, and return this rank's share of the loss."""
    if training.pipeline:
        return training.pipeline.step(microbatches, n_targets)
    loss = torch.zeros(())
    for i, batch in enumerate(microbatches):
        training.sync_gradients(last=i == len(microbatches) - 1)  # ZeRO: reduce gradients once, or each time
        loss_i = training.model(batch.tokens, labels=batch.labels) / n_targets
        scaled = loss_i * training.layout.gradient_ranks  # FSDP averages over these ranks; we want the sum
        scaled.backward()
        loss += loss_i.detach()
    return loss


def train_step(config: ParallelConfig, tokens: Tensor, labels: Tensor) -> tuple[float, float, Llama]:
    """Run forward and backward of all sequences (B, T) under a layout.

    Returns the loss, the gradient norm, and the model with the gradients of this rank's parameters.
    """
    config = config.resolve(dist.get_world_size())
    n_microbatches = check_parallel(config, Job(TINY, T, B))  # refuses what cannot run
    layout = Layout(config, build_mesh(config, "cpu"), n_microbatches)
    with torch.device("meta"):
        model = Llama(TINY)  # names and shapes, no memory
    training = assemble(model, layout, Computation(), adamw(lr=3e-4, weight_decay=0.1))
    init_weights(model, seed=0)  # depends on the names, so it is the same under every layout
    own = slice(layout.dp_rank, None, config.dp)  # this dp rank's sequences, in microbatches of one
    microbatches = []
    for columns in zip(tokens[own].split(1), labels[own].split(1), strict=True):
        batch = layout.own_tokens(Batch(*columns, None))  # (1, T/cp): this cp rank's tokens
        microbatches.append(batch)
    for axis in ("dp_replicate", "fsdp", "cp", "tp", "pp"):
        axis_of_group[layout.mesh[axis].get_group().group_name] = axis
    with CountMessages() as trace:
        loss = forward_backward(training, microbatches, (labels != -100).sum())
    dist.all_reduce(loss, group=layout.loss_group)
    norm = training.optimizer.clip_grad_norm(1e9)  # one norm over every axis; 1e9 clips nothing

    axes = " x ".join(f"{axis} {getattr(config, axis)}" for axis in AXES if getattr(config, axis) > 1)
    n_own = sum(p.to_local().numel() for p in model.parameters())
    print_once(
        f"{axes}: rank 0 has {n_own:,} of {TINY.n_parameters:,} parameters and reads "
        f"{len(microbatches)} x {tuple(microbatches[0].tokens.shape)} tokens"
    )
    for name, p in model.named_parameters():
        if name.endswith(("layers.0.self_attn.q_proj.weight", "layers.0.mlp.down_proj.weight")):
            axes = p.device_mesh.mesh_dim_names
            placed = ", ".join(f"{how} over {axis}" for how, axis in zip(p.placements, axes, strict=True))
            print_once(f"  {name[15:-7]:17}{tuple(p.shape)}, here {tuple(p.to_local().shape)}: {placed}")
    print_once("  messages of rank 0:")
    for what, n in sorted(trace.counts.items()):
        print_once(f"    {n:3} {what}")
    trace.counts.clear()
    return loss.item(), norm.item(), model


def lesson() -> None:
    # DTensor logs advice on speed, which is of no use for tiny models.
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    tokens, labels = torch.randint(TINY.vocab_size, (2, B, T), generator=torch.Generator().manual_seed(1))
    labels[2:, T // 2 :] = -100  # the last sequences have fewer targets
    plain = Llama(TINY)  # one process
    plain_loss = plain(tokens, labels) / (labels != -100).sum()
    plain_loss.backward()
    plain_norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()]).item()
    for layout in LAYOUTS:
        loss, norm, model = train_step(layout, tokens, labels)
        print_once(f"  loss {loss:.6f}, one process {plain_loss.item():.6f}")
        print_once(f"  gradient norm {norm:.6f}, one process {plain_norm:.6f}\n")
        # The project promises these tolerances for fp32.
        assert_close([loss, norm], [plain_loss.item(), plain_norm], rtol=0, atol=2e-5)
        for name, p in model.named_parameters():
            assert_close(p.grad.full_tensor(), plain.get_parameter(name).grad, rtol=1e-4, atol=1e-6)

    print_once("To add an axis of your own, e.g. ep for experts:")
    for file, start, what in (
        ("parallel/config.py", "AXES =", "its name, beside the axes that shall be its neighbours; a field"),
        ("parallel/config.py", "DERIVED_AXES =", "do its ranks read other data (dp)? share weights (fsdp)?"),
        ("parallel/rules.py", "TENSOR =", "a list like this one: what it cannot do, and what works instead"),
        ("parallel/apply.py", "def parallelize", "its pass, from a file of its own, after those it needs"),
        ("parallel/cost.py", "def _tp_traffic", "a function like this one: what it sends"),
        ("parallel/mesh.py", "def build_mesh", "nothing: it makes the axes of config.py"),
        ("dtensor_llama/shards.py", "def copies", "nothing: it counts by the placements of DTensors"),
    ):
        lines = Path(__file__).parents[2].joinpath(file).read_text().splitlines()
        line = 1 + next(i for i, text in enumerate(lines) if text.startswith(start))
        print_once(f"  {f'{file}:{line}':26} {start:20} {what}")
    print_once(
        f"\nproven: {len(LAYOUTS)} layouts of 4 processes give one process's loss, gradient norm "
        "and gradients"
    )


if __name__ == "__main__":
    run_lesson(lesson, n_ranks=4)
