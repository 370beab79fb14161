"""LLaMA and its training parts. This package knows tensors and modules; no mesh, no rank, no environment.

Names are imported when they are first used: the tokenizing workers import `dtensor_llama.data` in many
processes, each of which would otherwise spend seconds on importing torch.
"""

from importlib import import_module

_HOME = {
    "Llama": "dtensor_llama.model",
    "LlamaConfig": "dtensor_llama.config",
    "UsageError": "dtensor_llama.errors",
    "load_hf": "dtensor_llama.weights",
    "save_hf": "dtensor_llama.weights",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'dtensor_llama' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
