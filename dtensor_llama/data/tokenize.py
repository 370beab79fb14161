"""Tokenizes a corpus on all cores, once, into files that training maps into memory.

  python -m dtensor_llama.data.tokenize --path 'data/**/*.jsonl' --tokenizer llama2/ --cache-dir runs/tokens

One process reads and writes, one worker per core parses and encodes, and a few chunks per worker are under way: memory
depends on the number of cores, not on the corpus. This process never imports torch: it forks, which is safe only before
threads exist. `prepare_corpus` is the same for a training script; it starts this module when there is work.

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
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from dtensor_llama.data.chat import conversation_of
from dtensor_llama.data.cut import Cutter
from dtensor_llama.data.rows import EMPTY_ANSWER, ChatCorpus, TokenCorpus
from dtensor_llama.data.sources import FORMATS, RECORD_FORMATS, Chunk, expand_paths, read_chunks
from dtensor_llama.data.template import ChatTemplate
from dtensor_llama.data.tokenizer import Tokenizer, load_tokenizer
from dtensor_llama.errors import UsageError
from dtensor_llama.places import first_writable, is_full, readable, say_full
from dtensor_llama.terminal import make_streams_last

FORMAT_VERSION = 2      # of the files of a corpus; 2: meta.json has content_hash
CHAT_VERSION = 1        # of how conversations become ids: chat.py and template.py
PIECE_CHARS = 16384     # a worker cuts longer texts: both libraries are fastest on texts of about this length
CHUNKS_PER_WORKER = 3   # under way at once: one being encoded, one waiting, one done and waiting for its turn
LINE_EVERY_S = 10       # of progress, where stderr is no terminal


def prepare_corpus(paths: Sequence[str | Path], tokenizer: Tokenizer,
                   cache_dir: str | Path | Sequence[str | Path], text_field: str = "text",
                   processes: int | None = None) -> TokenCorpus:
    """The corpus of `paths` (files and globs), tokenized now unless that has been done and nothing changed since.

    Any number of ranks and runs may call this at once: one tokenizes, the others wait for it. Progress goes to stderr.
    cache_dir: a folder, or several: the corpus is read where it is found, and written into the first that can
    be written. Raises UsageError for what is wrong with the files.
    """
    return TokenCorpus(_prepare(paths, tokenizer, cache_dir, text_field, processes))


def prepare_chat(paths: Sequence[str | Path], tokenizer: Tokenizer,
                 cache_dir: str | Path | Sequence[str | Path], processes: int | None = None) -> ChatCorpus:
    """As prepare_corpus, of conversations in any of the formats of chat.py, written with the tokenizer's ChatTemplate."""
    ChatTemplate(tokenizer)                          # one that cannot be used is the first thing to say
    return ChatCorpus(_prepare(paths, tokenizer, cache_dir, None, processes))


def _prepare(paths, tokenizer: Tokenizer, cache_dir, text_field: str | None, processes: int | None) -> Path:
    paths = [paths] if isinstance(paths, str | Path) else paths
    cache_dirs = [cache_dir] if isinstance(cache_dir, str | Path) else list(cache_dir)
    folder = _find(cache_dirs, fingerprint(_files(paths, text_field), tokenizer, text_field))
    if folder is None:
        # -P: a file called queue.py in the current folder is no module of ours.
        command = [sys.executable, "-P", "-m", "dtensor_llama.data.tokenize", "--for-process", os.getpid()]
        command += ["--path", *paths]
        command += ["--tokenizer", tokenizer.path, "--cache-dir", *cache_dirs]
        command += ["--chat"] if text_field is None else [f"--text-field={text_field}"]
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


def _files(paths: Sequence[str | Path], text_field: str | None) -> list[Path]:
    return expand_paths(paths, FORMATS if text_field is not None else RECORD_FORMATS)


def fingerprint(files: list[Path], tokenizer: Tokenizer, text_field: str | None) -> str:
    """A hash of all that decides the tokens; of each file its path, size and time of change. text_field None: of a chat."""
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    what = text_field if text_field is not None else ("chat", CHAT_VERSION, ChatTemplate(tokenizer).source)
    return hashlib.sha256(repr((FORMAT_VERSION, stats, tokenizer.fingerprint, what)).encode()).hexdigest()[:32]


def tokenize(paths: list[str], tokenizer: Tokenizer, cache_dirs: Sequence[Path], text_field: str | None,
             processes: int, for_process: int | None = None) -> Path:
    """Write the corpus unless it is there; returns its folder. Whoever comes second waits here for the first.

    cache_dirs: it is written into the first of them that can be written; which one that is, is the same for
    all who ask."""
    files = _files(paths, text_field)
    name = fingerprint(files, tokenizer, text_field)
    found = _find(cache_dirs, name)
    if found:
        return found
    cache_dir = cache_dirs[0]
    try:
        cache_dir, why_not_first = first_writable(cache_dirs)
        folder, staging = cache_dir / name, cache_dir / f"{name}.partial"
        with open(cache_dir / f"{name}.lock", "w") as lock:  # never removed: a new file would be another lock
            fcntl.flock(lock, fcntl.LOCK_EX)                 # the system releases it however this process ends
            if folder.is_dir():
                return folder
            if why_not_first:
                _say(f"note: {why_not_first}; the tokens go to {cache_dir}")
            shutil.rmtree(staging, ignore_errors=True)       # of a killed run: nobody else writes it under the lock
            staging.mkdir()
            _write_corpus(files, tokenizer, staging, text_field, processes, for_process)
            if fingerprint(files, tokenizer, text_field) != name:
                raise UsageError(f"--data.path {' '.join(paths)}: a file changed while it was read; start again.")
            os.rename(staging, folder)                       # the one moment at which the corpus comes to exist
    except OSError as error:
        reason = say_full(cache_dir) if is_full(error) else error
        shutil.rmtree(cache_dir / f"{name}.partial", ignore_errors=True)     # it would keep the disk full
        raise UsageError(f"the tokens cannot be written to {cache_dir}: {reason}; --data.cache-dir names "
                         "another folder.") from None
    return folder


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


def _write_corpus(files: list[Path], tokenizer: Tokenizer, staging: Path, text_field: str | None, processes: int,
                  for_process: int | None) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    total_bytes, done_bytes, n_tokens, n_documents = sum(file.stat().st_size for file in files), 0, 0, 0
    columns = "tokenizing", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    task, began_s = bar.add_task("", total=total_bytes), time.monotonic()
    line_due_s = began_s + LINE_EVERY_S
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _start_worker, (tokenizer, text_field))
    counts: Counter[str] = Counter()                   # of a chat: records of each format, and those left out
    names = ["tokens.bin", "documents.bin"] + (["trained.bin"] if text_field is None else [])
    with pool, contextlib.ExitStack() as opened:
        tokens_file, starts_file, *trained_file = [opened.enter_context(_HashedFile(staging / name)) for name in names]
        pool.submit(int).result()  # forks the workers, now, before the bar starts a thread
        try:
            with bar:
                cutter = Cutter(tokenizer) if text_field is not None else None
                for ids, starts, trained, of_chunk, input_bytes in _in_order(pool, files, text_field, cutter, processes):
                    tokens_file.write(ids.astype(dtype).tobytes())
                    starts_file.write((starts + n_tokens).tobytes())
                    for file in trained_file:
                        file.write(trained.tobytes())
                    counts += of_chunk
                    n_tokens, n_documents = n_tokens + len(ids), n_documents + len(starts)
                    done_bytes += input_bytes
                    bar.advance(task, input_bytes)
                    if bar.disable and time.monotonic() > line_due_s:
                        line_due_s = time.monotonic() + LINE_EVERY_S
                        _say(f"tokenizing: {done_bytes / 1e6:,.0f} of {total_bytes / 1e6:,.0f} MB, {n_tokens:,} tokens")
                    if for_process and os.getppid() != for_process:
                        raise SystemExit("tokenizing stopped: the process that asked for it is gone")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        if n_documents == 0:
            what = "document with any text" if text_field is not None else "conversation with any answer"
            raise UsageError(f"--data.path {files[0]}: no {what} in {len(files)} file(s).")
        meta = {"n_tokens": n_tokens, "n_documents": n_documents, "dtype": dtype.name, "format": FORMAT_VERSION}
        meta |= {"tokenizer": tokenizer.fingerprint, "text_field": text_field, "files": [str(file) for file in files]}
        meta |= {"counts": counts} if text_field is None else {}
        written = (tokens_file, starts_file, *trained_file)
        meta["content_hash"] = hashlib.sha256(b"".join(file.digest.digest() for file in written)).hexdigest()
        (staging / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        for file in written:
            file.flush_to_disk()     # before the rename: after a power cut a name must not stand for missing bytes
    elapsed_s = time.monotonic() - began_s
    _say(f"tokenized {total_bytes / 1e6:,.1f} MB: {n_documents:,} documents, {n_tokens:,} tokens in {elapsed_s:.1f} s")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _in_order(pool: ProcessPoolExecutor, files: list[Path], text_field: str | None, cutter: Cutter | None,
              processes: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None, Counter, int]]:
    """What the workers make of each chunk, and its bytes of input, in the order of the corpus, a few of them at a time."""
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

_cutter: Cutter         # set once in each worker
_template: ChatTemplate
_text_field: str | None


def _start_worker(tokenizer: Tokenizer, text_field: str | None) -> None:
    global _cutter, _template, _text_field
    _text_field = text_field
    if text_field is not None:
        _cutter = Cutter(tokenizer)
    else:
        _template = ChatTemplate(tokenizer)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent decides
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """When the parent is killed its workers would wait for chunks for ever, and hold its lock."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _encode_chunk(chunk: Chunk) -> tuple[np.ndarray, np.ndarray, None, Counter]:
    """(uint32 ids with BOS and EOS; int64 offsets into them of the documents that start in this chunk; nothing; no counts)."""
    tokenizer = _cutter.tokenizer
    documents = [list(_cutter.pieces(text, PIECE_CHARS, chunk.skip)) for text in chunk.documents(_text_field)]
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
    return np.array(ids, dtype=np.uint32), np.array(starts, dtype=np.int64), None, Counter()


def _encode_chat(chunk: Chunk) -> tuple[np.ndarray, np.ndarray, np.ndarray, Counter]:
    """(uint32 ids; int64 offsets of the conversations; uint8 1 where a token is trained; how many records of each kind)."""
    ids, starts, trained, counts = [], [], [], Counter()
    for where, record in chunk.records():
        name, turns = conversation_of(record, where)
        counts[name] += 1
        if any(turn["role"] == "assistant" and not turn["content"].strip() for turn in turns):
            counts[EMPTY_ANSWER] += 1
            continue
        of_one, mask = _template.encode(turns, where)
        starts.append(len(ids))
        ids += of_one
        trained += mask
    return np.array(ids, dtype=np.uint32), np.array(starts, dtype=np.int64), np.array(trained, dtype=np.uint8), counts


def main() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(prog="python -m dtensor_llama.data.tokenize", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--path", nargs="+", required=True, help="files and globs of " + " ".join(FORMATS))
    add("--tokenizer", required=True, help="Hugging Face folder, tokenizer.json or SentencePiece .model")
    add("--cache-dir", required=True, nargs="+", type=Path,
        help="where the tokens go, or the first of several that can be written; older ones are never deleted")
    add("--text-field", default="text", help="field or column that holds the text (default: text)")
    add("--chat", action="store_true", help="conversations instead of texts, for recipes/sft.py")
    add("--processes", type=int, default=cores, help=f"workers (default: one per core, {cores})")
    add("--for-process", type=int, metavar="PID", help="for a program: print the result or the error as JSON, and stop "
                                                       "when the process PID, which must be the parent, is gone")
    args = parser.parse_args()
    make_streams_last()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    try:
        if args.processes < 1:
            raise UsageError(f"--processes {args.processes}: at least one worker is needed.")
        tokenizer = load_tokenizer(args.tokenizer)
        text_field = None if args.chat else args.text_field
        folder = tokenize(args.path, tokenizer, args.cache_dir, text_field, args.processes, args.for_process)
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
