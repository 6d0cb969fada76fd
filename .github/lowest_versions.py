"""Print the lowest versions that pyproject.toml allows, as constraints for pip.

``python .github/lowest_versions.py > constraints.txt``. A bound that this version of Python has no wheels for is left
to pip: numpy has its own first release for each.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
#: The first releases of numpy that Pythons newer than its bound can install.
FIRST_NUMPY = {(3, 13): "2.1.0"}


def lowest(text: str) -> dict[str, str]:
    """Return the version behind ``>=`` of every requirement in the text of a pyproject.toml."""
    body = text.partition("[build-system]")[2].partition("\n[project]")[2]
    return dict(re.findall(r'"([\w-]+)(?:\[\w+\])?>=([\d.]+)', body))


if __name__ == "__main__":
    versions = lowest(PYPROJECT.read_text())
    versions["numpy"] = FIRST_NUMPY.get(sys.version_info[:2], versions["numpy"])
    print("\n".join(f"{name}=={version}" for name, version in versions.items()))
