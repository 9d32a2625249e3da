"""The notebooks run on the shipped model, and are kept with what their code gives, to be read on the web."""

import importlib
import re
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_notebook, new_output

from moe_lens import MoELensError

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
UNTRAINED = ("01", "04")
"""Of these each word is the same on any machine; the others train first, which rounding takes elsewhere."""
BYTES = 400_000
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture
def run_notebooks(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "notebooks")
    return importlib.import_module("run_notebooks")


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def said(notebook: NotebookNode) -> list[list[str]]:
    """Of each cell what its outputs say in words, tables and numbers, pictures left out."""
    kept = [[output.get("data", output) for output in cell.outputs] for cell in code(notebook)]
    return [[data.get("text") or data["text/plain"] for data in of if "image/png" not in data] for of in kept]


def test_the_six_notebooks_are_there():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]


@each
def test_a_notebook_is_kept_as_its_code_left_it(path, run_notebooks):
    """All cells ran once, from top to bottom, and none was edited since."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].source.startswith("# ")
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    assert notebook.metadata.moe_lens.outputs_of == run_notebooks.digest(notebook), "run `make notebooks`"


@each
def test_what_a_notebook_shows_can_be_read_on_the_web(path, run_notebooks):
    """Text, tables and pictures alone: GitHub shows no scripts and no frames. Nothing says where it was run."""
    notebook = nbformat.read(path, as_version=4)
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for output in outputs:
        assert output.output_type in ("stream", "display_data", "execute_result")
        assert set(output.get("data", {})) <= {"text/plain", "text/html", "image/png"}
        assert not re.search("<(script|iframe|style)", output.get("data", {}).get("text/html", ""))
    text = path.read_text(encoding="utf-8")
    assert len(text) < BYTES
    assert not run_notebooks.MACHINE.search(text)


@pytest.mark.parametrize(
    ("output", "error"),
    [
        (new_output("stream", name="stderr", text="UserWarning: slow"), "says nothing on stderr; .*UserWarning"),
        (new_output("stream", name="stdout", text="wrote /tmp/abc/model"), "this one says /tmp/abc/model"),
    ],
)
def test_what_does_not_belong_on_the_web_is_refused(run_notebooks, output, error):
    notebook = new_notebook(cells=[nbformat.v4.new_code_cell("pass", outputs=[output])])
    with pytest.raises(MoELensError, match=error):
        run_notebooks.to_read(notebook)


@pytest.mark.slow
@each
def test_a_notebook_says_again_what_it_is_kept_with(path, run_notebooks, tmp_path):
    kept, again = nbformat.read(path, as_version=4), run_notebooks.executed(path, tmp_path)
    shapes = [
        [[(output.output_type, "image/png" in output.get("data", {})) for output in cell.outputs] for cell in code(one)]
        for one in (kept, again)
    ]
    assert [[kind for kind, _ in of] for of in shapes[0]] == [[kind for kind, _ in of] for of in shapes[1]]
    if path.stem[:2] in UNTRAINED:
        drawn = [[output for output, (_, picture) in zip(a.outputs, b, strict=True) if not picture]
                 for a, b in zip(code(again), shapes[0], strict=True)]  # fmt: skip
        assert [[o.get("text") or o.data["text/plain"] for o in of] for of in drawn] == said(kept)
