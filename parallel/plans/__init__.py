"""Tables of how models of transformers are spread over a mesh: a file a family, and an adapter for those that
transformers has a plan for. README.md here says how to add one."""

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from dtensor_llama.errors import UsageError
from parallel.plans.adapter import adapted
from parallel.plans.bert import BERT
from parallel.plans.bloom import BLOOM
from parallel.plans.family import Family, refuse
from parallel.plans.glm import GLM, GLM4
from parallel.plans.gpt2 import GPT2
from parallel.plans.opt import OPT
from parallel.plans.t5 import T5

FAMILIES: dict[str, Family] = {
    family.architecture: family for family in (GPT2, OPT, BLOOM, BERT, T5, GLM, GLM4)
}
WRAPPERS = ("module", "_orig_mod", "peft_config", "_hf_hook")  # attributes of DDP, compile, PEFT, accelerate


def family_of(model: nn.Module) -> Family:
    """Return the family of an untouched transformers model.

    UsageError if it has none, or if the model is not as transformers made it: wrapped, quantised, spread
    already, or with a head that is said to be tied and is not.
    """
    wrapper = next((name for name in WRAPPERS if hasattr(model, name)), None)
    is_spread = isinstance(model, FSDPModule) or any(isinstance(p, DTensor) for p in model.parameters())
    if wrapper == "peft_config" or any("lora_" in name for name, _ in model.named_parameters()):
        refuse(model, "has adapters of PEFT; merge them (merge_and_unload), or train them with PEFT itself.")
    if wrapper or is_spread or hasattr(model, "whole_shapes"):
        refuse(model, "is already wrapped or spread; give the Booster the model as transformers made it.")
    name = type(model).__name__
    if not hasattr(getattr(model, "config", None), "to_dict"):
        raise UsageError(
            f"model is a {name}; the Booster takes dtensor_llama.Llama, transformers.LlamaForCausalLM, and "
            f"the models of parallel/plans/README.md: {', '.join(FAMILIES)}, and causal models with a "
            "tensor-parallel plan in transformers."
        )
    if getattr(model.config, "quantization_config", None) is not None:
        refuse(model, "has quantised weights; load it without quantization_config to train it.")
    family = FAMILIES.get(name) or adapted(model)
    if family is None:
        refuse(
            model,
            "has no plan, here or in transformers; parallel/plans/README.md says how to add one, about ten "
            "rows. Those with one here: " + ", ".join(FAMILIES) + ".",
        )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            refuse(model, f"{name} is on `meta`, and only our own Llama has initial weights here.")
        if not parameter.dtype.is_floating_point or parameter.itemsize < 2:
            refuse(model, f"{name} is {parameter.dtype}: quantised weights cannot be trained.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        refuse(model, "has no parameter that trains: requires_grad is False for all.")
    head, embedding = model.get_submodule(family.head), model.get_submodule(family.embedding)
    if getattr(model.config, "tie_word_embeddings", False) and head.weight is not embedding.weight:
        refuse(
            model,
            f"config.tie_word_embeddings is set and {family.head} has not the matrix of {family.embedding}; "
            "call model.tie_weights(), or unset it.",
        )
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            refuse(model, f"{name} gathers statistics in forward, and each rank would gather others.")
    return family
