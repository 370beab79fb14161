"""Turns conversations into a corpus of token ids and masks, once; training maps it into memory."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from dtensor_llama.chat.conversations import (
    EMPTY_ANSWER,
    NOTHING_TRAINED,
    UNANSWERED,
    ChatOptions,
    Conversation,
    conversation_of,
)
from dtensor_llama.chat.template import template_of
from dtensor_llama.data.encoding import Encoded, Found
from dtensor_llama.data.sequences import TokenCorpus
from dtensor_llama.data.sources import RECORD_FORMATS, Chunk
from dtensor_llama.data.tokenize import CacheDirs, prepare
from dtensor_llama.data.tokenizer import Tokenizer
from dtensor_llama.errors import UsageError

CHAT_VERSION = 2  # raise it when conversations.py or template.py writes other ids or masks than before


class ChatCorpus(TokenCorpus):
    """Maps a folder that `prepare_chat` wrote into memory. Its documents are conversations.

    trained: (n_tokens,) uint8, 1 where a token counts in the loss
    counts: the number of records of each format, and of each special case of conversations.py
    unread: {field that nothing reads: the number of records that have it}
    end_ids: the tokens that end an answer, at which generation has to stop
    """

    def __init__(self, folder: str | Path):
        super().__init__(folder)
        self.counts, self.unread = self.meta["counts"], self.meta["unread"]
        self.end_ids, self.trained = self.meta["end_ids"], self._mapped("trained.bin", np.uint8)


def prepare_chat(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    cache_dir: CacheDirs,
    processes: int | None = None,
    options: ChatOptions = ChatOptions(),
) -> ChatCorpus:
    """Return the corpus of the conversations in `paths`; tokenize it first unless the cache already has it.

    The records may have any format of conversations.py. Arguments and errors are those of prepare_corpus."""
    return ChatCorpus(prepare(paths, ChatEncoding(tokenizer, options), cache_dir, processes))


class ChatEncoding:
    """Encodes each conversation with its template, and makes its loss mask: a data.encoding.Encoding."""

    formats, text_field, cutter = RECORD_FORMATS, None, None
    files, a_document = (
        ("tokens.bin", "documents.bin", "trained.bin"),
        "conversation with any answer to train on",
    )

    def __init__(self, tokenizer: Tokenizer, options: ChatOptions):
        self.tokenizer, self.options, self.meta = tokenizer, options, {"chat": asdict(options)}
        self.template = template_of(tokenizer, options)

    def identity(self) -> object:
        return "chat", CHAT_VERSION, self.template.identity, asdict(self.options)

    def arguments(self) -> list[str]:
        return ["--chat", json.dumps(asdict(self.options))]

    def encode(self, chunk: Chunk) -> Encoded:
        ids, starts, trained, found = [], [], [], Found()
        skip = found.skip_or_refuse(self.options.bad_records)
        for where, record in chunk.records(skip):
            try:
                conversation = conversation_of(record, where)
                left_out, example = _why_left_out(conversation), None
                if left_out is None:
                    example = self.template.example(conversation, where, self.options.train_on)
            except UsageError as error:
                skip(where, error)
                continue
            found.counts[conversation.format] += 1
            found.counts[UNANSWERED] += conversation.n_unanswered > 0
            found.unread.update([*conversation.unread, *self.template.unread(conversation)])
            if example is not None and not any(example.trained):
                left_out = NOTHING_TRAINED
            if left_out is not None:
                found.counts[left_out] += 1
                continue
            found.end_ids |= example.ends
            starts.append(len(ids))
            ids += example.ids
            trained += example.trained
        return Encoded(
            np.array(ids, dtype=np.uint32),
            np.array(starts, dtype=np.int64),
            np.array(trained, dtype=np.uint8),
            found,
        )


def _why_left_out(conversation: Conversation) -> str | None:
    """Return EMPTY_ANSWER, which `counts` counts, if an answer to train on is empty, else None."""
    for turn, flag in zip(conversation.turns, conversation.flags, strict=True):
        says = turn.get("content", "").strip() or turn.get("tool_calls") or turn.get("function_call")
        if turn["role"] == "assistant" and not says and flag is not False:
            return EMPTY_ANSWER
    return None
