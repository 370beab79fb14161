"""One tokenizer interface over SentencePiece models and Hugging Face's tokenizer.json.

Where a SentencePiece model is known its ids are the reference: the models we continue to train learned from
them. See pieces.py for the tokenizer.json that is exported with it.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import AddedToken, processors

from dtensor_llama.data.pieces import as_tokenizer_json, has_dummy_prefix, load_pieces
from dtensor_llama.errors import UsageError, require
from dtensor_llama.places import expanded, read_settings, refuse_hub_name

WELL_KNOWN = {"bos": ("<s>", "<|begin_of_text|>"), "eos": ("</s>", "<|end_of_text|>", "<|endoftext|>")}
ADDED_FIELDS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")  # of an AddedToken
TEMPLATE_FILE, TEMPLATE_FOLDER = (
    "chat_template.jinja",
    "additional_chat_templates",
)  # as transformers has them
# Settings of a tokenizer_config.json that an export does not take over. These are paths and classes of
# another machine:
NOT_KEPT = {"tokenizer_class", "auto_map", "tokenizer_file", "vocab_file", "merges_file", "name_or_path"}
NOT_KEPT |= {"special_tokens_map_file", "backend", "is_local", "legacy", "from_slow", "sp_model_kwargs"}
NOT_KEPT |= {"clean_up_tokenization_spaces"}
# These the export writes itself, as training had them:
NOT_KEPT |= {"bos_token", "eos_token", "unk_token", "add_bos_token", "add_eos_token", "add_prefix_space"}
NOT_KEPT |= {"added_tokens_decoder"}


class EndIds(NamedTuple):
    """Holds the tokens of begin and end; None where a tokenizer has none."""

    bos: int | None
    eos: int | None


class AddedEnds(NamedTuple):
    """Tells which of these tokens transformers puts around a text on its own."""

    bos: bool
    eos: bool


class Tokenizer:
    """Text to ids and back.

    `encode` adds neither BOS nor EOS, and reads `</s>` inside a text as plain characters.

    vocab_size: one more than the largest id, added tokens included
    bos_id, eos_id: None where the tokenizer has none
    adds: what transformers would put around a text. A document of training begins with BOS if adds.bos is
        true, as a prompt of generate.py does; it always ends with EOS.
    fingerprint: a hash of what decides the ids, BOS and EOS included
    path: where it was loaded from"""

    def __init__(self, path: Path, fast: tokenizers.Tokenizer, pieces, ids: EndIds, adds: AddedEnds):
        self.path, self.bos_id, self.eos_id, self.adds = path, ids.bos, ids.eos, adds
        self._fast, self._pieces = fast, pieces  # pieces: the SentencePieceProcessor that encodes, or None
        fast.encode_special_tokens = True  # special tokens inside a text are text
        self.vocab_size = max(fast.get_vocab(with_added_tokens=True).values()) + 1
        _put_ends(fast, ids, adds)  # so that the exported tokenizer.json does as training did
        source = fast.to_str().encode() if pieces is None else pieces.serialized_model_proto()
        self.fingerprint = hashlib.sha256(source + repr((*ids, *adds, self.vocab_size)).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text.

        SentencePiece runs in this thread, `tokenizers` in as many as TOKENIZERS_PARALLELISM allows."""
        if self._pieces is not None:
            return self._pieces.encode(texts, num_threads=1)
        return [encoding.ids for encoding in self._fast.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`, without special tokens."""
        ids = [int(i) for i in ids]
        if self._pieces is None:
            return self._fast.decode(ids, skip_special_tokens=True)
        return self._pieces.decode([i for i in ids if i < len(self._pieces)])

    def id_of(self, token: str) -> int:
        return self._fast.token_to_id(token)

    def token_of(self, token_id: int) -> str:
        """Return the entry of the vocabulary as it is written there."""
        return self._fast.id_to_token(token_id)

    @property
    def control_tokens(self) -> dict[str, AddedToken]:
        """Return {text: AddedToken} of what a chat template may write to mean one id: with BOS and EOS."""
        ends = [self.token_of(i) for i in (self.bos_id, self.eos_id) if i is not None]
        added = {token.content: token for _, token in self._added_tokens()}
        return {token: AddedToken(token) for token in ends} | added

    @property
    def plain(self) -> "Tokenizer":
        """Return a tokenizer that reads all added tokens as text, also those that are not called special."""
        if self._pieces is not None:
            return self
        source = json.loads(self._fast.to_str())
        source["added_tokens"] = [token | {"special": True} for token in source["added_tokens"]]
        fast = tokenizers.Tokenizer.from_str(json.dumps(source))
        return Tokenizer(self.path, fast, None, EndIds(self.bos_id, self.eos_id), self.adds)

    @property
    def prefixes_every_text(self) -> bool:
        """Return whether a text after a control token gets its dummy prefix, if there is one, as at the
        start."""
        if self._pieces is not None or self.bos_id is None:
            return True
        self._fast.encode_special_tokens = False
        behind_bos = self._fast.encode(self.token_of(self.bos_id) + "a", add_special_tokens=False).ids[1:]
        self._fast.encode_special_tokens = True
        return behind_bos == self.encode("a")

    @property
    def chat_template(self) -> str | None:
        """Return the Jinja source of the default chat template that came with the tokenizer."""
        return self.chat_templates.get("default")

    @property
    def chat_templates(self) -> dict[str, str]:
        """Return {name: Jinja source} of the chat templates that came with the tokenizer.

        They are found as transformers finds them: in files of their own, else in tokenizer_config.json.
        "tool_use" is the one for conversations with tools."""
        if self._neighbours is None:
            return {}
        files = {"default": self._neighbours / TEMPLATE_FILE}
        files |= {file.stem: file for file in (self._neighbours / TEMPLATE_FOLDER).glob("*.jinja")}
        in_files = {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}
        given = in_files or read_settings(self._neighbours / "tokenizer_config.json").get("chat_template")
        if isinstance(given, list):
            given = {one.get("name"): one.get("template") for one in given}
        if isinstance(given, str):
            return {"default": given}
        return given if isinstance(given, dict) else {}

    @property
    def _neighbours(self) -> Path | None:
        """Return the folder of the files that belong to the tokenizer; None for a .model by itself.

        What lies beside a .model may belong to another tokenizer."""
        if self.path.suffix == ".model":
            return None
        return self.path if self.path.is_dir() else self.path.parent

    def save(self, folder: str | Path, chat_template: str | None = None) -> None:
        """Write a folder for transformers' AutoTokenizer: tokenizer.json, tokenizer_config.json and the rest.

        chat_template: the one that training used, if any. Several that came with the tokenizer stay as they
            are.
        """
        folder, home = Path(folder), self._neighbours
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if home is not None:
            given = read_settings(home / "tokenizer_config.json")
            config |= {key: value for key, value in given.items() if key not in NOT_KEPT}
            for file in [home / TEMPLATE_FILE, *(home / TEMPLATE_FOLDER).glob("*.jinja")]:
                if file.is_file():
                    _write(folder / file.relative_to(home), file.read_bytes())
        if chat_template is not None and len(self.chat_templates) < 2:
            config.pop("chat_template", None)
            _write(folder / TEMPLATE_FILE, chat_template.encode())
        unk_token = getattr(self._fast.model, "unk_token", None)
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        config |= {name: self.token_of(i) for name, i in ids.items() if i is not None}
        config |= {"unk_token": unk_token} if unk_token else {}
        config |= self._settings_of_ids()
        _write(folder / "tokenizer.json", self._fast.to_str(pretty=True).encode())
        _write(folder / "tokenizer_config.json", _as_json(config))
        if self._pieces is not None:
            _write(folder / "tokenizer.model", self._pieces.serialized_model_proto())
            behind = {token.content: i for i, token in self._added_tokens() if i >= len(self._pieces)}
            if behind:  # for readers of tokenizer.model, which knows none of them, like llama.cpp
                _write(folder / "added_tokens.json", _as_json(behind))

    def _added_tokens(self) -> list[tuple[int, AddedToken]]:
        return sorted(self._fast.get_added_tokens_decoder().items())

    def _settings_of_ids(self) -> dict:
        """Return what a tokenizer_config.json tells about ids to readers that do not read tokenizer.json."""
        added = {
            str(i): {name: getattr(token, name) for name in ADDED_FIELDS} for i, token in self._added_tokens()
        }
        settings = {"added_tokens_decoder": added}
        if self.bos_id is not None:
            settings["add_bos_token"] = self.adds.bos
        if self.adds.eos:
            settings["add_eos_token"] = True
        prefix = _prefixes_first_word(self._fast) if self._pieces is None else has_dummy_prefix(self._pieces)
        return settings if prefix is None else settings | {"add_prefix_space": prefix}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Open a Hugging Face folder, a tokenizer.json or a SentencePiece .model.

    In a folder with both files the SentencePiece model is the reference if it is one (LLaMA-3 has another
    format under that name) and has as many pieces as tokenizer.json without its added tokens. Raises
    UsageError.
    """
    refuse_hub_name(str(path), "tokenizer")
    path = Path(expanded(str(path), "tokenizer"))
    if not path.exists():
        raise UsageError(
            f"tokenizer={path}: there is no such file or folder; give a Hugging Face folder, a "
            "tokenizer.json or a SentencePiece .model on this machine."
        )
    home = path if path.is_dir() else path.parent
    json_file = home / "tokenizer.json" if path.is_dir() else path
    model_file = home / "tokenizer.model" if path.is_dir() else path
    has_model = model_file.suffix == ".model" and model_file.is_file()
    fast = _load_fast(json_file) if json_file.suffix == ".json" and json_file.is_file() else None
    pieces = load_pieces(model_file) if has_model else None
    if fast is None and pieces is None:
        problem = "no tokenizer; give a tokenizer.json, a SentencePiece .model or a folder with one"
        if has_model:
            problem = (
                f"{model_file.name} is not a SentencePiece model (damaged, or another format); give the "
            )
            problem += "tokenizer.json that belongs to it"
        raise UsageError(f"tokenizer={path}: {problem}.")
    settings = read_settings(home / "tokenizer_config.json") if path.suffix != ".model" else {}
    if pieces is None or fast is not None and fast.get_vocab_size(with_added_tokens=False) != len(pieces):
        ids = EndIds(_special_id("bos", home, fast), _special_id("eos", home, fast))
        return Tokenizer(path, fast, None, ids, _added_ends(settings, fast, ids, home))
    added = _tokens_behind(pieces, fast, settings, home if path.is_dir() else None)
    whole = as_tokenizer_json(pieces, fast, added, model_file)
    ids = EndIds(
        _named_id("bos", {"bos_token": pieces.bos_id()} | settings, whole, home),
        _named_id("eos", {"eos_token": pieces.eos_id()} | settings, whole, home),
    )
    return Tokenizer(path, whole, pieces, ids, _added_ends(settings, fast, ids, home))


def _load_fast(file: Path) -> tokenizers.Tokenizer:
    try:
        fast = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise UsageError(f"{file}: not a readable tokenizer.json ({_one_line(error)}).") from None
    # A tokenizer.json may have the settings of its last use, which would cut documents in silence.
    fast.no_truncation()
    fast.no_padding()
    return fast


def _named_id(name: str, settings: dict, fast: tokenizers.Tokenizer, folder: Path) -> int | None:
    """Return the id of settings["bos_token"]: a text, an object with `content`, or an id (below 0: none)."""
    token = settings[f"{name}_token"]
    token = token.get("content") if isinstance(token, dict) else token
    if isinstance(token, str):
        if fast.token_to_id(token) is None:
            raise UsageError(f"{folder}: the {name}_token {token!r} is not in the vocabulary.")
        token = fast.token_to_id(token)
    return token if token is not None and token >= 0 else None


def _special_id(name: str, folder: Path, fast: tokenizers.Tokenizer) -> int | None:
    """Return BOS or EOS of a tokenizer.json, which does not name them.

    It comes from the files beside it, else from the names in common use."""
    for beside in ("tokenizer_config.json", "special_tokens_map.json"):
        settings = read_settings(folder / beside)
        if f"{name}_token" in settings:
            return _named_id(name, settings, fast, folder)
    for beside in ("config.json", "generation_config.json"):
        token_id = read_settings(folder / beside).get(f"{name}_token_id")
        if isinstance(token_id, list) and token_id:  # LLaMA-3 lists several EOS
            token_id = token_id[0]
        if isinstance(token_id, int):
            if fast.id_to_token(token_id) is None:
                raise UsageError(
                    f"{folder}: {beside} says {name}_token_id {token_id}, which the tokenizer does not "
                    "have; give the tokenizer that belongs to it."
                )
            return token_id
    known = [fast.token_to_id(token) for token in WELL_KNOWN[name]]
    return next((token_id for token_id in known if token_id is not None), None)


def _added_ends(settings: dict, fast: tokenizers.Tokenizer | None, ids: EndIds, folder: Path) -> AddedEnds:
    """Return what goes around a text: as tokenizer_config.json says, else as tokenizer.json does it.

    (transformers before 5 and llama.cpp read the first, later ones the second.) Where neither says anything,
    BOS is added if there is one."""
    bos, eos = True, False
    if fast is not None and fast.post_processor is not None:
        around = fast.encode("a").ids
        bos, eos = around[:1] == [ids.bos], around[-1:] == [ids.eos]
    adds = {"add_bos_token": bos, "add_eos_token": eos}
    for name in adds:
        said = settings.get(name)
        where = f"{folder / 'tokenizer_config.json'}: {name}"
        require(isinstance(said, bool | None), where, said, "true or false")
        adds[name] = adds[name] if said is None else said
    return AddedEnds(
        adds["add_bos_token"] and ids.bos is not None, adds["add_eos_token"] and ids.eos is not None
    )


def _put_ends(fast: tokenizers.Tokenizer, ids: EndIds, adds: AddedEnds) -> None:
    """Give `fast` a post-processor that adds these ends, unless it does so already."""
    before, after = [ids.bos] * adds.bos, [ids.eos] * adds.eos
    if fast.encode("a").ids == before + fast.encode("a", add_special_tokens=False).ids + after:
        return
    names = {i: fast.id_to_token(i) for i in before + after}
    first = [names[i] for i in before] + ["$A"] + [names[i] for i in after]
    second = ["$B" if part == "$A" else part for part in first]
    special = [(name, i) for i, name in names.items()]
    fast.post_processor = processors.TemplateProcessing(first, first + second, special)


def _prefixes_first_word(fast: tokenizers.Tokenizer) -> bool | None:
    """Return whether the pre-tokenizer puts a space before a text; None if it has no such setting."""
    if fast.pre_tokenizer is None:
        return None
    source = json.loads(fast.to_str())["pre_tokenizer"]
    for one in source.get("pretokenizers", [source]):
        if "add_prefix_space" in one:
            return one["add_prefix_space"]
        if "prepend_scheme" in one:
            return one["prepend_scheme"] != "never"
    return None


def _tokens_behind(pieces, fast: tokenizers.Tokenizer | None, settings: dict, folder: Path | None) -> list:
    """Return (id, AddedToken) of the tokens that a fine-tuning added behind the pieces, in order.

    They come from tokenizer.json, else from tokenizer_config.json and added_tokens.json. folder: None for a
    .model by itself, whose neighbours may not belong to it."""
    added = {}
    if fast is not None:
        added = fast.get_added_tokens_decoder()
    elif folder is not None:
        ids = read_settings(folder / "added_tokens.json")
        by_id = {str(i): {"content": token} for token, i in ids.items()}
        by_id |= settings.get("added_tokens_decoder") or {}
        try:
            for i, token in by_id.items():
                added[int(i)] = AddedToken(**{name: token[name] for name in ADDED_FIELDS if name in token})
        except (TypeError, ValueError) as error:
            raise UsageError(f"{folder}: its added tokens cannot be read ({_one_line(error)}).") from None
    return [(i, token) for i, token in sorted(added.items()) if i >= len(pieces)]


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)


def _as_json(settings: dict) -> bytes:
    return (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
