"""Models of transformers through the Booster: one answer with plain transformers, for the traffic that their
tables state."""

import codecs
import gzip
import json
import re
from collections import Counter
from functools import cache, partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import PLAN_ROWS
from hf_models import ADAPTED, DECODERS, MODELS, STAGED, batches, plain_model, small_model
from pool import run_on
from recipe import ROOT, recipe
from safetensors.torch import load_file, save_file
from test_compile import CountedGraphs
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dtensor_llama import UsageError, save_hf
from memory import MemoryConfig
from parallel import ParallelConfig
from parallel.apply import Computation
from parallel.booster import Booster, copy_weights
from parallel.config import check_parallel
from parallel.plans import FAMILIES, family_of
from parallel.plans.family import shape_of
from parallel.plans.loss import HfBatch, loss_sum, targets_of
from parallel.plans.spread import apply_plan, check_family, materialize, restore_buffers, shell_of

LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, {"tp": 2, "zero_stage": 1}),
    "zero3": (2, {"zero_stage": 3, "microbatches": 2}),
    "tp2-zero3": (4, {"tp": 2, "zero_stage": 3, "microbatches": 2}),
    "pp2-zero1": (4, {"pp": 2, "zero_stage": 1, "microbatches": 2}),
    "pp2-tp2": (4, {"pp": 2, "tp": 2, "zero_stage": 0, "schedule": "gpipe"}),
    "hsdp": (4, {"dp_replicate": 2, "dp_shard": 2, "zero_stage": 2}),
}
MIX = MemoryConfig("static", 0.4, 0.3, 0.3, kernel="blocks")
# The cases that run by default; all others are `slow`.
QUICK = {
    *(
        (name, "tp2")
        for name in MODELS
        if name in FAMILIES or name in ("Qwen3ForCausalLM", "Phi3ForCausalLM", "MixtralForCausalLM")
    ),
    ("GPT2LMHeadModel", "tp2-zero3"),
    ("GPT2LMHeadModel", "pp2-tp2"),
    ("BloomForCausalLM", "pp2-zero1"),
    ("T5ForConditionalGeneration", "zero3"),
}


def adamw(model):
    """Decay for matrices only: two groups that the Booster must keep apart."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0, "lr": 3e-3},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, eps=1e-5)


def smoothed(name):
    """Return a user's criterion: whole logits, labels as they came, the mean over scored tokens."""
    shift = 0 if name.startswith(("Bert", "T5")) else 1

    def criterion(logits, labels):
        logits, labels = logits[:, : logits.shape[1] - shift], labels[:, shift:]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)

    return criterion


@cache
def plain(name, smooth=False, sequences=8):
    """Train with transformers alone; return the losses, gradient norms and the model at the end."""
    model = plain_model(name)
    optimizer, losses, norms = adamw(model), [], []
    for batch in batches(name, sequences=sequences):
        out = model(**batch)
        loss = smoothed(name)(out.logits, batch["labels"]) if smooth else out.loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, model


def boosted(name, layout, folder, memory=None, smooth=False, sequences=8, **computation):
    model = plain_model(name)
    booster = Booster(ParallelConfig(**layout), memory, **computation)
    criterion = smoothed(name) if smooth else None
    model, optimizer, dataloader, _ = booster.boost(
        model, adamw(model), batches(name, sequences=sequences), criterion
    )
    losses, norms = [], []
    for batch in dataloader:
        losses.append(booster.step(batch).item())
        norms.append(booster.clip_grad_norm(0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    booster.save_hf(model, folder)
    return losses, norms


def recomputed(name, layout, folder, mode):
    return boosted(name, layout, folder, recompute=mode)


def compiled(name, layout, folder, memory=None, recompute="none"):
    """Train with compiled blocks, in whole graphs: one for each kind of block, with and without padding."""
    graphs = CountedGraphs()
    torch._dynamo.reset()
    with mock.patch("torch.compile", partial(torch.compile, backend=graphs, fullgraph=True)):
        ended = boosted(name, layout, folder, memory, compile=True, recompute=recompute)
    kinds = 4 if name.startswith("T5") else 1  # first blocks make the bias of positions that later ones get
    assert graphs.n_graphs in (kinds, 2 * kinds), graphs.n_graphs
    return ended


def load(name, folder):
    import transformers

    return getattr(transformers, name).from_pretrained(folder)


def assert_same_training(name, layout, folder, *args, expected=None, function=boosted):
    ranks, config = LAYOUTS[layout]
    losses, norms, trained = expected or plain(name)
    by_loss, by_norm, by_weight = 0.0, 0.0, 0.0
    for its_losses, its_norms in run_on(ranks, function, name, config, folder, *args, timeout=300):
        by_loss = max(by_loss, *(abs(a - b) for a, b in zip(its_losses, losses, strict=True)))
        by_norm = max(by_norm, *(abs(a / b - 1) for a, b in zip(its_norms, norms, strict=True)))
    again, weights = load(name, folder), dict(trained.named_parameters())
    for parameter, weight in again.named_parameters():
        by_weight = max(by_weight, (weight - weights[parameter]).abs().max().item())
    how = [arg for arg in args if isinstance(arg, str)]
    how += [f"placement={arg.placement}" for arg in args if isinstance(arg, MemoryConfig)]
    how += ["own criterion"] if True in args else []
    PLAN_ROWS.append((name, " ".join([layout, *how]), by_loss, by_norm, by_weight))
    assert by_loss < 2e-5 and by_norm < 1e-4
    assert by_weight < 1e-5  # after five steps of 1e-3 (vectors: 3e-3)
    batch = batches(name)[0]
    with torch.no_grad():
        logits, expected = (model.eval()(**batch).logits for model in (again, trained))
    trained.train()
    assert_close(logits, expected, rtol=0, atol=1e-4)


CASES = [
    pytest.param(name, layout, marks=() if (name, layout) in QUICK else pytest.mark.slow)
    for name in MODELS
    for layout in LAYOUTS
    if layout != "one" and ("pp" not in layout or name in DECODERS)
]


@pytest.mark.parametrize("name,layout", CASES)
def test_it_trains_as_plain_transformers_in_one_process(tmp_path, name, layout):
    assert_same_training(name, layout, tmp_path / "hf")


CHUNKS = {"OPTForCausalLM": "one", "BloomForCausalLM": "zero3", "GlmForCausalLM": "tp2-zero3"}


@pytest.mark.parametrize(
    "name,layout",
    [
        ("GPT2LMHeadModel", "tp2"),
        pytest.param("GPT2LMHeadModel", "pp2-zero1", marks=pytest.mark.slow),
        pytest.param("BertForMaskedLM", "tp2-zero3", marks=pytest.mark.slow),
        *(pytest.param(name, CHUNKS.get(name, "tp2"), marks=pytest.mark.slow) for name in [*MODELS][1:]),
    ],
)
def test_with_a_mix_of_chunk_placements_it_trains_alike(tmp_path, name, layout):
    assert_same_training(name, layout, tmp_path / "hf", MIX)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "T5ForConditionalGeneration"])
def test_with_placement_auto_it_trains_alike(tmp_path, name):
    assert_same_training(name, "tp2", tmp_path / "hf", MemoryConfig("auto", kernel="blocks"))


@pytest.mark.parametrize(
    "name,layout",
    [
        ("BertForMaskedLM", "tp2"),
        pytest.param("GPT2LMHeadModel", "pp2-tp2", marks=pytest.mark.slow),
        pytest.param("T5ForConditionalGeneration", "tp2", marks=pytest.mark.slow),
    ],
)
def test_a_criterion_of_the_user_gets_whole_logits_and_labels_as_they_came(tmp_path, name, layout):
    assert_same_training(name, layout, tmp_path / "hf", None, True, expected=plain(name, True))


@pytest.mark.parametrize(
    "name,mode",
    [
        pytest.param(name, mode, marks=() if (name, mode) == ("OPTForCausalLM", "full") else pytest.mark.slow)
        for name in ("OPTForCausalLM", "GPT2LMHeadModel", "T5ForConditionalGeneration")
        for mode in ("full", "selective")
    ],
)
def test_recomputed_blocks_give_the_same(tmp_path, name, mode):
    assert_same_training(name, "tp2", tmp_path / "hf", mode, function=recomputed)


@pytest.mark.slow
def test_sequences_that_do_not_divide_are_filled_up(tmp_path):
    expected = plain("BertForMaskedLM", sequences=7)
    assert_same_training("BertForMaskedLM", "tp2-zero3", tmp_path / "hf", None, False, 7, expected=expected)


def in_bfloat16(name, memory):
    model = plain_model(name)
    booster = Booster(ParallelConfig(tp=2, zero_stage=1), memory, dtype=torch.bfloat16)
    _, optimizer, data, _ = booster.boost(model, adamw(model), batches(name))
    losses = []
    for batch in data:
        losses.append(booster.step(batch).item())
        booster.clip_grad_norm(0.5)
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize(
    "name,layout,memory,recompute",
    [
        ("GPT2LMHeadModel", "tp2", None, "selective"),
        pytest.param("GPT2LMHeadModel", "one", None, "full", marks=pytest.mark.slow),
        pytest.param("MixtralForCausalLM", "tp2", None, "selective", marks=pytest.mark.slow),
        pytest.param("T5ForConditionalGeneration", "zero3", None, "full", marks=pytest.mark.slow),
        *(pytest.param(name, "tp2", None, "none", marks=pytest.mark.slow) for name in MODELS),
        *(
            pytest.param(name, layout, memory, recompute, marks=pytest.mark.slow)
            for name in ("OPTForCausalLM", "Qwen3ForCausalLM")
            for layout, memory, recompute in (
                ("one", None, "none"),
                ("tp2", MIX, "none"),
                ("tp2", None, "selective"),
                ("tp2-zero3", None, "none"),
                ("pp2-tp2", None, "none"),
            )
        ),
    ],
)
def test_compiled_blocks_train_alike_in_one_graph(name, layout, memory, recompute, tmp_path):
    assert_same_training(name, layout, tmp_path / "hf", memory, recompute, function=compiled)


@pytest.mark.slow
@pytest.mark.parametrize("memory", [None, MIX], ids=["device", "chunks"])
@pytest.mark.parametrize("name", [*FAMILIES, "Qwen3ForCausalLM"])
def test_in_bfloat16_it_stays_near(name, memory):
    for losses in run_on(2, in_bfloat16, name, memory):
        assert losses == pytest.approx(plain(name)[0], rel=0.01)  # bfloat16 has 8 bits


# ---- the tables ----


class Collectives(TorchDispatchMode):
    """Counts collectives. (torch's CommDebugMode hangs hooks on modules that hand on copies of their inputs,
    so that layers that read the same tensor no longer do.)"""

    NAMES = {"all_gather_into_tensor": "all-gather", "all_reduce": "all-reduce", "allreduce_": "all-reduce"}

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        packet = str(op).split(".")
        if packet[0] in ("c10d", "_c10d_functional") and "wait" not in packet[1] and "wrap" not in packet[1]:
            self.counts[self.NAMES[packet[1]]] += 1
        return op(*args, **kwargs or {})


def split_over_two(model):
    """Return a model with this rank's half of the weights of a whole one, without the Booster, and its
    family."""
    family = family_of(model)
    shell = shell_of(model, family)
    apply_plan(shell, family, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
    materialize(shell, torch.device("cpu"))
    restore_buffers(shell, model, torch.device("cpu"))
    copy_weights(dict(model.named_parameters()), shell)
    return shell, family


def one_backward(name, changed=None):
    """Return how far loss and gradients of a model under tp 2 are from those of the whole one."""
    model = small_model(name) if changed is None else plain_model(name, **changed)
    batch = batches(name, 1)[0]
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    shell, family = split_over_two(model)
    n_targets = (targets_of(family, batch["labels"]) != -100).sum()
    batch = HfBatch(batch.pop("input_ids"), batch.pop("labels"), batch)
    its_loss = loss_sum(shell, family, batch) / n_targets
    its_loss.backward()
    furthest = 0.0
    for parameter, whole in model.named_parameters():
        grad = shell.get_parameter(parameter).grad
        if whole.grad is None:  # T5's `shared`, if nothing is tied to it
            assert grad is None
            continue
        grad = grad.full_tensor().reshape(whole.shape)
        furthest = max(furthest, ((grad - whole.grad).norm() / whole.grad.norm().clamp(min=1e-6)).item())
    return abs(its_loss.item() - loss.item()), furthest


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTED)
def test_every_plan_that_the_adapter_takes_gives_the_gradients_of_one_process(name):
    for by_loss, by_gradient in run_on(2, one_backward, name):
        assert by_loss < 2e-5 and by_gradient < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,changed",
    [
        ("T5ForConditionalGeneration", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
        ("OPTForCausalLM", {"do_layer_norm_before": False, "enable_bias": False}),
        ("BloomForCausalLM", {"apply_residual_connection_post_layernorm": True}),
        ("GPT2LMHeadModel", {"reorder_and_upcast_attn": True, "attn_implementation": "eager"}),
        ("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False}),
        ("GlmForCausalLM", {"tie_word_embeddings": True, "attention_bias": False}),
        ("BertForMaskedLM", {"attn_implementation": "eager"}),
    ],
)
def test_settings_of_a_family_change_nothing(name, changed):
    for by_loss, by_gradient in run_on(2, one_backward, name, changed):
        assert by_loss < 2e-5 and by_gradient < 1e-4


def with_a_longer_head():
    """Return the loss of a model whose head has more rows than its config has tokens, and the same under
    tp 2."""
    model = plain_model("MixtralForCausalLM")
    torch.manual_seed(5)
    model.lm_head = torch.nn.Linear(32, 64, bias=False)
    batch = batches("MixtralForCausalLM", 1)[0]
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    shell, family = split_over_two(model)
    batch = HfBatch(batch.pop("input_ids"), batch.pop("labels"), batch)
    return loss.item(), loss_sum(shell, family, batch).item()


def test_a_head_may_have_more_rows_than_there_are_tokens():
    for loss, its_loss in run_on(2, with_a_longer_head):
        assert its_loss == pytest.approx(loss, rel=1e-6)


def boosted_at_once(name):
    model = small_model(name)
    model.lm_head.weight.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    Booster(ParallelConfig(tp=2)).boost(model, torch.optim.AdamW(trained))


def one_step_in_stages(name):
    """Return how far loss and gradient norm of a step under pp 2 are from those of one process."""
    model, batch = small_model(name), batches(name, 1)[0]
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    norm = torch.nn.utils.get_total_norm([one.grad for one in model.parameters() if one.grad is not None])
    model.zero_grad()
    booster = Booster(ParallelConfig(pp=2, microbatches=2))
    booster.boost(model, torch.optim.AdamW(model.parameters()))
    for stage in booster.training.stages:
        stage.eval()  # as small_model is: without dropout
    its_loss, its_norm = booster.step(batch), booster.clip_grad_norm(1e9)
    return abs(its_loss.item() - loss.item()), abs(float(its_norm) / norm.item() - 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGED)
def test_every_plan_that_is_cut_into_stages_gives_the_step_of_one_process(name):
    for by_loss, by_norm in run_on(2, one_step_in_stages, name):
        assert by_loss < 2e-5 and by_norm < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTED)
def test_every_plan_that_the_adapter_takes_passes_the_rules(name):
    """Frozen weights need not be in the optimizer."""
    run_on(2, boosted_at_once, name)


def counted(name):
    """Return the collectives of forward and backward of a whole model under tp 2, and what its table states
    for the modules that ran; and the placements of its weights, as they are and as the table has them."""
    shell, family = split_over_two(plain_model(name))
    ran, placements, hooks = Counter(), [], []
    for module, row in family.rows(shell):
        hooks.append(module.register_forward_hook(lambda *_, row=row: ran.update([id(row)])))
        if row.weight:
            placements.append((row.weight, str(module.weight.placements[0]).replace("Replicate", "R")))
    stated = {id(row): row for row in family.plan.values()}
    batch = dict(batches(name)[0])
    batch = HfBatch(batch.pop("input_ids"), batch.pop("labels"), batch)
    with Collectives() as forward:
        loss = loss_sum(shell, family, batch)
    with Collectives() as backward:
        loss.backward()
    totals = Counter(), Counter()
    ran.update([id(row) for row in stated.values() if row.style is None])  # the token loss
    for key, n in ran.items():
        for total, collectives in zip(totals, (stated[key].forward, stated[key].backward), strict=True):
            total.update({kind: n * each for kind, each in collectives.items()})
    return (dict(forward.counts), dict(backward.counts)), tuple(map(dict, totals)), placements


@pytest.mark.parametrize(
    "name", [name if name in FAMILIES else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_a_model_sends_what_its_table_states_and_lies_as_it_says(name):
    for sent, stated, placements in run_on(2, counted, name):
        assert sent == stated
        for said, is_so in placements:
            assert said == is_so


def test_a_plan_is_a_page():
    for path in (ROOT / "parallel" / "plans").glob("*.py"):
        if path.stem in ("gpt2", "opt", "bloom", "bert", "t5", "glm"):
            assert len(path.read_text().splitlines()) <= 60, path


def trained_from_the_readme(folder):
    text = (ROOT / "parallel" / "plans" / "README.md").read_text()
    made = {}
    exec(re.findall(r"```python\n(from parallel.*?)```", text, re.DOTALL)[0], made)
    FAMILIES[made["FAMILY"].architecture] = made["FAMILY"]
    return boosted("GPTNeoForCausalLM", {"tp": 2, "zero_stage": 1}, folder)


def test_a_new_family_is_made_from_the_readme_alone(tmp_path):
    losses, norms, trained = plain("GPTNeoForCausalLM")
    for its_losses, its_norms in run_on(2, trained_from_the_readme, tmp_path / "hf"):
        assert its_losses == pytest.approx(losses, abs=2e-5) and its_norms == pytest.approx(norms, rel=1e-4)
    for name, weight in load("GPTNeoForCausalLM", tmp_path / "hf").named_parameters():
        assert_close(weight, trained.get_parameter(name), rtol=0, atol=1e-5)


# ---- weights and state ----


def saved_at_once(name, layout, folder):
    model = plain_model(name)
    booster = Booster(ParallelConfig(**layout))
    model, *_ = booster.boost(model, adamw(model))
    booster.save_hf(model, folder)
    logits = model(**batches(name)[0], use_cache=False).logits if layout.get("pp", 1) == 1 else None
    return None if logits is None else logits.detach()


@pytest.mark.parametrize(
    "name,layout",
    [
        ("GPT2LMHeadModel", "tp2-zero3"),
        ("GlmForCausalLM", "tp2"),
        ("DeepseekV3ForCausalLM", "tp2-zero3"),
        pytest.param("DeepseekV3ForCausalLM", "pp2-tp2", marks=pytest.mark.slow),
        pytest.param("GPT2LMHeadModel", "pp2-tp2", marks=pytest.mark.slow),
        pytest.param("BertForMaskedLM", "tp2-zero3", marks=pytest.mark.slow),
        pytest.param("T5ForConditionalGeneration", "tp2-zero3", marks=pytest.mark.slow),
        pytest.param("Glm4ForCausalLM", "zero3", marks=pytest.mark.slow),
    ],
)
def test_weights_are_saved_bitwise_and_a_spread_model_has_whole_logits(tmp_path, name, layout):
    ranks, config = LAYOUTS[layout]
    model = plain_model(name)
    logits = run_on(ranks, saved_at_once, name, config, tmp_path / "hf")[0]
    if logits is not None:
        assert_close(logits, model(**batches(name)[0]).logits, rtol=0, atol=1e-5)
    again = load(name, tmp_path / "hf")
    assert again.config.architectures == [name]
    saved = again.state_dict()
    for name, value in model.state_dict().items():  # with buffers that belong to the weights
        assert torch.equal(saved[name], value), name
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("hf", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_experts_get_their_names_of_the_hub_in_each_of_several_files(tmp_path):
    model = plain_model("MixtralForCausalLM")
    model.convert_to_save = shell_of(model, family_of(model)).convert_to_save
    save_hf(model, tmp_path, max_shard_bytes=20_000)
    files = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(files.values())) > 2 and "model.layers.2.block_sparse_moe.experts.3.w1.weight" in files
    saved = load("MixtralForCausalLM", tmp_path).state_dict()
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())


def test_a_disk_without_room_for_a_converted_file_keeps_what_was_there(tmp_path, monkeypatch):
    model = plain_model("MixtralForCausalLM")
    model.convert_to_save = shell_of(model, family_of(model)).convert_to_save
    free = iter([10**9, 0])  # before anything is written, and before the conversion
    monkeypatch.setattr("dtensor_llama.weights.free_bytes", lambda path: next(free))
    with pytest.raises(UsageError, match="hf is not written"):
        save_hf(model, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def loaded_over_other_buffers(folder):
    """Save a training state, and load it into a model whose routers had no biases."""
    for step in ("save", "load"):
        model = plain_model("DeepseekV3ForCausalLM")
        if step == "load":
            model.get_buffer(BIAS).zero_()
        booster = Booster(ParallelConfig(tp=2, zero_stage=1))
        model, *_ = booster.boost(model, adamw(model))
        getattr(booster, step)(folder / "state")
    booster.save_hf(model, folder / "hf")


def test_buffers_are_saved_as_they_were_loaded(tmp_path):
    run_on(2, loaded_over_other_buffers, tmp_path)
    saved, bias = load("DeepseekV3ForCausalLM", tmp_path / "hf"), plain_model("DeepseekV3ForCausalLM")
    assert torch.equal(saved.get_buffer(BIAS), bias.get_buffer(BIAS)) and bias.get_buffer(BIAS).any()


def first_part(name, layout, folder):
    booster, model = Booster(ParallelConfig(**layout)), plain_model(name)
    _, optimizer, data, _ = booster.boost(model, adamw(model), batches(name))
    losses = []
    for batch in data:
        losses.append(booster.step(batch).item())
        optimizer.step()
        optimizer.zero_grad()
        if len(losses) == 3:
            booster.save(folder)
    return losses


def second_part(name, layout, folder):
    booster, model = Booster(ParallelConfig(**layout)), plain_model(name)
    _, optimizer, data, _ = booster.boost(model, adamw(model), batches(name))
    assert booster.load(folder) == 3
    losses = []
    for batch in data:
        losses.append(booster.step(batch).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize(
    "name,first,second",
    [
        ("GPT2LMHeadModel", "tp2", "zero3"),
        pytest.param("GPT2LMHeadModel", "tp2", "tp2", marks=pytest.mark.slow),
        pytest.param("GPT2LMHeadModel", "pp2-tp2", "one", marks=pytest.mark.slow),
        pytest.param("OPTForCausalLM", "one", "pp2-tp2", marks=pytest.mark.slow),
        pytest.param("BertForMaskedLM", "tp2-zero3", "tp2", marks=pytest.mark.slow),
        pytest.param("T5ForConditionalGeneration", "zero3", "tp2", marks=pytest.mark.slow),
        pytest.param("GlmForCausalLM", "tp2", "one", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_goes_on_under_another_layout(tmp_path, name, first, second):
    whole = run_on(LAYOUTS[first][0], first_part, name, LAYOUTS[first][1], tmp_path / "c")[0]
    for rest in run_on(LAYOUTS[second][0], second_part, name, LAYOUTS[second][1], tmp_path / "c"):
        assert rest == whole[3:] if first == second else rest == pytest.approx(whole[3:], abs=2e-5)


# ---- dropout ----


def drawn(name, dropped, recompute):
    """Train two steps with dropout; return the losses, whether weights that every tp rank has are the same,
    and the masks of the first step by what they are for."""
    model = plain_model(name, **dropped)
    booster = Booster(ParallelConfig(tp=2, zero_stage=0), recompute=recompute, seed=1)
    model, optimizer, data, _ = booster.boost(
        model, torch.optim.SGD(model.parameters(), lr=0.1), batches(name, 2)
    )
    masks, original = [], F.dropout

    def noted(x, p=0.5, training=True, inplace=False):
        y = original(x, p, training, inplace)
        if p and training:
            masks.append((tuple(x.shape), (y == 0).flatten()[:200].tolist()))
        return y

    F.dropout = torch.nn.functional.dropout = noted
    losses = []
    for batch in data:
        losses.append(booster.step(batch).item())
        optimizer.step()
        optimizer.zero_grad()
    F.dropout = torch.nn.functional.dropout = original
    whole = [
        p.to_local() for p in model.parameters() if isinstance(p, DTensor) and p.placements[-1].is_replicate()
    ]
    sums = torch.stack([p.double().sum() for p in whole])
    everyones = [torch.empty_like(sums) for _ in range(2)]
    dist.all_gather(everyones, sums)
    return losses, torch.equal(*everyones), masks


DROPPED = {
    "GPT2LMHeadModel": {
        "attn_pdrop": 0.3,
        "resid_pdrop": 0.3,
        "embd_pdrop": 0.3,
        "attn_implementation": "eager",
    },
    "T5ForConditionalGeneration": {"dropout_rate": 0.3},
    "BloomForCausalLM": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
}


@pytest.mark.parametrize(
    "name,recompute",
    [("GPT2LMHeadModel", "none"), ("T5ForConditionalGeneration", "none"), ("GPT2LMHeadModel", "full")],
)
def test_tp_ranks_draw_alike_what_they_share_and_differently_what_is_split(name, recompute):
    (losses, same, masks), (others_losses, _, others_masks) = run_on(2, drawn, name, DROPPED[name], recompute)
    assert losses == others_losses and same
    assert losses != plain(name)[0][:2]
    assert [shape for shape, _ in masks] == [shape for shape, _ in others_masks]
    shared, split = 0, 0
    for (shape, mask), (_, others) in zip(masks, others_masks, strict=True):
        is_split = len(shape) == 4 or shape[-1] == 24  # heads, or the features inside T5's feed-forward
        shared, split = shared + (not is_split), split + is_split
        assert (mask == others) != is_split, shape
    assert shared and split


def test_a_recomputed_block_draws_what_it_drew():
    plainly, recomputed = (
        run_on(2, drawn, "GPT2LMHeadModel", DROPPED["GPT2LMHeadModel"], mode) for mode in ("none", "full")
    )
    assert plainly[0][0] == recomputed[0][0]  # the second loss is after a backward that drew again


# ---- the recipe ----


def gpt2_folder(inputs, folder):
    """Write a Hugging Face folder with a small GPT-2 and the tokenizer of the fixture."""
    import shutil

    shutil.copytree(inputs / "tokenizer", folder)
    plain_model("GPT2LMHeadModel", vocab_size=400, bos_token_id=0, eos_token_id=1).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("ranks,flags", [(2, ["--parallel.tp", "2", "--train.recompute", "full"])])
def test_a_folder_is_fine_tuned_by_the_recipe(tmp_path, inputs, ranks, flags):
    model, losses = gpt2_folder(inputs, tmp_path / "model"), []
    asked = ["--model", model, "--text", inputs / "data.jsonl", "--train.steps", 6, "--train.seq-len", 32]
    for n, more in ((1, []), (ranks, flags)):
        out = tmp_path / f"out-{n}"
        ended = recipe("finetune_hf", *asked, "--train.lr", "3e-3", "--out", out, *more, ranks=n)
        assert ended.status == 0, ended
        losses.append([json.loads(line)["loss"] for line in (out / "losses.jsonl").read_text().splitlines()])
        assert load("GPT2LMHeadModel", out).config.vocab_size == 400
    assert losses[1] == pytest.approx(losses[0], abs=2e-5) and losses[0][-1] < losses[0][0]


def test_the_recipe_says_in_one_line_what_is_wrong(tmp_path, inputs):
    model = gpt2_folder(inputs, tmp_path / "model")
    for flags, said in (
        (["--model", tmp_path], "has no config.json"),
        (["--text", tmp_path / "none"], "no file matches"),
        (["--text-field", "body"], "no field 'body'"),
        (["--train.seq-len", 10**6], "fewer than one step takes: --train.rows 8 of --train.seq-len 1000000"),
        (["--train.seed", 2**63], f"less than {2**63}"),
        (["--train.seq-len", 1], "--train.seq-len 1 is not possible; use 2 or more"),
        (["--memory.activations"], "error: --memory.activations needs to know the shape"),
        (["--memory.draw"], "--memory.draw would do nothing"),
        (["--memory.device-budget-gib", 1], "--memory.device-budget-gib 1 would do nothing"),
        (["--out", "/proc/model", "--train.seq-len", 16], "--out /proc/model cannot be written"),
        (["--parallel.cp", 2], "GPT2LMHeadModel: --parallel.cp 2"),
    ):
        asked = ["--model", model, "--text", inputs / "data.jsonl", "--out", tmp_path / "out", *flags]
        ended = recipe("finetune_hf", *asked, ranks=2 if "--parallel.cp" in flags else 1)
        assert ended.status == 2 and said in ended.err, ended
    assert not (tmp_path / "out").exists()


def test_the_recipe_makes_up_no_part_of_a_model(tmp_path, inputs):
    from recipes.finetune_hf import open_base

    model = gpt2_folder(inputs, tmp_path / "model")
    whole = load_file(model / "model.safetensors")
    name = "transformer.ln_f.bias"
    others = {key: tensor for key, tensor in whole.items() if key != name}
    for tensors, said in (
        (others, f"{name}: missing"),
        (others | {name: whole[name][:3].clone()}, f"{name}: is [3], must be"),
    ):
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UsageError, match=re.escape(said)):
            open_base(str(model))
    (model / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(UsageError, match="not opened by transformers"):
        open_base(str(model))
    for file in model.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UsageError, match="has no tokenizer"):
        open_base(str(model))


class Letters:
    """A tokenizer whose ids are the characters themselves."""

    eos_token_id = 0

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(letter) for letter in text]}


def test_the_recipe_reads_what_pretraining_reads(tmp_path):
    """A line may contain a separator of Unicode, begin with a byte-order mark, and be compressed."""
    from recipes.finetune_hf import FinetuneConfig, TrainConfig, sequences_of

    line = json.dumps({"body": "ab\u2028c"}, ensure_ascii=False) + "\n"
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "one.jsonl.gz").write_bytes(gzip.compress(codecs.BOM_UTF8 + line.encode()))
    train = TrainConfig(rows=1, seq_len=5)
    cfg = FinetuneConfig("model", f"{tmp_path}/**/*.jsonl.gz", "out", text_field="body", train=train)
    with mock.patch("torch.distributed.get_rank", return_value=1):
        (sequence,) = sequences_of(cfg, Letters(), vocab_size=0x2029)
        assert sequence.tolist() == [ord("a"), ord("b"), 0x2028, ord("c"), 0]
        with pytest.raises(UsageError, match="gives the id 8232, and config.json has a vocabulary of 8232"):
            sequences_of(cfg, Letters(), vocab_size=0x2028)


def test_the_recipe_stops_at_a_gradient_that_is_not_finite(tmp_path, inputs):
    model = gpt2_folder(inputs, tmp_path / "model")
    asked = ["--model", model, "--text", inputs / "data.jsonl", "--train.seq-len", 32, "--train.lr", "1e38"]
    ended = recipe("finetune_hf", *asked, "--out", tmp_path / "out")
    assert ended.status == 2 and "must be finite; nothing is saved" in ended.err, ended
    assert not any((tmp_path / "out").iterdir())


FROZEN = ("transformer.wpe.weight", "transformer.h.1.mlp.c_fc.weight", "transformer.h.2.ln_1.bias")


def freeze(model):
    for name in FROZEN:
        model.get_parameter(name).requires_grad_(False)
    return model


def partly_frozen(layout, folder, memory=None):
    with mock.patch(f"{__name__}.plain_model", lambda name, make=plain_model: freeze(make(name))):
        return boosted("GPT2LMHeadModel", layout, folder, memory)


@pytest.mark.parametrize(
    "layout,memory",
    [
        ("tp2-zero3", None),
        pytest.param("pp2-zero1", None, marks=pytest.mark.slow),
        pytest.param("tp2", MIX, marks=pytest.mark.slow),
    ],
)
def test_frozen_weights_stay_and_are_saved(tmp_path, layout, memory):
    with mock.patch(f"{__name__}.plain_model", lambda name, make=plain_model: freeze(make(name))):
        losses, norms, trained = plain.__wrapped__("GPT2LMHeadModel")
    ranks, config = LAYOUTS[layout]
    for its_losses, its_norms in run_on(ranks, partly_frozen, config, tmp_path / "hf", memory):
        assert its_losses == pytest.approx(losses, abs=2e-5) and its_norms == pytest.approx(norms, rel=1e-4)
    again, untrained = load("GPT2LMHeadModel", tmp_path / "hf"), plain_model("GPT2LMHeadModel")
    for name, weight in again.named_parameters():
        assert_close(weight, trained.get_parameter(name), rtol=0, atol=1e-5)
        assert torch.equal(weight, untrained.get_parameter(name)) == (name in FROZEN), name


# ---- what it refuses ----


def refused(what):
    name, layout, settings, changed = "GPT2LMHeadModel", {"tp": 2}, {}, {}
    if what in ("cp", "heads", "schedule"):
        layout = {"cp": {"cp": 2}, "heads": {"tp": 2}, "schedule": {"pp": 2, "schedule": "zbv"}}[what]
        changed = {"n_head": 1} if what == "heads" else {}
    elif what in ("pp of BERT", "pp of T5"):
        layout = {"pp": 2}
        name = "BertForMaskedLM" if "BERT" in what else "T5ForConditionalGeneration"
    elif what == "key/value heads":
        name, changed = "Qwen2ForCausalLM", {"num_key_value_heads": 1}
    elif what == "layerdrop":
        name, layout, changed = "OPTForCausalLM", {}, {"layerdrop": 0.1}
    elif what == "no row":
        changed = {"add_cross_attention": True}
    elif what == "loss of routers":
        name, changed = "MixtralForCausalLM", {"output_router_logits": True}
    elif what == "width of experts":
        name, changed = "MixtralForCausalLM", {"intermediate_size": 28}
    elif what == "an unused bias":
        name, changed = "BertForMaskedLM", {"tie_word_embeddings": False}
    elif what == "compile, recompute":
        settings = {"compile": True, "recompute": "full"}
    elif what in ("compile", "attention"):
        settings = {"compile": True} if what == "compile" else {"attention": "math"}
        changed = {"attn_pdrop": 0.1} if what == "compile" else {}
    model = plain_model(name, **changed)
    if what == "adapters":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    elif what == "all frozen":
        model.requires_grad_(False)
    elif what == "wrapped":
        model = torch.nn.parallel.DistributedDataParallel(model)
    elif what == "spread already":
        model, *_ = Booster(ParallelConfig(**layout)).boost(model, adamw(model))
    elif what == "quantised":
        model.config.quantization_config = {"quant_method": "fp8"}
    elif what == "untied":
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    elif what == "no plan":
        import transformers

        config = transformers.OpenAIGPTConfig(vocab_size=61, n_embd=32, n_layer=1, n_head=4)
        model = transformers.OpenAIGPTLMHeadModel(config)
    elif what in ("untranslated", "broken"):
        model = small_model("LongcatFlash" if what == "untranslated" else "Doge")
    elif what == "meta":
        model.to("meta")
    data = batches(name)
    if what == "column":
        data[0]["past"] = data[0]["labels"]
    try:
        booster = Booster(ParallelConfig(**layout), **settings)
        *_, data, _ = booster.boost(model, adamw(model), data)
        booster.step(next(iter(data)))
    except UsageError as error:
        return str(error)


@pytest.mark.parametrize(
    "what,said",
    {
        "cp": "GPT2LMHeadModel: cp=2",
        "heads": "tp=2 does not divide the 1 attention heads of GPT2LMHeadModel",
        "key/value heads": "tp=2 does not divide the 1 key/value heads",
        "schedule": "schedule=zbv",
        "pp of BERT": "BertForMaskedLM: pp=2",
        "pp of T5": "T5ForConditionalGeneration: pp=2",
        "layerdrop": "layerdrop",
        "no row": "no row for transformer.h.0.crossattention",
        "an unused bias": "no row for cls.predictions.bias",
        "width of experts": "with tp=2 a rank has 14 features of each expert",
        "adapters": "has adapters of PEFT; merge them",
        "all frozen": "has no parameter that trains",
        "loss of routers": "MixtralForCausalLM: config.output_router_logits adds a loss",
        "untranslated": "has the style moe_identity_expert, which is not translated",
        "broken": "DogeForCausalLM: its plan in transformers splits the features",
        "compile": "compile=True",
        "compile, recompute": "use recompute=selective, or make the model with attn_implementation=eager",
        "attention": "attention=math",
        "wrapped": "already wrapped",
        "spread already": "already wrapped or spread",
        "quantised": "quantised weights",
        "untied": "has not the matrix of transformer.wte",
        "no plan": "parallel/plans/README.md",
        "meta": "`meta`",
        "column": "a batch has past",
    }.items(),
)
def test_what_cannot_be_done_is_refused_by_name(what, said):
    for message in run_on(2, refused, what):
        assert message is not None and said in message


def said_of_a_boosted_model(folder) -> list[str]:
    """What is refused on one process, where nothing is sharded that would show that a model was boosted."""
    model = plain_model("GPT2LMHeadModel")
    booster = Booster(ParallelConfig())
    boosted, optimizer, _, _ = booster.boost(model, torch.optim.AdamW(model.parameters()))
    zeros = torch.zeros(1, 8, dtype=torch.int64)
    n_ids, n_positions = model.config.vocab_size, model.config.n_positions
    long = torch.zeros(1, n_positions + 1, dtype=torch.int64)
    said = []
    for misuse in (
        lambda: booster.boost(boosted, optimizer),
        lambda: boosted.save_pretrained(folder),
        lambda: booster.step({"input_ids": zeros + n_ids, "labels": zeros}),
        lambda: booster.step({"input_ids": zeros, "labels": zeros + n_ids}),
        lambda: booster.step({"input_ids": long, "labels": long}),
    ):
        with pytest.raises(UsageError) as refused:
            misuse()
        said.append(str(refused.value))
    return said


def test_what_would_break_a_boosted_model_is_refused_in_words(tmp_path):
    [said] = run_on(1, said_of_a_boosted_model, tmp_path / "out", group=False)
    expected = [
        "already wrapped or spread",
        "use booster.save_hf",
        "input_ids has ids",
        "labels has ids",
        "are longer than its",
    ]
    assert all(words in one for words, one in zip(expected, said, strict=True)), said
    assert not (tmp_path / "out").exists()


def test_a_model_with_eager_attention_may_be_compiled_and_fully_recomputed_on_a_cpu():
    model = plain_model("GPT2LMHeadModel", attn_implementation="eager")
    family, layout = family_of(model), ParallelConfig(tp=2, dp_shard=1, sequence_parallel=False)
    computation = check_family(model, family, layout, Computation(recompute="full", compile=True))
    check_parallel(layout, computation.job(shape_of(model, family), 16, 8, 8))
