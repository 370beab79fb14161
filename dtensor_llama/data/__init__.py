"""Text to training batches: files -> documents -> tokens on disk -> packed rows -> micro-batches. See
README.md beside.

Names are imported when first used, because only `reader` needs torch: the tokenizing processes never pay for
it.
"""

from importlib import import_module

_HOME = {
    "Tokenizer": "dtensor_llama.data.tokenizer",
    "load_tokenizer": "dtensor_llama.data.tokenizer",
    "prepare_corpus": "dtensor_llama.data.tokenize",
    "prepare_chat": "dtensor_llama.data.tokenize",
    "ChatTemplate": "dtensor_llama.data.template",
    "ChatCorpus": "dtensor_llama.data.rows",
    "PackedExamples": "dtensor_llama.data.rows",
    "TokenCorpus": "dtensor_llama.data.rows",
    "PackedRows": "dtensor_llama.data.rows",
    "MixedRows": "dtensor_llama.data.mix",
    "open_rows": "dtensor_llama.data.mix",
    "Batch": "dtensor_llama.data.reader",
    "RowReader": "dtensor_llama.data.reader",
    "validation_batches": "dtensor_llama.data.reader",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'dtensor_llama.data' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
