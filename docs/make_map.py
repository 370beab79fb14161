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
    """Holds what the map needs of a source file: its syntax tree, and the names that it uses."""

    def __init__(self, path: Path):
        text = path.read_text(encoding="utf-8")
        self.path = path.relative_to(ROOT).as_posix()
        self.n_lines = text.count("\n")
        self.tree = ast.parse(text)
        self.module = self.path.removesuffix(".py").replace("/", ".")
        self.used = _names_used(self.tree)

    def uses(self, module: str, name: str) -> bool:
        """Return whether this file imports a name from its module, or from the package that exports it."""
        package = module.split(".")[0]
        return (module, name) in self.used or (package, name) in self.used

    def public(self) -> list[ast.ClassDef | ast.FunctionDef]:
        """Return the classes and functions of the file that others may use."""
        definitions = [node for node in self.tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
        return [node for node in definitions if not node.name.startswith("_")]


def _names_used(tree: ast.Module) -> set[tuple[str, str]]:
    """Return (module, name) of each `from module import name`, and of each `module.name` where the module
    itself was imported from a package."""
    nodes = list(ast.walk(tree))
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    used = {(node.module, alias.name) for node in imports for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            # Of which package the module is, is not asked: a wrong pair names nothing that there is.
            used |= {(f"{one.module}.{node.value.id}", node.attr) for one in imports}
    return used


def files_of(room: str, first: str) -> list[File]:
    """Return the files of a folder, those named in `first` before the others."""
    paths = sorted(path for path in (ROOT / room).glob("*.py") if path.name != "__init__.py")
    order = [*first.split(), *(path.stem for path in paths)]
    return [File(path) for path in sorted(paths, key=lambda path: order.index(path.stem))]


def make_map() -> str:
    """Return the text of docs/map.md."""
    rooms = {room: files_of(room, first) for room, _, first in ROOMS}
    sources = [file for files in rooms.values() for file in files]
    tests = [File(path) for path in (ROOT / "tests").glob("*.py")]

    head, body = HEAD, ""
    for room, purpose, _ in ROOMS:
        files = rooms[room]
        anchor = room.replace("/", "")
        n_lines = sum(file.n_lines for file in files)
        head += f"| [{room}](#{anchor}) | {purpose} | {len(files)} | {n_lines:,} |\n"

        body += f"\n## {room}\n"
        for file in files:
            name = Path(file.path).name
            body += f"\n**[{name}](../{file.path})** {first_sentence(file.tree)}\n\n"
            if room in SCRIPTS:
                body += ", ".join(f"`{node.name}`" for node in file.public()) + "\n"
            else:
                lines = [line_of(node, file, sources, tests) for node in file.public()]
                body += "".join(lines)
    return head + body


def line_of(node: ast.ClassDef | ast.FunctionDef, file: File, sources: list[File], tests: list[File]) -> str:
    """Return the line of a class or a function: what it is, and which files use it."""
    users = [other.path for other in sources if other.uses(file.module, node.name)]
    if not users:
        is_tested = any(test.uses(file.module, node.name) for test in tests)
        users = ["the tests"] if is_tested else ["this file"]
    shown = users[:4]
    if len(users) > 4:
        shown.append(f"{len(users) - 4} more")
    return f"- `{node.name}`: {first_sentence(node)} *Used in {', '.join(shown)}.*\n"


if __name__ == "__main__":
    (ROOT / "docs" / "map.md").write_text(make_map(), encoding="utf-8")
