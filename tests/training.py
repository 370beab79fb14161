"""A training set-up for tests, made as recipes/pretrain.py makes it, on the ranks of the default group."""

import torch
import torch.distributed as dist

from dtensor_llama import Llama, LlamaConfig
from parallel import ParallelConfig, build_mesh
from parallel.apply import Computation
from parallel.assemble import Offload, Training, adamw, assemble
from parallel.mesh import Layout
from recipes.pretrain import forward_backward

__all__ = ["Offload", "forward_backward", "make_training"]


def make_training(
    model: Llama | LlamaConfig,
    parallel: ParallelConfig,
    n_microbatches: int,
    computation: Computation = Computation(),
    lr: float = 1e-3,
    weight_decay: float = 0.1,
) -> Training:
    """Assemble a model (or one of this shape) under a layout of the world's size; its weights have no "
    "values yet."""
    resolved = parallel.resolve(dist.get_world_size())
    if isinstance(model, LlamaConfig):
        with torch.device("meta"):
            model = Llama(model)
    layout = Layout(resolved, build_mesh(resolved, computation.device.type), n_microbatches)
    return assemble(model, layout, computation, adamw(lr, weight_decay))
