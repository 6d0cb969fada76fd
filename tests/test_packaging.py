"""What pip installs: the demo's configurations, true bounds, links that lead somewhere."""

import re
import runpy
import sys
from pathlib import Path

import pytest

import lsp_callbacks

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
sys.path.insert(0, str(ROOT / "docs" / "hooks"))
import readme  # noqa: E402

README = readme.README.read_text()


def test_the_configurations_in_the_package_are_those_of_the_repository():
    """In a clone by a link, in a source distribution as copies that the build has made."""
    shipped = Path(lsp_callbacks.__file__).parent / "configs"
    names = {path.name for path in (ROOT / "configs").glob("*.yaml")}
    assert len(names) == 2 and names == {path.name for path in shipped.glob("*.yaml")}
    assert all((shipped / name).read_text() == (ROOT / "configs" / name).read_text() for name in names)


def test_every_dependency_of_the_core_and_of_transformers_has_a_lower_bound():
    core = re.search(r"^dependencies = \[(.*)\]$", PYPROJECT, re.MULTILINE)[1]
    transformers = re.search(r"^hf = \[(.*)\]$", PYPROJECT, re.MULTILINE)[1]
    requirements = [entry.strip(' "') for entry in f"{core}, {transformers}".split(",")]
    lowest = runpy.run_path(str(ROOT / ".github" / "lowest_versions.py"))["lowest"](PYPROJECT)
    assert len(requirements) == 6
    assert all(requirement.split(">=") == [name, lowest[name]] for requirement in requirements
               for name in [requirement.split(">=")[0]])  # fmt: skip
    assert {"jsonargparse", "lightning"} <= set(lowest) and "setuptools" not in lowest


def test_the_workflow_runs_every_python_that_is_named_and_the_lowest_and_newest_torch():
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    runs = re.findall(r'python: "(3\.\d+)", torch: "(\w+)"', workflow)
    named = re.findall(r"Programming Language :: Python :: (3\.\d+)", PYPROJECT)
    assert {python for python, torch in runs if torch == "torch"} == set(named)
    assert {python for python, torch in runs if torch == "lowest"} == {named[0], named[-1]}
    assert f'requires-python = ">={named[0]}"' in PYPROJECT and "run: .ci/run" in workflow


# -- README's links --------------------------------------------------------------------------------------------------


def test_relative_links_of_readme_exist():
    links = [path for _, path in readme.RELATIVE_LINK.findall(README)]
    assert (len(links) > 20) is not bool(readme.address(PYPROJECT))
    assert not [path for path in links if not (ROOT / path).exists()]


@pytest.mark.parametrize(
    ("text", "address"),
    [
        (PYPROJECT.replace('# [project.urls]\n# Source = ""', '[project.urls]\nHome = "a"\nSource = "https://b.org/c/"'),
         "https://b.org/c"),
        ('# [project.urls]\n# Source = ""\n', ""),
        ('[project.urls]\nHome = "a"\n\n[tool]\nSource = "https://no.org"\n', ""),
    ],
)  # fmt: skip
def test_the_address_is_that_of_the_repository(text, address):
    assert readme.address(text) == address


def test_links_work_outside_of_the_repository_once_it_has_an_address():
    at, links = "https://x.org/y", "[a\nb](docs/theory.md) ![c](configs/d.png) [e](docs/notebooks) "
    assert readme.with_address(links + "[f](https://g.org) [h](#i)", at) == (
        f"[a\nb]({at}/blob/HEAD/docs/theory.md) ![c]({at}/raw/HEAD/configs/d.png) [e]({at}/tree/HEAD/docs/notebooks) "
        "[f](https://g.org) [h](#i)"
    )
    everywhere = readme.with_address(README, at)
    assert not readme.RELATIVE_LINK.findall(everywhere) and readme.with_address(everywhere, at) == everywhere
    assert readme.with_address(README, "") == README
