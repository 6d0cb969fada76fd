"""Turn ``references.bib`` into a page."""

from __future__ import annotations

import re
from pathlib import Path

_ENTRY = re.compile(r"^@(\w+)\{(\S+),\n(.*?)\n\}", re.MULTILINE | re.DOTALL)
_FIELD = re.compile(r"(\w+)\s*=\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_ACCENTS = {r"{\'e}": "é", r"{\'E}": "É"}


def entries(path: Path) -> dict[str, dict[str, str]]:
    """Return the fields of each entry by its key, the kind among them.

    Raises:
        ValueError: for an entry without author, title or year.
    """
    text = path.read_text()
    for latex, letter in _ACCENTS.items():
        text = text.replace(latex, letter)
    found = {}
    for kind, key, body in _ENTRY.findall(text):
        fields = {name: re.sub(r"[{}]|\s+", _plain, value) for name, value in _FIELD.findall(body)}
        if missing := {"author", "title", "year"} - fields.keys():
            raise ValueError(f"{path.name}: {key} has no {', '.join(sorted(missing))}")
        found[key] = {"kind": kind, **fields}
    return found


def _plain(match: re.Match[str]) -> str:
    return " " if match[0].isspace() else ""


def surnames(entry: dict[str, str]) -> list[str]:
    """Return the authors' surnames."""
    return [author.split(",")[0].strip() for author in entry["author"].split(" and ")]


def page(path: Path) -> str:
    """Return the page of all references, by author and year."""
    lines = [
        "# References\n",
        "Docstrings and pages cite these as *first author year*. The source is `docs/references.bib`.\n",
    ]
    for key, entry in sorted(entries(path).items(), key=lambda item: (surnames(item[1])[0].lower(), item[1]["year"])):
        authors = ", ".join(
            " ".join(reversed([part.strip() for part in author.split(",")]))
            for author in entry["author"].split(" and ")
        )
        where = [f"*{entry[name]}*" for name in ("journal", "booktitle", "publisher") if name in entry]
        where += [f"edition {entry['edition']}"] if "edition" in entry else []
        where += [entry["volume"]] if "volume" in entry else []
        where += [f"pp. {entry['pages'].replace('--', '-')}"] if "pages" in entry else []
        where += [f"[arXiv:{e}](https://arxiv.org/abs/{e})"] if (e := entry.get("eprint")) else []
        where += [entry["note"]] if "note" in entry else []
        lines.append(f'- <a id="{key}"></a>**{authors}** ({entry["year"]}). {entry["title"]}. {", ".join(where)}.')
    return "\n".join(lines) + "\n"
