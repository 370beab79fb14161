"""Empties what torch remembers of a mesh, for a process that outlives its process group.

A dry run makes a pretended group for each rank that it counts, and the workers of the tests have a group for
each test. All of this is private in torch 2.11 to 2.13.
"""

import sys

import torch
from torch.distributed.tensor import _redistribute
from torch.distributed.tensor.debug import _clear_sharding_prop_cache


def forget_meshes() -> None:
    """Empty DTensor's caches. They hold plans with the mesh they were made for, and take an equal mesh of a
    later process group for the same, whose groups are gone."""
    _clear_sharding_prop_cache()
    # This cache is a plain dict, which the loop below does not find.
    getattr(_redistribute, "clear_redistribute_planner_cache", lambda: None)()
    getattr(torch._C, "_clear_DTensor_sharding_propagator_cache", lambda: None)()
    for name, module in list(sys.modules.items()):
        if name.startswith("torch.distributed.tensor"):
            _clear_caches(module)
            for value in list(vars(module).values()):
                if isinstance(value, type) and value.__module__ == name:
                    _clear_caches(value)


def _clear_caches(owner) -> None:
    """Empty the caches of all functions of a module, or of all methods of a class."""
    for value in list(vars(owner).values()):
        function = getattr(value, "__func__", value)  # of a static method
        if not isinstance(function, type):
            getattr(function, "cache_clear", lambda: None)()
