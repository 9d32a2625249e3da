"""Runs the notebooks and keeps them with outputs that can be read on the web: text, tables, and pictures of all else.

    python notebooks/run_notebooks.py                            # all of them, as `make notebooks`
    python notebooks/run_notebooks.py notebooks/01_tour.ipynb

Each runs in an empty folder. Figures and interactive pages are drawn as they first show themselves (PNG, by Chromium or
Chrome); progress bars, timings and what else differs between two runs are not kept. A notebook that says anything on
stderr, or names a folder of this machine, is refused. Its metadata hold the digest of the code that gave the outputs.
"""

import hashlib
import html
import os
import re
import shutil
import subprocess
from base64 import b64encode
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import nbformat
import plotly.io
from nbclient import NotebookClient
from nbformat import NotebookNode
from typer import Argument

from moe_lens import MoELensError
from moe_lens.commands import console
from moe_lens.progress import NO_BARS

NOTEBOOKS = Path(__file__).parent
PLOTLY = "application/vnd.plotly.v1+json"
FRAME = re.compile(r'<iframe srcdoc="(.*?)".*?height: (\d+)px', re.DOTALL)
WIDTH = 900  # pixels of an interactive page
WITHOUT_BARS = {NO_BARS: "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore:IProgress"}
"""The last is what tqdm says of bars in notebooks where ipywidgets is not there."""
MACHINE = re.compile(r"/(?:home|root|tmp|work|Users)/[^\s\"'<]*")


def main(
    paths: Annotated[list[Path] | None, Argument(help="Notebooks; default all in notebooks/.")] = None,
) -> None:
    """Run notebooks and write each back with its outputs, when all of it went well."""
    for path in paths or sorted(NOTEBOOKS.glob("*.ipynb")):
        with TemporaryDirectory() as folder:
            notebook = executed(path, Path(folder))
        nbformat.write(to_read(notebook), path)
        console.say(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def executed(path: Path, folder: Path) -> NotebookNode:
    """The notebook after a run of all its cells in that folder, without progress bars."""
    notebook = nbformat.read(path, as_version=4)
    before = dict(notebook.metadata)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
    client.execute(env=os.environ | WITHOUT_BARS)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
    notebook.metadata = NotebookNode(before | {"moe_lens": {"outputs_of": digest(notebook)}})
    return notebook


def joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Outputs in which what is printed at one time and another is one text: where it is parted depends on the clock."""
    found: list[NotebookNode] = []
    for output in outputs:
        if found and output.output_type == found[-1].output_type == "stream" and output.name == found[-1].name:
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def digest(notebook: NotebookNode) -> str:
    """Of the code in all cells, in their order."""
    code = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()


def to_read(notebook: NotebookNode) -> NotebookNode:
    """The notebook with each output in a form that GitHub, nbviewer and Jupyter show alike."""
    for cell in notebook.cells:
        cell.metadata = NotebookNode()
        if cell.cell_type == "code":
            cell.outputs = [shown(output) for output in cell.outputs]
    if found := MACHINE.search(nbformat.writes(notebook)):
        raise MoELensError(
            f"a notebook that is kept names no folder of the machine it ran on; this one says {found[0]}"
        )
    return notebook


def shown(output: NotebookNode) -> NotebookNode:
    """An output as it is kept; MoELensError for what was said on stderr."""
    if output.output_type == "stream":
        if output.name != "stdout":
            raise MoELensError(f"expected a notebook that says nothing on stderr; it says {output.text!r}")
        return output
    data: dict[str, Any] = output.data
    if PLOTLY in data:
        figure = plotly.io.from_json(plotly.io.json.to_json_plotly(data[PLOTLY]), skip_invalid=True)
        return pictured(output, figure.to_image(format="png"), figure.layout.title.text)
    if frame := FRAME.search(data.get("text/html", "")):
        page, height = html.unescape(frame[1]), int(frame[2])
        return pictured(output, photographed(page, height), re.findall("<title>(.*?)</title>", page)[0])
    if "text/html" in data:  # a table, of whose style GitHub shows nothing
        data["text/html"] = re.sub(r"<style.*?</style>\n?", "", data["text/html"], flags=re.DOTALL)
    return output


def pictured(output: NotebookNode, png: bytes, title: str) -> NotebookNode:
    """The output as a picture, with a title for those who do not see it."""
    output.data = NotebookNode({"image/png": b64encode(png).decode(), "text/plain": re.sub("<.*?>", " ", title)})
    output.metadata = NotebookNode()
    return output


def photographed(page: str, height: int) -> bytes:
    """A page as it first shows itself, as PNG."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise MoELensError("pages are drawn by Chromium or Chrome; install one of these")
    with TemporaryDirectory() as folder:
        file, drawn = Path(folder) / "page.html", Path(folder) / "page.png"
        file.write_text(page, encoding="utf-8")
        options = "--headless --no-sandbox --disable-gpu --hide-scrollbars"
        options += f" --window-size={WIDTH},{height} --virtual-time-budget=2000 --screenshot={drawn}"
        subprocess.run([browser, *options.split(), file.as_uri()], check=True, capture_output=True, timeout=120)
        return drawn.read_bytes()


if __name__ == "__main__":
    console.run(main)
