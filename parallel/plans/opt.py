"""OPT: biases everywhere, positions from 2 on, and in OPT-350M projections of the embeddings and back."""

from parallel.plans.family import Family, Stages
from parallel.plans.styles import AR, AR3, COLUMNS, EMBED, HEAD, NONE, ROWS, WHOLE
from parallel.tensor import Row

# fmt: off
BLOCK = {                                                                        # forward, backward
    "self_attn_layer_norm": Row(WHOLE,   "R",    "(B, T, D), as it was",         NONE, NONE),
    "self_attn.q_proj":     Row(COLUMNS, "S(0)", "(B, T, D) -> (B, T, H/tp E)",  NONE, AR),  # q, k, v
    "self_attn.k_proj":     Row(COLUMNS, "S(0)", "(B, T, D) -> (B, T, H/tp E)",  NONE, NONE),
    "self_attn.v_proj":     Row(COLUMNS, "S(0)", "(B, T, D) -> (B, T, H/tp E)",  NONE, NONE),
    "self_attn.out_proj":   Row(ROWS,    "S(1)", "(B, T, H/tp E) -> (B, T, D)",  AR, NONE),
    "final_layer_norm":     Row(WHOLE,   "R",    "(B T, D), as it was",          NONE, NONE),
    "fc1":                  Row(COLUMNS, "S(0)", "(B T, D) -> (B T, F/tp)",      NONE, AR),
    "fc2":                  Row(ROWS,    "S(1)", "(B T, F/tp) -> (B T, D)",      AR, NONE),
}
ENDS = {
    "model.decoder.embed_tokens":     Row(EMBED, "S(0)", "(B, T) -> (B, T, W)",  AR, NONE),
    "model.decoder.embed_positions":  Row(WHOLE, "R", "(B, T) -> (B, T, D)",     NONE, NONE),
    "model.decoder.project_in":       Row(WHOLE, "R", "(B, T, W) -> (B, T, D)",  NONE, NONE),
    "model.decoder.project_out":      Row(WHOLE, "R", "(B, T, D) -> (B, T, W)",  NONE, NONE),
    "model.decoder.final_layer_norm": Row(WHOLE, "R", "(B, T, D), as it was",    NONE, NONE),
    "lm_head":                        Row(HEAD, "S(0)", "(B, T, W) -> (B, T, V/tp)", NONE, AR),
    "token_loss":                     Row(None, "",  "(B, T, V/tp) -> scalar",   AR3, NONE),
}
# fmt: on

OPT = Family(
    architecture="OPTForCausalLM",
    blocks=("model.decoder.layers",),
    block=BLOCK,
    ends=ENDS,
    embedding="model.decoder.embed_tokens",
    local_heads={"self_attn": ("num_heads",)},
    stages=Stages(
        first=("model.decoder.embed_tokens", "model.decoder.project_in"),
        added=("model.decoder.embed_positions",),
        last=("model.decoder.final_layer_norm", "model.decoder.project_out"),
    ),
)
