"""The chunk manager, which decides where bytes live. This package knows DTensor parameters; it does not know
LLaMA, nor what the axes of a mesh mean."""

from memory.config import MemoryConfig
from memory.home import Home
from memory.inputs import Machine, Overrides, TrainingLoop
from memory.manager import ChunkManager
from memory.placement import Plan

__all__ = ["ChunkManager", "Home", "Machine", "MemoryConfig", "Overrides", "Plan", "TrainingLoop"]
