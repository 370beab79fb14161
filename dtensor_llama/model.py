"""The LLaMA decoder (arXiv:2302.13971, arXiv:2307.09288), with Hugging Face's module names, so weights need
no converting.

Shape letters: B rows, T tokens per row, D model width, H query heads, K key/value heads, E head width, V
vocabulary. The module knows no mesh and no rank: parallel/ rewrites it from outside. So it reads head counts
off the tensors it gets
(tensor parallelism leaves a share of the heads), and what needs the other ranks can be replaced:
    self_attn.attend(q, k, v, documents)            attention over the whole sequence         (context parallelism)
    model.locate(tokens, positions, cache)          which positions this rank's tokens have   (context parallelism)
    cross_entropy(hidden, lm_head.weight, labels)   the loss over the whole vocabulary        (tensor parallelism)
    embed_tokens, layers[i], norm, lm_head          None where another pipeline stage has them
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtensor_llama.attention import Documents, attention
from dtensor_llama.config import LlamaConfig
from dtensor_llama.loss import cross_entropy_sum


def rope_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles at `positions` (B, T).

    Returns two (B, T, 1, E/2) float32 tensors, to be broadcast over heads; angles in radians, theta the base
    of the frequencies. Made anew in each forward from the positions, so that no buffer can be cast to
    bfloat16 (wrong by radians at position 4,000) or be lost on `meta`. Source: Su et al. 2021,
    arXiv:2104.09864, sec. 3.2.2.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[..., None].float() * theta**-exponents  # (B, T, E/2)
    return angles.cos()[:, :, None], angles.sin()[:, :, None]


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x (B, T, heads, E) in float32; dims i and i + E/2 are a pair (Hugging Face's order; Meta's is
    2i, 2i + 1)."""
    cos, sin = rope
    first, second = x.float().chunk(2, dim=-1)  # (B, T, heads, E/2) each
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class KVCache:
    """Keys and values of the tokens already seen, per layer (B, max_tokens, K, E); filled in order.

    padding: (B,) how many tokens at the start of each row are no tokens, so that rows of unequal length end
        together."""

    def __init__(self, max_tokens: int, padding: Tensor | None = None):
        self.max_tokens, self.n_seen, self.padding = max_tokens, 0, padding
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, T, K, E) of the new tokens; returns all of them (B, n_seen + T, K, E)."""
        if layer not in self.layers:
            self.layers[layer] = tuple(x.new_empty(x.shape[0], self.max_tokens, *x.shape[2:]) for x in (k, v))
        end = self.n_seen + k.shape[1]
        for stored, new in zip(self.layers[layer], (k, v), strict=True):
            stored[:, self.n_seen : end] = new
        return tuple(x[:, :end] for x in self.layers[layer])


class LlamaAttention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        D, E = config.hidden_size, config.head_dim
        self.layer, self.head_dim = layer, E
        self.attend = partial(attention, kernel="sdpa")  # Llama.set_attention changes it
        self.q_proj = nn.Linear(D, config.num_attention_heads * E, bias=False)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * E, bias=False)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * E, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * E, D, bias=False)

    def forward(self, x: Tensor, rope, documents: Documents | None, cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # (B, T, H, E): -1, as tp holds a share of H
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, E)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, S, K, E), S tokens seen so far
        return self.o_proj(self.attend(q, k, v, documents=documents).reshape(B, T, -1))


class LlamaMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). Source: Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    """(B, T, D) -> (B, T, D): each half normalises its input and adds its output to the stream."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = LlamaAttention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(
        self, x: Tensor, rope, documents: Documents | None = None, cache: KVCache | None = None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, documents, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """Everything below the head: tokens (B, T) -> normalised hidden states (B, T, D)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention_kernel = "sdpa"

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        positions, documents = self.locate(tokens, positions, cache)
        rope = rope_tables(positions, self.config.head_dim, self.config.rope_theta)
        x = tokens if self.embed_tokens is None else self.embed_tokens(tokens)  # (B, T, D)
        for block in self.layers:
            if block is not None:
                x = block(x, rope, documents, cache)
        if cache is not None:
            cache.n_seen += tokens.shape[1]
        return x if self.norm is None else self.norm(x)

    def locate(
        self, tokens: Tensor, positions: Tensor | None, cache: KVCache | None
    ) -> tuple[Tensor, Documents | None]:
        """The positions of `tokens` (B or 1, T) on their device, for RoPE, and the documents of packed rows,
        if any."""
        if positions is None:  # one document a row
            first = cache.n_seen if cache is not None else 0
            at = torch.arange(first, first + tokens.shape[1], device=tokens.device)[None]  # (1, T)
            if cache is None or cache.padding is None:
                return at, None
            key, padding = torch.arange(first + tokens.shape[1], device=tokens.device), cache.padding[:, None]
            seen = (key >= padding)[:, None] & (key <= at[..., None])  # (B, T, S)
            seen = seen | (key == at[..., None])  # a row of the softmax without any key would be nan
            # RoPE is relative: padding moves all positions of a row alike
            return at, Documents(mask=seen[:, None])
        documents = Documents.from_positions(positions, self.attention_kernel, tokens.device)
        return positions.to(tokens.device, non_blocking=True), documents


@dataclass(frozen=True)
class OnHost:
    """A tensor among a module's arguments that has to stay on the CPU, where FSDP leaves alone what is no
    tensor."""

    tensor: Tensor


class Llama(nn.Module):
    """The whole model. `Llama(config)` under `torch.device("meta")` costs nothing; then `to_empty` and
    `init_weights` or `load_hf`. Made on a real device it has the initial weights of seed 0 at once."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        # what save_hf writes into generation_config.json; None: from config
        self.generation_config: dict | None = None
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.cross_entropy = cross_entropy_sum
        self._tie()
        if not self.lm_head.weight.is_meta:
            init_weights(self, seed=0)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        positions: Tensor | OnHost | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """tokens (B, T) int64 -> logits (B, T, V); or, with labels (B, T), the float32 sum of the token
        losses in nats.

        labels[b, t] is the token that position t must predict (shifted by whoever made the batch), -100 where
        nothing is scored. With labels the logits never exist as a whole. positions (B, T), on any device,
        restart at 0 where a document begins; without them a row is one document. cache: keys and values of
        earlier tokens, for generation.
        """
        if isinstance(positions, OnHost):
            positions = positions.tensor
        hidden = self.model(tokens, positions, cache)
        if self.lm_head is None:  # a pipeline stage before the last
            return hidden
        if labels is None:
            return self.lm_head(hidden)
        return self.cross_entropy(hidden, self.lm_head.weight, labels)

    def _tie(self) -> None:
        if (
            self.config.tie_word_embeddings
            and self.lm_head is not None
            and self.model.embed_tokens is not None
        ):
            self.lm_head.weight = self.model.embed_tokens.weight

    def to_empty(self, **kwargs) -> "Llama":
        """As nn.Module.to_empty, which would leave two matrices where one is tied."""
        super().to_empty(**kwargs)
        self._tie()
        return self

    def set_attention(self, kernel: str) -> None:
        """Attend with `flash`, `varlen`, `sdpa` or `math` from now on (`choose_attention` in attention.py:
        what can run)."""
        self.model.attention_kernel = kernel
        for block in self.model.layers:
            if block is not None:
                block.self_attn.attend = partial(attention, kernel=kernel)


INIT_BLOCK_ELEMENTS = 2**20  # what one random stream fills: small enough to skip what other ranks hold


@torch.no_grad()
def init_weights(model: Llama, seed: int) -> None:
    """Give every parameter its initial value: normal(0, initializer_range), norms 1, as Hugging Face does.

    The value of an element depends on the seed, the parameter's name and its place in the whole parameter,
    never on how the parameter is spread: each run of rows has a random stream of its own, made on the CPU,
    and a rank draws only the runs its shards touch. Parameters may be plain or DTensors of any placement; not
    on `meta`.
    """
    from dtensor_llama.weights import local_boxes, values_to_write

    def fill(name: str, first: int, run: int, box: tuple) -> None:
        """Draw `run` rows of a whole parameter from row `first` on, and keep those that lie in the box."""
        offsets, sizes, local = box
        shape = model.get_parameter(name).shape
        key = hashlib.sha256(f"{seed}/{name}/{first}".encode()).digest()
        stream = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
        low = max(first, offsets[0])
        high = min(first + run, offsets[0] + sizes[0])
        target = local[low - offsets[0] : high - offsets[0]]
        n_rows = min(run, shape[0] - first)
        whole_run = target.shape == (n_rows, *shape[1:]) and target.is_contiguous()
        if whole_run and target.dtype == torch.float32 and target.device.type == "cpu":
            # the same numbers, without a copy
            target.normal_(0, model.config.initializer_range, generator=stream)
            return
        rows = torch.empty(n_rows, *shape[1:]).normal_(0, model.config.initializer_range, generator=stream)
        columns = [slice(o, o + s) for o, s in zip(offsets[1:], sizes[1:], strict=True)]
        target.copy_(rows[(slice(low - first, high - first), *columns)])

    # normal_ runs on one core and lets go of the interpreter while it does
    with ThreadPoolExecutor() as threads:
        for name, parameter in model.named_parameters():  # a tied matrix comes once, as the embedding
            run = max(1, INIT_BLOCK_ELEMENTS // max(1, parameter.shape[1:].numel()))  # rows per stream
            with values_to_write(model, name, parameter) as values:
                jobs = []
                for box in local_boxes(values):
                    offsets, sizes, local = box
                    if parameter.dim() == 1:
                        local.fill_(1.0)
                        continue
                    for first in range(offsets[0] // run * run, offsets[0] + sizes[0], run):
                        jobs.append(threads.submit(fill, name, first, run, box))
                for job in jobs:
                    job.result()
