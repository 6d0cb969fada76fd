"""Show notebooks as pages: their text, code and committed outputs."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files


def on_files(files: Files, *, config: Any) -> Files:
    """Replace each notebook by a Markdown page of the same name and its pictures."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.remove(file)
        page, pictures = page_of(Path(config.docs_dir, file.src_uri))
        name = file.src_uri.removesuffix(".ipynb")
        files.append(File.generated(config, f"{name}.md", content=page))
        for picture, content in pictures.items():
            files.append(File.generated(config, f"{Path(name).parent}/{picture}", content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the page with its links to notebooks leading to their pages."""
    return markdown.replace(".ipynb)", ".md)")


def page_of(path: Path) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and its pictures by file name.

    Args:
        path: of the ``.ipynb`` file, with its outputs.
    """
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code" and source:
            parts.append(_fence(source, "python"))
            for output in cell["outputs"]:
                data = output.get("data", {})
                if "image/png" in data:
                    picture = f"{path.stem}_{len(pictures)}.png"
                    pictures[picture] = base64.b64decode(data["image/png"])
                    parts.append(f"![Output of the cell above]({picture})")
                elif text := "".join(output.get("text", data.get("text/plain", []))):
                    parts.append(_fence(text.rstrip(), "text"))
    parts.append(f"*This page is the notebook `docs/notebooks/{path.name}` of the repository, with its outputs.*")
    return "\n\n".join(parts), pictures


def _fence(text: str, language: str) -> str:
    return f"```{language}\n{text}\n```"
