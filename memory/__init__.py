"""Where bytes live. Knows DTensor parameters; not LLaMA, not the mesh's meaning."""

from memory.config import MemoryConfig
from memory.manager import ChunkManager
from memory.placement import Placement, Plan

__all__ = ["ChunkManager", "MemoryConfig", "Placement", "Plan"]
