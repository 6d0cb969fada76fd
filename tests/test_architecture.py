"""Imports point one way, and the core stands alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lsp_callbacks

ROOT = Path(lsp_callbacks.__file__).parent
#: Each layer may import itself and what is left of it.
LAYERS = ("linalg", "snapshot", "replay", "operators", "functional", "quantities", "monitor", "report", "callbacks")
#: Not layers: they may import everything.
TOP = ("__init__", "demo", "cli")
LIGHTNING = {"lightning", "pytorch_lightning"}
OPTIONAL = {"matplotlib", "rich", "jsonargparse", "sklearn", "scipy", "torchvision", "transformers"}
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
        yield node
        for field in ("body", "orelse", "handlers", "finalbody"):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _at_import(getattr(node, field, []))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    own = layer(path)
    if own in TOP:
        return
    for name in imports(path):
        package, _, rest = name.partition(".")
        if package == "lsp_callbacks":
            other = rest.split(".")[0]
            assert other in LAYERS, f"{path.name} imports {name}"
            assert LAYERS.index(other) <= LAYERS.index(own), f"{own} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_few_files_know_lightning_and_none_needs_an_extra_at_import(path):
    if layer(path) not in ("callbacks", "cli", "demo"):
        assert not LIGHTNING & {name.split(".")[0] for name in imports(path)}
    if layer(path) not in ("cli", "demo"):
        assert not OPTIONAL & {name.split(".")[0] for name in imports(path, everywhere=False)}


@pytest.mark.parametrize(
    "statement, absent",
    [
        ("import lsp_callbacks", OPTIONAL),
        ("import lsp_callbacks.callbacks.stability_monitor, lsp_callbacks.report", OPTIONAL),
    ],
)
def test_the_package_imports_without_its_extras(statement, absent):
    """In a fresh interpreter in which the extras do not exist."""
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
{statement}
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_public_names_exist_and_are_sorted():
    assert lsp_callbacks.__all__ == sorted(lsp_callbacks.__all__)
    assert all(hasattr(lsp_callbacks, name) for name in lsp_callbacks.__all__)
