"""Hook of mkdocs: the pages of the site that live elsewhere: README and its like, notebooks, and every public name."""

import ast
import json
import re
from base64 import b64decode
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
AT_TOP = {"README.md": "index.md"} | {name: name for name in ("MODELS.md", "CONTRIBUTING.md", "CHANGELOG.md")}
ROOMS = {
    stub.parent: ".".join(stub.parent.relative_to(ROOT).parts)
    for stub in sorted((ROOT / "moe_lens").rglob("__init__.pyi"), key=lambda stub: (len(stub.parts), stub))
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The rooms come into the navigation, and the pages of docs/ that it does not name."""
    [reference] = [part["Reference"] for part in config.nav if "Reference" in part]
    [rooms] = [part for part in reference if "Rooms" in part]
    rooms["Rooms"] = [{room: f"reference/{room}.md"} for room in list(ROOMS.values())[1:]]
    named = {page for part in config.nav for of in part.values() for page in _pages(of)}
    reference += sorted({path.name for path in (ROOT / "docs").glob("*.md")} - named)
    return config


def _pages(part: str | list[dict[str, str]]) -> set[str]:
    """The pages of a part of the navigation."""
    return {part} if isinstance(part, str) else {page for of in part for page in of.values() if isinstance(page, str)}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """All of them beside those of docs/."""
    for name, page in AT_TOP.items():
        files.append(File.generated(config, page, content=linked((ROOT / name).read_text(encoding="utf-8"))))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        page, pictures = of_notebook(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=page))
        for name, picture in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=picture))
    for name, page in reference().items():
        files.append(File.generated(config, f"reference/{name}.md", content=page))
    return files


def on_page_markdown(markdown: str, **kwargs: object) -> str:
    """Links that lead to a place of the repository lead to that of the site."""
    return linked(markdown)


def linked(text: str) -> str:
    """Markdown whose links are those of the site: pages at the top beside those of docs/, notebooks as pages."""
    text = re.sub(r"\]\((?:docs|\.\.)/", "](", text)
    return re.sub(r"\]\((?:\.\./)*notebooks/(\w+)\.ipynb", r"](notebooks/\1.md", text)


def of_notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook with its outputs as Markdown, and its pictures by their names."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = {kind: "".join(value) for kind, value in output.get("data", {}).items()}
            if "image/png" in data:
                name = f"{path.stem}-{len(pictures)}.png"
                pictures[name] = b64decode(data["image/png"])
                parts.append(f"![{data['text/plain']}]({name})")
            else:
                said = "".join(output.get("text", "")) or data.get("text/plain", "")
                parts.append(data.get("text/html") or f"```text\n{said.rstrip()}\n```")
    return "\n\n".join(parts), pictures


def reference() -> dict[str, str]:
    """A page for each room with names: its sentence, and every name where it is first met, the package last."""
    pages: dict[str, str] = {}
    placed: dict[str, str] = {}
    for folder, room in [*list(ROOMS.items())[1:], *list(ROOMS.items())[:1]]:
        own, others = [], []
        for name, full in handed_on(folder, room).items():
            if full in placed:
                others.append(f"[`{name}`][{placed[full]}]")
            else:
                placed[full] = f"{room}.{name}"
                own.append(f"::: {room}.{name}")
        said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
        elsewhere = f"Documented with their rooms: {', '.join(others)}.\n\n" if others else ""
        pages[room] = f"# {room}\n\n{said}\n\n{elsewhere}" + "\n\n".join(own)
    return pages


def handed_on(folder: Path, room: str) -> dict[str, str]:
    """The names of a room's stub, each with the module it is from."""
    nodes = ast.parse((folder / "__init__.pyi").read_text(encoding="utf-8")).body
    imported = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    return {alias.name: f"{room}.{node.module}.{alias.name}" for node in imported for alias in node.names}
