"""What README and the pages say: their code runs, their tables and sources are those of the package."""

import ast
import doctest
import re
import sys
import textwrap
import warnings
from functools import partial
from pathlib import Path

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lsp_callbacks
from lsp_callbacks import StabilityMonitor, StabilityReport, StopOnInstability

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs" / "hooks"))
import bibliography  # noqa: E402
import readme  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```(?P<kind>python|pycon)\n(?P<code>.*?)^(?P=indent)```", re.DOTALL | re.MULTILINE)
NOT_RUN = re.compile(r"<!-- not run: [^>]+ -->\s*\Z")


def blocks(page, kind):
    """The code of a page, but for what is marked as not run, with a reason."""
    text = page.read_text()
    for match in FENCE.finditer(text):
        if match["kind"] == kind and not NOT_RUN.search(text[: match.start()]):
            yield textwrap.dedent(match["code"])


def label(page):
    return str(page.relative_to(ROOT))


class Classifier(lightning.pytorch.LightningModule):
    """The reader's own module."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def reader(monkeypatch, tmp_path):
    """What a page takes for granted: a model, its data, an optimizer, a loss; and runs that are short and quiet."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    quiet = {"accelerator": "cpu", "max_steps": 8, "logger": False, "enable_checkpointing": False,
             "enable_progress_bar": False, "enable_model_summary": False}  # fmt: skip
    for library in (pytorch_lightning, lightning.pytorch):
        monkeypatch.setattr(library, "Trainer", partial(library.Trainer, **quiet))
    model, x = Classifier(), torch.randn(32, 6)
    y = x[:, :3].argmax(1)
    data = loader = DataLoader(TensorDataset(x, y), batch_size=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss_fn(module, batch):
        return nn.functional.cross_entropy(module(batch[0]), batch[1])

    def full_loss():
        return loss_fn(model, (x, y))

    def train_step(net, optimizer, batch):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(batch[0]), batch[1]).backward()
        optimizer.step()

    return {
        "torch": torch, "pl": lightning.pytorch, "model": model, "data": data, "loader": loader, "x": x, "y": y,
        "optimizer": optimizer, "loss_fn": loss_fn, "full_loss": full_loss, "net": model.net,
        "train_step": train_step,
        "my_loss": nn.functional.cross_entropy, "StabilityMonitor": StabilityMonitor,
        "StopOnInstability": StopOnInstability, "StabilityReport": StabilityReport,
        "SGDStability": lsp_callbacks.SGDStability,
    }  # fmt: skip


@pytest.mark.parametrize("page", [p for p in PAGES if any(blocks(p, "python"))], ids=label)
def test_the_code_of_a_page_runs(page, reader):
    if page.name in ("transformers.md",):
        pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning|torch)\b")
        warnings.filterwarnings("error", message="lsp_callbacks could not measure")
        for code in blocks(page, "python"):
            exec(compile(code, label(page), "exec"), reader)


@pytest.mark.parametrize("page", [p for p in PAGES if any(blocks(p, "pycon"))], ids=label)
def test_the_sessions_of_a_page_print_what_they_say(page):
    names = {}
    for number, code in enumerate(blocks(page, "pycon")):
        session = doctest.DocTestParser().get_doctest(code, names, f"{label(page)}, session {number}", None, None)
        runner = doctest.DocTestRunner(verbose=False)
        runner.run(session, clear_globs=False)
        assert runner.summarize(verbose=False).failed == 0
        names = session.globs


def test_every_block_of_python_is_run_or_says_why_not():
    """A fence of another name would not be looked at."""
    for page in PAGES:
        for kind in re.findall(r"^ *```([^\n]*)$", page.read_text(), re.MULTILINE):
            assert kind in ("", "python", "pycon", "bash", "text", "yaml"), (label(page), kind)


def test_the_table_of_readme_is_that_of_the_classes():
    """``python docs/hooks/readme.py`` writes it anew."""
    text = (ROOT / "README.md").read_text()
    assert readme.written(text) == text


# -- sources ---------------------------------------------------------------------------------------------------------

REFERENCES = bibliography.entries(ROOT / "docs" / "references.bib")
#: ``Cohen et al. 2021``, ``Chemnitz & Engel 2025``, ``Hardt, Recht & Singer 2016``, ``Katende 2025b``.
_NAME = r"(?:van (?:der )?|Van )?[A-Z][\w-]+"
CITED = re.compile(rf"({_NAME}(?:(?:, {_NAME})*,? (?:&|and) {_NAME}| et al\.)?),? \(?((?:1[89]|20)\d\d[a-z]?)\b")
#: No authors.
OTHER = {"Science", "January", "May"}


def docstrings():
    for path in (ROOT / "lsp_callbacks").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                yield path, " ".join(text.split())


def test_every_source_that_is_cited_is_in_the_references():
    known = {(bibliography.surnames(entry)[0], re.search(r"\d{4}[a-z]?$", key)[0]) for key, entry in REFERENCES.items()}
    texts = [*docstrings(), *((page, " ".join(page.read_text().split())) for page in PAGES)]
    cited = {}
    for path, text in texts:
        for authors, year in CITED.findall(text):
            first = re.split(r",| & | and | et al", authors)[0]
            if first not in OTHER:
                cited[first, year] = label(path)
    missing = {source: where for source, where in cited.items() if source not in known}
    assert not missing, f"not in docs/references.bib: {missing}"
    assert len(cited) > 30


def test_every_section_of_the_theory_that_is_cited_exists():
    theory = (ROOT / "docs" / "theory.md").read_text()
    headings = re.findall(r"^##+ (?:(\d)\. )?(.+)$", theory, re.MULTILINE)
    claims = set(re.findall(r"^\*\*Claim (\d)\.\*\*", theory, re.MULTILINE))
    numbers, titles = {number for number, _ in headings}, [title for _, title in headings]
    cited = 0
    for path, text in docstrings():
        assert "MATH" not in text and "DESIGN" not in text, label(path)
        for what in re.findall(r"docs/theory\.md,? sections? (.{1,80})", text):
            cited += 1
            sections = re.match(r"\d(?:(?:, | and | to )\d)*", what)
            if sections:
                assert set(re.findall(r"\d", sections[0])) <= numbers, f"{label(path)}: {what}"
            else:
                assert re.match(rf"(?:{'|'.join(map(re.escape, titles))})(?!\w)", what), f"{label(path)}: {what}"
        for claim in re.findall(r"claims? (\d)", text):
            assert claim in claims, f"{label(path)}: claim {claim}"
    assert cited > 20
