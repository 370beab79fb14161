"""Write docs/map.md: every public class and function, in one line each, and the files that use it.

    python docs/make_map.py            (make map calls it; a test fails while the committed page is stale)

The page is made from the syntax trees alone, so nothing is imported and torch is not needed.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = [  # folder, what it is for, and the files to read first in it, in this order
    ("dtensor_llama", "LLaMA and its training parts", "model attention loss config optim schedule shards"),
    (
        "dtensor_llama/data",
        "text to tokens to packed sequences",
        "sources tokenizer tokenize sequences reader",
    ),
    ("dtensor_llama/chat", "what only fine-tuning needs", "conversations template corpus packing preview"),
    ("parallel", "how a model is spread over a mesh", "config mesh apply tensor context pipeline zero clip"),
    (
        "parallel/plans",
        "tables of models of transformers, and what applies them",
        "family styles gpt2 spread",
    ),
    ("memory", "where bytes live: the offload manager", "config chunk store manager lanes kernel placement"),
    ("recipes", "what people copy: each file is a whole program", "pretrain sft finetune_hf generate export"),
    ("recipes/launch", "how recipes are started on clusters", ""),
    ("recipes/bench", "measurements against peers and limits", ""),
    ("recipes/lessons", "parallelism and memory, one idea at a time", ""),
]
SCRIPTS = ("recipes/bench", "recipes/lessons")  # the functions of scripts are named only
HEAD = """# Map

This page lists every public class and function with the first sentence of its docstring and the files that
use it, in reading order. `make map` writes it from the source, so do not edit it.

| room | what it is for | files | lines |
| --- | --- | --- | --- |
"""


def first_sentence(node: ast.AST) -> str:
    """Return the first sentence of a docstring; without one, the arguments of a function or a class."""
    text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
    if text:
        return re.split(r"(?<=[^\s.])\.\s+(?=[A-Z`(])", text)[0].rstrip(".") + "."
    if isinstance(node, ast.FunctionDef):
        return f"takes ({ast.unparse(node.args)})."
    fields = [item.target.id for item in node.body if isinstance(item, ast.AnnAssign)]
    return f"has {', '.join(fields)}." if fields else f"is a {', '.join(map(ast.unparse, node.bases))}."


class File:
    def __init__(self, path: Path):
        text = path.read_text(encoding="utf-8")
        self.path, self.n_lines = path.relative_to(ROOT).as_posix(), text.count("\n")
        self.tree = ast.parse(text)
        self.module = self.path.removesuffix(".py").replace("/", ".")
        self.used = set()  # (module, name): `from module import name`, or `module.name` of an imported module
        imports = [node for node in ast.walk(self.tree) if isinstance(node, ast.ImportFrom)]
        for node in imports:
            self.used |= {(node.module, alias.name) for alias in node.names}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                self.used |= {(f"{n.module}.{node.value.id}", node.attr) for n in imports}

    def uses(self, module: str, name: str) -> bool:
        """Return whether this file imports a name from its module, or from the package that exports it."""
        return (module, name) in self.used or (module.split(".")[0], name) in self.used


def make_map() -> str:
    rooms, head, body = {}, HEAD, ""
    for room, purpose, first in ROOMS:
        paths = [path for path in (ROOT / room).glob("*.py") if path.name != "__init__.py"]
        order = [*first.split(), *sorted(path.stem for path in paths)]
        rooms[room] = [File(path) for path in sorted(paths, key=lambda path: order.index(path.stem))]
        n_lines = sum(file.n_lines for file in rooms[room])
        head += f"| [{room}](#{room.replace('/', '')}) | {purpose} | {len(paths)} | {n_lines:,} |\n"
    everywhere = [file for files in rooms.values() for file in files]
    tests = [File(path) for path in (ROOT / "tests").glob("*.py")]
    for room, files in rooms.items():
        body += f"\n## {room}\n"
        for file in files:
            body += f"\n**[{Path(file.path).name}](../{file.path})** {first_sentence(file.tree)}\n\n"
            public = [node for node in file.tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
            public = [node for node in public if not node.name.startswith("_")]
            if room in SCRIPTS:
                body += ", ".join(f"`{node.name}`" for node in public) + "\n"
                continue
            for node in public:
                users = [other.path for other in everywhere if other.uses(file.module, node.name)]
                tested = ["the tests"] if any(test.uses(file.module, node.name) for test in tests) else []
                users = users or tested or ["this file"]
                shown = users[:4] + [f"{len(users) - 4} more"] * (len(users) > 4)
                body += f"- `{node.name}`: {first_sentence(node)} *Used in {', '.join(shown)}.*\n"
    return head + body


if __name__ == "__main__":
    (ROOT / "docs" / "map.md").write_text(make_map(), encoding="utf-8")
