"""How fast `prepare_corpus` tokenizes against the library's own batch call, and how much memory it takes.

  python recipes/bench/tokenizing.py --corpus sotu.jsonl --tokenizer llama2/tokenizer.json llama2/tokenizer.model

speed: seconds for the same documents, ours (start, parsing and writing included) and the library's (documents
    parsed and in memory; all cores), in turns, so that a machine that slows down slows both; the median of
    the ratios counts.
memory: the largest sum over all processes of their memory (PSS: a page that n processes share counts 1/n in
    each), for the corpus and for one four times as large. Prints one JSON line per tokenizer and measurement.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import psutil
import sentencepiece
import tokenizers


def make_corpus(source: Path, target: Path, copies: int) -> int:
    """The documents of `source` `copies` times, each copy with numbers of its own so that none is a
    repetition."""
    documents = [json.loads(line)["text"] for line in source.read_text(encoding="utf-8").splitlines()]
    with open(target, "w", encoding="utf-8") as file:
        for copy in range(copies):
            for i, text in enumerate(documents):
                text = text.replace(". ", f" ({copy * 7919 + i}). ")
                file.write(json.dumps({"text": text}) + "\n")
    return target.stat().st_size


def our_run(corpus: Path, tokenizer: str, cache: Path, watch_memory: bool = False) -> tuple[float, float]:
    """(seconds, peak MiB over all processes; 0 unless watched) of the command."""
    command = [
        sys.executable,
        "-m",
        "dtensor_llama.data.tokenize",
        "--path",
        corpus,
        "--tokenizer",
        tokenizer,
    ]
    began_s, peak_bytes = time.perf_counter(), 0
    command += ["--cache-dir", tempfile.mkdtemp(dir=cache)]
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
    """Seconds the library's own batch call takes for all documents on all cores, reading not counted."""
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
        "--copies", type=int, default=3, help="of the corpus, for the speed and for memory at 1x"
    )
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        once, four_times = Path(folder) / "1x.jsonl", Path(folder) / "4x.jsonl"
        sizes_mb = [
            make_corpus(args.corpus, file, n * args.copies) / 1e6 for file, n in ((once, 1), (four_times, 4))
        ]
        for tokenizer in args.tokenizer:
            turns = [
                (our_run(once, tokenizer, folder)[0], library_run(once, tokenizer)) for _ in range(args.turns)
            ]
            print(
                json.dumps(
                    {
                        "what": "speed",
                        "tokenizer": Path(tokenizer).name,
                        "cores": len(os.sched_getaffinity(0)),
                        "corpus_mb": round(sizes_mb[0], 1),
                        "ours_s": [round(ours, 2) for ours, _ in turns],
                        "library_s": [round(library, 2) for _, library in turns],
                        "ours_over_library_speed": round(
                            median(library / ours for ours, library in turns), 2
                        ),
                    }
                ),
                flush=True,
            )
            peaks_mib = [
                our_run(file, tokenizer, folder, watch_memory=True)[1] for file in (once, four_times)
            ]
            print(
                json.dumps(
                    {
                        "what": "memory",
                        "tokenizer": Path(tokenizer).name,
                        "corpus_mb": [round(mb, 1) for mb in sizes_mb],
                        "peak_mib": [round(mib) for mib in peaks_mib],
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
