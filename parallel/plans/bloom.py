"""BLOOM. query_key_value has q, k and v of a head next to each other, so whole heads are whole rows; ALiBi is
made for all heads, and each rank takes what is for its own."""

from parallel.plans.family import Family, Stages
from parallel.plans.styles import AR, AR3, COLUMNS, EMBED, HEAD, NONE, ROWS, WHOLE, Style, WithOwnHeads
from parallel.tensor import Row

OWN_ALIBI = Style(WithOwnHeads, per_head="alibi")
# fmt: off
BLOCK = {                                                                            # forward, backward
    "input_layernorm":                Row(WHOLE,     "R",    "(B, T, D), as it was",          NONE, NONE),
    "self_attention":                 Row(OWN_ALIBI, "",     "alibi (B H, 1, T): B H/tp",      NONE, NONE),
    "self_attention.query_key_value": Row(COLUMNS,   "S(0)", "(B, T, D) -> (B, T, H/tp 3 E)", NONE, AR),
    "self_attention.dense":           Row(ROWS,      "S(1)", "(B, T, H/tp E) -> (B, T, D)",   AR, NONE),
    "post_attention_layernorm":       Row(WHOLE,     "R",    "(B, T, D), as it was",          NONE, NONE),
    "mlp.dense_h_to_4h":              Row(COLUMNS,   "S(0)", "(B, T, D) -> (B, T, 4 D/tp)",   NONE, AR),
    "mlp.dense_4h_to_h":              Row(ROWS,      "S(1)", "(B, T, 4 D/tp) -> (B, T, D)",   AR, NONE),
}
ENDS = {
    "transformer.word_embeddings":           Row(EMBED, "S(0)", "(B, T) -> (B, T, D)",        AR, NONE),
    "transformer.word_embeddings_layernorm": Row(WHOLE, "R",    "(B, T, D), as it was",       NONE, NONE),
    "transformer.ln_f":                      Row(WHOLE, "R",    "(B, T, D), as it was",       NONE, NONE),
    "lm_head":                               Row(HEAD,  "S(0)", "(B, T, D) -> (B, T, V/tp)",  NONE, AR),
    "token_loss":                            Row(None,  "",     "(B, T, V/tp) -> scalar",     AR3, NONE),
}
# fmt: on

BLOOM = Family(
    architecture="BloomForCausalLM",
    blocks=("transformer.h",),
    block=BLOCK,
    ends=ENDS,
    embedding="transformer.word_embeddings",
    local_heads={"self_attention": ("num_heads",)},
    stages=Stages(
        first=("transformer.word_embeddings", "transformer.word_embeddings_layernorm"),
        last=("transformer.ln_f",),
        block_returns_tuple=True,
    ),
)
