"""Tokenizes a corpus on all cores, once, into files that training maps into memory.

  python -m dtensor_llama.data.tokenize --path 'data/**/*.jsonl' --tokenizer llama2/ --cache-dir runs/tokens

One process reads and writes, one worker per core parses and encodes, and only a few chunks per worker are in
flight. So memory depends on the number of cores, not on the size of the corpus. This process never imports
torch. It forks, which is safe only before any thread exists. That is why `prepare_corpus`, which does the
same for a training run, starts this module as a program when there is something to tokenize.

<cache-dir>/<fingerprint>/
  tokens.bin      each document as BOS, ids, EOS, in uint16 or uint32. BOS is there if the tokenizer adds it
                  to a text, EOS if the tokenizer has one.
  documents.bin   the int64 offset in tokens.bin at which each document starts
  trained.bin     for conversations only: one byte per token, 1 if the token counts in the loss, else 0
  meta.json       counts, the type of tokens.bin, the files and options, and content_hash. That is a hash of
                  the bytes of the other files, and tells apart two corpora of equal size.
"""

import argparse
import contextlib
import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path
from typing import BinaryIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from dtensor_llama.data.encoding import Encoded, Encoding, Found, TextEncoding
from dtensor_llama.data.sequences import SKIPPED, TokenCorpus, in_words
from dtensor_llama.data.sources import FORMATS, Chunk, TextOptions, expand_paths, read_chunks
from dtensor_llama.data.tokenizer import Tokenizer, load_tokenizer
from dtensor_llama.errors import UsageError
from dtensor_llama.places import first_writable, readable, say_unwritten
from dtensor_llama.terminal import make_streams_last

FORMAT_VERSION = 2  # the version of the files of a corpus; since 2, meta.json has content_hash
CHUNKS_PER_WORKER = 3  # one is being encoded, one waits for that, and one is done and waits to be written
# One folder or several. A corpus is looked for in all of them, and written into the first that is writable.
CacheDirs = str | Path | Sequence[str | Path]
LINE_EVERY_S = 10  # seconds between two lines of progress, where stderr is not a terminal


def prepare_corpus(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    cache_dir: CacheDirs,
    text: TextOptions = TextOptions(),
    processes: int | None = None,
) -> TokenCorpus:
    """Return the corpus of `paths` (files and globs); tokenize it first unless the cache already has it.

    Any number of ranks and runs may call this at once: one of them tokenizes, and the others wait for it.
    Progress is printed on stderr.
    processes: the number of workers; None: one per core
    Raises UsageError if a file cannot be read, has a bad record, or cannot be written."""
    return TokenCorpus(prepare(paths, TextEncoding(tokenizer, text), cache_dir, processes))


def prepare(paths, encoding: Encoding, cache_dir, processes: int | None) -> Path:
    """Return the folder of a corpus; if it does not exist, run a separate program that writes it.

    The arguments are those of prepare_corpus, with an Encoding instead of a tokenizer and its options. Raises
    UsageError with the message of that program, KeyboardInterrupt if it was interrupted, and RuntimeError if
    it ended without an answer."""
    paths = [paths] if isinstance(paths, str | Path) else paths
    cache_dirs = [cache_dir] if isinstance(cache_dir, str | Path) else list(cache_dir)
    folder = _find(cache_dirs, fingerprint(expand_paths(paths, encoding.formats), encoding))
    if folder is not None:
        return folder
    # With -P a file called queue.py in the current folder cannot replace Python's own module.
    command = [sys.executable, "-P", "-m", "dtensor_llama.data.tokenize", "--for-process", os.getpid()]
    command += ["--path", *paths, "--tokenizer", encoding.tokenizer.path, "--cache-dir", *cache_dirs]
    command += encoding.arguments()
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
    return Path(answer["folder"])


def _find(cache_dirs: Sequence[str | Path], name: str) -> Path | None:
    return next((cache_dir / name for cache_dir in readable(cache_dirs) if (cache_dir / name).is_dir()), None)


def fingerprint(files: list[Path], encoding: Encoding) -> str:
    """Return a hash of what decides the tokens, including each file's path, size and modification time."""
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    decisive = FORMAT_VERSION, stats, encoding.tokenizer.fingerprint, encoding.identity()
    return hashlib.sha256(repr(decisive).encode()).hexdigest()[:32]


# ---- in the separate program ----


def tokenize(
    paths: list[str],
    encoding: Encoding,
    cache_dirs: Sequence[Path],
    processes: int,
    for_process: int | None,
) -> Path:
    """Write the corpus unless it exists, and return its folder.

    A second process that needs the same corpus waits here until the first has written it.
    cache_dirs: the corpus is written into the first folder that is writable, the same one for all processes
    for_process: the id of the parent process; tokenizing stops when that process is gone
    Raises UsageError if a file changes while it is read, and if the corpus cannot be written."""
    files = expand_paths(paths, encoding.formats)
    name = fingerprint(files, encoding)
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
                _print(f"note: {why_not_first}; the tokens go to {cache_dir}")
            # A run that was killed may have left this folder: nobody else writes it while we hold the lock.
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            _write_corpus(files, encoding, staging, processes, for_process)
            if fingerprint(files, encoding) != name:
                raise UsageError(f"{' '.join(paths)}: a file changed while it was read; start again.")
            os.rename(staging, folder)  # from this moment on the corpus exists
    except OSError as error:
        reason = say_unwritten(cache_dir, error)
        shutil.rmtree(cache_dir / f"{name}.partial", ignore_errors=True)  # else the disk stays full
        raise UsageError(
            f"the tokens cannot be written to {cache_dir}: {reason}; `cache_dir` names another folder."
        ) from None
    return folder


class _HashedFile:
    """Writes arrays to a file, and keeps a hash of what has been written so far."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest = file, hashlib.sha256()

    def write(self, array: np.ndarray) -> None:
        data = array.tobytes()
        self.file.write(data)
        self.digest.update(data)

    def flush_to_disk(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())


class _Progress:
    """Shows how much of the input is done: a bar in a terminal, or else a line every LINE_EVERY_S seconds."""

    def __init__(self, total_bytes: int):
        self.total_bytes, self.done_bytes = total_bytes, 0
        columns = "tokenizing", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
        to_file = not sys.stderr.isatty()
        self.bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=to_file)
        self.task, self.line_due_s = self.bar.add_task("", total=total_bytes), time.monotonic() + LINE_EVERY_S

    def advance(self, input_bytes: int, n_tokens: int) -> None:
        self.done_bytes += input_bytes
        self.bar.advance(self.task, input_bytes)
        if self.bar.disable and time.monotonic() > self.line_due_s:
            self.line_due_s = time.monotonic() + LINE_EVERY_S
            done, total = self.done_bytes / 1e6, self.total_bytes / 1e6
            _print(f"tokenizing: {done:,.0f} of {total:,.0f} MB, {n_tokens:,} tokens")


def _write_corpus(
    files: list[Path], encoding: Encoding, staging: Path, processes: int, for_process: int | None
) -> None:
    began_s, total_bytes = time.monotonic(), sum(file.stat().st_size for file in files)
    dtype = np.dtype(np.uint16 if encoding.tokenizer.vocab_size <= 1 << 16 else np.uint32)
    n_tokens, n_documents, found = 0, 0, Found()
    forked = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(processes, forked, _start_worker, (encoding,))
    with pool, contextlib.ExitStack() as opened:
        files_to_write = [opened.enter_context(open(staging / name, "wb")) for name in encoding.files]
        written = list(map(_HashedFile, files_to_write))
        skipped_file = opened.enter_context(open(staging / SKIPPED, "w", encoding="utf-8"))
        pool.submit(int).result()  # forks the workers, now, before the progress bar starts a thread
        try:
            progress = _Progress(total_bytes)
            with progress.bar:
                for encoded, input_bytes in _in_order(pool, files, encoding, processes):
                    arrays = encoded.ids.astype(dtype), encoded.starts + n_tokens, encoded.trained
                    for file, array in zip(written, arrays, strict=False):
                        file.write(array)
                    skipped_file.writelines(line + "\n" for line in encoded.found.skipped_lines)
                    found.add(encoded.found)
                    n_tokens, n_documents = n_tokens + len(encoded.ids), n_documents + len(encoded.starts)
                    progress.advance(input_bytes, n_tokens)
                    if for_process and os.getppid() != for_process:
                        raise SystemExit("tokenizing stopped: the process that asked for it is gone")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        if n_documents == 0:
            skipped = f"; skipped were {in_words(found.skipped)}" if found.skipped else ""
            raise UsageError(f"{files[0]}: no {encoding.a_document} in {len(files)} file(s){skipped}.")
        digests = b"".join(file.digest.digest() for file in written)
        meta = {
            "n_tokens": n_tokens,
            "n_documents": n_documents,
            "dtype": dtype.name,
            "format": FORMAT_VERSION,
            "tokenizer": encoding.tokenizer.fingerprint,
            "files": [str(file) for file in files],
            **encoding.meta,
            **found.as_json(),
            "content_hash": hashlib.sha256(digests).hexdigest(),
        }
        (staging / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        for file in written:
            # This comes before the folder is renamed: after a power cut, the final name must stand for
            # a complete folder.
            file.flush_to_disk()
    elapsed_s = time.monotonic() - began_s
    _print(
        f"tokenized {total_bytes / 1e6:,.1f} MB: {n_documents:,} document{'s' * (n_documents != 1)}, "
        f"{n_tokens:,} tokens in {elapsed_s:.1f} s"
    )


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _in_order(
    pool: ProcessPoolExecutor, files: list[Path], encoding: Encoding, processes: int
) -> Iterator[tuple[Encoded, int]]:
    """Yield (encoded chunk, its bytes of input) in the order of the corpus, with a few chunks in flight."""
    under_way = deque()
    of_files = (read_chunks(file, encoding.text_field, encoding.cutter) for file in files)
    chunks = itertools.chain.from_iterable(of_files)
    while True:
        while len(under_way) < CHUNKS_PER_WORKER * processes and (chunk := next(chunks, None)):
            under_way.append((pool.submit(_encode, chunk), chunk.input_bytes))
        if not under_way:
            return
        future, input_bytes = under_way.popleft()
        yield future.result(), input_bytes


# ---- in the workers ----

_encoding: Encoding  # each worker sets it once, when it starts


def _start_worker(encoding: Encoding) -> None:
    global _encoding
    _encoding = encoding
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent decides
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """End this worker when its parent is killed; else it would wait for ever and hold the parent's lock."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _encode(chunk: Chunk) -> Encoded:
    return _encoding.encode(chunk)


# ---- the command ----


def _arguments() -> argparse.Namespace:
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
    return parser.parse_args()


def _encoding_of(args: argparse.Namespace) -> Encoding:
    tokenizer = load_tokenizer(args.tokenizer)
    if not args.chat:
        return TextEncoding(tokenizer, TextOptions(args.text_field, args.bad_records))
    # The imports stand here because data/ does not need chat/ to tokenize texts.
    from dtensor_llama.chat.conversations import ChatOptions
    from dtensor_llama.chat.corpus import ChatEncoding

    return ChatEncoding(tokenizer, ChatOptions(**{"bad_records": args.bad_records} | json.loads(args.chat)))


def main() -> int:
    args = _arguments()
    make_streams_last()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers use all cores already
    try:
        if args.processes < 1:
            raise UsageError(f"--processes {args.processes}: at least one worker is needed.")
        encoding = _encoding_of(args)
        folder = tokenize(args.path, encoding, args.cache_dir, args.processes, args.for_process)
        answer = {"folder": str(folder)}
    except UsageError as error:
        answer = {"error": str(error)}
    except KeyboardInterrupt:
        return 130
    if args.for_process:
        print(json.dumps(answer))
    elif "error" in answer:
        _print(f"error: {answer['error']}")
    else:
        print(answer["folder"])
    return 2 if "error" in answer else 0


if __name__ == "__main__":
    sys.exit(main())
