"""GLM and GLM-4. gate_up packs two matrices, and is kept as (2, F, D), so that a rank has its share of both.
(The plan in transformers gathers its output instead.)"""

from dataclasses import replace

from parallel.plans.family import Family, Stages
from parallel.plans.styles import AR, AR3, COLUMNS, EMBED, HEAD, NONE, ROWS, WHOLE, packed
from parallel.tensor import Row

# fmt: off
BLOCK = {                                                                                  # forward, backward
    "input_layernorm":          Row(WHOLE,     "R",    "(B, T, D), as it was",             NONE, NONE),
    "self_attn.q_proj":         Row(COLUMNS,   "S(0)", "(B, T, D) -> (B, T, H/tp E)",    NONE, AR),  # q, k, v
    "self_attn.k_proj":         Row(COLUMNS,   "S(0)", "(B, T, D) -> (B, T, K/tp E)",      NONE, NONE),
    "self_attn.v_proj":         Row(COLUMNS,   "S(0)", "(B, T, D) -> (B, T, K/tp E)",      NONE, NONE),
    "self_attn.o_proj":         Row(ROWS,      "S(1)", "(B, T, H/tp E) -> (B, T, D)",      AR, NONE),
    "post_attention_layernorm": Row(WHOLE,     "R",    "(B, T, D), as it was",             NONE, NONE),
    "mlp.gate_up_proj":         Row(packed(2), "S(1)", "(B, T, D) -> (B, T, 2 F/tp)",      NONE, AR),
    "mlp.down_proj":            Row(ROWS,      "S(1)", "(B, T, F/tp) -> (B, T, D)",        AR, NONE),
}
ENDS = {
    "model.embed_tokens":       Row(EMBED,     "S(0)", "(B, T) -> (B, T, D)",              AR, NONE),
    "model.norm":               Row(WHOLE,     "R",    "(B, T, D), as it was",             NONE, NONE),
    "lm_head":                  Row(HEAD,      "S(0)", "(B, T, D) -> (B, T, V/tp)",        NONE, AR),
    "token_loss":               Row(None,      "",     "(B, T, V/tp) -> scalar",           AR3, NONE),
}
# fmt: on
AFTER = Row(WHOLE, "R", "(B, T, D), as it was", NONE, NONE)  # GLM-4 norms what comes out of both halves, too

GLM = Family(
    architecture="GlmForCausalLM",
    blocks=("model.layers",),
    block=BLOCK,
    ends=ENDS,
    embedding="model.embed_tokens",
    stages=Stages(first=("model.embed_tokens",), last=("model.norm",)),
)
GLM4 = replace(
    GLM,
    architecture="Glm4ForCausalLM",
    block={**BLOCK, "post_self_attn_layernorm": AFTER, "post_mlp_layernorm": AFTER},
)
