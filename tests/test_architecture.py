"""Imports point one way, and the core stands alone."""

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import lsp_callbacks

ROOT = Path(lsp_callbacks.__file__).parent
#: Each layer may import itself and what is left of it.
LAYERS = (
    "_validation",
    "errors",
    "linalg",
    "autograd",
    "functional",
    "step",
    "operators",
    "plots",
    "quantities",
    "monitor",
    "report",
    "loops",
    "callbacks",
)
#: Programs: they may import everything, and nothing imports them.
PROGRAMS = ("demo", "cli", "__main__")
LIGHTNING = {"lightning", "pytorch_lightning"}
OPTIONAL = {
    "matplotlib", "rich", "jsonargparse", "sklearn", "scipy", "torchvision", "transformers", "tensorboard", "pandas",
    "IPython", "wandb", "mlflow", "comet_ml",
}  # fmt: skip
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
    below = LAYERS[: LAYERS.index(own) + 1] if own in LAYERS else LAYERS
    if own in PROGRAMS:
        below += (*PROGRAMS, "__version__")
    for name in imports(path):
        package, _, rest = name.partition(".")
        assert package != "lsp_callbacks" or rest.split(".")[0] in below, f"{own} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_few_files_know_lightning_and_none_needs_an_extra_at_import(path):
    if layer(path) not in ("callbacks", *PROGRAMS):
        assert not LIGHTNING & {name.split(".")[0] for name in imports(path)}
    if layer(path) not in PROGRAMS:  # of Lightning's two names the user's own is imported, by the user
        extra = (OPTIONAL | LIGHTNING) - ITS_OWN.get(str(path.relative_to(ROOT)), set())
        assert not extra & {name.split(".")[0] for name in imports(path, everywhere=False)}


#: The files that may touch what torch and Lightning keep to themselves.
INTERNALS = {"autograd/_torch_internals.py", "callbacks/_lightning_internals.py"}
#: What other files touch: the name of a method of ``nn.Module`` that is overridden.
STILL_PRIVATE = {"quantities/base.py": {"_load_from_state_dict"}}
PRIVATE = re.compile(r"_(?!_)\w+")


def private_names_of_torch():
    """Private attributes of the objects that the package handles: names that may hide in strings, or behind self."""
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter])
    compiled = torch.compile(nn.Identity())
    things = (
        nn.Module(), nn.Conv2d(1, 1, 1), compiled, parameter, (2 * parameter).grad_fn, optimizer, torch, torch.autograd,
        torch.utils.checkpoint, torch.optim.lr_scheduler.ConstantLR(optimizer), torch.amp.GradScaler("cpu"),
    )  # fmt: skip
    names = {name for thing in things for name in (*dir(thing), *getattr(thing, "__dict__", {}))}
    known = {"_orig_mod", "_step_supports_amp_scaling", "_checkpoint_without_reentrant_generator", "_trainer"}
    return {name for name in names if PRIVATE.fullmatch(name)} | known


def foreign_private_names(path, names_of_torch):
    """Private names that a file takes from others: by attribute, by import, or as a string.

    Attributes of ``self`` and ``cls`` are the file's own, unless torch has one of that name that it does not define.
    """
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    defined = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    defined |= {
        n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) and _own(n.value)
    }
    defined |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    for node in nodes:
        if isinstance(node, ast.Attribute) and PRIVATE.fullmatch(node.attr):
            if not _own(node.value) or (node.attr in names_of_torch and node.attr not in defined):
                yield node.attr
        elif isinstance(node, ast.Constant) and node.value in names_of_torch:
            yield node.value
    for name in imports(path):
        if not name.startswith("lsp_callbacks."):
            yield from filter(PRIVATE.fullmatch, name.split("."))


def _own(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def test_private_attributes_of_others_stand_in_one_file_each():
    names_of_torch = private_names_of_torch()
    touched = {
        str(path.relative_to(ROOT)): names
        for path in FILES
        if (names := set(foreign_private_names(path, names_of_torch))) and str(path.relative_to(ROOT)) not in INTERNALS
    }
    assert touched == STILL_PRIVATE, "move what is new to autograd/_torch_internals.py"


@pytest.mark.parametrize(
    "line",
    [
        "import torch\ntorch._foreach_norm([])",
        "import torch.utils._pytree",
        "from torch.utils._pytree import tree_map",
        "from torch.nn.modules.batchnorm import _BatchNorm",
        "def f(node): return node.grad_fn._saved_self",
        "def f(tensor): return tensor._version",
        "def f(module): return getattr(module, '_orig_mod')",
        "HOOKS = ('_forward_hooks',)",
        "class A(Module):\n    def f(self): return self._buffers",
        "class A(Module):\n    def f(self): return super()._apply(len)",
    ],
)
def test_private_attributes_are_found(line, tmp_path):
    path = tmp_path / "file.py"
    path.write_text(line)
    assert list(foreign_private_names(path, private_names_of_torch()))


def test_no_file_is_long():
    assert not [str(path.relative_to(ROOT)) for path in FILES if len(path.read_text().splitlines()) > 400]


def test_public_names_exist_and_are_sorted():
    assert lsp_callbacks.__all__ == sorted(lsp_callbacks.__all__)
    assert all(hasattr(lsp_callbacks, name) for name in lsp_callbacks.__all__)
