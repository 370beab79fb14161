"""The process group and the one DeviceMesh. Axes, outermost first: pp, dp_replicate, dp_shard, cp, tp.

    ranks of a 2 x 1 x 2 x 1 x 2 mesh        dp_shard 0   dp_shard 1
                              pp 0   tp         0  1         2  3
                              pp 1   tp         4  5         6  7

Neighbouring ranks differ in tp first. So the axis that communicates most has the shortest wires, and pp,
which communicates least, the longest.
"""

import gc
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from dtensor_llama.data.reader import Batch
from parallel.config import AXES, DERIVED_AXES, ParallelConfig
from parallel.context import shard_batch, shard_sequence

# its successor is not public yet
warnings.filterwarnings("ignore", message="Slicing a flattened dim from root mesh")


def start_process_group(
    device: torch.device, world_size: int, attempt: int = 0, timeout_s: float = 600
) -> None:
    """Join the processes that torchrun started, or, for a single process without it, found a group of one.

    The group has gloo for CPU tensors, and NCCL beside it when the device is a GPU. A rank that does not
    arrive within `timeout_s` seconds, or a collective that lasts longer, is an error on all others.

    attempt: how often torchrun has restarted the processes. They find the store of the attempt before, with
        the addresses of processes that are gone, so each attempt uses names of its own (pytorch issue
        135712). Several nodes may count their restarts differently: there, set
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, which then makes a new store each time, and leave
        `attempt` at 0.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    options = {"timeout": timedelta(seconds=timeout_s)}
    if device.type == "cuda":
        options["device_id"] = device
    if world_size == 1:
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    elif attempt:
        store, rank, _ = next(rendezvous("env://", timeout=options["timeout"]))
        store = dist.PrefixStore(f"attempt-{attempt}", store)
        options |= {"store": store, "rank": rank, "world_size": world_size}
    dist.init_process_group(backend, **options)


def stop_process_group() -> None:
    """Leave the group in order. Every rank calls it, after its last collective.

    The barrier keeps a fast rank from closing connections others still read from; the collection drops meshes
    and models that hold sub-groups, so that no gloo thread outlives them and aborts the interpreter at exit.
    """
    if dist.is_initialized():
        dist.barrier()
        gc.collect()
        dist.destroy_process_group()


@dataclass(frozen=True)
class Layout:
    """Holds a resolved ParallelConfig, its mesh, and the number of microbatches in a step.

    n_microbatches: how many forwards a rank computes in one optimizer step; with pp they fill the pipeline,
        without pp their gradients are accumulated.
    """

    config: ParallelConfig
    mesh: DeviceMesh
    n_microbatches: int

    @property
    def dp_rank(self) -> int:
        """Return which of the dp groups this rank belongs to; it decides which sequences the rank reads."""
        return self.mesh["dp"].get_local_rank()

    @property
    def ranks_per_batch(self) -> int:
        """Return how many ranks read the same sequences. A sum over the world counts each one that often."""
        return dist.get_world_size() // self.config.dp

    @property
    def gradient_ranks(self) -> int:
        """Return how many ranks FSDP averages a gradient over. Multiply the loss by it to get the sum."""
        return self.config.gradient_ranks

    @property
    def loss_group(self) -> dist.ProcessGroup:
        """Return the group whose shares of the loss add up: ranks with other layers, sequences or tokens."""
        return self.mesh["loss"].get_group()

    def own_tokens(self, batch: Batch) -> Batch:
        """Return the batch with the tokens that this rank holds: all, or under cp its share of them."""
        return shard_batch(batch, self.mesh["cp"], self.config.cp_method)

    def embedded_tokens(self, per_token: Tensor) -> Tensor:
        """Return those of the values per_token (B, T) that belong to the tokens that this rank embeds.

        These are its share over cp and, under sequence parallelism, of that share its part over tp."""
        if self.config.cp > 1:
            per_token = shard_sequence(per_token, self.mesh["cp"], self.config.cp_method)
        n_shards = self.config.sequence_shards  # as many as tp has ranks, or 1
        return per_token.chunk(n_shards, dim=1)[self.mesh["tp"].get_local_rank() % n_shards]


def build_mesh(config: ParallelConfig, device_type: str) -> DeviceMesh:
    """Return the mesh of a resolved config, with all axes of config.py, those of size 1 and derived ones too.

    At ZeRO stage 0 there is also an axis `solo` of size 1, which fully_shard shards over: nothing is sharded.
    """
    names = list(AXES)
    if config.zero_stage == 0:
        names.insert(names.index(DERIVED_AXES["dp_cp"][-1]) + 1, "solo")
    sizes = tuple(getattr(config, name, 1) for name in names)
    mesh = init_device_mesh(device_type, sizes, mesh_dim_names=tuple(names))
    for name, neighbours in DERIVED_AXES.items():
        mesh[neighbours]._flatten(name)  # private in torch 2.11 to 2.13; `mesh` has the axis from then on
    return mesh
