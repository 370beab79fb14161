"""Conversations tokenized once, into files that training maps into memory."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dtensor_llama.chat.conversations import ChatOptions
from dtensor_llama.chat.template import template_of
from dtensor_llama.data.sequences import TokenCorpus
from dtensor_llama.data.tokenize import prepare
from dtensor_llama.data.tokenizer import Tokenizer


class ChatCorpus(TokenCorpus):
    """A folder written by `prepare_chat`: documents are conversations.

    trained: (n_tokens,) uint8, 1 where a token is trained. counts: records of each format, and those left
    out.
    unread: fields that nothing reads, and in how many records they stand. end_ids: the tokens that end an
    answer, at which generation has to stop.
    """

    def __init__(self, folder: str | Path):
        super().__init__(folder)
        meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
        self.counts, self.unread, self.end_ids = meta["counts"], meta["unread"], meta["end_ids"]
        self.trained = np.memmap(self.folder / "trained.bin", np.uint8, mode="r")


def prepare_chat(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    cache_dir: str | Path | Sequence[str | Path],
    processes: int | None = None,
    options: ChatOptions = ChatOptions(),
) -> ChatCorpus:
    """As prepare_corpus, of conversations in any of the formats of chat.py, written as `options` say."""
    template_of(tokenizer, options)  # one that cannot be used is the first thing to say
    return ChatCorpus(prepare(paths, tokenizer, cache_dir, options, processes))
