"""The exported folder is served by another engine: transformers' OpenAI-compatible server says what
generate.py says."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from recipe import ROOT, recipe

for package in ("fastapi", "uvicorn", "openai", "accelerate"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[serve]'")

SHARED = Path(os.environ.get("DTENSOR_LLAMA_SHARED_DATA", ROOT.parent / "shared" / "data"))
# a text to be continued
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
PROMPTS = ["Once upon a time", "Lily and Tom went to the", "The dog was very"]


def ask(url: str, body: dict | None = None) -> dict:
    request = urllib.request.Request(
        url, json.dumps(body).encode() if body else None, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())


@pytest.fixture(scope="module")
def served(inputs, tmp_path_factory):
    """(folder, address): a run's export, served on loopback. The run goes on from trained weights where there
    are any."""
    run_dir, steps, lr = tmp_path_factory.mktemp("served"), 1, "1e-5"
    weights, text = SHARED / "stories260K", SHARED / "corpus/tinyshakespeare.txt"
    if not weights.exists():
        # until it is sure of its next token
        weights, text, steps, lr = inputs / "model", inputs / "data.jsonl", 40, "1e-2"
    ended = recipe(
        "pretrain",
        "--model",
        weights,
        "--data.path",
        text,
        "--data.cache-dir",
        run_dir / "cache",
        "--data.seq-len",
        64,
        "--train.steps",
        steps,
        "--train.lr",
        lr,
        "--train.global-batch-size",
        2,
        "--train.dtype",
        "float32",
        "--train.validate-every",
        0,
        "--run-dir",
        run_dir,
    )
    assert ended.status == 0, ended
    folder = run_dir / "exported"
    assert recipe("export", run_dir / f"checkpoints/step-{steps:08}", folder).status == 0
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        Path(sys.executable).with_name("transformers"),
        "serve",
        folder,
        "--host",
        "127.0.0.1",
        "--port",
        port,
        "--device",
        "cpu",
    ]
    with open(run_dir / "said.txt", "w") as said:
        server = subprocess.Popen(list(map(str, command)), stdout=said, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 180
        while True:
            try:
                ask(f"http://127.0.0.1:{port}/health")
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None and time.monotonic() < deadline, (
                    run_dir / "said.txt"
                ).read_text()
                time.sleep(0.3)
        yield folder, f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def ours(served) -> list[str]:
    flags = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    ended = recipe("generate", "--model", served[0], *flags, "--max-new-tokens", 40, "--json")
    assert ended.status == 0, ended
    return [json.loads(line)["text"] for line in ended.out.splitlines()]


def test_completions_are_those_of_generate(served, ours):
    folder, url = served
    for prompt, text in zip(PROMPTS, ours, strict=True):
        answer = ask(
            f"{url}/completions", {"model": str(folder), "prompt": prompt, "max_tokens": 40, "temperature": 0}
        )
        assert answer["choices"][0]["text"].strip() == text.strip()


def test_chat_answers_are_those_of_generate(served, ours):
    folder, url = served
    for prompt, text in zip(PROMPTS, ours, strict=True):
        answer = ask(
            f"{url}/chat/completions",
            {
                "model": str(folder),
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": 40,
                "temperature": 0,
                "stream": False,
            },
        )
        assert answer["choices"][0]["message"]["content"].strip() == text.strip()
