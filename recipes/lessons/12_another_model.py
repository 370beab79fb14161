"""Lesson 12: a plan for another model is found from its module tree, by counting and by comparing numbers.

    torchrun --nproc-per-node 2 recipes/lessons/12_another_model.py

plan         has one row for each module with weights: how it is split over tp, and what that sends
packed       is a weight that contains several matrices. In GPT-2's c_attn these are q, k and v, side by side:

                 cut in two like any matrix        a share of each of the three
                 q q q q k k|k k v v v v           q q|q q  k k|k k  v v|v v
                 rank 0      rank 1                0   1    0   1    0   1

The module tree below is transformers' own GPT-2 block, and no part of it is rewritten. Its weights become
slices, one attribute counts fewer heads, and hooks send what lesson 4 sends. Four questions lead to the plan:

  1. Which weights read the whole x? Split their columns (c_attn, c_fc). Which weights add up the results?
     Split their rows (c_proj). Then one sum serves two layers. (Conv1D stores (inputs, outputs).)
  2. Which weight contains several matrices? Each of the matrices is cut.
  3. What must be added once, and not on every rank? The bias of a layer whose output is summed.
  4. Where does a whole x meet split weights? There every rank has a partial sum of the gradient of x.

Each attempt answers one question wrongly. The numbers that differ from those of one process show which one.
"""

import copy

import torch
import torch.distributed as dist
from common import print_once, run_lesson
from torch import Tensor, nn
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from parallel.plans.gpt2 import BLOCK

B, T, D, HEADS = 2, 8, 32, 4
TOLERANCE = 1e-5  # fp32: only the order of summation differs
sent = {"forward": 0, "backward": 0}  # the number of all-reduces in the current attempt


def all_reduce(x: Tensor, when: str) -> Tensor:
    sent[when] += 1
    x = x.clone()
    dist.all_reduce(x)
    return x


class Enter(torch.autograd.Function):
    """Pass x on unchanged; in backward, sum the gradients that came through each rank's slices."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return all_reduce(grad, "backward")


class Leave(torch.autograd.Function):
    """Add up the ranks' partial sums; in backward, pass the gradient on to each rank unchanged."""

    @staticmethod
    def forward(ctx, partial: Tensor) -> Tensor:
        return all_reduce(partial, "forward")

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def own_slice(name: str, whole: Tensor, packed: bool) -> Tensor:
    """Return this rank's slice of a parameter or of its gradient; the name says how it is split."""
    tp, tp_rank = dist.get_world_size(), dist.get_rank()
    if "c_attn" in name and packed:  # (..., 3 D) is (..., 3, D): a share of q, of k and of v
        return whole.unflatten(-1, (3, -1)).chunk(tp, dim=-1)[tp_rank].flatten(-2)
    if "c_attn" in name or "c_fc" in name:  # columns, and their biases
        return whole.chunk(tp, dim=-1)[tp_rank]
    if name.endswith("c_proj.weight"):  # rows
        return whole.chunk(tp, dim=0)[tp_rank]
    return whole  # norms, and the bias of c_proj


def split(whole: GPT2Block, packed: bool, bias_once: bool, enters: bool) -> GPT2Block:
    """Return a copy of a block that has only this rank's slices of the weights.

    packed, bias_once, enters: the answers to questions 2, 3 and 4; all are right if True."""
    block, tp = copy.deepcopy(whole), dist.get_world_size()
    for name, parameter in whole.named_parameters():
        module = block.get_submodule(name.rpartition(".")[0])
        slice_ = own_slice(name, parameter.detach(), packed).clone()
        setattr(module, name.rpartition(".")[2], nn.Parameter(slice_))
    block.attn.split_size //= tp  # the width of q; the number of heads follows from it
    for column_wise in (block.attn.c_attn, block.mlp.c_fc):
        column_wise.nf //= tp
        if enters:
            column_wise.register_forward_pre_hook(lambda module, args: (Enter.apply(*args),))
    for row_wise in (block.attn.c_proj, block.mlp.c_proj):
        if bias_once:
            row_wise.register_forward_hook(lambda module, args, y: Leave.apply(y - module.bias) + module.bias)
        else:
            row_wise.register_forward_hook(lambda module, args, y: Leave.apply(y))
    return block


def run(block: GPT2Block, x: Tensor, grad_y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return y and the gradients of x and of every parameter."""
    x = x.clone().requires_grad_()
    y = block(x)
    y.backward(grad_y)
    return y.detach(), {"x": x.grad} | {name: p.grad for name, p in block.named_parameters()}


def attempt(
    what: str, whole: GPT2Block, x: Tensor, grad_y: Tensor, **answers: bool
) -> tuple[bool, list[str]]:
    """Split the block, compare it with one process, and print a line about `what` was tried.

    Returns whether y is right, and the names of the parameters whose gradients are wrong."""
    plain_y, plain_grads = run(whole, x, grad_y)
    whole.zero_grad()
    sent.update(forward=0, backward=0)
    y, grads = run(split(whole, **answers), x, grad_y)
    y_is_right = bool((y - plain_y).abs().max() < TOLERANCE)
    wrong = []
    for name, grad in grads.items():
        difference = (grad - own_slice(name, plain_grads[name], answers["packed"])).abs().max()
        if difference > TOLERANCE * 10:
            wrong.append(name)
    told = "gradients agree"
    if wrong:
        modules = dict.fromkeys(name.removesuffix(".weight").removesuffix(".bias") for name in wrong)
        told = f"not the gradients of {', '.join(modules)}" if y_is_right else "nor do gradients"
    print_once(
        f"  {what:28} sent {sent['forward']} + {sent['backward']}: "
        f"y {'agrees' if y_is_right else 'does not agree'}, {told}"
    )
    return y_is_right, wrong


def lesson() -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=D, n_head=HEADS, attn_pdrop=0.0, resid_pdrop=0.0, attn_implementation="eager")
    whole = GPT2Block(config, layer_idx=0)
    for parameter in whole.parameters():
        nn.init.normal_(parameter, std=0.2)  # biases of 0 and norms of 1 would hide mistakes
    print_once("GPT-2's block as transformers has it:")
    for name, parameter in whole.named_parameters():
        print_once(f"  {name:18} {tuple(parameter.shape)}")
    x, grad_y = torch.randn(B, T, D), torch.randn(B, T, D)
    print_once("\nattempts; all-reduces sent in forward + backward")
    right = {"packed": True, "bias_once": True, "enters": True}
    cut_through, _ = attempt("c_attn cut like any matrix", whole, x, grad_y, **right | {"packed": False})
    twice, _ = attempt("every rank adds the bias", whole, x, grad_y, **right | {"bias_once": False})
    silent, wrong = attempt("nothing is sent in backward", whole, x, grad_y, **right | {"enters": False})
    is_right, none_wrong = attempt("all of it", whole, x, grad_y, **right)
    assert not cut_through and not twice, "a mistake was not noticed"
    # Forward cannot show the last mistake: only the gradients before the split weights are wrong.
    assert silent and {"x", "ln_1.weight", "ln_2.weight"} <= set(wrong), wrong
    assert is_right and not none_wrong, none_wrong
    stated = {
        "forward": sum(row.forward.get("all-reduce", 0) for row in BLOCK.values()),
        "backward": sum(row.backward.get("all-reduce", 0) for row in BLOCK.values()),
    }
    print_once("\nthe plan that follows, parallel/plans/gpt2.py:")
    for name, row in BLOCK.items():
        print_once(f"  {name:12} {row.weight:5} {row.shapes:32} {row.forward or ''} {row.backward or ''}")
    assert sent == stated, (sent, stated)
    print_once(
        "\nproven: transformers' own GPT-2 block on 2 ranks gives one process's output and gradients, "
        "for what its plan states"
    )


if __name__ == "__main__":
    run_lesson(lesson, n_ranks=2)
