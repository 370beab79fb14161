"""Stands for torch.compile where tensors have no memory: the same graphs hold what compiled kernels hold.

Dynamo traces a block and AOTAutograd cuts its graph into a forward and a backward, as on a GPU: what is kept
between the two is the partitioner's choice and no estimate. Inductor would then make few kernels of many
operations. So what only passes from one elementwise operation to the next stays in registers, and is not
counted here. Counted are the results of matrix products, attention, reductions and collectives, what these
read, and what a graph returns.
"""

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd  # private in torch 2.11 to 2.13, as are the next
from torch._functorch import partitioners
from torch._inductor.decomposition import select_decomp_table
from torch.utils._python_dispatch import _disable_current_modes

from parallel.step_counter import StepCounter


def compiler(counter: StepCounter) -> Callable[[Callable], Callable]:
    """Return what to call instead of torch.compile."""

    def backend(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable:
        run = lambda graph, inputs: _FusedGraph(graph, counter).boxed()
        build = aot_autograd(
            fw_compiler=run,
            bw_compiler=run,
            inference_compiler=run,
            partition_fn=_cut,
            decompositions=select_decomp_table(),
        )
        return build(graph, inputs)

    compile = torch.compile
    # What was compiled for an earlier count, with another sequence length, would leave symbols in the shapes.
    torch.compiler.reset()

    def pretended_compile(function: Callable, **how) -> Callable:
        compiled = compile(function, backend=backend, **how)

        def call(*args, **kwargs):
            with _disable_current_modes():  # dynamo does not look into a function while something watches it
                return compiled(*args, **kwargs)

        return call

    return pretended_compile


def _cut(*args, **kwargs) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Cut a graph into forward and backward as the compiler does for a GPU.

    There the random state of attention that is recomputed belongs to the generator. On `meta` torch would
    save it as one more tensor, for which it has no place under tp; and this attention draws nothing."""
    without_random_state = lambda joint, forward, backward, n_symbols: (forward, backward)
    with mock.patch.object(partitioners, "functionalize_rng_ops", without_random_state):
        return partitioners.min_cut_rematerialization_partition(*args, **kwargs)


class _FusedGraph(fx.Interpreter):
    """Runs a graph operation by operation.

    It lets the counter see only those results that a compiled graph would have in memory."""

    def __init__(self, graph: fx.GraphModule, counter: StepCounter):
        super().__init__(graph)
        self.counter, self.in_memory = counter, _results_in_memory(graph.graph)

    def boxed(self) -> Callable[[list], Any]:
        """Return the graph as AOTAutograd calls it: with a list, which it empties so that inputs can go."""

        def call(inputs: list) -> Any:
            own = list(inputs)
            inputs.clear()
            try:
                with self.counter.watching():
                    return self.boxed_run(own)
            finally:
                self.env = {}  # it still has what was returned

        call._boxed_call = True
        return call

    def run_node(self, node: fx.Node) -> Any:
        if node.op != "call_function" or node in self.in_memory:
            return super().run_node(node)
        with self.counter.muted():
            return super().run_node(node)


def _results_in_memory(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose results are in memory."""
    in_memory = set()
    for node in graph.nodes:
        is_output = node.op == "output"
        if node.op == "call_function" and not _is_fused(node):
            in_memory.add(node)
            is_output = True
        if is_output:
            in_memory |= {_base(read) for read in node.all_input_nodes}
    return in_memory


def _is_fused(node: fx.Node) -> bool:
    """Return whether an operation is elementwise or a view: it becomes part of a kernel."""
    tags = getattr(node.target, "tags", ())
    is_view = getattr(node.target, "is_view", False)
    return is_view or torch.Tag.pointwise in tags or getattr(node.target, "_opname", "") in _FUSED


# Elementwise operations without the tag, and those that make numbers from nothing.
_FUSED = {
    "_to_copy",
    "convert_element_type",
    "clone",
    "cat",
    "full",
    "arange",
    "iota",
    "expand",
    "where",
    "slice",
}
_FUSED |= {"_unsafe_view", "view", "reshape", "getitem", "copy", "empty", "zeros", "constant_pad_nd", "split"}


def _base(node: fx.Node) -> fx.Node:
    """Return the node whose memory a view shows."""
    while getattr(node.target, "is_view", False) or getattr(node.target, "_opname", "") == "_unsafe_view":
        node = node.all_input_nodes[0]
    return node
