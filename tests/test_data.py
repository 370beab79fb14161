"""What the data path promises: exact ids however a text is cut, one tokenizing, and sequences that do not
depend on the layout."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_tokenizer import ROOT, SHARED, TEXT, train_byte_level, train_pieces
from tokenizers import Regex, pre_tokenizers

from dtensor_llama.chat.corpus import ChatCorpus, prepare_chat
from dtensor_llama.data import tokenize as tokenize_module
from dtensor_llama.data.cut import Cutter
from dtensor_llama.data.reader import Batching, SequenceReader, validation_batches
from dtensor_llama.data.sequences import PackedSequences, Packing, TokenCorpus, permute
from dtensor_llama.data.sources import TextOptions, expand_paths, read_chunks
from dtensor_llama.data.tokenize import prepare_corpus
from dtensor_llama.data.tokenizer import load_tokenizer
from dtensor_llama.errors import UsageError

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
KINDS = ["sentencepiece", "byte-level", "llama3-like", "across words", "llama2", "stories260K"]
DOCUMENTS = ["First document.", " second\nwith </s> inside", "naïve Ω 你好 🦙\r\n\r\nthird " * 9, "4th"]


@pytest.fixture(scope="module")
def tokenizers_by_kind(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    kinds = {"sentencepiece": train_pieces(folder), "byte-level": train_byte_level(folder / "tokenizer.json")}
    llama3 = pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated")
    kinds["llama3-like"] = train_byte_level(folder / "llama3.json", words=[llama3])
    kinds["across words"] = train_byte_level(folder / "across.json", words=[])
    if (SHARED / "llama2_tokenizer").is_dir():
        kinds |= {
            "llama2": SHARED / "llama2_tokenizer",
            "stories260K": SHARED / "stories260K" / "tokenizer.json",
        }
    return {kind: load_tokenizer(path) for kind, path in kinds.items()}


@pytest.fixture
def tokenizer(tokenizers_by_kind):
    return tokenizers_by_kind["sentencepiece"]


def whole(tokenizer, documents) -> list[int]:
    """The tokens a corpus of `documents` must hold, by the plainest way."""
    return [i for text in documents for i in [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]]


def write_jsonl(file: Path, documents, **extra) -> Path:
    file.write_text("".join(json.dumps({"text": text} | extra) + "\n" for text in documents))
    return file


def make_corpus(folder: Path, tokens, starts=(0,)) -> TokenCorpus:
    folder.mkdir(exist_ok=True)
    np.array(tokens, dtype=np.uint16).tofile(folder / "tokens.bin")
    np.array(starts, dtype=np.int64).tofile(folder / "documents.bin")
    meta = {"n_tokens": len(tokens), "n_documents": len(starts), "dtype": "uint16"}
    (folder / "meta.json").write_text(json.dumps(meta))
    return TokenCorpus(folder)


def command(path, tokenizer, cache_dir) -> list[str]:
    words = [
        sys.executable,
        "-m",
        "dtensor_llama.data.tokenize",
        "--path",
        path,
        "--tokenizer",
        tokenizer.path,
    ]
    return [str(word) for word in [*words, "--cache-dir", cache_dir]]


def folders(cache_dir: Path) -> list[Path]:
    """The finished corpora in a cache."""
    return [entry for entry in cache_dir.iterdir() if entry.is_dir() and entry.suffix != ".partial"]


# ---- cutting ----


def real_texts() -> dict[str, str]:
    dice = random.Random(0)
    runs = "".join(dice.choice("-=a .\n_#") * dice.choice([1, 1, 2, 3, 17, 400]) for _ in range(1500))
    texts = {"python": TEXT, "runs of one character": runs}
    for file in (
        ("moby_dick.txt", "tinyshakespeare.txt", "sotu.jsonl") if (SHARED / "corpus").is_dir() else ()
    ):
        text = (SHARED / "corpus" / file).read_text()
        texts[file] = (
            "\n".join(json.loads(line)["text"] for line in text.splitlines()[:40])
            if "jsonl" in file
            else text
        )
    return texts


@pytest.mark.parametrize("change", [None, ("\n", "\r\n"), ("\n", " "), (" ", ""), (".", "。 ")])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_a_cut_text_equal_those_of_the_whole(tokenizers_by_kind, kind, change):
    if kind not in tokenizers_by_kind:
        pytest.skip("no real tokenizers")
    tokenizer = tokenizers_by_kind[kind]
    for name, text in real_texts().items():
        text = text[:60_000].replace(*change) if change else text[:60_000]
        pieces = list(Cutter(tokenizer).pieces(text, 400))
        assert change or name.startswith("runs") or len(pieces) > len(text) / 700, name
        ids = [i for piece, skip in pieces for i in tokenizer.encode(piece)[skip:]]
        assert ids == tokenizer.encode(text), name


def test_a_text_without_a_place_to_cut_stays_whole(tokenizer):
    for text in ("x" * 20_000, "\n" * 20_000, "ab  " * 5000):
        pieces = list(Cutter(tokenizer).pieces(text, 1000))
        assert [i for piece, skip in pieces for i in tokenizer.encode(piece)[skip:]] == tokenizer.encode(text)


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
def test_a_txt_read_in_small_chunks_is_one_document_with_the_ids_of_the_whole(
    tokenizers_by_kind, kind, tmp_path
):
    tokenizer, text = tokenizers_by_kind[kind], (TEXT + "é🦙\r\n") * 2
    (tmp_path / "a.txt").write_text("\ufeff" + text, newline="")
    chunks = list(read_chunks(tmp_path / "a.txt", "text", Cutter(tokenizer), chunk_bytes=777))
    assert len(chunks) > 50 and max(len(chunk.data) for chunk in chunks) < 3000
    assert [chunk.opens for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
    assert [chunk.closes for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert [i for chunk in chunks for i in tokenizer.encode(chunk.data)[chunk.skip :]] == tokenizer.encode(
        text
    )


def test_a_jsonl_in_small_chunks_keeps_every_line(tokenizer, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [f"{i} " * (i % 300) + "." for i in range(500)])
    chunks = read_chunks(file, "text", Cutter(tokenizer), chunk_bytes=100)
    expected = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    assert [text for chunk in chunks for text in chunk.documents("text")] == expected


# ---- the corpus on disk ----


def test_every_kind_of_file_gives_the_same_tokens_as_the_plain_way(tokenizer, tmp_path):
    table = pa.table({"text": DOCUMENTS, "n": range(len(DOCUMENTS))})
    pq.write_table(table, tmp_path / "c.parquet", row_group_size=3)
    jsonl = write_jsonl(tmp_path / "b.jsonl", DOCUMENTS).read_bytes()
    (tmp_path / "a.txt").write_text(DOCUMENTS[2], newline="")
    for name in ("a.txt", "b.jsonl", "c.parquet"):
        plain = (tmp_path / name).read_bytes()
        # two members
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(plain[:20]) + gzip.compress(plain[20:]))
        with pa.output_stream(tmp_path / f"{name}.zst", compression="zstd") as file:
            file.write(plain)
    (tmp_path / "d.jsonl").write_bytes(
        b"\xef\xbb\xbf\r\n" + jsonl.replace(b"\n", b"\r\n\r\n") + b' {"text": " \\n"}'
    )
    corpus = prepare_corpus(
        [tmp_path / "*.txt*", str(tmp_path / "**/[b-d].*")], tokenizer, tmp_path / "cache"
    )
    documents = [DOCUMENTS[2]] * 3 + DOCUMENTS * 7
    assert corpus.tokens.tolist() == whole(tokenizer, documents) and corpus.tokens.dtype == np.uint16
    lengths = [len(tokenizer.encode(text)) + 2 for text in documents]
    assert corpus.document_starts.tolist() == [0, *np.cumsum(lengths)[:-1].tolist()]


def test_the_corpus_is_reused_until_a_file_the_field_or_the_tokenizer_changes(
    tokenizers_by_kind, tmp_path, monkeypatch
):
    tokenizer, cache = tokenizers_by_kind["sentencepiece"], tmp_path / "cache"
    file = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS, other="another field")
    first = prepare_corpus([file], tokenizer, cache)
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", None)  # nothing is started for a hit, whatever names the file
        assert prepare_corpus([str(tmp_path / "*.jsonl"), file], tokenizer, cache).folder == first.folder
    os.utime(file, ns=(0, 0))
    touched = prepare_corpus([file], tokenizer, cache)
    field = prepare_corpus([file], tokenizer, cache, TextOptions("other"))
    other = prepare_corpus([file], tokenizers_by_kind["byte-level"], cache)
    assert len({corpus.folder for corpus in (first, touched, field, other)}) == 4 == len(folders(cache))
    assert field.tokens.tolist() == whole(tokenizer, ["another field"] * 4)


def test_the_content_hash_is_of_tokens_documents_and_masks_however_they_were_read(tokenizer, tmp_path):
    def hash_of(*documents: str, chunk_bytes: int = 1 << 20, files: int = 1) -> str:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for i in range(files):
            write_jsonl(folder / f"{i}.jsonl", documents[i::files] if files > 1 else documents)
        code = (
            f"import functools, sys, dtensor_llama.data.tokenize as t\n"
            f"t.read_chunks = functools.partial(t.read_chunks, chunk_bytes={chunk_bytes}); sys.exit(t.main())"
        )
        words = [
            sys.executable,
            "-c",
            code,
            "--path",
            folder / "*.jsonl",
            "--tokenizer",
            tokenizer.path,
            "--cache-dir",
            folder / "cache",
        ]
        done = subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, check=True)
        return TokenCorpus(done.stdout.decode().strip()).content_hash

    texts = [
        text + f" {i}" for i, text in enumerate(["one of them", "another", "a third one", "and the last"])
    ]
    first = hash_of(*texts)
    assert len(first) == 64 and hash_of(*texts, chunk_bytes=20) == first
    # the same documents in the same order
    assert hash_of(texts[0], texts[2], texts[1], texts[3], files=2) == first
    assert first not in {
        hash_of(*texts[::-1]),
        hash_of(*texts[:3], "and the tsal 3"),
        hash_of(*texts, "more"),
    }


def test_a_mask_alone_changes_the_content_hash(tmp_path):
    def corpus_of(name: str, answer: str) -> ChatCorpus:
        folder = tmp_path / name
        folder.mkdir()
        train_byte_level(folder / "tokenizer.json")
        (folder / "chat_template.jinja").write_text(
            "{% for turn in messages %}{% if turn['role'] == 'user' %}{{ turn['content'] + '\\n' }}{% else %}"
            + answer
            + "{% endif %}{% endfor %}"
        )
        (folder / "chat.jsonl").write_text(json.dumps({"question": "Which?", "answer": "1 2"}))
        return prepare_chat([folder / "chat.jsonl"], load_tokenizer(folder), tmp_path / "cache", processes=1)

    all_of_it = corpus_of("all", "{% generation %}{{ turn['content'] + eos_token }}{% endgeneration %}")
    but_the_first = corpus_of("rest", "{{ '1' }}{% generation %}{{ ' 2' + eos_token }}{% endgeneration %}")
    assert all_of_it.tokens.tolist() == but_the_first.tokens.tolist()
    assert all_of_it.trained.tolist() != but_the_first.trained.tolist()
    assert all_of_it.content_hash != but_the_first.content_hash


def test_a_damaged_corpus_is_refused(tokenizer, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    tokens_file = prepare_corpus([file], tokenizer, tmp_path / "cache").folder / "tokens.bin"
    tokens_file.write_bytes(tokens_file.read_bytes()[:-2])
    with pytest.raises(UsageError, match="damaged .* delete the folder"):
        prepare_corpus([file], tokenizer, tmp_path / "cache")


def wait_until(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def gone(processes) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def test_kill_9_leaves_nothing_that_would_be_used_and_no_process(tokenizer, tmp_path):
    file, cache = write_jsonl(tmp_path / "a.jsonl", [TEXT] * 60), tmp_path / "cache"
    process = subprocess.Popen(command(file, tokenizer, cache), cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_until(lambda: any(part.stat().st_size for part in cache.glob("*.partial/tokens.bin")))
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert workers and folders(cache) == [] and list(cache.glob("*.partial"))
    wait_until(lambda: gone(workers))
    corpus = prepare_corpus([file], tokenizer, cache)
    assert corpus.tokens.tolist() == whole(tokenizer, [TEXT]) * 60
    assert folders(cache) == [corpus.folder] and not list(cache.glob("*.partial"))


def test_tokenizing_stops_when_the_run_that_asked_for_it_is_killed(tokenizer, tmp_path):
    file, cache = write_jsonl(tmp_path / "a.jsonl", [TEXT] * 200), tmp_path / "cache"
    code = "from dtensor_llama.data.tokenize import prepare_corpus\n"
    code += "from dtensor_llama.data.tokenizer import load_tokenizer\n"
    code += f"t = load_tokenizer({str(tokenizer.path)!r})\n"
    code += f"prepare_corpus([{str(file)!r}], t, {str(cache)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_until(lambda: any(part.stat().st_size for part in cache.glob("*.partial/tokens.bin")))
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: gone(family))
    assert len(family) >= 2 and folders(cache) == []


def test_runs_that_start_together_tokenize_once(tokenizer, tmp_path):
    words = command(write_jsonl(tmp_path / "a.jsonl", [TEXT] * 20), tokenizer, tmp_path / "cache")
    runs = [subprocess.Popen(words, cwd=ROOT, stdout=-1, stderr=-1, text=True) for _ in range(3)]
    answers = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert {Path(out.strip()) for out, _ in answers} == set(folders(tmp_path / "cache"))
    assert sum("tokenized" in said for _, said in answers) == 1


def test_at_most_a_few_chunks_are_under_way_whatever_the_corpus(monkeypatch):
    under_way = []

    class Pool:  # finishes nothing before it is asked for it
        def submit(self, encode, chunk):
            under_way.append(chunk)
            future = Future()
            future.result = lambda: (under_way.remove(chunk), None)
            return future

    monkeypatch.setattr(
        tokenize_module, "read_chunks", lambda *_: (type("C", (), {"input_bytes": 1})() for _ in range(99))
    )
    encoding = SimpleNamespace(text_field="text", cutter=None)
    peaks = [len(under_way) for _ in tokenize_module._in_order(Pool(), ["file"], encoding, processes=2)]
    assert len(peaks) == 99 and max(peaks) < tokenize_module.CHUNKS_PER_WORKER * 2


# ---- bad files ----


def bad_jsonl(line: bytes) -> bytes:
    return b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n'


def parquet_bytes(**columns) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def zstd_bytes(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", bad_jsonl(b'{"text": "cut'), "line 3: broken JSON"),
        ("a.jsonl", bad_jsonl(b"[" * 100_000), "line 3: broken JSON"),
        ("a.jsonl", bad_jsonl(b'["text"]'), "line 3: expected a JSON object, found a list"),
        (
            "a.jsonl",
            bad_jsonl(b'{"body": "x", "id": 1}'),
            "line 3: no field 'text'; its fields are body, id.*`text_field`",
        ),
        (
            "a.jsonl",
            bad_jsonl(b'{"text": "x", "text": "y"}'),
            "line 3: broken JSON \\(the field 'text' stands twice\\)",
        ),
        ("a.jsonl", bad_jsonl(b'{"text": 5}'), "line 3: 'text' holds a number, expected a string"),
        ("a.jsonl", bad_jsonl(b'{"text": null}'), "line 3: 'text' holds null, expected a string"),
        ("a.jsonl", bad_jsonl(b'{"text": "\\ud83e"}'), "line 3: 'text' holds half a surrogate pair"),
        ("a.jsonl", bad_jsonl(b'{"text": "\xff"}'), "line 3: byte 0xff is not UTF-8"),
        ("a.jsonl", bad_jsonl(b'{"text": "\0"}'), "line 3: a zero byte"),
        ("a.txt", b"one\ntwo\n\0\1\2", "line 3: a zero byte; the file is binary"),
        ("a.txt", "one\ntwo".encode("utf-16"), "line 1: a zero byte"),
        ("a.txt", b"one\ntwo\ncaf\xe9 au lait", "line 3: byte 0xe9 is not UTF-8"),
        ("a.txt", b"one\n" * 40 + "\n🦙".encode()[:-1], "line 42: byte 0xf0 is not UTF-8"),
        ("a.txt.gz", gzip.compress(os.urandom(3000).hex().encode())[:-9], "cannot be read to its end"),
        ("a.jsonl.gz", b"not gzip", "cannot be read to its end"),
        ("a.jsonl.zst", zstd_bytes(os.urandom(3000).hex().encode())[:-9], "cannot be read to its end"),
        ("a.parquet", b"PAR1 not really", "cannot be read to its end"),
        ("a.parquet", parquet_bytes(text=["x" * 99] * 99)[:-20], "cannot be read to its end"),
        ("a.parquet.gz", gzip.compress(parquet_bytes(text=["x"]))[:-9], "cannot be read to its end"),
        (
            "a.parquet",
            parquet_bytes(body=["x"], id=[1]),
            "no column 'text'; it has body, id.*`text_field`",
        ),
        ("a.parquet", parquet_bytes(text=[1, 2]), "row 1: 'text' holds a number, expected a string"),
        ("a.parquet", parquet_bytes(text=["x", None]), "row 2: 'text' holds null, expected a string"),
    ],
)
def test_a_bad_file_is_named_with_the_line(tokenizer, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message) as error:
        for chunk in read_chunks(tmp_path / name, "text", Cutter(tokenizer), chunk_bytes=64):
            chunk.documents("text")
    assert str(error.value).startswith(f"{tmp_path / name}") and "\n" not in str(error.value)


def test_paths_that_name_nothing_readable_are_refused(tmp_path):
    (tmp_path / "a.doc").write_text("x")
    for pattern, message in (
        ("nope*.txt", r"data\.path=.*nope\*\.txt: no file matches"),
        ("nope.txt", r"data\.path=.*nope\.txt: no file matches"),
        ("", r"data\.path=.*: is a folder"),
        ("a.doc", r"a\.doc: unknown kind of file"),
        ("*", r"a\.doc: unknown kind of file"),
    ):
        with pytest.raises(UsageError, match=message):
            expand_paths([tmp_path / pattern])
    with pytest.raises(UsageError, match="no file was named"):
        expand_paths([])


def test_what_is_wrong_in_the_other_process_reaches_the_caller_and_leaves_no_corpus(
    tokenizer, tmp_path, capfd
):
    (tmp_path / "empty.txt").write_text(" \n")
    bad = write_jsonl(tmp_path / "bad.jsonl", ["good"] * 3, other=1)
    bad.write_text(bad.read_text() + "{")
    for file, message in (
        (tmp_path / "empty.txt", "empty.txt: no document with any text"),
        (bad, "line 4: broken JSON"),
    ):
        with pytest.raises(UsageError, match=message):
            prepare_corpus([file], tokenizer, tmp_path / "cache")
    with pytest.raises(UsageError, match="the tokens cannot be written to .*bad.jsonl"):
        prepare_corpus(write_jsonl(tmp_path / "good.jsonl", DOCUMENTS), tokenizer, bad)
    assert folders(tmp_path / "cache") == [] and "Traceback" not in capfd.readouterr().err


def test_the_command_prints_one_line_and_exits_with_2(tokenizer, tmp_path):
    done = subprocess.run(command("nope.txt", tokenizer, tmp_path), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("error: data.path=nope.txt: no file matches") and done.stderr.count("\n") == 1
    )


# ---- sequences ----


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 65, 1000, 65_537])
def test_the_permutation_is_a_bijection_and_its_key_matters(n):
    index = np.arange(n)
    images = [permute(index, n, np.full(n, key)) for key in (0, 1)]
    assert all(sorted(image.tolist()) == index.tolist() for image in images)
    if n >= 64:
        assert (images[0] == images[1]).mean() < 0.1 and (images[0] == index).mean() < 0.1
        assert abs(np.corrcoef(images[0], index)[0, 1]) < 0.35  # of 64 random numbers: 0.125 on average


def test_the_permutation_reaches_a_trillion_tokens_without_a_list():
    n = 10**12
    image = permute(np.arange(n - 1000, n), n, np.full(1000, 7))
    assert len(set(image.tolist())) == 1000 and image.min() >= 0 and image.max() < n


def test_training_and_held_out_sequences_are_all_sequences_once_and_epochs_differ(tmp_path):
    sequences = PackedSequences(make_corpus(tmp_path, range(1008)), Packing(10, 0.1, seed=3))
    # 1,008 tokens: the last 7 make no sequence
    assert (sequences.n_sequences, sequences.n_train, sequences.n_validation) == (100, 90, 10)
    epochs = [sequences.sequences_at(np.arange(e * 90, e * 90 + 90)).tolist() for e in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2]) and epochs[0] != epochs[1] != epochs[2]
    assert sorted(epochs[0] + sequences.validation_sequences().tolist()) == list(range(100))
    other_seed = PackedSequences(sequences.corpus, Packing(10, 0.1, seed=4))
    assert set(other_seed.validation_sequences()) != set(sequences.validation_sequences())


def test_a_sequence_has_the_next_token_as_label(tmp_path):
    sequences = PackedSequences(make_corpus(tmp_path, range(31)), Packing(10))
    [batch] = next(SequenceReader(sequences, Batching(3, 3)))
    order = sequences.sequences_at(np.arange(3)).tolist()
    assert batch.tokens.tolist() == [list(range(sequence * 10, sequence * 10 + 10)) for sequence in order]
    assert torch.equal(batch.labels, batch.tokens + 1) and batch.positions is None
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64 and sorted(order) == [0, 1, 2]


def test_under_the_document_mask_positions_restart_and_labels_stay_in_their_document(tmp_path):
    corpus = make_corpus(tmp_path, range(25), starts=[0, 5, 8, 16, 20])
    sequences = PackedSequences(corpus, Packing(8))
    [batch] = next(SequenceReader(sequences, Batching(3, 3, document_mask=True)))
    by_number = {int(t[0]) // 8: (labels.tolist(), p.tolist()) for t, labels, p in zip(*batch, strict=True)}
    no = -100
    # 8 opens the next sequence and a document
    assert by_number[0] == ([1, 2, 3, 4, no, 6, 7, no], [0, 1, 2, 3, 4, 0, 1, 2])
    assert by_number[1] == ([9, 10, 11, 12, 13, 14, 15, no], [0, 1, 2, 3, 4, 5, 6, 7])
    assert by_number[2] == ([17, 18, 19, no, 21, 22, 23, 24], [0, 1, 2, 3, 0, 1, 2, 3])


@pytest.fixture
def sequences(tmp_path):
    starts = np.unique(np.random.default_rng(0).integers(0, 3000, 200))
    corpus = make_corpus(tmp_path / "sequences", np.arange(3000) % 500, [0, *starts[starts > 0]])
    return PackedSequences(corpus, Packing(16, 0.05, seed=1))


def steps_of(
    sequences, n_steps, dp_size=1, micro_batch_size=1, position=0, global_batch_size=8
) -> list[list[list[int]]]:
    """Token sequences of each step in global order: the micro-batches of the dp ranks one after another."""
    readers = [
        SequenceReader(sequences, Batching(global_batch_size, micro_batch_size, r, dp_size, True), position)
        for r in range(dp_size)
    ]
    steps = [
        [sequence for reader in readers for micro in next(reader) for sequence in micro.tokens.tolist()]
        for _ in range(n_steps)
    ]
    assert {reader.position for reader in readers} == {position + n_steps * global_batch_size}
    for reader in readers:
        reader.close()
    return steps


def test_a_step_has_the_same_sequences_in_the_same_order_on_any_layout(sequences):
    plain = steps_of(sequences, 70)  # 560 sequences: three epochs of 177, and more than STEPS_PERMUTED
    for dp_size, micro_batch_size in ((1, 8), (2, 1), (2, 4), (4, 2), (8, 1)):
        assert steps_of(sequences, 70, dp_size, micro_batch_size) == plain


def test_a_reader_resumed_anywhere_goes_on_exactly_also_on_another_layout(sequences):
    plain = steps_of(sequences, 40)
    for step in (1, 7, 23):
        resumed = steps_of(sequences, 5, dp_size=4, micro_batch_size=2, position=step * 8)
        assert resumed == plain[step : step + 5]
    flat = [sequence for step in plain for sequence in step]
    resumed = steps_of(sequences, 3, position=56, global_batch_size=12)
    assert [sequence for step in resumed for sequence in step] == flat[56 : 56 + 36]


def test_position_counts_steps_handed_out_not_those_read_ahead(sequences):
    reader = SequenceReader(sequences, Batching(8, 8))
    wait_until(lambda: reader._ready.full())
    assert reader.position == 0
    next(reader)
    assert reader.position == 8
    reader.close()


def test_an_error_while_reading_reaches_the_caller_and_no_thread_stays(sequences):
    sequences.corpus.tokens = sequences.corpus.tokens[:100]
    reader = SequenceReader(sequences, Batching(8, 8))
    for _ in range(2):
        with pytest.raises(ValueError, match="same shape"):
            next(reader)
    reader.close()
    reader.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(reader)
    assert not [thread for thread in threading.enumerate() if thread.name == "sequence-reader"]


def test_a_reader_never_closed_does_not_disturb_the_exit(sequences):
    code = "from dtensor_llama.data.reader import Batching, SequenceReader\n"
    code += "from dtensor_llama.data.sequences import PackedSequences, Packing, TokenCorpus\n"
    code += f"sequences = PackedSequences(TokenCorpus({str(sequences.corpus.folder)!r}), Packing(16))\n"
    code += "reader = SequenceReader(sequences, Batching(8, 8)); next(reader); print(reader.position)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "8\n", "")


@pytest.mark.parametrize("document_mask", [False, True])
def test_validation_sums_do_not_depend_on_dp_size_and_every_rank_gets_as_many_batches(
    sequences, document_mask
):
    def scored(dp_size, micro_batch_size, max_sequences=None):
        ranks = [
            list(validation_batches(sequences, batching, max_sequences))
            for r in range(dp_size)
            for batching in [
                Batching(dp_size * micro_batch_size, micro_batch_size, r, dp_size, document_mask)
            ]
        ]
        assert len({len(batches) for batches in ranks}) == 1
        batches = [batch for batches in ranks for batch in batches]
        assert all(batch.tokens.shape == (micro_batch_size, 16) for batch in batches)
        assert all((batch.positions is not None) == document_mask for batch in batches)
        labels = torch.cat([batch.labels[batch.labels != -100] for batch in batches])
        return len(labels), int((labels**2).sum())

    assert sequences.n_validation == 9
    sums = {scored(dp_size, micro) for dp_size, micro in ((1, 1), (1, 4), (2, 2), (4, 1), (4, 3), (16, 1))}
    assert len(sums) == 1 and (document_mask or sums.pop()[0] == 9 * 16)
    assert scored(2, 2, max_sequences=5) == scored(1, 1, max_sequences=5) != scored(1, 1)


def test_too_few_tokens_are_refused_with_the_length_that_would_work(tmp_path):
    corpus = make_corpus(tmp_path, range(101))
    for share, works in ((0.1, 50), (0, 100)):
        with pytest.raises(UsageError, match=f"the data has 101 tokens.* use seq_len={works} or less"):
            PackedSequences(corpus, Packing(works + 1, share))
        assert PackedSequences(corpus, Packing(works, share)).n_train == 1
    with pytest.raises(UsageError, match="give more text"):
        PackedSequences(make_corpus(tmp_path / "tiny", [1, 2]), Packing(4, 0.1))
    corpus = make_corpus(tmp_path / "held-out", range(100))
    with pytest.raises(UsageError, match="validation_share=0.99 holds out all 24 sequences .*such as 0.01"):
        PackedSequences(corpus, Packing(4, 0.99))
    assert PackedSequences(corpus, Packing(4, 0.01)).n_train == 23
    with pytest.raises(UsageError, match="seq_len=0"):
        Packing(0, 0.1)


def test_a_batch_that_cannot_be_dealt_is_refused():
    for global_batch_size, micro_batch_size, dp_size in ((6, 2, 2), (8, 3, 1), (0, 1, 1), (8, 0, 1)):
        with pytest.raises(UsageError, match=f"global_batch_size={global_batch_size} .*use a multiple of"):
            Batching(global_batch_size, micro_batch_size, 0, dp_size)


NESTED = [{"meta": {"a": {"body": f"text {i}", "n": i}, "b": i}, "n": i} for i in range(40)]
NESTED_TEXTS = [record["meta"]["a"]["body"] for record in NESTED]


def nested_files(folder: Path, records: list[dict]) -> list[Path]:
    """The records as .jsonl, .json, .parquet and .arrow."""
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "b.json").write_text(json.dumps(records, indent=1))
    table = pa.Table.from_pylist(records)
    pq.write_table(table, folder / "c.parquet")
    with pa.OSFile(str(folder / "d.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return sorted(folder.iterdir())


def test_a_text_inside_of_another_field_is_named_with_a_dot(tmp_path):
    for file in nested_files(tmp_path, NESTED):
        assert texts_of(file, text_field="meta.a.body") == NESTED_TEXTS, file
        with pytest.raises(UsageError, match=f"{file}.*no (field|column) 'meta.body'.*meta.b.*`text_field`"):
            texts_of(file, text_field="meta.body")
        with pytest.raises(UsageError, match="(no field|no column) 'n.body'"):
            texts_of(file, text_field="n.body")


def test_a_field_with_a_dot_in_its_name_goes_before_one_inside_of_another(tmp_path):
    for file in nested_files(tmp_path, [{"a.b": "this", "a": {"b": "not this"}}]):
        assert texts_of(file, text_field="a.b") == ["this"], file


def test_a_text_inside_of_another_field_is_trained_on(tokenizer, tmp_path):
    file, plain = tmp_path / "nested.jsonl", write_jsonl(tmp_path / "plain.jsonl", NESTED_TEXTS)
    file.write_text("".join(json.dumps(record) + "\n" for record in NESTED))
    nested = prepare_corpus([file], tokenizer, tmp_path / "cache", TextOptions("meta.a.body"), processes=1)
    assert (
        nested.content_hash
        == prepare_corpus([plain], tokenizer, tmp_path / "cache", processes=1).content_hash
    )


def test_records_without_a_text_are_skipped_and_listed(tokenizer, tmp_path):
    records = [{"text": "one"}, {"text": None}, {"text": "two"}, {"body": "x"}, {"text": "three"}]
    files = {"a.jsonl": "\n".join(map(json.dumps, records)) + "\n{\n[1]\n", "b.json": json.dumps(records)}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    pq.write_table(pa.table({"text": ["one", None, "two", "three"]}), tmp_path / "c.parquet")
    plain = prepare_corpus(
        [write_jsonl(tmp_path / "plain.jsonl", ["one", "two", "three"])], tokenizer, tmp_path / "cache"
    )
    assert plain.skipped == {} and plain.bad_records.read_text() == ""
    for name, lost in {"a.jsonl": 4, "b.json": 2, "c.parquet": 1}.items():
        with pytest.raises(UsageError, match=f"{name}, (line|row) \\d+: 'text' holds null"):
            prepare_corpus([tmp_path / name], tokenizer, tmp_path / "cache")
        skipping = TextOptions(bad_records="skip")
        corpus = prepare_corpus([tmp_path / name], tokenizer, tmp_path / "cache", skipping, processes=1)
        assert corpus.content_hash == plain.content_hash
        listed = [json.loads(line) for line in corpus.bad_records.read_text().splitlines()]
        assert sum(corpus.skipped.values()) == lost == len(listed)
        assert all(one["where"].startswith(f"{tmp_path / name}, ") for one in listed)
        assert all(one["message"].startswith(one["where"]) for one in listed)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("b.json", b'[{"text": "good"}, {"text": ', "b.json, line 1: broken JSON"),
        ("b.jsonl", b'{"text": "good"}\n\0', "b.jsonl, line 2: a zero byte"),
        ("b.jsonl.gz", b"not gzip", "b.jsonl.gz: cannot be read to its end"),
        ("b.parquet", b"PAR1 not really", "b.parquet: cannot be read to its end"),
        ("b.csv", b'text,n\n"open,1\n', "b.csv, line 2: broken CSV"),
    ],
)
def test_a_damaged_file_is_refused_though_bad_records_are_skipped(
    tokenizer, tmp_path, name, content, message
):
    """A file that cannot be read to its end may lack any number of records, so that none of them is
    counted."""
    good = write_jsonl(tmp_path / "a.jsonl", ["one"])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message) as error:
        skipping = TextOptions(bad_records="skip")
        prepare_corpus([good, tmp_path / name], tokenizer, tmp_path / "cache", skipping, processes=1)
    assert "\n" not in str(error.value) and folders(tmp_path / "cache") == []


# ---- what people have besides ----


def texts_of(file: Path, chunk_bytes: int = 64, text_field: str = "text") -> list[str]:
    return [
        text
        for chunk in read_chunks(file, text_field, None, chunk_bytes)
        for text in chunk.documents(text_field)
    ]


OBJECTS = [{"text": f'number {i}, {{[,]}} \u2028 \n "x"', "n": i} for i in range(40)]
TEXTS = [one["text"] for one in OBJECTS]


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("array", json.dumps(OBJECTS)),
        ("indented array", json.dumps(OBJECTS, indent=2, ensure_ascii=False)),
        ("two arrays", json.dumps(OBJECTS[:7]) + json.dumps(OBJECTS[7:], indent=1) + "\n"),
        ("empty arrays between", "[]" + json.dumps(OBJECTS) + "\n[ ]\n"),
        ("lines", "".join(json.dumps(one) + "\n" for one in OBJECTS)),
        ("pretty-printed objects", "\n".join(json.dumps(one, indent=2) for one in OBJECTS)),
        ("an array, then lines", json.dumps(OBJECTS[:3]) + "\n" + "\n".join(map(json.dumps, OBJECTS[3:]))),
        ("wrapped", json.dumps({"version": "1.0", "data": OBJECTS}, indent=1)),
        (
            "wrapped twice",
            json.dumps({"train": OBJECTS[:5]}) + json.dumps({"train": OBJECTS[5:], "info": {"by": "me"}}),
        ),
    ],
)
def test_a_json_gives_all_its_objects_however_they_are_laid_out(tmp_path, kind, content):
    (tmp_path / "a.json").write_text("\ufeff" + content)
    assert texts_of(tmp_path / "a.json") == TEXTS


def test_an_object_with_the_field_is_a_record_even_if_it_has_a_list_called_data(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"text": "mine", "data": [{"text": "no"}]}))
    assert texts_of(tmp_path / "a.json") == ["mine"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '[{"text": "a"} {"text": "b"}]',
            "line 1: broken JSON .expected a comma or the end of the list, found '{'",
        ),
        ('[{"text": "a"},\n]', "line 2: broken JSON .a comma before the end"),
        ('[{"text": "a"},,{}]', "a comma where a record"),
        ('[{"text": "a"}]\nrest', "line 2: broken JSON .Expecting value"),
        ('[{"text": "a"}]]', "']' where a record should begin"),
        ('{"text": "a"},\n{"text": "b"}', "line 1: broken JSON .a comma where .* stand in"),
        ('[{"text": "a"}][{"text": "b"}', "not closed, which begins in line 1; the file is cut short"),
        ('[{"text": "a"}', "not closed"),
        ('[{"text": "a"},', "not closed"),
        ("[", "not closed"),
        ('{"text": "a"}\n{"text":', "line 2: broken JSON"),
        ('["a"]', "line 1: expected a JSON object, found a string"),
        ('[[{"text": "a"}]]', "expected a JSON object, found a list"),
        ('[{"text": "a", "text": "b"}]', "the field 'text' stands twice"),
        ("3", "found a number"),
        ('[{"text": 1}]', "holds a number"),
        ('{"train": [{"text": "a"}], "test": [{"text": "b"}]}', "several lists of records, train and test"),
        ('{"data": [{"body": "a"}]}', r"line 1, data\[0\]: no field 'text'"),
        ("[{}, \0]", "a zero byte"),
        ("[" * 99_999, "broken JSON"),
    ],
)
def test_a_json_that_is_not_what_it_seems_is_refused_with_its_line(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UsageError, match=message) as error:
        texts_of(tmp_path / "a.json")
    assert str(error.value).startswith(f"{tmp_path / 'a.json'}") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "delimiter"), [("a.csv", ","), ("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "\t")]
)
def test_a_table_of_text_gives_its_column(tmp_path, name, delimiter):
    import csv

    long = "line\nbreak \r\n \u2028 " * 20_000  # more than csv's own limit of 128 KiB
    with open(tmp_path / name, "w", newline="") as file:
        writer = csv.DictWriter(file, ["n", "text"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows([*OBJECTS, {"n": 1, "text": ""}, {"n": 2, "text": long}])
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes() + b"\r\n")
    assert texts_of(tmp_path / name) == [*TEXTS, long]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text,n\na,1\nb\n", "line 3: 1 fields, and the header has 2 columns .text, n"),
        (b"text\na,b\n", "line 2: 2 fields"),
        (b"text,text\na,b\n", "'text' is there twice"),
        (b'text,n\n"open,1\n', "line 2: broken CSV"),
        (b'text,n\n"a"b,1\n', "line 2: broken CSV"),
        (b'text,n\n"a\nb",1\nc\n', "line 4: 1 fields"),
        (b"text,n\na,\xff\n", "line 2: byte 0xff is not UTF-8"),
        (b"a,b\n1,2\n", "line 2: no field 'text'; its fields are a, b"),
        (b"text\n\0\n", "line 2: a zero byte"),
    ],
)
def test_a_bad_table_of_text_is_named_with_its_line(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UsageError, match=message) as error:
        texts_of(tmp_path / "a.csv")
    assert "\n" not in str(error.value)


def arrow_bytes(new, **columns) -> bytes:
    sink, table = pa.BufferOutputStream(), pa.table(columns)
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
def test_an_arrow_file_or_stream_gives_its_column_and_is_refused_when_cut(tmp_path, new):
    whole = arrow_bytes(new, n=[one["n"] for one in OBJECTS], text=TEXTS)
    (tmp_path / "a.arrow").write_bytes(whole)
    (tmp_path / "a.arrow.gz").write_bytes(gzip.compress(whole))
    assert texts_of(tmp_path / "a.arrow") == texts_of(tmp_path / "a.arrow.gz") == TEXTS
    records = [
        record for chunk in read_chunks(tmp_path / "a.arrow", None, None) for _, record in chunk.records()
    ]
    assert records == OBJECTS
    for content, message in (
        (whole[:-9], "cannot be read to its end"),
        (whole[: len(whole) // 2], "cannot be read"),
        (b"x", "cannot be read"),
        (arrow_bytes(new, body=["x"]), "no column 'text'; it has body"),
    ):
        (tmp_path / "a.arrow").write_bytes(content)
        with pytest.raises(UsageError, match=message):
            texts_of(tmp_path / "a.arrow")


@pytest.mark.parametrize("ending", [".bz2", ".xz"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet", ".csv"])
def test_bzip2_and_xz_of_every_kind_several_streams_in_a_row_and_cut_ones(tokenizer, tmp_path, ending, kind):
    import bz2
    import lzma

    compress = {".bz2": bz2.compress, ".xz": lzma.compress}[ending]
    data = {
        ".txt": TEXT.encode(),
        ".jsonl": "".join(json.dumps(one) + "\n" for one in OBJECTS).encode(),
        ".csv": b"text\nfirst\nsecond\n",
        ".parquet": parquet_bytes(text=TEXTS),
    }[kind]
    plain, packed = tmp_path / f"a{kind}", tmp_path / f"a{kind}{ending}"
    plain.write_bytes(data)
    packed.write_bytes(compress(data[:30]) + compress(data[30:]))

    def documents(file):
        return [
            text for chunk in read_chunks(file, "text", Cutter(tokenizer)) for text in chunk.documents("text")
        ]

    assert documents(packed) == documents(plain)
    packed.write_bytes(compress(data)[:-9])
    with pytest.raises(UsageError, match="cannot be read to its end"):
        documents(packed)


def test_zstd_with_a_long_window_is_unpacked_or_refused_with_what_would_work(tmp_path, monkeypatch):
    """A window of 512 MiB takes more than half of it to be written, so the frame is made by hand: raw blocks
    of nothing."""
    file = tmp_path / "a.jsonl.zst"
    line = b'{"text": "x"}\n'
    block = (len(line) << 3 | 1).to_bytes(3, "little") + line  # the last block, as it is
    file.write_bytes(b"\x28\xb5\x2f\xfd" + b"\0" + bytes([(29 - 10) << 3]) + block)
    import shutil

    if shutil.which("zstd"):
        assert texts_of(file) == ["x"]
        file.write_bytes(file.read_bytes()[:-3])
        with pytest.raises(UsageError, match="cannot be read to its end"):
            texts_of(file)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(
        UsageError, match="zstd --long.*pip install zstandard.*zstd -dc --long=31 a.jsonl.zst"
    ):
        texts_of(file)
    file.write_bytes(zstd_bytes(line) + file.read_bytes())  # the long frame comes second
    with pytest.raises(UsageError, match="zstd --long"):
        texts_of(file)
