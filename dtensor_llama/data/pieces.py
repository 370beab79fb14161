"""Converts SentencePiece models to tokenizer.json, for transformers and every other reader of that file.

piece          an entry of the vocabulary; the variable `pieces` is the SentencePieceProcessor, and `model` is
               the protocol buffer that it has read
dummy prefix   the space that SentencePiece puts before every text, so that a word has the same ids at the
               start of a text as inside one; some models put it after the text instead
byte fallback  a character without a piece becomes its UTF-8 bytes

A conversion is accepted only if it gives the same ids as SentencePiece on many probe texts, because training
encodes with SentencePiece itself.
"""

import re
from pathlib import Path

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from dtensor_llama.errors import UsageError

NEVER = -1e6  # a score so bad that the piece is never chosen
PROBES = (  # texts on which conversions of SentencePiece models have gone wrong
    "Hello world",
    " one leading space",
    "  two",
    "a\n\nb\r\n\tc  d ",
    "\n",
    "naïve Ω 你好 🦙\u200d\u00a0x",
    "<0x0A> ▁ x▁y",
    "</s><s>[INST] <unk>",
    "1234567 3.14",
    "aaaaaaaaaaaaaaaaaaa",
    "don't  --stop",
)


def load_pieces(file: Path):
    """Open a SentencePiece model and return its processor, or None if the file has another format."""
    try:
        model = file.read_bytes()
        return sentencepiece.SentencePieceProcessor(model_proto=model) if model else None
    except (RuntimeError, OSError, ValueError, TypeError):  # each version of the library raises another one
        return None


def has_dummy_prefix(pieces) -> bool:
    """Return whether the SentencePieceProcessor `pieces` puts a space before every text."""
    return "".join(pieces.encode("a", out_type=str)).startswith("▁")


def as_tokenizer_json(
    pieces, given: tokenizers.Tokenizer | None, added: list, file: Path
) -> tokenizers.Tokenizer:
    """Return a tokenizer.json that gives the same ids as `pieces`: the given one if it does, else a new one.

    given: the tokenizer.json that came with the model; None if there was none
    added: (id, AddedToken) for each token whose id comes after those of the pieces, in the order of ids
    file: the SentencePiece model, for messages
    Raises UsageError if no tokenizer.json gives the same ids, and if the ids of `added` have gaps."""
    model = sentencepiece_model_pb2.ModelProto.FromString(pieces.serialized_model_proto())
    probes = _probes(model)
    expected = pieces.encode(probes, num_threads=1)

    def agrees(candidate: tokenizers.Tokenizer) -> bool:
        candidate.encode_special_tokens = True
        # Probes are encoded one by one: the batch call starts threads, and then warns about every fork.
        return [candidate.encode(probe, add_special_tokens=False).ids for probe in probes] == expected

    if given is not None and agrees(given):
        return given
    built = _converted(pieces, model)
    for splits_crlf in (False, True):
        built.normalizer = _normalizer(pieces, model, splits_crlf)
        if agrees(built):
            break
    else:
        raise UsageError(
            f"tokenizer={file}: no tokenizer.json gives the ids of this SentencePiece model (none does for "
            "whole-word models that fall back to bytes), so transformers could not open a model that was "
            "trained with it. Give a tokenizer.json instead."
        )
    built.add_tokens([token for _, token in added])  # they must keep their ids
    now = built.get_added_tokens_decoder()
    if any(i not in now or now[i].content != token.content for i, token in added):
        raise UsageError(
            f"tokenizer={file.parent}: tokens are added with gaps between their ids, {[i for i, _ in added]} "
            f"behind {len(pieces)} pieces; fill the gaps with unused tokens."
        )
    return built


def _probes(model) -> list[str]:
    # The names of byte and control tokens are hardly ever found in a text; PROBES contains some of them.
    texts = [
        one.piece.replace("▁", " ") for one in model.pieces if one.type in (one.NORMAL, one.USER_DEFINED)
    ]
    texts = texts[:: len(texts) // 4000 + 1]
    probes = list(PROBES) + ["".join(texts[i : i + 100]) for i in range(0, len(texts), 100)]
    for symbol in _symbols(model):
        probes += [symbol, f"a{symbol}b", f" {symbol} a  {symbol}"]
    return probes


def _symbols(model) -> list[str]:
    """Return the user-defined symbols, which are always pieces of their own, in the order of the search."""
    symbols = [one.piece for one in model.pieces if one.type == one.USER_DEFINED]
    return sorted(symbols, key=len, reverse=True)


def _converted(pieces, model) -> tokenizers.Tokenizer:
    """Return the tokenizer.json that is equivalent to a SentencePiece model, except for the normalizer."""
    spec, symbols = model.trainer_spec, _symbols(model)
    if spec.model_type == spec.UNIGRAM:
        fast = tokenizers.Tokenizer(_unigram(pieces, model))
    elif spec.model_type == spec.WORD:
        fast = tokenizers.Tokenizer(models.WordLevel(_ids(model), pieces.id_to_piece(pieces.unk_id())))
        fast.pre_tokenizer = pre_tokenizers.Split(Regex(_any_known_word(model)), "isolated")
    else:
        fast = tokenizers.Tokenizer(_bpe(pieces, model))
        if symbols:  # not added tokens: the text after one of those would get another dummy prefix
            fast.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, symbols))), "isolated")
    strip = []
    if has_dummy_prefix(pieces) or spec.treat_whitespace_as_suffix:
        behind = int(spec.treat_whitespace_as_suffix)
        strip = [decoders.Strip(" ", 1 - behind, behind)]
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    special = [one.piece for one in model.pieces if one.type in (one.CONTROL, one.UNKNOWN)]
    fast.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    return fast


def _bpe(pieces, model) -> models.BPE:
    """Return a BPE model with the merges that the scores of the pieces stand for.

    SentencePiece joins the two neighbours whose piece has the highest score; `tokenizers` wants a list of
    pairs in order of preference. Source: generate_merges in transformers' convert_slow_tokenizer.py."""
    plain = {one.piece: i for i, one in enumerate(model.pieces) if one.type == one.NORMAL}
    ranked = []
    for piece, i in plain.items():
        for at in range(1, len(piece)):
            left, right = piece[:at], piece[at:]
            if left in plain and right in plain:
                ranked.append((-pieces.get_score(i), i, plain[left], plain[right], left, right))
    return models.BPE(
        _ids(model),
        [(left, right) for *_, left, right in sorted(ranked)],
        unk_token=pieces.id_to_piece(pieces.unk_id()),
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
        # The symbols that the pre-tokenizer isolates are pieces, although no merges lead to them.
        ignore_merges=bool(_symbols(model)),
    )


def _unigram(pieces, model) -> models.Unigram:
    """Return a unigram model, which splits a text into the pieces whose scores have the largest sum.

    In SentencePiece user-defined symbols always win, and control tokens and bytes are never found in a text.
    `tokenizers` has only scores, so symbols get good ones, and control tokens and bytes very bad ones.
    Source: PopulateNodes in sentencepiece's unigram_model.cc.
    """
    best = max((one.score for one in model.pieces if one.type == one.NORMAL), default=0.0)
    scored = []
    for one in model.pieces:
        score = one.score
        if one.type == one.USER_DEFINED:
            score = len(one.piece) * best - 0.1
        elif one.type != one.NORMAL:
            score = NEVER
        # Nine digits hold every bit of a float32, and `tokenizers` reads that many back exactly from a file.
        scored.append((one.piece, float(f"{score:.9g}")))
    return models.Unigram(scored, unk_id=pieces.unk_id(), byte_fallback=model.trainer_spec.byte_fallback)


def _ids(model) -> dict[str, int]:
    return {one.piece: i for i, one in enumerate(model.pieces)}


def _any_known_word(model) -> str:
    """Return a regular expression that matches whole known words.

    The text between two matches, one unknown word or many, is one token in SentencePiece too. The pattern is
    nested like a prefix tree of the words, since a plain list of 32,000 words takes 40 times as long."""
    tree: dict = {}
    for one in model.pieces:
        if one.type == one.NORMAL:
            node = tree
            for char in one.piece:
                node = node.setdefault(char, {})
            node[""] = {}

    def pattern(node: dict) -> str:
        ways = [re.escape(char) + pattern(node[char]) for char in node if char]
        return f"(?:{'|'.join(ways + [''] * ('' in node))})" if ways else ""

    return r"(?:\A|(?=▁))" + pattern(tree) + r"(?=▁|\z)"


def _normalizer(pieces, model, splits_crlf: bool) -> normalizers.Normalizer:
    """Return the steps that SentencePiece applies to a text before it looks for pieces.

    splits_crlf: turn a carriage return and its newline into two spaces first. `tokenizers` takes the two for
        one character, so that one of them would be lost where the model makes a space of each."""
    spec, steps = model.normalizer_spec, []
    if spec.precompiled_charsmap:
        steps += [normalizers.Replace("\r\n", "  ")] if splits_crlf else []
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if has_dummy_prefix(pieces):
        steps.append(normalizers.Prepend("▁"))
    elif spec.add_dummy_prefix and model.trainer_spec.treat_whitespace_as_suffix:
        steps.append(normalizers.Replace(Regex(r"\z"), " "))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
