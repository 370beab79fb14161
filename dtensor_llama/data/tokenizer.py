"""Gives SentencePiece models and Hugging Face's tokenizer.json files one interface.

If there is a SentencePiece model, its ids are the reference, because the models that people continue to train
have learned from them. pieces.py makes the tokenizer.json that is exported with it.
"""

import hashlib
import itertools
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import AddedToken, processors

from dtensor_llama.data.pieces import as_tokenizer_json, has_dummy_prefix, load_pieces
from dtensor_llama.errors import UsageError, require
from dtensor_llama.places import expanded, read_settings, refuse_hub_name

WELL_KNOWN = {"bos": ("<s>", "<|begin_of_text|>"), "eos": ("</s>", "<|end_of_text|>", "<|endoftext|>")}
ADDED_FIELDS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")  # of an AddedToken
# The names that transformers gives to the files of chat templates.
TEMPLATE_FILE, TEMPLATE_FOLDER = "chat_template.jinja", "additional_chat_templates"
# These settings of a tokenizer_config.json are not copied into an export.
# fmt: off
NOT_KEPT = {
    # paths and classes that mean something only on the machine that wrote them
    "tokenizer_class", "auto_map", "tokenizer_file", "vocab_file", "merges_file", "name_or_path",
    "special_tokens_map_file", "backend", "is_local", "legacy", "from_slow", "sp_model_kwargs",
    "clean_up_tokenization_spaces",
    # what the export writes itself, with the values that training used
    "bos_token", "eos_token", "unk_token", "add_bos_token", "add_eos_token", "add_prefix_space",
    "added_tokens_decoder",
}
# fmt: on


class EndIds(NamedTuple):
    """Holds the ids of BOS and EOS; None where a tokenizer has no such token."""

    bos: int | None
    eos: int | None


class AddedEnds(NamedTuple):
    """Tells which of BOS and EOS transformers puts around a text without being asked."""

    bos: bool
    eos: bool


class Tokenizer:
    """Turns text into ids and ids into text.

    `encode` adds neither BOS nor EOS, and reads `</s>` inside a text as plain characters.

    vocab_size: one more than the largest id, added tokens included
    bos_id, eos_id: None where the tokenizer has no such token
    adds: what transformers would put around a text. A document in training begins with BOS if adds.bos is
        true, and so does a prompt of generate.py. A document always ends with EOS.
    fingerprint: a hash of everything that decides the ids, including BOS and EOS
    path: the file or folder that it was loaded from"""

    def __init__(self, path: Path, fast: tokenizers.Tokenizer, pieces, ids: EndIds, adds: AddedEnds):
        self.path, self.bos_id, self.eos_id, self.adds = path, ids.bos, ids.eos, adds
        self._fast, self._pieces = fast, pieces  # pieces: the SentencePieceProcessor that encodes; or None
        fast.encode_special_tokens = True  # special tokens inside a text are text
        # of the added tokens that SentencePiece does not know, those that are text
        self._added_texts = {
            i: token.content
            for i, token in self._added_tokens()
            if pieces is not None and i >= len(pieces) and not token.special
        }
        self.vocab_size = max(fast.get_vocab(with_added_tokens=True).values()) + 1
        _put_ends(fast, ids, adds)  # so that the exported tokenizer.json adds what training did
        source = fast.to_str().encode() if pieces is None else pieces.serialized_model_proto()
        self.fingerprint = hashlib.sha256(source + repr((*ids, *adds, self.vocab_size)).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text, without BOS and EOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, without BOS and EOS.

        SentencePiece runs in this thread; `tokenizers` in as many as TOKENIZERS_PARALLELISM allows."""
        if self._pieces is not None:
            return self._pieces.encode(texts, num_threads=1)
        return [encoding.ids for encoding in self._fast.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`, without special tokens.

        A token that fine-tuning has added, such as <think>, is text too, unless it is marked as special."""
        ids = [int(i) for i in ids]
        if self._pieces is None:
            return self._fast.decode(ids, skip_special_tokens=True)
        text = ""
        # The pieces after an added token are a text of their own, as when they were encoded.
        for added, run in itertools.groupby(ids, key=self._added_texts.get):
            if added is None:
                text += self._pieces.decode([i for i in run if i < len(self._pieces)])
            else:
                text += added * len(list(run))
        return text

    def id_of(self, token: str) -> int:
        """Return the id of an entry of the vocabulary."""
        return self._fast.token_to_id(token)

    def token_of(self, token_id: int) -> str:
        """Return the entry of the vocabulary with this id, exactly as it is written there."""
        return self._fast.id_to_token(token_id)

    @property
    def ends(self) -> dict[str, str]:
        """Return the texts of "bos_token" and "eos_token", of those that the tokenizer has."""
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        return {name: self.token_of(i) for name, i in ids.items() if i is not None}

    @property
    def control_tokens(self) -> dict[str, AddedToken]:
        """Return {text: AddedToken} of the texts that stand for one id each in a chat template.

        These are BOS, EOS and all added tokens."""
        added = {token.content: token for _, token in self._added_tokens()}
        return {token: AddedToken(token) for token in self.ends.values()} | added

    @property
    def plain(self) -> "Tokenizer":
        """Return a tokenizer that reads every added token as plain text, also those not marked as special."""
        if self._pieces is not None:
            return self
        source = json.loads(self._fast.to_str())
        source["added_tokens"] = [token | {"special": True} for token in source["added_tokens"]]
        fast = tokenizers.Tokenizer.from_str(json.dumps(source))
        return Tokenizer(self.path, fast, None, EndIds(self.bos_id, self.eos_id), self.adds)

    @property
    def prefixes_every_text(self) -> bool:
        """Return whether the text after a control token gets a dummy prefix just as a text at the start does.

        pieces.py explains the dummy prefix. Where a tokenizer has none, this says nothing."""
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

        They are looked for where transformers looks: in files of their own, else in tokenizer_config.json.
        The template "tool_use" is for conversations with tools."""
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
        """Return the folder whose other files belong to the tokenizer; None for a path to a .model.

        The files beside such a .model may belong to another tokenizer."""
        if self.path.suffix == ".model":
            return None
        return self.path if self.path.is_dir() else self.path.parent

    def save(self, folder: str | Path, chat_template: str | None = None) -> None:
        """Write a folder for transformers' AutoTokenizer: tokenizer.json, tokenizer_config.json and the rest.

        Files of another tokenizer there are replaced, or removed if this one has no such file.
        chat_template: the one that training used, if any. It is not written if the tokenizer came with
            several templates, which are copied as they are.
        """
        folder, home = Path(folder), self._neighbours
        folder.mkdir(parents=True, exist_ok=True)
        if home is None or not home.samefile(folder):
            # What another tokenizer has left there would be read as a part of this one.
            for name in (TEMPLATE_FILE, "tokenizer.model", "added_tokens.json"):
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(folder / TEMPLATE_FOLDER, ignore_errors=True)
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
        config |= {"unk_token": unk_token} if unk_token else {}
        config |= self.ends | self._settings_of_ids()
        _write(folder / "tokenizer.json", self._fast.to_str(pretty=True).encode())
        _write(folder / "tokenizer_config.json", _as_json(config))
        if self._pieces is not None:
            _write(folder / "tokenizer.model", self._pieces.serialized_model_proto())
            behind = {token.content: i for i, token in self._added_tokens() if i >= len(self._pieces)}
            if behind:  # tokenizer.model does not contain them, and llama.cpp, for example, reads only that
                _write(folder / "added_tokens.json", _as_json(behind))

    def _added_tokens(self) -> list[tuple[int, AddedToken]]:
        return sorted(self._fast.get_added_tokens_decoder().items())

    def _settings_of_ids(self) -> dict:
        """Return the settings about ids in a tokenizer_config.json, for readers that skip tokenizer.json."""
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


def load_tokenizer(path: str | Path, field: str = "tokenizer") -> Tokenizer:
    """Open a Hugging Face folder, a tokenizer.json or a SentencePiece .model. field: names it in messages.

    A folder may have both tokenizer.model and tokenizer.json. Then the first is the reference, if it is a
    SentencePiece model (LLaMA-3 has another format under that name) and has as many pieces as tokenizer.json
    has tokens without the added ones.
    Raises UsageError if there is no such file, or if it cannot be read as a tokenizer.
    """
    refuse_hub_name(str(path), field)
    path = Path(expanded(str(path), field))
    if not path.exists():
        raise UsageError(
            f"{field}={path}: there is no such file or folder; give a Hugging Face folder, a "
            "tokenizer.json or a SentencePiece .model on this machine."
        )
    home = path if path.is_dir() else path.parent
    json_file = home / "tokenizer.json" if path.is_dir() else path
    model_file = home / "tokenizer.model" if path.is_dir() else path
    has_model = model_file.suffix == ".model" and model_file.is_file()
    fast = _load_fast(json_file) if json_file.suffix == ".json" and json_file.is_file() else None
    pieces = load_pieces(model_file) if has_model else None
    if fast is None and pieces is None:
        problem = "no tokenizer; copy a tokenizer.json or a SentencePiece .model there, or give another place"
        if has_model:
            problem = (
                f"{model_file.name} is not a SentencePiece model (damaged, or another format); give the "
                "tokenizer.json that belongs to it"
            )
        raise UsageError(f"{field}={path}: {problem}.")
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
    # A tokenizer.json may contain the settings of its last use, which would silently cut documents.
    fast.no_truncation()
    fast.no_padding()
    return fast


def _named_id(name: str, settings: dict, fast: tokenizers.Tokenizer, folder: Path) -> int | None:
    """Return the id that settings["bos_token"] (or eos) means; None if there is none.

    The setting is a text, an object with `content`, or an id, which is below 0 if there is no such token."""
    token = settings[f"{name}_token"]
    token = token.get("content") if isinstance(token, dict) else token
    if isinstance(token, str):
        if fast.token_to_id(token) is None:
            raise UsageError(f"{folder}: the {name}_token {token!r} is not in the vocabulary.")
        token = fast.token_to_id(token)
    return token if token is not None and token >= 0 else None


def _special_id(name: str, folder: Path, fast: tokenizers.Tokenizer) -> int | None:
    """Return the id of BOS or EOS for a tokenizer.json, which itself does not say which tokens these are.

    The files beside it say so; if they do not, the names in common use are looked up."""
    for beside in ("tokenizer_config.json", "special_tokens_map.json"):
        settings = read_settings(folder / beside)
        if f"{name}_token" in settings:
            return _named_id(name, settings, fast, folder)
    for beside in ("config.json", "generation_config.json"):
        token_id = read_settings(folder / beside).get(f"{name}_token_id")
        if isinstance(token_id, list) and token_id:  # LLaMA-3 lists several EOS ids
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

    transformers before 5 and llama.cpp read the first file, later versions of transformers the second. If
    neither says anything, BOS is added if there is one."""
    bos, eos = True, False
    if fast is not None and fast.post_processor is not None:
        around = fast.encode("a").ids
        bos, eos = around[:1] == [ids.bos], around[-1:] == [ids.eos]
    adds = {"add_bos_token": bos, "add_eos_token": eos}
    for name in adds:
        said = settings.get(name)
        where = f"{folder / 'tokenizer_config.json'}: {name}"
        require(isinstance(said, bool | None), where, said, "true or false")
        if said is not None:
            adds[name] = said
    return AddedEnds(
        adds["add_bos_token"] and ids.bos is not None, adds["add_eos_token"] and ids.eos is not None
    )


def _put_ends(fast: tokenizers.Tokenizer, ids: EndIds, adds: AddedEnds) -> None:
    """Give `fast` a post-processor that adds BOS and EOS as `adds` says, unless it does so already."""
    before, after = [ids.bos] * adds.bos, [ids.eos] * adds.eos
    if fast.encode("a").ids == before + fast.encode("a", add_special_tokens=False).ids + after:
        return
    names = {i: fast.id_to_token(i) for i in before + after}
    first = [names[i] for i in before] + ["$A"] + [names[i] for i in after]
    second = ["$B" if part == "$A" else part for part in first]
    special = [(name, i) for i, name in names.items()]
    fast.post_processor = processors.TemplateProcessing(first, first + second, special)


def _prefixes_first_word(fast: tokenizers.Tokenizer) -> bool | None:
    """Return whether the pre-tokenizer puts a space before a text, or None if it has no such setting."""
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
    """Return (id, AddedToken) for each token that fine-tuning has added after the pieces, in order of ids.

    They are read from tokenizer.json, else from tokenizer_config.json and added_tokens.json.
    folder: None for a path to a .model, since the files beside it may not belong to it."""
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
    file.unlink(missing_ok=True)  # if it is a link, what it points to stays as it is
    file.write_bytes(content)


def _as_json(settings: dict) -> bytes:
    return (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
