"""Initial weights: they depend on a seed and on the names of parameters, never on the layout of the ranks."""

import functools
import hashlib
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from dtensor_llama.weights import local_boxes, values_to_write

# So many numbers come from one random stream: few enough that a rank can skip most of what others hold.
INIT_BLOCK_ELEMENTS = 2**20


def initial_constant(name: str) -> float | None:
    """Return the number that all of a parameter starts with: a bias 0, the weight of a norm 1; else None."""
    module, _, kind = name.rpartition(".")
    if kind == "bias":
        return 0.0
    return 1.0 if module.endswith("norm") else None


def random_stream(name: str) -> torch.Generator:
    """Return a generator on the CPU whose numbers depend on the name alone."""
    key = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)


@torch.no_grad()
def init_weights(model: nn.Module, seed: int) -> None:
    """Give every parameter its initial value, as Hugging Face does.

    Matrices are normal(0, initializer_range), the weights of norms 1, and biases 0. The value of an element
    depends on the seed, the parameter's name and its place in the whole parameter, never on how the parameter
    is sharded: each run of rows has a random stream of its own, made on the CPU, and a rank draws only the
    runs that its shards touch. Parameters may be plain or DTensors of any placement, but not on `meta`.
    """

    def fill(name: str, run: int, box: tuple, first: int) -> None:
        """Draw `run` rows of a whole parameter from row `first` on, and keep those that lie in the box."""
        offsets, sizes, local = box
        shape = model.get_parameter(name).shape
        stream = random_stream(f"{seed}/{name}/{first}")
        low = max(first, offsets[0])
        high = min(first + run, offsets[0] + sizes[0])
        target = local[low - offsets[0] : high - offsets[0]]
        n_rows = min(run, shape[0] - first)
        whole_run = target.shape == (n_rows, *shape[1:]) and target.is_contiguous()
        in_place = whole_run and target.dtype == torch.float32 and target.device.type == "cpu"
        rows = target if in_place else torch.empty(n_rows, *shape[1:])
        rows.normal_(0, model.config.initializer_range, generator=stream)
        if not in_place:
            columns = [slice(o, o + s) for o, s in zip(offsets[1:], sizes[1:], strict=True)]
            target.copy_(rows[(slice(low - first, high - first), *columns)])

    # normal_ runs on one core, and other threads of Python can run meanwhile.
    with ThreadPoolExecutor() as threads:
        for name, parameter in model.named_parameters():  # a tied matrix comes once, as the embedding
            run = max(1, INIT_BLOCK_ELEMENTS // max(1, parameter.shape[1:].numel()))  # rows per stream
            with values_to_write(model, name, parameter) as values:
                for box in local_boxes(values):
                    offsets, sizes, local = box
                    if (constant := initial_constant(name)) is not None:
                        local.fill_(constant)
                        continue
                    firsts = range(offsets[0] // run * run, offsets[0] + sizes[0], run)
                    list(threads.map(functools.partial(fill, name, run, box), firsts))
