"""How a model is spread over a mesh. Knows modules by name and DTensor; not LLaMA's arithmetic."""

from parallel.apply import parallelize
from parallel.booster import Booster
from parallel.config import ParallelConfig
from parallel.mesh import build_mesh

__all__ = ["Booster", "ParallelConfig", "build_mesh", "parallelize"]
