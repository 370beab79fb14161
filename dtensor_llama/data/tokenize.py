"""Tokenizes a corpus on all cores, once, into files that training maps into memory.

  python -m dtensor_llama.data.tokenize --path 'data/**/*.jsonl' --tokenizer llama2/ --cache-dir runs/tokens

One process reads and writes, one worker per core parses and encodes, and a few chunks per worker are under
way: memory depends on the number of cores, not on the corpus. This process never imports torch: it forks,
which is safe only before threads exist. `prepare_corpus` is the same for a training script; it starts this
module when there is work.

<cache-dir>/<fingerprint>/   tokens.bin      each document as BOS, ids, EOS; uint16 or uint32. BOS as the tokenizer
                                             adds it to a text, EOS if it has one
                             documents.bin   int64 offset in tokens.bin at which each document starts
                             meta.json       counts, the type of tokens.bin, what went in, and content_hash: of the bytes of
                                             the other files, so that equal tokens can be told from as many other ones
Of conversations (`prepare_chat`, or --chat) a document is one of them as its template writes it, and there is
                             trained.bin     a byte for each token: 1 where it is the assistant's, 0 elsewhere
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from dtensor_llama.chat.conversations import (
    EMPTY_ANSWER,
    NOTHING_TRAINED,
    UNANSWERED,
    ChatOptions,
    Conversation,
    conversation_of,
)
from dtensor_llama.chat.template import ChatTemplate, RawTemplate, template_of
from dtensor_llama.data.cut import Cutter
from dtensor_llama.data.sequences import SKIPPED, TokenCorpus, reasons_in_order
from dtensor_llama.data.sources import FORMATS, RECORD_FORMATS, Chunk, TextOptions, expand_paths, read_chunks
from dtensor_llama.data.tokenizer import Tokenizer, load_tokenizer
from dtensor_llama.errors import BadRecord, UsageError
from dtensor_llama.places import first_writable, is_full, readable, say_full
from dtensor_llama.terminal import make_streams_last

FORMAT_VERSION = 2  # of the files of a corpus; 2: meta.json has content_hash
CHAT_VERSION = 2  # of how conversations become ids: chat.py and template.py
PIECE_CHARS = 16384  # a worker cuts longer texts: both libraries are fastest on texts of about this length
CHUNKS_PER_WORKER = 3  # under way at once: one being encoded, one waiting, one done and waiting for its turn
LINE_EVERY_S = 10  # of progress, where stderr is no terminal


def prepare_corpus(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    cache_dir: str | Path | Sequence[str | Path],
    text_field: str | TextOptions = "text",
    processes: int | None = None,
) -> TokenCorpus:
    """The corpus of `paths` (files and globs), tokenized now unless that has been done and nothing changed
    since.

    Any number of ranks and runs may call this at once: one tokenizes, the others wait for it. Progress goes
    to stderr.
    text_field: the field that holds the text, or more about it.
    cache_dir: a folder, or several: the corpus is read where it is found, and written into the first that can
    be written. Raises UsageError for what is wrong with the files.
    """
    options = TextOptions(text_field) if isinstance(text_field, str) else text_field
    return TokenCorpus(prepare(paths, tokenizer, cache_dir, options, processes))


def prepare(
    paths, tokenizer: Tokenizer, cache_dir, what: TextOptions | ChatOptions, processes: int | None
) -> Path:
    paths = [paths] if isinstance(paths, str | Path) else paths
    cache_dirs = [cache_dir] if isinstance(cache_dir, str | Path) else list(cache_dir)
    folder = _find(cache_dirs, fingerprint(_files(paths, what), tokenizer, what))
    if folder is None:
        # -P: a file called queue.py in the current folder is no module of ours.
        command = [sys.executable, "-P", "-m", "dtensor_llama.data.tokenize", "--for-process", os.getpid()]
        command += ["--path", *paths]
        command += ["--tokenizer", tokenizer.path, "--cache-dir", *cache_dirs]
        if isinstance(what, TextOptions):
            command += [f"--text-field={what.field}", f"--bad-records={what.bad_records}"]
        else:
            command += ["--chat", json.dumps(asdict(what))]
        command += ["--processes", processes] if processes else []
        package_root = str(Path(__file__).resolve().parents[2])
        python_path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": python_path}
        done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, env=environment)
        if done.returncode == 130:
            raise KeyboardInterrupt
        if not done.stdout:
            raise RuntimeError(f"tokenizing ended with status {done.returncode}; stderr says why")
        answer = json.loads(done.stdout)
        if "error" in answer:
            raise UsageError(answer["error"])
        folder = Path(answer["folder"])
    return folder


def _find(cache_dirs: Sequence[str | Path], name: str) -> Path | None:
    return next((cache_dir / name for cache_dir in readable(cache_dirs) if (cache_dir / name).is_dir()), None)


def _files(paths: Sequence[str | Path], what: TextOptions | ChatOptions) -> list[Path]:
    return expand_paths(paths, FORMATS if isinstance(what, TextOptions) else RECORD_FORMATS)


def fingerprint(files: list[Path], tokenizer: Tokenizer, what: TextOptions | ChatOptions) -> str:
    """A hash of all that decides the tokens; of each file its path, size and time of change.

    what: which texts there are, or how conversations become examples."""
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    if isinstance(what, ChatOptions):
        what = ("chat", CHAT_VERSION, template_of(tokenizer, what).source, asdict(what))
    elif what.bad_records == "refuse":
        what = what.field  # the corpora of earlier versions stay what they are
    return hashlib.sha256(repr((FORMAT_VERSION, stats, tokenizer.fingerprint, what)).encode()).hexdigest()[
        :32
    ]


def tokenize(
    paths: list[str],
    tokenizer: Tokenizer,
    cache_dirs: Sequence[Path],
    what: TextOptions | ChatOptions,
    processes: int,
    for_process: int | None = None,
) -> Path:
    """Write the corpus unless it is there; returns its folder. Whoever comes second waits here for the first.

    cache_dirs: it is written into the first of them that can be written; which one that is, is the same for
    all who ask."""
    files = _files(paths, what)
    name = fingerprint(files, tokenizer, what)
    found = _find(cache_dirs, name)
    if found:
        return found
    cache_dir = cache_dirs[0]
    try:
        cache_dir, why_not_first = first_writable(cache_dirs)
        folder, staging = cache_dir / name, cache_dir / f"{name}.partial"
        with open(cache_dir / f"{name}.lock", "w") as lock:  # never removed: a new file would be another lock
            fcntl.flock(lock, fcntl.LOCK_EX)  # the system releases it however this process ends
            if folder.is_dir():
                return folder
            if why_not_first:
                _say(f"note: {why_not_first}; the tokens go to {cache_dir}")
            # of a killed run: nobody else writes it under the lock
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            _write_corpus(files, tokenizer, staging, what, processes, for_process)
            if fingerprint(files, tokenizer, what) != name:
                raise UsageError(
                    f"--data.path {' '.join(paths)}: a file changed while it was read; start again."
                )
            os.rename(staging, folder)  # the one moment at which the corpus comes to exist
    except OSError as error:
        reason = say_full(cache_dir) if is_full(error) else error
        shutil.rmtree(cache_dir / f"{name}.partial", ignore_errors=True)  # it would keep the disk full
        raise UsageError(
            f"the tokens cannot be written to {cache_dir}: {reason}; --data.cache-dir names another folder."
        ) from None
    return folder


@dataclass
class Found:
    """What the records of some conversations were.

    counts: of each format, and of those that something happened to. skipped: of bad records by what is wrong
    with them.
    skipped_lines: a JSON line for each of those. unread: fields that nothing reads. end_ids: tokens that end
    an answer."""

    counts: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    skipped_lines: list[str] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)
    end_ids: set[int] = field(default_factory=set)

    def skip(self, where: str, error: UsageError) -> None:
        """Note a record that is left out."""
        reason = error.reason if isinstance(error, BadRecord) else "cannot be read"
        self.skipped[reason] += 1
        line = {"where": where, "reason": reason, "message": str(error)}
        self.skipped_lines.append(json.dumps(line, ensure_ascii=False))

    def add(self, other: "Found") -> None:
        """Take what another chunk holds; of its lines only the number is kept."""
        self.counts += other.counts
        self.skipped += other.skipped
        self.unread += other.unread
        self.end_ids |= other.end_ids

    def as_json(self) -> dict:
        return {
            "counts": self.counts,
            "skipped": self.skipped,
            "unread": self.unread,
            "end_ids": sorted(self.end_ids),
        }


class _HashedFile:
    """A file that is being written, with a hash of what has been written so far."""

    def __init__(self, path: Path):
        self.file, self.digest = open(path, "wb"), hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.digest.update(data)

    def flush_to_disk(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())

    def __enter__(self) -> "_HashedFile":
        return self

    def __exit__(self, *exception) -> None:
        self.file.close()


def _write_corpus(
    files: list[Path],
    tokenizer: Tokenizer,
    staging: Path,
    what: TextOptions | ChatOptions,
    processes: int,
    for_process: int | None,
) -> None:
    is_chat = isinstance(what, ChatOptions)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    total_bytes, done_bytes, n_tokens, n_documents = sum(file.stat().st_size for file in files), 0, 0, 0
    columns = "tokenizing", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    task, began_s = bar.add_task("", total=total_bytes), time.monotonic()
    line_due_s = began_s + LINE_EVERY_S
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("fork"), _start_worker, (tokenizer, what)
    )
    found = Found()
    names = ["tokens.bin", "documents.bin"] + (["trained.bin"] if is_chat else [])
    with pool, contextlib.ExitStack() as opened:
        tokens_file, starts_file, *trained_file = [
            opened.enter_context(_HashedFile(staging / name)) for name in names
        ]
        skipped_file = opened.enter_context(open(staging / SKIPPED, "w", encoding="utf-8"))
        pool.submit(int).result()  # forks the workers, now, before the bar starts a thread
        try:
            with bar:
                cutter = None if is_chat else Cutter(tokenizer)
                for ids, starts, trained, of_chunk, input_bytes in _in_order(
                    pool, files, what, cutter, processes
                ):
                    tokens_file.write(ids.astype(dtype).tobytes())
                    starts_file.write((starts + n_tokens).tobytes())
                    for file in trained_file:
                        file.write(trained.tobytes())
                    found.add(of_chunk)
                    for line in of_chunk.skipped_lines:
                        skipped_file.write(line + "\n")
                    n_tokens, n_documents = n_tokens + len(ids), n_documents + len(starts)
                    done_bytes += input_bytes
                    bar.advance(task, input_bytes)
                    if bar.disable and time.monotonic() > line_due_s:
                        line_due_s = time.monotonic() + LINE_EVERY_S
                        _say(
                            f"tokenizing: {done_bytes / 1e6:,.0f} of {total_bytes / 1e6:,.0f} MB, {n_tokens:,} tokens"
                        )
                    if for_process and os.getppid() != for_process:
                        raise SystemExit("tokenizing stopped: the process that asked for it is gone")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        if n_documents == 0:
            missing = "conversation with any answer to train on" if is_chat else "document with any text"
            skipped = f"; skipped were {', '.join(reasons_in_order(found.skipped))}" if found.skipped else ""
            raise UsageError(f"--data.path {files[0]}: no {missing} in {len(files)} file(s){skipped}.")
        meta = {
            "n_tokens": n_tokens,
            "n_documents": n_documents,
            "dtype": dtype.name,
            "format": FORMAT_VERSION,
        }
        meta |= {"tokenizer": tokenizer.fingerprint, "files": [str(file) for file in files]}
        meta |= {"chat" if is_chat else "text": asdict(what), **found.as_json()}
        written = (tokens_file, starts_file, *trained_file)
        meta["content_hash"] = hashlib.sha256(b"".join(file.digest.digest() for file in written)).hexdigest()
        (staging / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        for file in written:
            # before the rename: after a power cut a name must not stand for missing bytes
            file.flush_to_disk()
    elapsed_s = time.monotonic() - began_s
    _say(
        f"tokenized {total_bytes / 1e6:,.1f} MB: {n_documents:,} documents, {n_tokens:,} tokens in {elapsed_s:.1f} s"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _in_order(
    pool: ProcessPoolExecutor,
    files: list[Path],
    what: TextOptions | ChatOptions,
    cutter: Cutter | None,
    processes: int,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None, Found, int]]:
    """What the workers make of each chunk, and its bytes of input, in the order of the corpus, a few of them
    at a time."""
    text_field = what.field if isinstance(what, TextOptions) else None
    under_way, chunks = deque(), (chunk for file in files for chunk in read_chunks(file, text_field, cutter))
    while True:
        while len(under_way) < CHUNKS_PER_WORKER * processes and (chunk := next(chunks, None)):
            encode = _encode_chunk if text_field is not None else _encode_chat
            under_way.append((pool.submit(encode, chunk), chunk.input_bytes))
        if not under_way:
            return
        future, input_bytes = under_way.popleft()
        yield *future.result(), input_bytes


# ---- in the workers ----

_cutter: Cutter  # set once in each worker
_template: ChatTemplate | RawTemplate
_what: TextOptions | ChatOptions


def _start_worker(tokenizer: Tokenizer, what: TextOptions | ChatOptions) -> None:
    global _cutter, _template, _what
    _what = what
    if isinstance(what, TextOptions):
        _cutter = Cutter(tokenizer)
    else:
        _template = template_of(tokenizer, what)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent decides
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """When the parent is killed its workers would wait for chunks for ever, and hold its lock."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _encode_chunk(chunk: Chunk) -> tuple[np.ndarray, np.ndarray, None, Found]:
    """(uint32 ids with BOS and EOS; int64 offsets into them of the documents that start in this chunk;
    nothing; what was left out)."""
    tokenizer, found = _cutter.tokenizer, Found()
    texts = chunk.documents(_what.field, found.skip if _what.bad_records == "skip" else None)
    documents = [list(_cutter.pieces(text, PIECE_CHARS, chunk.skip)) for text in texts]
    encoded = iter(tokenizer.encode_batch([text for pieces in documents for text, _ in pieces]))
    bos = [tokenizer.bos_id] if chunk.opens and tokenizer.adds.bos else []
    eos = [tokenizer.eos_id] if chunk.closes and tokenizer.eos_id is not None else []
    ids, starts = [], []
    for pieces in documents:
        starts += [len(ids)] if chunk.opens else []
        ids += bos
        for _, skip in pieces:
            ids += next(encoded)[skip:]
        ids += eos
    return np.array(ids, dtype=np.uint32), np.array(starts, dtype=np.int64), None, found


def _encode_chat(chunk: Chunk) -> tuple[np.ndarray, np.ndarray, np.ndarray, Found]:
    """(uint32 ids; int64 offsets of the conversations; uint8 1 where a token is trained; what the records
    were)."""
    ids, starts, trained, found = [], [], [], Found()
    skip = found.skip if _what.bad_records == "skip" else None
    for where, record in chunk.records(skip):
        try:
            conversation = conversation_of(record, where)
            left_out = _why_left_out(conversation)
            example = None if left_out else _template.example(conversation, where, _what.train_on)
        except UsageError as error:
            if skip is None:
                raise
            skip(where, error)
            continue
        found.counts[conversation.format] += 1
        found.unread.update([*conversation.unread, *_template.unread(conversation)])
        found.counts[UNANSWERED] += conversation.n_unanswered > 0
        if not left_out and not any(example.trained):
            left_out = NOTHING_TRAINED
        if left_out:
            found.counts[left_out] += 1
            continue
        found.end_ids |= example.ends
        starts.append(len(ids))
        ids += example.ids
        trained += example.trained
    return (
        np.array(ids, dtype=np.uint32),
        np.array(starts, dtype=np.int64),
        np.array(trained, dtype=np.uint8),
        found,
    )


def _why_left_out(conversation: Conversation) -> str | None:
    """What `counts` calls a conversation with an answer that is trained and empty."""
    for turn, flag in zip(conversation.turns, conversation.flags, strict=True):
        says = turn.get("content", "").strip() or turn.get("tool_calls") or turn.get("function_call")
        if turn["role"] == "assistant" and not says and flag is not False:
            return EMPTY_ANSWER
    return None


def main() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(
        prog="python -m dtensor_llama.data.tokenize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--path", nargs="+", required=True, help="files and globs of " + " ".join(FORMATS))
    add("--tokenizer", required=True, help="Hugging Face folder, tokenizer.json or SentencePiece .model")
    add(
        "--cache-dir",
        required=True,
        nargs="+",
        type=Path,
        help="where the tokens go, or the first of several that can be written; older ones are never deleted",
    )
    add("--text-field", default="text", help="field or column that holds the text (default: text)")
    add(
        "--chat",
        nargs="?",
        const="{}",
        metavar="OPTIONS",
        help='conversations instead of texts, for recipes/sft.py; OPTIONS as {"train_on": "last-answer"}',
    )
    add(
        "--bad-records",
        choices=("refuse", "skip"),
        default="refuse",
        help="whether a record that cannot be used ends this, or is left out and listed in bad-records.jsonl",
    )
    add("--processes", type=int, default=cores, help=f"workers (default: one per core, {cores})")
    add(
        "--for-process",
        type=int,
        metavar="PID",
        help="for a program: print the result or the error as JSON, and stop "
        "when the process PID, which must be the parent, is gone",
    )
    args = parser.parse_args()
    make_streams_last()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    try:
        if args.processes < 1:
            raise UsageError(f"--processes {args.processes}: at least one worker is needed.")
        tokenizer = load_tokenizer(args.tokenizer)
        what = TextOptions(args.text_field, args.bad_records)
        if args.chat:
            what = ChatOptions(**{"bad_records": args.bad_records} | json.loads(args.chat))
        folder = tokenize(args.path, tokenizer, args.cache_dir, what, args.processes, args.for_process)
        answer = {"folder": str(folder)}
    except UsageError as error:
        answer = {"error": str(error)}
    except KeyboardInterrupt:
        return 130
    if args.for_process:
        print(json.dumps(answer))
    elif "error" in answer:
        _say(f"error: {answer['error']}")
    else:
        print(answer["folder"])
    return 2 if "error" in answer else 0


if __name__ == "__main__":
    sys.exit(main())
