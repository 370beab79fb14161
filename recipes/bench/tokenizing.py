"""Compare the speed of `prepare_corpus` with the library's own batch call, and measure its memory.

  python recipes/bench/tokenizing.py --corpus sotu.jsonl --tokenizer tokenizer.json tokenizer.model

speed: the seconds for the same documents, ours with start, parsing and writing, and the library's on all
    cores with parsed documents in memory. The two take turns, so that a machine that slows down slows both;
    the median of the ratios counts.
memory: the largest sum of the memory of all processes (PSS: a page that n processes share counts 1/n in
    each), for the corpus and for one four times as large.

Prints one JSON line for each tokenizer and measurement.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from operator import truediv
from pathlib import Path
from statistics import median

import psutil
import sentencepiece
import tokenizers


def make_corpus(source: Path, target: Path, copies: int) -> int:
    """Write the documents of `source` `copies` times, each copy with numbers of its own, so that none is a
    repetition. Return the bytes written."""
    documents = [json.loads(line)["text"] for line in source.read_text(encoding="utf-8").splitlines()]
    with open(target, "w", encoding="utf-8") as file:
        for copy in range(copies):
            for i, text in enumerate(documents):
                text = text.replace(". ", f" ({copy * 7919 + i}). ")
                file.write(json.dumps({"text": text}) + "\n")
    return target.stat().st_size


def our_run(corpus: Path, tokenizer: str, cache: Path, watch_memory: bool = False) -> tuple[float, float]:
    """Run our command. Return its seconds, and the peak MiB of all its processes (0 unless watched)."""
    command = [
        sys.executable,
        "-m",
        "dtensor_llama.data.tokenize",
        "--path",
        corpus,
        "--tokenizer",
        tokenizer,
    ]
    command += ["--cache-dir", tempfile.mkdtemp(dir=cache)]
    began_s, peak_bytes = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while watch_memory and process.poll() is None:
        try:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            peak_bytes = max(peak_bytes, sum(member.memory_full_info().pss for member in family))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            pass
        time.sleep(0.05)
    if process.wait():
        raise SystemExit(f"{' '.join(map(str, command))} ended with status {process.returncode}")
    return time.perf_counter() - began_s, peak_bytes / 2**20


def library_run(corpus: Path, tokenizer: str) -> float:
    """Return the seconds of the library's own batch call for all documents on all cores, without reading."""
    documents = [json.loads(line)["text"] for line in open(corpus, encoding="utf-8")]
    if tokenizer.endswith(".model"):
        pieces = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
        encode = lambda: pieces.encode(documents, num_threads=len(os.sched_getaffinity(0)))
    else:
        fast = tokenizers.Tokenizer.from_file(tokenizer)
        encode = lambda: fast.encode_batch_fast(documents, add_special_tokens=False)
    began_s = time.perf_counter()
    encode()
    return time.perf_counter() - began_s


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpus", type=Path, required=True, help="a .jsonl with a field `text`, 10 MB or so"
    )
    parser.add_argument("--tokenizer", nargs="+", required=True, help="tokenizer.json or .model files")
    parser.add_argument(
        "--copies", type=int, default=3, help="how often the corpus is repeated, for speed and memory at 1x"
    )
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        once, four_times = Path(folder) / "1x.jsonl", Path(folder) / "4x.jsonl"
        sizes_mb = [make_corpus(args.corpus, once, args.copies) / 1e6]
        sizes_mb += [make_corpus(args.corpus, four_times, 4 * args.copies) / 1e6]
        for tokenizer in args.tokenizer:
            ours_s, library_s = [], []
            for _ in range(args.turns):
                ours_s.append(our_run(once, tokenizer, folder)[0])
                library_s.append(library_run(once, tokenizer))
            speed = {
                "what": "speed",
                "tokenizer": Path(tokenizer).name,
                "cores": len(os.sched_getaffinity(0)),
                "corpus_mb": round(sizes_mb[0], 1),
                "ours_s": [round(seconds, 2) for seconds in ours_s],
                "library_s": [round(seconds, 2) for seconds in library_s],
                "ours_over_library_speed": round(median(map(truediv, library_s, ours_s)), 2),
            }
            print(json.dumps(speed), flush=True)
            peaks_mib = [
                our_run(file, tokenizer, folder, watch_memory=True)[1] for file in (once, four_times)
            ]
            memory = {
                "what": "memory",
                "tokenizer": Path(tokenizer).name,
                "corpus_mb": [round(mb, 1) for mb in sizes_mb],
                "peak_mib": [round(mib) for mib in peaks_mib],
            }
            print(json.dumps(memory), flush=True)


if __name__ == "__main__":
    main()
