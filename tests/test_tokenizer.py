"""What `load_tokenizer` promises: SentencePiece's ids, no control tokens out of text, folders transformers
can open."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from dtensor_llama.data.tokenize import prepare_corpus
from dtensor_llama.data.tokenizer import load_tokenizer
from dtensor_llama.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("DTENSOR_LLAMA_SHARED_DATA", ROOT.parent / "shared" / "data"))
needs_shared = pytest.mark.skipif(
    not (SHARED / "llama2_tokenizer").is_dir(), reason=f"no real tokenizers in {SHARED}"
)
# real text that every machine has
TEXT = Path(json.decoder.__file__).read_text() + Path(shutil.__file__).read_text()
HARD = [
    "Hello world",
    " leading",
    "  two",
    "",
    "\n",
    "tab\there \r\n\n x  ",
    "naïve Ω 你好 🦙 \u200d",
    "</s><s> <unk>",
    "a\0b",
]


def train_pieces(folder: Path, **options) -> Path:
    """A small SentencePiece model as LLaMA's was made: BPE, byte fallback, no normalization, BOS 1, EOS 2."""
    (folder / "text.txt").write_text(TEXT)
    options = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "vocab_size": 600,
        "minloglevel": 2,
    } | options
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "m"), **options
    )
    return folder / "m.model"


def train_byte_level(file: Path, special_tokens=("<s>", "</s>"), words=None) -> Path:
    """A byte-level BPE tokenizer.json, the kind `make train` makes; `words` splits a text before its pieces
    are joined."""
    fast, bytes_only = tokenizers.Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(False, use_regex=False)
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if words is not None:
        fast.pre_tokenizer = pre_tokenizers.Sequence([*words, bytes_only])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(special_tokens), initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(TEXT.split("\n\n"), trainer)
    fast.save(str(file))
    return file


@pytest.fixture(scope="module")
def model_file(tmp_path_factory) -> Path:
    return train_pieces(tmp_path_factory.mktemp("pieces"))


@pytest.fixture
def json_file(tmp_path) -> Path:
    return train_byte_level(tmp_path / "tokenizer.json")


@pytest.fixture
def folder_with_both(tmp_path, model_file) -> Path:
    load_tokenizer(model_file).save(tmp_path / "both")
    return tmp_path / "both"


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | changes))


@needs_shared
@pytest.mark.parametrize("name", ["llama2_tokenizer", "stories260K"])
@pytest.mark.parametrize("file", ["", "tokenizer.json", "tokenizer.model"])
def test_ids_equal_sentencepiece_on_real_tokenizers(name, file):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(SHARED / name / "tokenizer.model"))
    tokenizer = load_tokenizer(SHARED / name / file)
    texts = [*HARD, (SHARED / "corpus" / "tinyshakespeare.txt").read_text()[:200_000]]
    assert tokenizer.encode_batch(texts) == reference.encode(texts)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (reference.get_piece_size(), 1, 2)


@needs_shared
def test_llama_gives_the_published_ids():
    assert load_tokenizer(SHARED / "llama2_tokenizer").encode("Hello world") == [15043, 3186]


def test_ids_of_a_trained_model_equal_sentencepiece(model_file):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    tokenizer = load_tokenizer(model_file)
    assert [tokenizer.encode(text) for text in [*HARD, TEXT]] == reference.encode([*HARD, TEXT])
    assert tokenizer.decode(tokenizer.encode(" a  naïve 🦙")) == " a  naïve 🦙"


def test_control_tokens_inside_a_text_are_text(model_file, json_file):
    for tokenizer in (load_tokenizer(model_file), load_tokenizer(json_file)):
        ids = tokenizer.encode("x</s> <s>y")
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
        assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == "x</s> <s>y"


def test_a_saved_tokenizer_opens_in_transformers_with_the_same_ids(
    model_file, json_file, folder_with_both, tmp_path
):
    from transformers import AutoTokenizer

    # transformers reads </s> as the control token
    plain = [text for text in HARD if "</s>" not in text] + [TEXT]
    for i, source in enumerate((model_file, json_file, folder_with_both)):
        tokenizer, folder = load_tokenizer(source), tmp_path / f"saved{i}"
        tokenizer.save(folder)
        theirs = AutoTokenizer.from_pretrained(folder)
        assert [theirs(text, add_special_tokens=False).input_ids for text in plain] == tokenizer.encode_batch(
            plain
        )
        assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
        again = load_tokenizer(folder)
        assert again.fingerprint == tokenizer.fingerprint and again.encode_batch(
            HARD
        ) == tokenizer.encode_batch(HARD)


POST_PROCESSORS = {
    "none": None,
    "offsets only": processors.ByteLevel(trim_offsets=False),
    "bos": processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 0)]),
    "bos and eos": processors.TemplateProcessing(
        "<s> $A </s>", "<s> $A </s> <s> $B </s>", [("<s>", 0), ("</s>", 1)]
    ),
}


@pytest.mark.parametrize("kind", [*POST_PROCESSORS, "pieces", "pieces and tokenizer.json"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"add_bos_token": False}, {"add_bos_token": True}, {"add_bos_token": False, "add_eos_token": True}],
)
def test_transformers_gives_the_ids_that_training_saw_bos_included(kind, settings, model_file, tmp_path):
    from transformers import AutoTokenizer

    base = tmp_path / "base"
    base.mkdir()
    if kind in POST_PROCESSORS:
        fast = tokenizers.Tokenizer.from_file(str(train_byte_level(base / "tokenizer.json")))
        if POST_PROCESSORS[kind] is not None:
            fast.post_processor = POST_PROCESSORS[kind]
        fast.save(str(base / "tokenizer.json"))
        edit_json(
            base / "tokenizer_config.json",
            tokenizer_class="PreTrainedTokenizerFast",
            bos_token="<s>",
            eos_token="</s>",
            **settings,
        )
    else:
        load_tokenizer(model_file).save(base)
        edit_json(base / "tokenizer_config.json", **settings)
        if kind == "pieces":
            (base / "tokenizer.json").unlink()
    (tmp_path / "data.txt").write_text("def main(self):")
    tokenizer = load_tokenizer(base)
    *document, end = prepare_corpus(
        [tmp_path / "data.txt"], tokenizer, tmp_path / "cache", processes=1
    ).tokens.tolist()
    tokenizer.save(tmp_path / "hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")("def main(self):").input_ids
    assert end == tokenizer.eos_id and theirs in (document, [*document, end])
    begins_with_bos = settings.get("add_bos_token", kind != "offsets only")
    assert (document[0] == tokenizer.bos_id) == begins_with_bos
    # where tokenizer.json says what to add, training had it too
    if not settings and kind not in ("none", "pieces"):
        assert AutoTokenizer.from_pretrained(base)("def main(self):").input_ids == theirs
    older = tokenizers.Tokenizer.from_file(str(tmp_path / "hf/tokenizer.json"))  # readers of that file alone
    assert older.encode("def main(self):").ids == theirs
    again = load_tokenizer(tmp_path / "hf")
    assert again.fingerprint == tokenizer.fingerprint and again.adds == tokenizer.adds


def test_a_flag_of_another_type_is_refused(json_file):
    edit_json(json_file.parent / "tokenizer_config.json", add_bos_token="false")
    with pytest.raises(UsageError, match="add_bos_token is 'false'; it must be true or false"):
        load_tokenizer(json_file)


def test_tokens_behind_a_sentencepiece_model_are_written_where_readers_of_it_look(folder_with_both, tmp_path):
    fast = tokenizers.Tokenizer.from_file(str(folder_with_both / "tokenizer.json"))
    fast.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    fast.add_tokens(["<tool>"])
    fast.save(str(folder_with_both / "tokenizer.json"))
    load_tokenizer(folder_with_both).save(tmp_path / "hf")
    added = json.loads((tmp_path / "hf/added_tokens.json").read_text())
    assert added == {"<|im_start|>": 600, "<|im_end|>": 601, "<tool>": 602}
    config = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert config["add_prefix_space"] is True and config["add_bos_token"] is True
    decoder = config["added_tokens_decoder"]
    assert (decoder["601"]["content"], decoder["601"]["special"], decoder["602"]["special"]) == (
        "<|im_end|>",
        True,
        False,
    )
    (tmp_path / "hf/tokenizer.json").unlink()
    for left in ("tokenizer_config.json", "added_tokens.json"):  # either of them is enough to know the ids
        shutil.copytree(tmp_path / "hf", tmp_path / left)
        for other in {"tokenizer_config.json", "added_tokens.json"} - {left}:
            (tmp_path / left / other).unlink()
        again = load_tokenizer(tmp_path / left)
        assert (again.vocab_size, again.id_of("<|im_end|>"), again.id_of("<tool>")) == (603, 601, 602)


def test_an_added_token_that_is_text_is_decoded_behind_sentencepiece_too(folder_with_both):
    fast = tokenizers.Tokenizer.from_file(str(folder_with_both / "tokenizer.json"))
    fast.add_special_tokens(["<|im_end|>"])
    fast.add_tokens(["<think>"])
    fast.save(str(folder_with_both / "tokenizer.json"))
    tokenizer = load_tokenizer(folder_with_both)
    end, think = tokenizer.id_of("<|im_end|>"), tokenizer.id_of("<think>")
    ids = [think, think, *tokenizer.encode("why"), end, think, *tokenizer.encode("so be it"), end]
    assert tokenizer.decode(ids) == "<think><think>why<think>so be it"


def test_a_saved_tokenizer_has_nothing_of_another_one_that_was_there(folder_with_both, json_file, tmp_path):
    (folder_with_both / "additional_chat_templates").mkdir()
    (folder_with_both / "additional_chat_templates/tool_use.jinja").write_text("tools")
    fast = tokenizers.Tokenizer.from_file(str(folder_with_both / "tokenizer.json"))
    fast.add_tokens(["<tool>"])
    fast.save(str(folder_with_both / "tokenizer.json"))
    before, after = load_tokenizer(folder_with_both), load_tokenizer(json_file)
    before.save(tmp_path / "hf", chat_template="{{ messages }}")
    (tmp_path / "elsewhere").write_text("precious")
    (tmp_path / "hf/tokenizer_config.json").unlink()
    (tmp_path / "hf/tokenizer_config.json").symlink_to(tmp_path / "elsewhere")
    after.save(tmp_path / "hf")
    after.save(tmp_path / "fresh")
    for folder in (tmp_path / "hf", tmp_path / "fresh"):
        files = {file.name for file in folder.rglob("*") if file.is_file()}
        assert files == {"tokenizer.json", "tokenizer_config.json"}
    assert (tmp_path / "elsewhere").read_text() == "precious"


def test_settings_of_the_base_are_carried_on_but_not_its_paths_and_classes(folder_with_both, tmp_path):
    carried = {
        "extra_special_tokens": ["<extra>"],
        "additional_special_tokens": ["<more>"],
        "model_max_length": 77,
        "padding_side": "left",
        "truncation_side": "left",
        "pad_token": "</s>",
        "my_own": [1],
    }
    left_out = {
        "auto_map": {"AutoTokenizer": "code.py"},
        "name_or_path": "/home/me",
        "tokenizer_class": "LlamaTokenizerFast",
    }
    edit_json(folder_with_both / "tokenizer_config.json", **carried, **left_out)
    load_tokenizer(folder_with_both).save(tmp_path / "hf")
    config = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert {key: config[key] for key in carried} == carried
    assert "auto_map" not in config and "name_or_path" not in config and "/home/me" not in str(config)


def test_a_chat_template_survives_saving(folder_with_both, tmp_path):
    edit_json(folder_with_both / "tokenizer_config.json", chat_template="in the config", model_max_length=77)
    (folder_with_both / "chat_template.jinja").write_text("in a file")
    load_tokenizer(folder_with_both).save(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (config["chat_template"], config["model_max_length"]) == ("in the config", 77)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "in a file"


def test_truncation_and_padding_left_in_a_tokenizer_json_are_off(json_file):
    expected = load_tokenizer(json_file).encode_batch(["a", TEXT])
    fast = tokenizers.Tokenizer.from_file(str(json_file))
    fast.enable_truncation(8)
    fast.enable_padding(length=16)
    fast.save(str(json_file))
    assert load_tokenizer(json_file).encode_batch(["a", TEXT]) == expected


def test_bos_and_eos_come_from_the_files_beside_then_from_well_known_names(json_file):
    eos_id = lambda: load_tokenizer(json_file).eos_id
    other, beside = 300, json_file.parent
    assert (load_tokenizer(json_file).bos_id, eos_id()) == (0, 1)  # named <s> and </s>
    edit_json(beside / "generation_config.json", eos_token_id=[other + 1, other])  # LLaMA-3 lists several
    assert eos_id() == other + 1
    edit_json(beside / "config.json", eos_token_id=other)
    assert eos_id() == other
    piece = tokenizers.Tokenizer.from_file(str(json_file)).id_to_token(other + 2)
    edit_json(beside / "special_tokens_map.json", eos_token={"content": piece})
    assert eos_id() == other + 2
    edit_json(beside / "tokenizer_config.json", eos_token=None)  # says: there is none
    assert eos_id() is None
    unnamed = load_tokenizer(train_byte_level(json_file.parent / "tokenizer.json", ["<|endoftext|>"]))
    assert (unnamed.bos_id, unnamed.eos_id) == (None, None)
    for file in beside.glob("*config.json"):
        file.unlink()
    (beside / "special_tokens_map.json").unlink()
    assert load_tokenizer(json_file).eos_id == 0  # <|endoftext|>


def test_in_a_folder_sentencepiece_is_the_reference_and_added_tokens_keep_their_ids(folder_with_both):
    file = folder_with_both / "tokenizer.json"
    fast = tokenizers.Tokenizer.from_file(str(file))
    fast.normalizer = tokenizers.normalizers.Lowercase()  # disagrees with SentencePiece from here on
    fast.add_special_tokens(["<pad>", "<|im_end|>"])
    fast.save(str(file))
    tokenizer = load_tokenizer(folder_with_both)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder_with_both / "tokenizer.model"))
    assert tokenizer.encode_batch(HARD) == reference.encode(HARD) and tokenizer.vocab_size == 602
    tokenizer.save(folder_with_both)
    saved = tokenizers.Tokenizer.from_file(str(file))
    assert (saved.token_to_id("<|im_end|>"), saved.encode("Ab c").ids[1:]) == (601, reference.encode("Ab c"))


def test_a_tokenizer_model_that_does_not_belong_to_the_tokenizer_json_is_not_used(json_file, model_file):
    expected = load_tokenizer(json_file).encode("Hello world")
    for content in (b"tiktoken ranks, as in LLaMA-3", (SHARED / "stories260K" / "tokenizer.model")):
        if isinstance(content, Path):  # a good model, of another vocabulary
            content = content.read_bytes() if content.exists() else b""
        (json_file.parent / "tokenizer.model").write_bytes(content)
        assert load_tokenizer(json_file.parent).encode("Hello world") == expected


def test_the_fingerprint_changes_with_the_content_and_with_bos(json_file):
    first = load_tokenizer(json_file).fingerprint
    assert load_tokenizer(json_file).fingerprint == first
    edit_json(json_file.parent / "tokenizer_config.json", bos_token=None)
    assert load_tokenizer(json_file).fingerprint != first


KINDS = {
    "unigram": {"model_type": "unigram"},
    "nfkc": {"normalization_rule_name": "nmt_nfkc"},
    "unigram, nfkc": {
        "model_type": "unigram",
        "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
    },
    "nfkc without bytes": {
        "normalization_rule_name": "nfkc",
        "byte_fallback": False,
        "remove_extra_whitespaces": True,
    },
    "casefolded": {"normalization_rule_name": "nmt_nfkc_cf"},
    "fewer spaces": {"remove_extra_whitespaces": True},
    "symbols": {"user_defined_symbols": ["<sep>", "self", "<sep><sep>"]},
    "unigram, symbols": {"model_type": "unigram", "user_defined_symbols": ["<sep>", "self"]},
    "no dummy prefix": {"add_dummy_prefix": False},
    "characters": {"model_type": "char", "byte_fallback": False},
    "words": {"model_type": "word", "byte_fallback": False},
    "words, nfkc": {
        "model_type": "word",
        "byte_fallback": False,
        "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
    },
    "words, space behind": {
        "model_type": "word",
        "byte_fallback": False,
        "treat_whitespace_as_suffix": True,
    },
    "space behind": {"treat_whitespace_as_suffix": True},
    "space behind, fewer spaces": {"treat_whitespace_as_suffix": True, "remove_extra_whitespaces": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_sentencepiece_model_trains_and_is_exported_with_its_ids(tmp_path, kind):
    from transformers import AutoTokenizer

    model = train_pieces(tmp_path, **KINDS[kind])
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokenizer = load_tokenizer(model)
    texts = [*HARD, TEXT, "<sep>a", "a<sep><sep> self\r\n\r\nﬁ Å ½ ＡＢ", "<0x0A>"]
    assert tokenizer.encode_batch(texts) == reference.encode(texts)
    (tmp_path / "long.txt").write_text(TEXT)
    corpus = prepare_corpus([tmp_path / "long.txt"], tokenizer, tmp_path / "cache", processes=1)
    assert corpus.tokens.tolist() == [1, *reference.encode(TEXT), 2]
    tokenizer.save(tmp_path / "hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in texts:
        if "</s>" not in text:  # transformers reads it as the control token
            assert theirs(text).input_ids == [1, *reference.encode(text)], text
    again = load_tokenizer(tmp_path / "hf")
    assert again.fingerprint == tokenizer.fingerprint
    assert again.decode(again.encode("a b")) == reference.decode(reference.encode("a b"))
    again.save(tmp_path / "again")
    for file in (tmp_path / "hf").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_a_sentencepiece_model_without_an_exact_tokenizer_json_is_refused(tmp_path):
    """The bytes of an unknown word include its space, which no model of `tokenizers` gives."""
    with pytest.raises(UsageError, match=r"m\.model.*Give a tokenizer\.json instead"):
        load_tokenizer(train_pieces(tmp_path, model_type="word", byte_fallback=True))


def test_a_large_vocabulary_of_words_is_searched_quickly(tmp_path):
    """A list of 20,000 words in the pattern of the exported tokenizer.json takes a second for 20 kB of "
    "text."""
    words = [f"w{i:x}" for i in range(20_000)]
    (tmp_path / "words.txt").write_text("\n".join(words))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "words.txt"),
        model_prefix=str(tmp_path / "w"),
        model_type="word",
        vocab_size=19_000,
        minloglevel=2,
    )
    load_tokenizer(tmp_path / "w.model").save(tmp_path / "hf")
    fast = tokenizers.Tokenizer.from_file(str(tmp_path / "hf/tokenizer.json"))
    began_s = time.process_time()
    assert len(fast.encode(" ".join(words[::4])).ids) > 1000
    assert time.process_time() - began_s < 1


def test_templates_by_name_are_found_where_transformers_finds_them_and_exported(json_file, tmp_path):
    from transformers import AutoTokenizer

    folder, named = json_file.parent, [{"name": name, "template": name} for name in ("default", "tool_use")]
    edit_json(folder / "tokenizer_config.json", chat_template=named)
    for _ in range(2):
        tokenizer = load_tokenizer(folder)
        assert tokenizer.chat_templates == {"default": "default", "tool_use": "tool_use"}
        tokenizer.save(tmp_path / "hf", chat_template="default")
        theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
        assert theirs.chat_template == tokenizer.chat_templates
        edit_json(folder / "tokenizer_config.json", chat_template="not this one")
        (folder / "chat_template.jinja").write_text("default")
        (folder / "additional_chat_templates").mkdir(exist_ok=True)
        (folder / "additional_chat_templates/tool_use.jinja").write_text("tool_use")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere/at-all", None, "no such file or folder"),
        ("", None, "no tokenizer"),
        ("tokenizer.bin", "x", "no tokenizer"),
        ("tokenizer.json", '{"model": {"type": "BPE"', r"tokenizer\.json: not a readable"),
        ("tokenizer.json", "{}", r"tokenizer\.json: not a readable"),
        ("tokenizer.model", "not a model", r"tokenizer\.model is not a SentencePiece model"),
        ("tokenizer.model", "", r"tokenizer\.model is not a SentencePiece model"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message) as error:
        load_tokenizer(tmp_path / name)
    assert "\n" not in str(error.value)


def test_special_tokens_the_vocabulary_lacks_are_refused(json_file):
    edit_json(json_file.parent / "config.json", bos_token_id=600)
    with pytest.raises(UsageError, match="config.json says bos_token_id 600"):
        load_tokenizer(json_file)
    edit_json(json_file.parent / "tokenizer_config.json", bos_token="<nope>")
    with pytest.raises(UsageError, match="bos_token '<nope>' is not in the vocabulary"):
        load_tokenizer(json_file)


def test_tokenizing_does_not_import_torch():
    code = "import dtensor_llama.chat.corpus, dtensor_llama.data.mix, sys; print(list(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert "'numpy'" in done.stdout and "'torch'" not in done.stdout
