"""Spreads a model over a mesh.

This package knows modules by name, and DTensor; it does not know LLaMA's arithmetic.
"""

from parallel.apply import parallelize
from parallel.booster import Booster
from parallel.config import ParallelConfig
from parallel.mesh import build_mesh

__all__ = ["Booster", "ParallelConfig", "build_mesh", "parallelize"]
