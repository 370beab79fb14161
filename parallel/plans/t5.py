"""T5: encoder, decoder and cross-attention. The relative bias has a column for each head, and the decoder
reads the labels, moved by one."""

from torch import Tensor, nn

from parallel.plans.family import Family
from parallel.plans.styles import AR, AR3, COLUMNS, EMBED, HEAD, NONE, PER_HEAD, ROWS, WHOLE
from parallel.tensor import Row

# fmt: off
BLOCK = {                                                                     # forward, backward
    "layer.*.layer_norm":        Row(WHOLE,   "R",    "(B, T, D), as it was", NONE, NONE),
    "layer.*.SelfAttention.q":   Row(COLUMNS, "S(0)", "(B, T, D) -> (B, T, H/tp E)", NONE, AR),  # q, k, v
    "layer.*.SelfAttention.k":   Row(COLUMNS, "S(0)", "(B, T, D) -> (B, T, H/tp E)", NONE, NONE),
    "layer.*.SelfAttention.v":   Row(COLUMNS, "S(0)", "(B, T, D) -> (B, T, H/tp E)", NONE, NONE),
    "layer.*.SelfAttention.o":   Row(ROWS,    "S(1)", "(B, T, H/tp E) -> (B, T, D)", AR, NONE),
    "layer.*.SelfAttention.relative_attention_bias": Row(PER_HEAD, "S(1)", "-> (T, T, H/tp)", NONE, NONE),
    "layer.*.EncDecAttention.q": Row(COLUMNS, "S(0)", "(B, T, D) -> (B, T, H/tp E)", NONE, AR),
    "layer.*.EncDecAttention.k": Row(COLUMNS, "S(0)", "(B, S, D) -> (B, S, H/tp E)", NONE, AR),  # k, v
    "layer.*.EncDecAttention.v": Row(COLUMNS, "S(0)", "(B, S, D) -> (B, S, H/tp E)", NONE, NONE),
    "layer.*.EncDecAttention.o": Row(ROWS,    "S(1)", "(B, T, H/tp E) -> (B, T, D)", AR, NONE),
    "layer.*.DenseReluDense.wi": Row(COLUMNS, "S(0)", "(B, T, D) -> (B, T, F/tp)", NONE, AR),
    "layer.*.DenseReluDense.wi_0": Row(COLUMNS, "S(0)", "(B, T, D) -> (B, T, F/tp)", NONE, AR),  # both
    "layer.*.DenseReluDense.wi_1": Row(COLUMNS, "S(0)", "(B, T, D) -> (B, T, F/tp)", NONE, NONE),
    "layer.*.DenseReluDense.wo": Row(ROWS,    "S(1)", "(B, T, F/tp) -> (B, T, D)", AR, NONE),
}
ENDS = {
    "shared":                    Row(EMBED, "S(0)", "the matrix of the other two; not called", NONE, NONE),
    "encoder.embed_tokens":      Row(EMBED, "S(0)", "(B, S) -> (B, S, D)",     AR, NONE),
    "decoder.embed_tokens":      Row(EMBED, "S(0)", "(B, T) -> (B, T, D)",     AR, NONE),
    "encoder.final_layer_norm":  Row(WHOLE, "R",    "(B, S, D), as it was",    NONE, NONE),
    "decoder.final_layer_norm":  Row(WHOLE, "R",    "(B, T, D), as it was",    NONE, NONE),
    "lm_head":                   Row(HEAD,  "S(0)", "(B, T, D) -> (B, T, V/tp)", NONE, AR),
    "token_loss":                Row(None,  "",     "(B, T, V/tp) -> scalar",  AR3, NONE),
}
# fmt: on


def with_decoder_tokens(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    """Return the arguments of forward: the decoder reads the labels before the one that it predicts."""
    return {"decoder_input_ids": model._shift_right(labels), **inputs}


T5 = Family(
    architecture="T5ForConditionalGeneration",
    blocks=("encoder.block", "decoder.block"),
    block=BLOCK,
    ends=ENDS,
    embedding="shared",
    local_heads={
        f"layer.*.{name}": ("n_heads", "inner_dim") for name in ("SelfAttention", "EncDecAttention")
    },
    shifts_labels=False,
    inputs=with_decoder_tokens,
)
