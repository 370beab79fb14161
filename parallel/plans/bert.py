"""BERT with its masked-token head, whose matrix is the embedding's and whose bias is its own."""

from parallel.plans.family import Family
from parallel.plans.styles import AR, AR3, COLUMNS, EMBED, HEAD, NONE, ROWS, WHOLE
from parallel.tensor import Row

# fmt: off
BLOCK = {                                                                             # forward, backward
    "attention.self.query":       Row(COLUMNS, "S(0)", "(B, T, D) -> (B, T, H/tp E)", NONE, AR),  # q, k, v
    "attention.self.key":         Row(COLUMNS, "S(0)", "(B, T, D) -> (B, T, H/tp E)", NONE, NONE),
    "attention.self.value":       Row(COLUMNS, "S(0)", "(B, T, D) -> (B, T, H/tp E)", NONE, NONE),
    "attention.output.dense":     Row(ROWS,    "S(1)", "(B, T, H/tp E) -> (B, T, D)", AR, NONE),
    "attention.output.LayerNorm": Row(WHOLE,   "R",    "(B, T, D), as it was",        NONE, NONE),
    "intermediate.dense":         Row(COLUMNS, "S(0)", "(B, T, D) -> (B, T, F/tp)",   NONE, AR),
    "output.dense":               Row(ROWS,    "S(1)", "(B, T, F/tp) -> (B, T, D)",   AR, NONE),
    "output.LayerNorm":           Row(WHOLE,   "R",    "(B, T, D), as it was",        NONE, NONE),
}
ENDS = {
    "bert.embeddings.word_embeddings":       Row(EMBED, "S(0)", "(B, T) -> (B, T, D)", AR, NONE),
    "bert.embeddings.position_embeddings":   Row(WHOLE, "R", "(1, T) -> (1, T, D)",    NONE, NONE),
    "bert.embeddings.token_type_embeddings": Row(WHOLE, "R", "(B, T) -> (B, T, D)",    NONE, NONE),
    "bert.embeddings.LayerNorm":             Row(WHOLE, "R", "(B, T, D), as it was",   NONE, NONE),
    "cls.predictions.transform.dense":       Row(WHOLE, "R", "(B, T, D), as it was",   NONE, NONE),
    "cls.predictions.transform.LayerNorm":   Row(WHOLE, "R", "(B, T, D), as it was",   NONE, NONE),
    "cls.predictions.decoder":               Row(HEAD, "S(0)", "(B, T, D) -> (B, T, V/tp)", NONE, AR),
    "token_loss":                            Row(None, "",  "(B, T, V/tp) -> scalar",  AR3, NONE),
}
# fmt: on

BERT = Family(
    architecture="BertForMaskedLM",
    blocks=("bert.encoder.layer",),
    block=BLOCK,
    ends=ENDS,
    embedding="bert.embeddings.word_embeddings",
    head="cls.predictions.decoder",
    shifts_labels=False,
)
