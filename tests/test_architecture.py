"""Imports point one way, and the core stands alone."""

import ast
from pathlib import Path

import pytest

import lsp_callbacks

ROOT = Path(lsp_callbacks.__file__).parent
#: Each layer may import itself and what is left of it.
LAYERS = (
    "_validation",
    "errors",
    "linalg",
    "autograd",
    "step",
    "operators",
    "functional",
    "plots",
    "quantities",
    "monitor",
    "report",
    "loops",
    "callbacks",
)
#: Programs: they may import everything, and nothing imports them.
PROGRAMS = ("demo", "cli")
LIGHTNING = {"lightning", "pytorch_lightning"}
OPTIONAL = {"matplotlib", "rich", "jsonargparse", "sklearn", "scipy", "torchvision", "transformers", "tensorboard"}
#: What a file is for may be imported at its top; nothing imports the file.
ITS_OWN = {"loops/hugging_face.py": {"transformers"}}
FILES = sorted(ROOT.rglob("*.py"))


def layer(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path, *, everywhere=True):
    """Dotted names that a file imports, in functions too if ``everywhere``."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if everywhere else _at_import(tree.body):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _at_import(body):
    for node in body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        for field in ("body", "orelse", "handlers", "finalbody"):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _at_import(getattr(node, field, []))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    own = layer(path)
    below = LAYERS[: LAYERS.index(own) + 1] if own in LAYERS else (*LAYERS, *(PROGRAMS if own in PROGRAMS else ()))
    for name in imports(path):
        package, _, rest = name.partition(".")
        assert package != "lsp_callbacks" or rest.split(".")[0] in below, f"{own} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_few_files_know_lightning_and_none_needs_an_extra_at_import(path):
    if layer(path) not in ("callbacks", *PROGRAMS):
        assert not LIGHTNING & {name.split(".")[0] for name in imports(path)}
    if layer(path) not in PROGRAMS:
        extra = OPTIONAL - ITS_OWN.get(str(path.relative_to(ROOT)), set())
        assert not extra & {name.split(".")[0] for name in imports(path, everywhere=False)}


def test_public_names_exist_and_are_sorted():
    assert lsp_callbacks.__all__ == sorted(lsp_callbacks.__all__)
    assert all(hasattr(lsp_callbacks, name) for name in lsp_callbacks.__all__)
