"""Makes a corpus of real text that every machine has, Python's standard library, and a tokenizer for it.

    python recipes/stdlib_corpus.py --out runs/first

This writes OUT/stdlib.jsonl, one line {"text", "path"} for each module, and OUT/tokenizer/, a byte-level BPE
tokenizer in Hugging Face's format.
"""

import json
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    from dtensor_llama.terminal import end_quietly_on_ctrl_c

    end_quietly_on_ctrl_c()  # the imports below take seconds

from dtensor_llama import UsageError
from dtensor_llama.atomic import replace_file
from dtensor_llama.cli import FilePath, run_recipe

BEGIN, END = "<s>", "</s>"
LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "encodings",
    "pydoc_data",
}


@dataclass(frozen=True)
class CorpusConfig:
    """Gather the standard library's source and train a byte-level BPE tokenizer on it."""

    out: FilePath = "runs/first"  # the folder for stdlib.jsonl and tokenizer/
    vocab_size: int = 4096  # the number of tokens, BOS and EOS included


def main(cfg: CorpusConfig) -> None:
    if not 258 <= cfg.vocab_size <= 65536:
        raise UsageError(
            f"--vocab-size {cfg.vocab_size} is not possible; 256 bytes and 2 marks come first: use 258 "
            "to 65536."
        )
    out = Path(cfg.out)
    texts = list(standard_library())
    if (out / "stdlib.jsonl").exists() and (out / "tokenizer" / "tokenizer.json").exists():
        print(f"{out}/stdlib.jsonl and {out}/tokenizer are there already")
        return
    out.mkdir(parents=True, exist_ok=True)
    train_tokenizer([text for _, text in texts], cfg.vocab_size, out / "tokenizer")
    lines = [json.dumps({"text": text, "path": path}) + "\n" for path, text in texts]
    replace_file(out / "stdlib.jsonl", "".join(lines))
    n_bytes = sum(len(text.encode()) for _, text in texts)
    print(
        f"{len(texts):,} modules, {n_bytes / 1e6:.1f} MB -> {out}/stdlib.jsonl and a tokenizer of "
        f"{cfg.vocab_size} pieces"
    )


def standard_library():
    """Yield (path, source) of each module, with the path relative to the library's folder.

    Tests, character tables and the help texts of pydoc are left out, because they contain little code."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if LEFT_OUT & set(parts):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # a few modules are in other encodings on purpose
        if text.strip():
            yield "/".join(parts), text


def train_tokenizer(texts: list[str], vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE tokenizer with Hugging Face's library, and save it into `folder`.

    vocab_size includes BOS and EOS.
    Source: Sennrich et al. 2016, arXiv:1508.07909, over bytes as in GPT-2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END],
        show_progress=sys.stderr.isatty(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_recipe(main, CorpusConfig)
