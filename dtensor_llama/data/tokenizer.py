"""One tokenizer interface over SentencePiece models and Hugging Face's tokenizer.json.

piece: an entry of the vocabulary   dummy prefix: the space SentencePiece puts before every text, so that a word has the
same ids at the start of a text as inside one   byte fallback: a character without a piece becomes its UTF-8 bytes
Where a SentencePiece model is known its ids are the reference: the models we continue to train learned from them.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from dtensor_llama.errors import UsageError
from dtensor_llama.places import expanded, refuse_hub_name

WELL_KNOWN = {"bos": ("<s>", "<|begin_of_text|>"), "eos": ("</s>", "<|end_of_text|>", "<|endoftext|>")}
NEVER = -1e6  # a score so bad that no text has the piece
# settings of a tokenizer_config.json that an export does not carry on: paths and classes of another
# machine...
NOT_KEPT = {
    "tokenizer_class",
    "auto_map",
    "tokenizer_file",
    "vocab_file",
    "merges_file",
    "name_or_path",
    "special_tokens_map_file",
    "backend",
    "is_local",
    "legacy",
    "from_slow",
    "sp_model_kwargs",
    "clean_up_tokenization_spaces",
    # ... and what it says itself, as training had it
    "bos_token",
    "eos_token",
    "unk_token",
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "added_tokens_decoder",
}
PROBES = (  # where conversions of a SentencePiece model have gone wrong
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


class Tokenizer:
    """Text to ids and back. `encode` adds neither BOS nor EOS, and reads `</s>` inside a text as plain
    characters.

    vocab_size: one more than the largest id, added tokens included. bos_id, eos_id: None where the tokenizer
        has none.
    adds: what transformers would put around a text. A document of training begins with BOS if adds.bos is
        true, as a prompt of generate.py does; it always ends with EOS.
    fingerprint: a hash of what decides the ids, BOS and EOS included. path: where it was loaded from.
    """

    def __init__(self, path: Path, fast: tokenizers.Tokenizer, pieces, ids: "EndIds", adds: "AddedEnds"):
        self.path, self.bos_id, self.eos_id, self.adds = path, ids.bos, ids.eos, adds
        self._fast, self._pieces = fast, pieces  # pieces: the SentencePieceProcessor that encodes, or None
        fast.encode_special_tokens = True  # special tokens inside a text are text
        self.vocab_size = max(fast.get_vocab(with_added_tokens=True).values()) + 1
        _put_ends(fast, ids, adds)  # so that the exported tokenizer.json does as training did
        source = fast.to_str() if pieces is None else pieces.serialized_model_proto()
        digest = hashlib.sha256(source if isinstance(source, bytes) else source.encode())
        digest.update(repr((*ids, *adds, self.vocab_size)).encode())
        self.fingerprint = digest.hexdigest()

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text. SentencePiece runs in this thread; `tokenizers` as TOKENIZERS_PARALLELISM
        says."""
        if self._pieces is not None:
            return self._pieces.encode(texts, num_threads=1)
        return [encoding.ids for encoding in self._fast.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; special tokens are left out."""
        ids = [int(i) for i in ids]
        if self._pieces is None:
            return self._fast.decode(ids, skip_special_tokens=True)
        return self._pieces.decode([i for i in ids if i < self._pieces.get_piece_size()])

    @property
    def control_tokens(self) -> dict[str, AddedToken]:
        """Text -> AddedToken of what a chat template may write to mean one id: the added tokens, and BOS and
        EOS."""
        named = (self._fast.id_to_token(i) for i in (self.bos_id, self.eos_id) if i is not None)
        added = self._fast.get_added_tokens_decoder().values()
        return {token: AddedToken(token) for token in named} | {token.content: token for token in added}

    def id_of(self, token: str) -> int:
        return self._fast.token_to_id(token)

    def token_of(self, token_id: int) -> str:
        """The entry of the vocabulary as it is written there."""
        return self._fast.id_to_token(token_id)

    @property
    def plain(self) -> "Tokenizer":
        """The same, reading added tokens as text even where tokenizer.json does not call them special."""
        if self._pieces is not None:
            return self
        source = json.loads(self._fast.to_str())
        source["added_tokens"] = [token | {"special": True} for token in source["added_tokens"]]
        fast = tokenizers.Tokenizer.from_str(json.dumps(source))
        return Tokenizer(self.path, fast, None, EndIds(self.bos_id, self.eos_id), self.adds)

    @property
    def prefixes_every_text(self) -> bool:
        """Whether a text after a control token gets its dummy prefix, as one at the start does (where there
        is one)."""
        if self._pieces is not None or self.bos_id is None:
            return True
        self._fast.encode_special_tokens = False
        after_bos = self._fast.encode(
            self._fast.id_to_token(self.bos_id) + "a", add_special_tokens=False
        ).ids[1:]
        self._fast.encode_special_tokens = True
        return after_bos == self.encode("a")

    @property
    def chat_template(self) -> str | None:
        """The Jinja source that came with the tokenizer: chat_template.jinja, else of
        tokenizer_config.json."""
        home = self.path if self.path.is_dir() else self.path.parent
        if self.path.suffix == ".model":  # what lies beside it may belong to another tokenizer
            return None
        if (home / "chat_template.jinja").is_file():
            return (home / "chat_template.jinja").read_text(encoding="utf-8")
        template = _settings(home, "tokenizer_config.json").get("chat_template")
        if isinstance(template, list):  # several by name
            template = {one.get("name"): one.get("template") for one in template}.get("default")
        return template if isinstance(template, str) else None

    def save(self, folder: str | Path, chat_template: str | None = None) -> None:
        """Write tokenizer.json, tokenizer_config.json and what came with them, for transformers'
        AutoTokenizer.

        chat_template: the one to write, where training used another than the tokenizer's own."""
        folder, home = Path(folder), self.path if self.path.is_dir() else self.path.parent
        folder.mkdir(parents=True, exist_ok=True)
        source, template = _settings(home, "tokenizer_config.json"), home / "chat_template.jinja"
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if self.path.suffix != ".model":  # else what lies beside it may belong to another tokenizer
            config |= {key: value for key, value in source.items() if key not in NOT_KEPT}
            if template.is_file():
                (folder / template.name).write_bytes(template.read_bytes())
        if chat_template is not None:
            config.pop("chat_template", None)
            (folder / template.name).write_text(chat_template, encoding="utf-8")
        unk_token = getattr(self._fast.model, "unk_token", None)
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        config |= {name: self._fast.id_to_token(i) for name, i in ids.items() if i is not None}
        config |= {"unk_token": unk_token} if unk_token else {}
        config |= self._settings_of_ids()
        (folder / "tokenizer.json").write_text(self._fast.to_str(pretty=True), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8"
        )
        if self._pieces is not None:
            (folder / "tokenizer.model").write_bytes(self._pieces.serialized_model_proto())
            behind = {
                token.content: i for i, token in self._added_tokens() if i >= self._pieces.get_piece_size()
            }
            if behind:  # for readers of tokenizer.model, which knows none of them, like llama.cpp
                text = json.dumps(behind, indent=2, ensure_ascii=False) + "\n"
                (folder / "added_tokens.json").write_text(text, "utf-8")

    def _added_tokens(self) -> list[tuple[int, AddedToken]]:
        return sorted(self._fast.get_added_tokens_decoder().items())

    def _settings_of_ids(self) -> dict:
        """What a tokenizer_config.json says about how ids are made, for readers that do not ask
        tokenizer.json."""
        fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
        added = {
            str(i): {field: getattr(token, field) for field in fields} for i, token in self._added_tokens()
        }
        settings = {"added_tokens_decoder": added}
        if self.bos_id is not None:
            settings["add_bos_token"] = self.adds.bos
        if self.adds.eos:
            settings["add_eos_token"] = True
        prefix = _prefixes_first_word(self._fast) if self._pieces is None else _has_dummy_prefix(self._pieces)
        return settings if prefix is None else settings | {"add_prefix_space": prefix}


class EndIds(NamedTuple):
    """The tokens of begin and end; None where a tokenizer has none."""

    bos: int | None
    eos: int | None


class AddedEnds(NamedTuple):
    """Which of them transformers puts around a text on its own."""

    bos: bool
    eos: bool


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Open a Hugging Face folder, a tokenizer.json or a SentencePiece .model.

    In a folder with both files the SentencePiece model is the reference if it is one (LLaMA-3 has another
    format under that name) and has as many pieces as tokenizer.json without its added tokens. Raises
    UsageError.
    """
    refuse_hub_name(str(path), "tokenizer")
    path = Path(expanded(str(path), "tokenizer"))
    given = f"--data.tokenizer {path}"
    if not path.exists():
        raise UsageError(
            f"{given}: there is no such file or folder; give a Hugging Face folder, a tokenizer.json or a "
            f"SentencePiece .model on this machine."
        )
    home = path if path.is_dir() else path.parent
    json_file, model_file = (
        (home / "tokenizer.json", home / "tokenizer.model") if path.is_dir() else (path, path)
    )
    fast = _load_fast(json_file) if json_file.suffix == ".json" and json_file.is_file() else None
    pieces = _load_pieces(model_file) if model_file.suffix == ".model" and model_file.is_file() else None
    if fast is None and pieces is None:
        if model_file.suffix == ".model" and model_file.is_file():
            raise UsageError(
                f"{given}: {model_file.name} is not a SentencePiece model (damaged, or another format); "
                f"give the tokenizer.json that belongs to it."
            )
        raise UsageError(
            f"{given}: no tokenizer; give a tokenizer.json, a SentencePiece .model or a folder with one."
        )
    settings = _settings(home, "tokenizer_config.json") if path.suffix != ".model" else {}
    if pieces is None or (
        fast is not None and fast.get_vocab_size(with_added_tokens=False) != pieces.get_piece_size()
    ):
        ids = EndIds(_special_id("bos", home, fast), _special_id("eos", home, fast))
        return Tokenizer(path, fast, None, ids, _added_ends(settings, fast, ids, home))
    given, added = fast, _tokens_behind(pieces, fast, settings, home if path.is_dir() else None)
    fast = _agreeing_fast(pieces, fast, added, model_file)
    own = (("bos", pieces.bos_id()), ("eos", pieces.eos_id()))  # -1 for none
    ids = EndIds(*(_named_id(name, settings, fast, home, own_id) for name, own_id in own))
    return Tokenizer(path, fast, pieces, ids, _added_ends(settings, given, ids, home))


def _load_fast(file: Path) -> tokenizers.Tokenizer:
    try:
        fast = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise UsageError(
            f"--data.tokenizer {file}: not a readable tokenizer.json ({_one_line(error)})."
        ) from None
    fast.no_truncation()  # a tokenizer.json may carry the settings of its last use, which would cut documents
    fast.no_padding()  # without a word
    return fast


def _load_pieces(file: Path):
    try:
        model = file.read_bytes()
        return sentencepiece.SentencePieceProcessor(model_proto=model) if model else None
    # what the versions of sentencepiece raise on another format
    except (RuntimeError, OSError, ValueError, TypeError):
        return None


def _settings(folder: Path, name: str) -> dict:
    """A JSON file of a Hugging Face folder as a dict, empty where there is none."""
    if not (folder / name).is_file():
        return {}
    try:
        settings = json.loads((folder / name).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(
            f"--data.tokenizer {folder / name}: not readable JSON ({_one_line(error)})."
        ) from None
    if not isinstance(settings, dict):
        raise UsageError(
            f"--data.tokenizer {folder / name}: expected a JSON object, found {type(settings).__name__}."
        )
    return settings


def _named_id(
    name: str, settings: dict, fast: tokenizers.Tokenizer, folder: Path, otherwise: int
) -> int | None:
    """The id of settings["bos_token"] (a string, or an object with `content`, or null for none), or
    `otherwise`."""
    token = settings.get(f"{name}_token", otherwise)
    token = token.get("content") if isinstance(token, dict) else token
    if isinstance(token, str) and fast.token_to_id(token) is None:
        raise UsageError(f"--data.tokenizer {folder}: its {name}_token {token!r} is not in the vocabulary.")
    token = fast.token_to_id(token) if isinstance(token, str) else token
    return token if token is not None and token >= 0 else None


def _added_ends(settings: dict, fast: tokenizers.Tokenizer | None, ids: EndIds, folder: Path) -> AddedEnds:
    """What goes around a text: as tokenizer_config.json says, else as the post-processor of tokenizer.json
    does, and where neither says anything BOS, if there is one. (transformers before 5 and llama.cpp ask the
    first, later ones the second.)"""
    for name in ("add_bos_token", "add_eos_token"):
        if not isinstance(settings.get(name), bool | None):
            raise UsageError(
                f"--data.tokenizer {folder / 'tokenizer_config.json'}: {name} is {settings[name]!r}; it must be "
                "true or false."
            )
    if fast is not None and fast.post_processor is not None:
        around = fast.encode("a").ids
        bos, eos = around[:1] == [ids.bos], around[-1:] == [ids.eos]
    else:
        bos, eos = True, False
    if settings.get("add_bos_token") is not None:
        bos = settings["add_bos_token"]
    if settings.get("add_eos_token") is not None:
        eos = settings["add_eos_token"]
    return AddedEnds(bos and ids.bos is not None, eos and ids.eos is not None)


def _put_ends(fast: tokenizers.Tokenizer, ids: EndIds, adds: AddedEnds) -> None:
    """Give `fast` a post-processor that adds these, unless it does so already."""
    before, after = [ids.bos] * adds.bos, [ids.eos] * adds.eos
    if fast.encode("a").ids == before + fast.encode("a", add_special_tokens=False).ids + after:
        return
    names = {i: fast.id_to_token(i) for i in before + after}
    single, second = (
        [*(names[i] for i in before), text, *(names[i] for i in after)] for text in ("$A", "$B")
    )
    special = [(name, i) for i, name in names.items()]
    fast.post_processor = processors.TemplateProcessing(single, [*single, *second], special)


def _prefixes_first_word(fast: tokenizers.Tokenizer) -> bool | None:
    """Whether the pre-tokenizer puts a space before a text; None if it knows no such thing."""
    if fast.pre_tokenizer is None:
        return None
    source = json.loads(fast.to_str())["pre_tokenizer"]
    for one in source.get("pretokenizers", [source]):
        if "add_prefix_space" in one:
            return one["add_prefix_space"]
        if "prepend_scheme" in one:
            return one["prepend_scheme"] != "never"
    return None


def _has_dummy_prefix(pieces) -> bool:
    return "".join(pieces.encode("a", out_type=str)).startswith("▁")


def _special_id(name: str, folder: Path, fast: tokenizers.Tokenizer) -> int | None:
    """BOS or EOS of a tokenizer.json, which does not say: from the files beside it, else by the names in
    common use."""
    for beside in ("tokenizer_config.json", "special_tokens_map.json"):
        if f"{name}_token" in (settings := _settings(folder, beside)):
            return _named_id(name, settings, fast, folder, -1)
    for beside in ("config.json", "generation_config.json"):
        token_id = _settings(folder, beside).get(f"{name}_token_id")
        # LLaMA-3 lists several EOS
        token_id = token_id[0] if isinstance(token_id, list) and token_id else token_id
        if isinstance(token_id, int):
            if fast.id_to_token(token_id) is None:
                raise UsageError(
                    f"--data.tokenizer {folder}: {beside} says {name}_token_id {token_id}, which the "
                    f"tokenizer does not have; give the tokenizer that belongs to it."
                )
            return token_id
    return next(
        (fast.token_to_id(token) for token in WELL_KNOWN[name] if fast.token_to_id(token) is not None), None
    )


def _tokens_behind(pieces, fast: tokenizers.Tokenizer | None, settings: dict, folder: Path | None) -> list:
    """(id, AddedToken) of the tokens that a fine-tuning added behind the pieces, in order: from
    tokenizer.json, else from tokenizer_config.json and added_tokens.json. folder: None for a .model by
    itself, whose neighbours may not belong to it."""
    if fast is not None:
        added = dict(fast.get_added_tokens_decoder())
    elif folder is not None:
        by_id = {str(i): {"content": token} for token, i in _settings(folder, "added_tokens.json").items()}
        by_id |= settings.get("added_tokens_decoder") or {}
        fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
        try:
            added = {
                int(i): AddedToken(**{field: token[field] for field in fields if field in token})
                for i, token in by_id.items()
            }
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"--data.tokenizer {folder}: its added tokens cannot be read ({_one_line(error)})."
            ) from None
    else:
        added = {}
    return [(i, token) for i, token in sorted(added.items()) if i >= len(pieces)]


def _agreeing_fast(
    pieces, fast: tokenizers.Tokenizer | None, added: list, file: Path
) -> tokenizers.Tokenizer:
    """A tokenizer.json that gives the ids of `pieces` on PROBES: the one that came with it, else one built
    from it."""
    model = sentencepiece_model_pb2.ModelProto.FromString(pieces.serialized_model_proto())
    # The names of bytes and control tokens are hardly ever met in a text; PROBES has some.
    vocabulary = [
        one.piece.replace("▁", " ") for one in model.pieces if one.type in (one.NORMAL, one.USER_DEFINED)
    ]
    vocabulary = vocabulary[:: len(vocabulary) // 4000 + 1]
    probes = [*PROBES, *("".join(vocabulary[i : i + 100]) for i in range(0, len(vocabulary), 100))]
    for symbol in _symbols(model):
        probes += [symbol, f"a{symbol}b", f" {symbol} a  {symbol}"]
    expected = pieces.encode(probes, num_threads=1)

    def agrees(candidate: tokenizers.Tokenizer) -> bool:
        candidate.encode_special_tokens = True
        # one by one: the batch call starts threads, and warns about every fork after that
        return [candidate.encode(probe, add_special_tokens=False).ids for probe in probes] == expected

    if fast is not None and agrees(fast):
        return fast
    for splits_crlf in (False, True):
        built = _fast_from_pieces(pieces, model)
        built.normalizer = _normalizer_from_pieces(pieces, model, splits_crlf)
        if agrees(built):
            break
    else:
        raise UsageError(
            f"--data.tokenizer {file}: no tokenizer.json gives the ids of this SentencePiece model, so that what "
            f"was trained with it could not be opened by transformers (models of whole words and those with "
            f"spaces behind the words are such). Give a tokenizer.json instead."
        )
    built.add_tokens([token for _, token in added])  # they keep their ids
    now = {i: token.content for i, token in built.get_added_tokens_decoder().items()}
    if any(now.get(i) != token.content for i, token in added):
        raise UsageError(
            f"--data.tokenizer {file.parent}: tokens are added with gaps between their ids, "
            f"{[i for i, _ in added]} behind {len(pieces)} pieces; fill the gaps with unused tokens."
        )
    return built


def _symbols(model) -> list[str]:
    """What is always a piece of its own in a text (user-defined symbols), the longest first, as they are
    looked for."""
    symbols = [one.piece for one in model.pieces if one.type == one.USER_DEFINED]
    return sorted(symbols, key=len, reverse=True)


def _fast_from_pieces(pieces, model) -> tokenizers.Tokenizer:
    """The tokenizer.json equivalent to a SentencePiece model, but for its normalizer. model: what `pieces`
    has read."""
    is_unigram = model.trainer_spec.model_type == model.trainer_spec.UNIGRAM
    fast = tokenizers.Tokenizer(
        _unigram_from_pieces(pieces, model) if is_unigram else _bpe_from_pieces(pieces, model)
    )
    symbols = _symbols(model)
    # an added token would do, if the text behind it did not get a dummy prefix
    if symbols and not is_unigram:
        pattern = tokenizers.Regex("|".join(map(re.escape, symbols)))
        fast.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    fast.decoder = decoders.Sequence(
        parts + [decoders.Strip(" ", 1, 0)] if _has_dummy_prefix(pieces) else parts
    )
    special = [one.piece for one in model.pieces if one.type in (one.CONTROL, one.UNKNOWN)]
    fast.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    return fast


def _bpe_from_pieces(pieces, model) -> models.BPE:
    """SentencePiece joins whichever neighbours make the piece of the highest score; `tokenizers` wants that
    as a list of pairs in order of preference. Source: generate_merges in transformers'
    convert_slow_tokenizer.py."""
    vocab = {one.piece: i for i, one in enumerate(model.pieces)}
    plain = {one.piece: i for i, one in enumerate(model.pieces) if one.type == one.NORMAL}
    ranked = []
    for piece, i in plain.items():
        splits = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        ranked += [
            (-pieces.get_score(i), i, plain[l], plain[r], l, r)
            for l, r in splits
            if l in plain and r in plain
        ]
    merges = [(left, right) for *_, left, right in sorted(ranked)]
    # ignore_merges: what the pre-tokenizer isolates is a piece, though no merges lead to it.
    return models.BPE(
        vocab,
        merges,
        unk_token=pieces.id_to_piece(pieces.unk_id()),
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
        ignore_merges=bool(_symbols(model)),
    )


def _unigram_from_pieces(pieces, model) -> models.Unigram:
    """The scores of SentencePiece, which a text's best pieces have the largest sum of. It has user-defined
    symbols always win, and looks for no control tokens and bytes in a text, where `tokenizers` does, unless
    they score too badly.
    Source: PopulateNodes in sentencepiece's unigram_model.cc."""
    best = max((one.score for one in model.pieces if one.type == one.NORMAL), default=0.0)
    scored = []
    for one in model.pieces:
        score = one.score
        if one.type == one.USER_DEFINED:
            score = len(one.piece) * best - 0.1
        elif one.type != one.NORMAL:
            score = NEVER
        # Nine digits are all of a float32, and few enough that `tokenizers` reads back from a file what it
        # has written.
        scored.append((one.piece, float(f"{score:.9g}")))
    return models.Unigram(scored, unk_id=pieces.unk_id(), byte_fallback=model.trainer_spec.byte_fallback)


def _normalizer_from_pieces(pieces, model, splits_crlf: bool) -> normalizers.Normalizer:
    """SentencePiece's steps before it looks for pieces. splits_crlf: `tokenizers` looks up characters as
    people see them, so that a carriage return before a newline is lost if both become spaces."""
    spec, steps = model.normalizer_spec, []
    if spec.precompiled_charsmap:
        steps += [normalizers.Replace("\r\n", "  ")] if splits_crlf else []
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(tokenizers.Regex(r"\A +| +\z"), ""),
            normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
        ]
    if _has_dummy_prefix(pieces):
        steps.append(normalizers.Prepend("▁"))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
