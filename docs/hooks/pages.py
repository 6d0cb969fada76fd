"""Generate the pages that must not be written by hand: reference, references, support matrix, benchmarks."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import lsp_callbacks
from lsp_callbacks import functional, linalg, loops, operators
from lsp_callbacks.quantities import PRESETS, REGISTRY
from lsp_callbacks.quantities.tables import cell, key_table, section, summary

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))
import bibliography  # noqa: E402
import support_matrix  # noqa: E402


def on_files(files: Files, *, config: Any) -> Files:
    """Add the generated pages, and the pictures that they show."""
    pages = {
        "reference/quantities.md": quantities(),
        "reference/classes.md": classes(),
        "reference/functional.md": functions(),
        "references.md": bibliography.page(ROOT / "docs" / "references.bib"),
        "benchmarks.md": benchmarks(ROOT / "benchmarks"),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(),
    }
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    for picture in (ROOT / "benchmarks").glob("*.png"):
        files.append(File.generated(config, picture.name, content=picture.read_bytes()))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Return the page with the tables that stand in it by a comment."""
    if page.file.src_uri == "support-matrix.md":
        return markdown.replace("<!-- tables -->", support_matrix.tables(ROOT / "docs" / "support_matrix.json"))
    if page.file.src_uri == "how-to/very-large-models.md":
        return markdown.replace("<!-- tables -->", (ROOT / "benchmarks" / "cost_at_scale.md").read_text())
    return markdown


def documented(*names: str) -> Iterator[str]:
    """Yield the directive that shows the docstring of each name."""
    for name in names:
        yield f"::: {name}"


def quantities() -> str:
    """Return the reference of all quantities: presets, one table, and each with its keys."""
    lines = [
        "# Quantities\n",
        "What can be measured, generated from the classes. Keys stand under `stability/`.\n",
        *(f"- preset `{name}`: {', '.join(f'[`{n}`](#{n})' for n in members)}" for name, members in PRESETS.items()),
        "\nA monitor takes a preset, names or objects: `StabilityMonitor([SGDStability(probes=256), 'sharpness'])`.\n",
        "| name | what it measures | cost |",
        "|---|---|---|",
        *(
            f"| [`{name}`](#{name}) | {cell(summary(quantity))} | {cell(section(quantity, 'Cost'))} |"
            for name, quantity in REGISTRY.items()
        ),
    ]
    for name, quantity in REGISTRY.items():
        lines += [
            f"\n## {name} {{ #{name} }}\n",
            key_table(name),
            "",
            *documented(f"lsp_callbacks.quantities.{quantity.__name__}"),
        ]
    return "\n".join(lines) + "\n"


def classes() -> str:
    """Return the reference of all public classes that are no quantities."""
    own = {quantity.__name__ for quantity in REGISTRY.values()}
    names = [f"lsp_callbacks.{name}" for name in lsp_callbacks.__all__ if name not in own]
    names += [f"lsp_callbacks.loops.{name}" for name in loops.__all__]
    names.append("lsp_callbacks.loops.hugging_face.StabilityCallback")
    return "\n\n".join(["# Classes", *documented(*names)]) + "\n"


def functions() -> str:
    """Return the reference of functions: definitions by topic, operators, linear algebra."""
    topics: dict[str, list[str]] = {}
    for name in functional.__all__:
        topic = getattr(functional, name).__module__.split(".")[2]
        topics.setdefault(topic, []).append(f"lsp_callbacks.functional.{name}")
    parts = ["# Functions"]
    for topic, names in sorted(topics.items()):
        parts += [f"## functional: {topic}", *documented(*names)]
    parts += ["## operators", *documented(*(f"lsp_callbacks.operators.{name}" for name in operators.__all__))]
    parts += ["## linalg", *documented(*(f"lsp_callbacks.linalg.{name}" for name in linalg.__all__))]
    return "\n\n".join(parts) + "\n"


def benchmarks(folder: Path) -> str:
    """Return the page of all benchmarks: each claim, its command, and its table where one is recorded."""
    parts = ["# Benchmarks", "One file in `benchmarks/` for each claim, named by it; each prints its numbers."]
    scripts = {script: script.read_text() for script in sorted(folder.glob("*.py"))}
    shared = {name for text in scripts.values() for name in re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)}
    for script, text in scripts.items():
        claim = ast.get_docstring(ast.parse(text)) or ""
        if script.stem in shared and not claim.startswith(("Claim:", "Question")):
            continue
        parts += [f"## {script.stem.replace('_', ' ')}", claim.split("\n\n")[0], f"`python benchmarks/{script.name}`"]
        table = script.with_suffix(".md")
        if table.exists():
            parts.append(re.sub(r"^# .*\n", "", table.read_text()).replace("\n## ", "\n### "))
    return "\n\n".join(parts) + "\n"
