"""Tensor and sequence parallelism give the loss, gradients and weights of one process, for the traffic the
plan states."""

from collections import Counter
from dataclasses import replace
from fnmatch import fnmatch

import pytest
import torch
from pool import run_on
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dtensor_llama import Llama, LlamaConfig, loss
from dtensor_llama.chat.lora import LoraConfig, apply_lora
from dtensor_llama.errors import UsageError
from dtensor_llama.generate import KVCache
from dtensor_llama.model import init_weights
from parallel.lora import apply_lora_parallel, lora_plan
from parallel.recompute import apply_recompute
from parallel.tensor import apply_tensor_parallel, tensor_plan

# 97 tokens: 49 + 48 over tp 2, 25 + 25 + 25 + 22 over tp 4
MHA = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
)
GQA = replace(MHA, num_key_value_heads=2)
MQA_TIED = replace(MHA, num_key_value_heads=1, tie_word_embeddings=True)
T = 32


def sequences(n_sequences: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels (B, T); the scored tokens lie unevenly over sequences, and over the halves and
    quarters of a sequence."""
    tokens = torch.randint(MHA.vocab_size, (n_sequences, T + 1), generator=torch.Generator().manual_seed(1))
    labels = tokens[:, 1:].clone()
    labels[0, :11], labels[1, -1] = -100, -100
    return tokens[:, :-1], labels


def packed_positions() -> torch.Tensor:
    return torch.stack(
        [torch.cat([torch.arange(n) for n in lengths]) for lengths in ([7, 1, 20, 4], [17, 15])]
    )


def split_model(config: LlamaConfig, tp_mesh, sequence_parallel: bool) -> Llama:
    with torch.device("meta"):
        model = Llama(config)
    apply_tensor_parallel(model, tp_mesh, sequence_parallel)
    model.to_empty(device="cpu")
    init_weights(model, seed=0)
    return model


def tp_mesh(tp: int):
    return init_device_mesh("cpu", (tp,), mesh_dim_names=("tp",))


def whole(model: Llama, what=lambda parameter: parameter.detach()) -> dict[str, torch.Tensor]:
    tensors = {name: what(parameter) for name, parameter in model.named_parameters()}
    return {name: (x.full_tensor() if isinstance(x, DTensor) else x).clone() for name, x in tensors.items()}


def gradients(model: Llama) -> dict[str, torch.Tensor]:
    return whole(model, lambda parameter: parameter.grad)


def assert_gradients_equal(ours: dict, plain: dict):
    assert ours.keys() == plain.keys()
    for name, expected in plain.items():
        difference = ((ours[name] - expected).norm() / expected.norm()).item()
        # fp32: only the order of summation differs; 1e-6 is usual
        assert difference < 1e-4, f"{name}: {difference}"


# ---- one forward and backward ----

CASES = {  # config, tp, sequence parallelism, recompute, packed documents
    "tp2": (MHA, 2, True, "none", False),
    "tp2-whole": (MHA, 2, False, "none", False),
    "tp2-gqa-documents-full": (GQA, 2, True, "full", True),
    "tp2-gqa-whole-documents-selective": (GQA, 2, False, "selective", True),
    "tp2-shared-kv-tied": (MQA_TIED, 2, True, "selective", False),
    "tp4-shared-kv": (GQA, 4, True, "none", True),
    "tp4-shared-kv-whole-full": (GQA, 4, False, "full", False),
    "tp4-tied": (replace(MHA, tie_word_embeddings=True), 4, True, "full", False),
}


def one_backward(config, tp, sequence_parallel, recompute, documents):
    model = split_model(config, tp_mesh(tp), sequence_parallel)
    initial = whole(model)
    apply_recompute(list(model.model.layers), recompute)
    tokens, labels = sequences()
    # 6 tokens for 49 rows, 7 for 48: ranks must agree all the same
    before, loss.CHUNK_ELEMENTS = loss.CHUNK_ELEMENTS, 336
    nll_sum = model(tokens, labels, packed_positions() if documents else None)
    loss.CHUNK_ELEMENTS = before
    nll_sum.backward()
    return nll_sum.item(), initial, gradients(model)


@pytest.mark.parametrize("case", CASES)
def test_loss_gradients_and_initial_weights_equal_one_process(case):
    config, tp, _, _, documents = CASES[case]
    plain, (tokens, labels) = Llama(config), sequences()
    nll_sum = plain(tokens, labels, packed_positions() if documents else None)
    nll_sum.backward()
    n_scored = (labels != -100).sum().item()
    for its_loss, its_initial, its_gradients in run_on(tp, one_backward, *CASES[case]):
        assert abs(its_loss - nll_sum.item()) / n_scored < 2e-5
        for name, weight in plain.named_parameters():
            assert torch.equal(its_initial[name], weight), name
        assert_gradients_equal(its_gradients, gradients(plain))


def compiled_backward(config, sequence_parallel, recompute):
    model = split_model(config, tp_mesh(2), sequence_parallel)
    blocks = list(model.model.layers)
    apply_recompute(blocks, recompute)
    for block in blocks:  # aot_eager: the graphs that inductor would get, without waiting for a C++ compiler
        block.forward = torch.compile(block.forward, backend="aot_eager")
    nll_sum = model(*sequences())
    nll_sum.backward()
    return nll_sum.item(), gradients(model)


@pytest.mark.parametrize(
    "config,sequence_parallel,recompute", [(MHA, True, "selective"), (MQA_TIED, False, "none")]
)
def test_compiled_blocks_give_the_same(config, sequence_parallel, recompute):
    plain = Llama(config)
    nll_sum = plain(*sequences())
    nll_sum.backward()
    its_loss, its_gradients = run_on(2, compiled_backward, config, sequence_parallel, recompute)[1]
    assert_close(its_loss, nll_sum.item(), rtol=1e-6, atol=0)
    assert_gradients_equal(its_gradients, gradients(plain))


# ---- biases ----


def model_with_biases(config: LlamaConfig) -> Llama:
    """A model whose q, k and v have biases, as in Qwen2."""
    model = Llama(config)
    for block in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            old = getattr(block.self_attn, name)
            linear = torch.nn.Linear(old.in_features, old.out_features, device=old.weight.device)
            setattr(block.self_attn, name, linear)
    return model


def logits_with_biases(config, tp):
    """Initial weights, and the logits once the biases are not zero."""
    with torch.device("meta"):
        model = model_with_biases(config)
    if tp > 1:
        apply_tensor_parallel(model, tp_mesh(tp))
    model.to_empty(device="cpu")
    init_weights(model, seed=0)
    initial = whole(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.fill_(0.5)
        return initial, model(sequences()[0])


@pytest.mark.parametrize("config", [GQA, MQA_TIED], ids=["split heads", "shared heads"])
def test_biases_start_at_zero_and_are_split_with_their_layers(config):
    expected_initial, expected = run_on(1, logits_with_biases, config, 1)[0]
    for initial, logits in run_on(2, logits_with_biases, config, 2):
        assert_close(logits, expected, rtol=0, atol=1e-5)
        for name, value in expected_initial.items():
            assert torch.equal(initial[name], value), name
            if name.endswith("bias"):
                assert not value.any()
            elif "norm" in name:
                assert (value == 1).all()


# ---- with ZeRO outside ----


def train(model: Llama, dp_rank: int, dp: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5)
    tokens, labels = sequences(n_sequences=4)
    n_scored, mine, losses = (labels != -100).sum(), slice(dp_rank * 4 // dp, (dp_rank + 1) * 4 // dp), []
    for _ in range(5):
        nll_mean = model(tokens[mine], labels[mine]) / n_scored
        (nll_mean * dp).backward()  # ZeRO averages over dp; we want the sum
        optimizer.step()
        optimizer.zero_grad()
        losses.append(nll_mean.item())  # of this rank's sequences
    return losses


def train_split(config, dp, tp, sequence_parallel):
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    with torch.device("meta"):
        model = Llama(config)
    apply_tensor_parallel(model, mesh["tp"], sequence_parallel)
    apply_recompute(list(model.model.layers), "full")
    if dp > 1:
        for module in [*model.model.layers, model]:
            fully_shard(module, mesh=mesh["dp"])
    model.to_empty(device="cpu")
    init_weights(model, seed=0)
    initial = whole(model)
    return initial, train(model, mesh.get_local_rank("dp"), dp), whole(model)


@pytest.mark.parametrize(
    "config,dp,tp,sequence_parallel",
    [
        (GQA, 2, 2, True),
        pytest.param(MQA_TIED, 2, 2, True, marks=pytest.mark.slow),
        (MQA_TIED, 2, 2, False),
        (MQA_TIED, 1, 2, True),
    ],
    ids=["gqa", "shared-kv-tied", "shared-kv-tied-whole", "no-zero"],
)
def test_five_adamw_steps_equal_one_process(config, dp, tp, sequence_parallel):
    plain = Llama(config)
    initial = {name: weight.detach().clone() for name, weight in plain.named_parameters()}
    plain_losses = train(plain, dp_rank=0, dp=1)
    results = run_on(dp * tp, train_split, config, dp, tp, sequence_parallel)
    for its_initial, _, its_final in results:
        for name, weight in plain.named_parameters():
            assert torch.equal(its_initial[name], initial[name]), name
            assert_close(its_final[name], weight.detach(), rtol=0, atol=1e-5)
    for step, expected in enumerate(plain_losses):
        losses = [results[rank][1][step] for rank in range(dp * tp)]
        # the same on every tp rank
        assert all(losses[rank] == losses[rank // tp * tp] for rank in range(dp * tp))
        assert abs(sum(losses[::tp]) - expected) < 2e-5


# ---- what travels and what is held ----


def count(comm: CommDebugMode) -> dict[str, int]:
    names = {
        "all_gather_into_tensor": "all-gather",
        "reduce_scatter_tensor": "reduce-scatter",
        "all_reduce": "all-reduce",
        "allreduce_": "all-reduce",
    }
    counts = Counter()
    for op, n in comm.get_comm_counts().items():
        counts[names[str(op).split(".")[1]]] += n
    return dict(counts)


def count_collectives(config, sequence_parallel):
    model = split_model(config, tp_mesh(2), sequence_parallel)
    whole_counts, block_counts = [], []
    with CommDebugMode() as comm:
        nll_sum = model(*sequences())
    whole_counts.append(count(comm))
    with CommDebugMode() as comm:
        nll_sum.backward()
    whole_counts.append(count(comm))
    x = torch.randn(2, T // 2 if sequence_parallel else T, config.hidden_size, requires_grad=True)
    rope = tuple(torch.ones(1, T, 1, config.head_dim // 2) for _ in range(2))
    with CommDebugMode() as comm:
        out = model.model.layers[0](x, rope, model.attention)
    block_counts.append(count(comm))
    with CommDebugMode() as comm:
        out.sum().backward()
    block_counts.append(count(comm))
    return block_counts, whole_counts


def count_lora_collectives(config, sequence_parallel, targets):
    """Of a block whose own weights are frozen and whose `targets` have adapters: forward, backward."""
    model = Llama(config)
    apply_lora(model, LoraConfig(rank=2, targets=targets))
    apply_lora_parallel(model, tp_mesh(2))
    apply_tensor_parallel(model, tp_mesh(2), sequence_parallel)
    x = torch.randn(2, T // 2 if sequence_parallel else T, config.hidden_size, requires_grad=True)
    rope = tuple(torch.ones(1, T, 1, config.head_dim // 2) for _ in range(2))
    with CommDebugMode() as forward:
        out = model.model.layers[0](x, rope, model.attention)
    with CommDebugMode() as backward:
        out.sum().backward()
    return count(forward), count(backward)


def planned(config, sequence_parallel, modules: dict[str, int]) -> list[dict[str, int]]:
    """Collectives of forward and of backward that the plan's rows state, for {pattern of modules: how many of
    each}."""
    totals = [{}, {}]
    for name, row in tensor_plan(config, 2, sequence_parallel).items():
        n_modules = next((n for pattern, n in modules.items() if fnmatch(name, pattern)), 0)
        for total, stated in zip(totals, (row.forward, row.backward), strict=True):
            for collective, n in stated.items():
                total[collective] = total.get(collective, 0) + n * n_modules
    return [{collective: n for collective, n in total.items() if n} for total in totals]


@pytest.mark.parametrize(
    "sequence_parallel,n_kv_heads,a_block",
    [
        # norms
        (
            True,
            2,
            [{"all-gather": 2, "reduce-scatter": 2}, {"all-gather": 2, "reduce-scatter": 2, "all-reduce": 2}],
        ),
        # and k, v
        (
            True,
            1,
            [{"all-gather": 2, "reduce-scatter": 2}, {"all-gather": 2, "reduce-scatter": 2, "all-reduce": 4}],
        ),
        (False, 2, [{"all-reduce": 2}] * 2),
        (False, 1, [{"all-reduce": 2}, {"all-reduce": 4}]),
    ],
)
def test_a_block_and_a_whole_step_cost_the_collectives_of_the_plan(sequence_parallel, n_kv_heads, a_block):
    config = replace(GQA, num_key_value_heads=n_kv_heads)
    block, step = run_on(2, count_collectives, config, sequence_parallel)[0]
    assert block == planned(config, sequence_parallel, {"model.layers*": 1}) == a_block
    parts = {"model.layers*": 2, "model.embed_tokens": 1, "model.norm": 1, "token_loss": 1}
    assert step == planned(config, sequence_parallel, parts)


@pytest.mark.parametrize("targets", [LoraConfig.targets, ("q_proj", "v_proj"), ("o_proj",)])
@pytest.mark.parametrize("sequence_parallel,n_kv_heads", [(True, 2), (True, 1), (False, 2), (False, 1)])
def test_adapters_cost_nothing_in_forward_and_in_backward_the_sums_of_their_rows(
    sequence_parallel, n_kv_heads, targets
):
    config = replace(GQA, num_key_value_heads=n_kv_heads)
    of = lambda name: name.split(".")[-2].removesuffix("_lora")
    adapters = [row for name, row in lora_plan(config, 2).items() if of(name) in targets]
    assert len(adapters) == 2 * len(targets) and not any(row.forward for row in adapters)
    # A frozen block has no sums of its own weights' gradients: those of norms, and of heads that ranks share.
    activations = {"all-gather": 2, "reduce-scatter": 2} if sequence_parallel else {"all-reduce": 2}
    forward, backward = run_on(2, count_lora_collectives, config, sequence_parallel, targets)[0]
    assert forward == activations
    assert backward == sum((Counter(row.backward) for row in adapters), Counter(activations))


class Widths(TorchDispatchMode):
    """The last dims of all tensors with a row per token that operations give, as this rank holds them."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                shape = tensor.to_local().shape if isinstance(tensor, DTensor) else tensor.shape
                if shape[:-1].numel() == 2 * T:
                    self.seen.add(shape[-1])
        return result


def widths_seen(sequence_parallel):
    model = split_model(GQA, tp_mesh(2), sequence_parallel)
    tokens, labels = sequences()
    with Widths() as with_labels:
        model(tokens, labels).backward()
    with Widths() as without_labels:
        model(tokens)
    return with_labels.seen, without_labels.seen


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_whole_logits_are_never_made_when_there_are_labels(sequence_parallel):
    with_labels, without_labels = run_on(2, widths_seen, sequence_parallel)[0]
    assert 49 in with_labels and 97 not in with_labels  # 49: this rank's rows of the 97
    assert 97 in without_labels  # the spy would have seen them


# ---- logits, generation, pipeline stages ----


def generate_logits(config, tp):
    tokens, _ = sequences()
    with torch.no_grad():
        at_once = split_model(config, tp_mesh(tp), sequence_parallel=True)(tokens)
        model, cache = split_model(config, tp_mesh(tp), sequence_parallel=False), KVCache(T)
        one_by_one = [
            model(tokens[:, start:end], cache=cache) for start, end in ((0, 5), (5, 6), (6, 7), (7, 12))
        ]
    return at_once, torch.cat(one_by_one, dim=1)


@pytest.mark.parametrize("config,tp", [(GQA, 2), (MQA_TIED, 4)])
def test_without_labels_every_rank_gets_whole_logits_with_a_cache_too(config, tp):
    with torch.no_grad():
        expected = Llama(config)(sequences()[0])
    for at_once, one_by_one in run_on(tp, generate_logits, config, tp):
        assert_close(at_once, expected, rtol=0, atol=1e-5)
        assert_close(one_by_one, expected[:, :12], rtol=0, atol=1e-5)


def two_stages(sequence_parallel, documents):
    with torch.device("meta"):
        first, last = Llama(GQA), Llama(GQA)
    first.model.layers[1] = first.model.norm = first.lm_head = None
    last.model.embed_tokens = last.model.layers[0] = None
    for stage in (first, last):
        apply_tensor_parallel(stage, tp_mesh(2), sequence_parallel)
        stage.to_empty(device="cpu")
        init_weights(stage, seed=0)
    tokens, labels = sequences()
    positions = packed_positions() if documents else None
    hidden = first(tokens, positions=positions)
    nll_sum = last(hidden, labels, positions)
    nll_sum.backward()
    return tuple(hidden.shape), nll_sum.item(), gradients(first) | gradients(last)


@pytest.mark.parametrize("sequence_parallel,documents", [(True, False), (True, True), (False, False)])
def test_pipeline_stages_hand_on_plain_hidden_states(sequence_parallel, documents):
    plain = Llama(GQA)
    nll_sum = plain(*sequences(), packed_positions() if documents else None)
    nll_sum.backward()
    for shape, its_loss, its_gradients in run_on(2, two_stages, sequence_parallel, documents):
        assert shape == (2, T // 2 if sequence_parallel else T, GQA.hidden_size)
        assert_close(its_loss, nll_sum.item(), rtol=1e-6, atol=0)
        assert_gradients_equal(its_gradients, gradients(plain))


# ---- refusals ----

LLAMA_70B = LlamaConfig.preset("llama2-70b")


def test_a_rank_has_whole_key_value_heads_or_shares_one():
    k_proj = "model.layers.*.self_attn.k_proj"
    assert tensor_plan(LLAMA_70B, 16)[k_proj].weight == "R"  # 8 heads, each for two ranks
    assert tensor_plan(LLAMA_70B, 8)[k_proj].weight == "S(0)"


def odd_sequence():
    model = split_model(MHA, tp_mesh(2), sequence_parallel=True)
    with pytest.raises(UsageError, match="a sequence has 31; use a multiple of 2"):
        model(sequences()[0][:, :31])


def test_a_sequence_that_cannot_be_split_is_refused_not_cut():
    run_on(2, odd_sequence)
