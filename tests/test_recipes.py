"""The recipes are one file each, and what stands in several of them is the same everywhere."""

import ast

import pytest
from recipe import ROOT

STEP = ("train_step", "forward_backward")
SAME = [
    *((name, ("pretrain", "sft", "benchmark", "dryrun")) for name in STEP),
    ("DataConfig", ("pretrain", "dryrun", "benchmark")),
    ("CheckpointConfig", ("pretrain", "sft", "dryrun", "benchmark")),
]


def source_of(name: str, recipe: str) -> str:
    """Return a function or class of a recipe, as it stands there."""
    text = (ROOT / "recipes" / f"{recipe}.py").read_text()
    (node,) = [node for node in ast.parse(text).body if getattr(node, "name", None) == name]
    return ast.get_source_segment(text, node)


@pytest.mark.parametrize("name,recipes", SAME, ids=[name for name, _ in SAME])
def test_what_stands_in_several_recipes_is_the_same_in_each(name, recipes):
    assert len({source_of(name, recipe) for recipe in recipes}) == 1


def fields_of(name: str, recipe: str) -> dict[str, str]:
    """Return the fields of a configuration, each as `type = default`."""
    (config,) = ast.parse(source_of(name, recipe)).body
    assigned = [node for node in config.body if isinstance(node, ast.AnnAssign)]
    return {
        node.target.id: f"{ast.unparse(node.annotation)} = {ast.unparse(node.value)}" for node in assigned
    }


@pytest.mark.parametrize("recipe", ["dryrun", "benchmark"])
def test_a_command_of_pretrain_can_be_dry_run_and_timed(recipe):
    asked, answered = fields_of("TrainConfig", "pretrain"), fields_of("TrainConfig", recipe)
    if recipe == "benchmark":  # it times 20 steps where nothing is asked for
        assert answered.pop("steps") == "int = 20" and asked.pop("steps") == "int = 1000"
    assert answered == asked


def test_the_booster_steps_as_the_recipes_do():
    text = (ROOT / "parallel/booster.py").read_text()
    (own,) = [node for node in ast.parse(text).body if getattr(node, "name", None) == "forward_backward"]
    (theirs,) = ast.parse(source_of("forward_backward", "pretrain")).body
    for function in (own, theirs):
        function.args.args[-1].annotation = None  # a tensor in one, a number in the other
    assert ast.dump(ast.Module(own.body[1:], [])) == ast.dump(ast.Module(theirs.body[1:], []))
