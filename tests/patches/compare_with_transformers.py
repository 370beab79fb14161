"""Compare the logits of a Hugging Face folder in our model and in transformers, over a long context.

python compare_with_transformers.py FOLDER
"""

import sys
from dataclasses import replace

import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from dtensor_llama import Llama, LlamaConfig, load_hf

folder = sys.argv[1]
config = LlamaConfig.from_hf(folder)
tokens = torch.randint(config.vocab_size, (2, 256), generator=torch.Generator().manual_seed(0))
theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
with torch.no_grad():
    expected = theirs(tokens).logits
    for scaling in (config.rope_scaling, None):
        model = Llama(replace(config, rope_scaling=scaling))
        load_hf(model, folder)
        logits = model(tokens)
        if scaling is None:  # the comparison would notice if the scaling were ignored
            assert (logits - expected).abs().max() > 1e-3
        else:
            assert_close(logits, expected, rtol=0, atol=1e-4)
