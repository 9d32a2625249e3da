"""The site of `make docs` builds without a warning, holds what it is to hold, and none of its links leads nowhere."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import moe_lens

ROOT = Path(__file__).parents[1]


class Page(HTMLParser):
    """What a page links to, and what in it can be linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attrs}
        self.links |= {named[name] for name in ("href", "src") if name in named}
        self.anchors |= {named[name] for name in ("id", "name") if name in named}


def broken(site: Path, page: Path, pages: dict[Path, Page]) -> list[str]:
    """The links of a page that lead to no file of the site, or to no place in it."""
    found = []
    for link in pages[page].links:
        target = urlsplit(link)
        if target.scheme or target.netloc:
            continue
        file = (page.parent / unquote(target.path)).resolve() if target.path else page
        file = file / "index.html" if file.is_dir() else file
        there = file.is_relative_to(site) and file.is_file()
        if not there or (target.fragment and file in pages and unquote(target.fragment) not in pages[file].anchors):
            found.append(link)
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site").resolve()
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_no_link_of_the_site_leads_nowhere(site):
    pages = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}  # served from any address
    assert len(pages) > 30
    assert {str(page.relative_to(site)): found for page in pages if (found := broken(site, page, pages))} == {}


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        tags = re.findall(r"<(?:script|img|iframe|link)\b[^>]*>", page.read_text(encoding="utf-8"))
        assert [tag for tag in tags if re.search("(src|href)=.?(https?:)?//", tag)] == [], page


@pytest.mark.slow
def test_every_page_every_notebook_and_every_public_name_is_there(site):
    kept = [*(ROOT / "docs").glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    built = {path.stem for path in site.rglob("*.html")}
    assert {path.stem for path in kept} <= built
    named = Page(site / "reference" / "moe_lens.html").links | {
        f"#{anchor}" for path in (site / "reference").glob("*.html") for anchor in Page(path).anchors
    }
    for name in moe_lens.__all__:
        assert any(link.endswith(f".{name}") for link in named), name
    assert list(site.glob("notebooks/*.png")), "the notebooks' figures"


@pytest.mark.slow
def test_docstrings_are_shown_as_lists_of_arguments_and_examples_as_code(site):
    text = (site / "reference" / "moe_lens.lens.html").read_text(encoding="utf-8")
    assert re.search(r"<li>\s*(<p>)?<code>layers</code>: put in place only what changed inside", text)
    assert "&gt;&gt;&gt;" in text
    assert "[mask][example]" in text


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#there">x</a><a href="b.html#not"></a><img src="no.png">')
    (tmp_path / "b.html").write_text('<h2 id="there">x</h2><a href="https://example.org/x">x</a><a href="a.html">x</a>')
    pages = {path: Page(path) for path in tmp_path.glob("*.html")}
    assert sorted(broken(tmp_path, tmp_path / "a.html", pages)) == ["b.html#not", "no.png"]
    assert broken(tmp_path, tmp_path / "b.html", pages) == []
