"""GPT-2. Its Conv1D weights are (inputs, outputs), transposed to nn.Linear's, and c_attn packs q, k and v."""

from parallel.plans.family import Family, Stages
from parallel.plans.styles import AR, AR3, COLUMNS, EMBED, HEAD, NONE, ROWS, WHOLE, packed
from parallel.tensor import Row

# fmt: off
BLOCK = {                                                                     # forward, backward
    "ln_1":        Row(WHOLE,     "R",    "(B, T, D), as it was",             NONE, NONE),
    "attn.c_attn": Row(packed(3), "S(2)", "(B, T, D) -> (B, T, 3 D/tp)",      NONE, AR),  # kept as (D, 3, D)
    "attn.c_proj": Row(ROWS,      "S(0)", "(B, T, D/tp) -> (B, T, D)",        AR, NONE),
    "ln_2":        Row(WHOLE,     "R",    "(B, T, D), as it was",             NONE, NONE),
    "mlp.c_fc":    Row(COLUMNS,   "S(1)", "(B, T, D) -> (B, T, F/tp)",        NONE, AR),
    "mlp.c_proj":  Row(ROWS,      "S(0)", "(B, T, F/tp) -> (B, T, D)",        AR, NONE),
}
ENDS = {
    "transformer.wte":  Row(EMBED, "S(0)", "(B, T) -> (B, T, D)",             AR, NONE),
    "transformer.wpe":  Row(WHOLE, "R",    "(1, T) -> (1, T, D)",             NONE, NONE),
    "transformer.ln_f": Row(WHOLE, "R",    "(B, T, D), as it was",            NONE, NONE),
    "lm_head":          Row(HEAD,  "S(0)", "(B, T, D) -> (B, T, V/tp)",       NONE, AR),
    "token_loss":       Row(None,  "",     "(B, T, V/tp) -> scalar",          AR3, NONE),
}
# fmt: on

GPT2 = Family(
    architecture="GPT2LMHeadModel",
    blocks=("transformer.h",),
    block=BLOCK,
    ends=ENDS,
    embedding="transformer.wte",
    local_heads={"attn": ("num_heads", "split_size")},
    stages=Stages(
        first=("transformer.wte", "transformer.drop"), added=("transformer.wpe",), last=("transformer.ln_f",)
    ),
)
