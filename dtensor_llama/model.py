"""The LLaMA decoder (arXiv:2302.13971, arXiv:2307.09288), with Hugging Face's module names, so that weights
need no converting. Families that are shaped like it (families.py) are this model too: biases on q, k and v,
norms of heads, sliding windows, layers without RoPE, and scaled RoPE are settings of its config.

Two parts can be replaced. Set either once on the model, before `parallelize`, which carries it into every
pipeline stage and every layout, or refuses it in words:

    model.token_loss = mine         loss(logits, labels, vocab) -> (tokens,): two lines, see loss.py
    model.attention = Mine(...)     positions, mask and attention of this rank's tokens: see attention.py

The module knows no mesh and no rank: parallel/ rewrites it from outside. So it reads head counts off the
tensors it gets (tensor parallelism leaves a share of the heads), and modules of another pipeline stage are
None (embed_tokens, layers[i], norm, lm_head).

Shape letters: B sequences, T tokens per sequence, D model width, H query heads, K key/value heads, E head
width, V vocabulary.
"""

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtensor_llama.attention import AttentionMask, WholeSequences
from dtensor_llama.config import LlamaConfig
from dtensor_llama.errors import UsageError
from dtensor_llama.initial_weights import init_weights
from dtensor_llama.loss import TokenLoss, Vocabulary, token_loss_sum, token_nll

if TYPE_CHECKING:
    from dtensor_llama.generate import KVCache


def rope_frequencies(config: LlamaConfig, n_tokens: int, device: torch.device) -> Tensor:
    """Return by how many radians each pair of dims is rotated a token, (E/2,) float32.

    n_tokens: the length of whole sequences, on which `dynamic` scaling depends.
    Source: Su et al. 2021, arXiv:2104.09864, sec. 3.2.2. Scalings: linear is Chen et al. 2023,
    arXiv:2306.15595; dynamic is described by Peng et al. 2023, arXiv:2309.00071; llama3 is in the code that
    Meta published with LLaMA-3.1.
    """
    E, theta, scaling = config.head_dim, config.rope_theta, config.rope_scaling or {}
    kind, factor = scaling.get("rope_type"), scaling.get("factor", 1)
    if kind == "dynamic" and n_tokens > config.max_position_embeddings:
        # The largest wavelength grows with the sequence, so that it stays within what was trained.
        stretch = factor * n_tokens / config.max_position_embeddings - (factor - 1)
        theta = theta * stretch ** (E / (E - 2))
    frequencies = theta ** -(torch.arange(0, E, 2, dtype=torch.float32, device=device) / E)
    if kind == "linear":
        return frequencies / factor
    if kind == "llama3":
        # Waves that turn often within the original context stay, those that turn seldom are slowed, and
        # between the two the frequency is interpolated.
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / factor)
    return frequencies


def rope_tables(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of the rotary angles at `positions` (B, T).

    They are two (B, T, 1, E/2) float32 tensors, to be broadcast over heads; angles are in radians. Each
    forward makes them anew from the positions, so that no buffer can be cast to bfloat16 (wrong by radians at
    position 4,000) or be lost on `meta`.
    """
    angles = positions[..., None].float() * frequencies  # (B, T, E/2)
    return angles.cos()[:, :, None], angles.sin()[:, :, None]


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x (B, T, heads, E) in float32. Dims i and i + E/2 are a pair, as in Hugging Face's weights; in
    Meta's 2i and 2i + 1 are."""
    cos, sin = rope
    first, second = x.float().chunk(2, dim=-1)  # (B, T, heads, E/2) each
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class LlamaAttention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        D, E = config.hidden_size, config.head_dim
        self.layer, self.head_dim = layer, E
        has_bias = config.family.qkv_bias
        self.q_proj = nn.Linear(D, config.num_attention_heads * E, bias=has_bias)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * E, bias=has_bias)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * E, bias=has_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * E, D, bias=False)
        self.q_norm = self.k_norm = None
        if config.family.qk_norm:  # each head by itself, with the same weight (E,) for all heads
            self.q_norm = nn.RMSNorm(E, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(E, eps=config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        attention: WholeSequences,
        mask: AttentionMask | None,
        cache: "KVCache | None",
    ) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # (B, T, H, E): -1, as tp holds a share of H
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, E)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, S, K, E), S tokens seen so far
        return self.o_proj(attention(q, k, v, mask).reshape(B, T, -1))


class LlamaMLP(nn.Module):
    """Computes SwiGLU: down(silu(gate(x)) * up(x)). Source: Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    """Maps (B, T, D) to (B, T, D). Each half normalises its input, and its output is added to the stream."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = LlamaAttention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    # The attention object is an argument, and not stored in each block: compiled blocks that each have an
    # object of their own would be compiled one by one.
    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None,  # None: a layer that does not rotate
        attention: WholeSequences,
        mask: AttentionMask | None = None,
        cache: "KVCache | None" = None,
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, attention, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


@functools.cache
def block_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter of a block, by its name inside the block; do not change the dict."""
    with torch.device("meta"):
        block = LlamaBlock(config, layer=0)
    return {name: tuple(parameter.shape) for name, parameter in block.named_parameters()}


class LlamaModel(nn.Module):
    """Maps tokens (B, T) to normalised hidden states (B, T, D): everything below the head."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = WholeSequences()
        # How many ranks share the tokens of the hidden states that a later pipeline stage receives: those of
        # tp under sequence parallelism. The first stage receives all tokens.
        self.sequence_shards = 1

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, cache: "KVCache | None" = None
    ) -> Tensor:
        config, n_tokens = self.config, tokens.shape[1] * self.sequence_shards
        # The length of whole sequences: with the tokens of all cp ranks, and with those in the cache.
        n_whole = n_tokens * self.attention.sequence_ranks + (0 if cache is None else cache.n_seen)
        self._refuse_growing_documents(positions)
        positions, mask = self.attention.prepare(n_tokens, positions, cache, tokens.device)
        near = mask
        if config.hides_tokens(n_whole):
            near = self.attention.near(mask, config.sliding_window, n_tokens, cache, tokens.device)
        rope = rope_tables(positions, rope_frequencies(config, n_whole, tokens.device))
        x = tokens if self.embed_tokens is None else self.embed_tokens(tokens)  # (B, T, D)
        for layer, block in enumerate(self.layers):
            if block is not None:
                own_mask = mask if config.window(layer) is None else near
                x = block(x, rope if config.rotates(layer) else None, self.attention, own_mask, cache)
        if cache is not None:
            cache.n_seen += tokens.shape[1]
        return x if self.norm is None else self.norm(x)

    def _refuse_growing_documents(self, positions: Tensor | None) -> None:
        """Raise UsageError if dynamic RoPE would depend on how a batch is cut into microbatches, because it
        would go by the longest document of each."""
        config = self.config
        dynamic = (config.rope_scaling or {}).get("rope_type") == "dynamic"
        if dynamic and positions is not None and positions.shape[1] > config.max_position_embeddings:
            raise UsageError(
                f"rope_scaling of type dynamic goes by the length of a sequence, and packed documents in "
                f"sequences of {positions.shape[1]} tokens have several lengths; use a seq_len of at most "
                f"max_position_embeddings={config.max_position_embeddings}, or no document mask."
            )


@dataclass(frozen=True)
class OnHost:
    """Wraps an argument of a module that has to stay on the CPU. FSDP would move it if it were a tensor."""

    tensor: Tensor


class Llama(nn.Module):
    """The decoder with its head. Made under `torch.device("meta")` it costs nothing; call `to_empty` and then
    `init_weights` or `load_hf`. Made on a real device it has the initial weights of seed 0 at once.

    token_loss, attention: see the first lines of this file.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        # save_hf writes this into generation_config.json; None: it makes one from `config`.
        self.generation_config: dict | None = None
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._token_loss: TokenLoss = token_nll
        self.is_parallel = False  # set by `parallelize`
        # Tensor parallelism replaces it by one whose columns are split over the ranks.
        self.vocabulary = Vocabulary(config.vocab_size)
        self.tie()
        if not self.lm_head.weight.is_meta:
            init_weights(self, seed=0)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        positions: Tensor | OnHost | None = None,
        cache: "KVCache | None" = None,
    ) -> Tensor:
        """Return the logits (B, T, V) of tokens (B, T) int64; with labels (B, T), the float32 sum of the
        token losses in nats.

        labels[b, t] is the token that position t must predict (the batch has them shifted already), or -100
        where there is none. With labels the logits never exist as a whole. positions (B, T), on any device,
        are Hugging Face's position_ids: they restart at 0 where a document begins; without them a sequence is
        one document. cache: the keys and values of earlier tokens, for generation.
        """
        if isinstance(positions, OnHost):
            positions = positions.tensor
        hidden = self.model(tokens, positions, cache)
        if self.lm_head is None:  # a pipeline stage before the last
            return hidden
        if labels is None:
            return self.lm_head(hidden)
        return self.loss_sum(hidden, labels)

    def loss_sum(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return the float32 sum of the token losses, from the hidden states below the head."""
        return token_loss_sum(hidden, self.lm_head.weight, labels, self.token_loss, self.vocabulary)

    @property
    def token_loss(self) -> TokenLoss:
        return self._token_loss

    @token_loss.setter
    def token_loss(self, token_loss: TokenLoss) -> None:
        self._refuse_late("token_loss")
        self._token_loss = token_loss

    @property
    def attention(self) -> WholeSequences:
        return self.model.attention

    @attention.setter
    def attention(self, attention: WholeSequences) -> None:
        self._refuse_late("attention")
        self.model.attention = attention

    def _refuse_late(self, name: str) -> None:
        if self.is_parallel:
            raise UsageError(
                f"model.{name} was set after parallelize, which assemble calls and which carries it into "
                "every stage; set it before."
            )

    def tie(self) -> None:
        """Make a tied matrix one parameter again, where both ends of the model are here."""
        ends = self.lm_head, self.model.embed_tokens
        if self.config.tie_word_embeddings and None not in ends:
            self.lm_head.weight = self.model.embed_tokens.weight

    def to_empty(self, **kwargs) -> "Llama":
        """Do what nn.Module.to_empty does, and keep tied matrices one: it would leave two."""
        super().to_empty(**kwargs)
        self.tie()
        return self
