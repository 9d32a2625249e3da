"""The report page is complete, self-contained, repeatable, and refuses what it cannot show."""

import re
import shutil
import subprocess
import sys

import pandas as pd
import plotly.graph_objects as go
import pytest

from moe_lens.errors import MoELensError
from moe_lens.report import pictures
from moe_lens.report.contents import SECTIONS
from moe_lens.report.glossary import meaning
from moe_lens.report.page import LONGEST, MOST_ROWS, build_report
from moe_lens.report.views.citations_of_answer import COLUMNS
from moe_lens.results import write_table

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRAWN = r'Plotly\.newPlot\(\s*"figure-\d"'
PROVENANCE = {"model": "organism", "seed": 3, "command": ["intervene", "--limit", "<10>"]}


def answers(em: float = 0.25) -> pd.DataFrame:
    return pd.DataFrame([{"variant": "base", "task": "swap", "em": em, "em_low": 0.2, "em_high": 0.3125}])


def log(steps: int) -> pd.DataFrame:
    return pd.DataFrame({"step": range(steps), "loss": 1.0, "learning_rate": 1e-3})


@pytest.fixture
def run(tmp_path):
    write_table(answers(), tmp_path / "tasks.parquet", PROVENANCE)
    write_table(log(MOST_ROWS + 5), tmp_path / "router" / "tuning.parquet", PROVENANCE | {"seed": 44})
    return tmp_path


def test_page_has_figures_numbers_and_provenance_of_all_known_tables_below_the_folder(run):
    page = build_report(run, title="One & two").read_text()
    assert "<title>One &amp; two</title>" in page
    linked = re.findall(r'<li><a href="#(.*?)">(.*?)</a></li>', page)
    assert linked == re.findall(r'<section id="(.*?)"><h2>(.*?)</h2>', page), "the contents lead to each table"
    assert re.findall(r"<h2>(.*?)</h2>", page) == [
        "Answers",
        "Training: router",
        "What the words mean",
        "Where the numbers came from",
    ]
    assert len(re.findall(DRAWN, page)) == 2
    assert '<td class="number">0.3125</td>' in page
    assert "&quot;seed&quot;: 44" in page
    assert "&lt;10&gt;" in page


def test_page_needs_no_network_and_offers_no_upload(run):
    page = build_report(run, title="x").read_text()
    assert page.count("plotly.js v") == 1
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=", page)
    assert page.count('"showSendToCloud": false') == len(re.findall(DRAWN, page)) == 2


def test_same_tables_give_the_same_bytes(run):
    first = build_report(run, title="x").read_bytes()
    assert build_report(run, title="x").read_bytes() == first


def test_a_long_table_is_cut_and_says_so(run):
    page = build_report(run, title="x").read_text()
    assert f"The first {MOST_ROWS} of {MOST_ROWS + 5} rows" in page
    assert f'<td class="number">{MOST_ROWS - 1}</td>' in page
    assert f'<td class="number">{MOST_ROWS}</td>' not in page


def test_a_missing_value_is_a_dash_not_nan(tmp_path):
    table = log(3).assign(dev_em=[None, 0.5, None])
    write_table(table, tmp_path / "tuning.parquet", PROVENANCE)
    page = build_report(tmp_path, title="x").read_text()
    numbers = page[page.index('<div class="numbers">') : page.index("<footer>")]
    assert "–" in numbers
    assert "nan" not in numbers.lower()


def test_text_of_a_table_cannot_become_part_of_the_page(tmp_path):
    write_table(answers().assign(task="<script>alert(1)</script>"), tmp_path / "tasks.parquet", PROVENANCE)
    assert "<script>alert" not in build_report(tmp_path, title="x").read_text()


def test_experts_of_a_column_planted_are_outlined(tmp_path):
    table = pd.DataFrame({"layer": [0, 0], "expert": [0, 1], "score": [0.5, 0.5], "planted": [True, False]})
    write_table(table, tmp_path / "usage.parquet", PROVENANCE)
    assert '"name":"planted"' in build_report(tmp_path, title="x").read_text()


def test_every_saved_score_is_drawn_under_its_name(tmp_path):
    table = pd.DataFrame({"layer": [0, 0], "expert": [0, 1], "score": [0.5, 0.5]})
    for name in ("ce", "oe-last"):
        write_table(table.assign(name=name), tmp_path / f"score-{name}.parquet", PROVENANCE)
    page = build_report(tmp_path, title="x").read_text()
    assert "Score ce is highest for" in page
    assert "Score oe-last is highest for" in page


def test_an_attention_case_is_shown_as_a_view(tmp_path):
    case = pd.DataFrame({"position": [0, 1], "token": ["a", "<b>"], "part": ["context", "answer"], "layer": 0})
    both = [case.assign(model=name, attention=[x, 1 - x]) for name, x in (("base", 0.75), ("tuned", 0.25))]
    write_table(pd.concat(both).assign(case="7", note="said"), tmp_path / "attention_case.parquet", PROVENANCE)
    page = build_report(tmp_path, title="x").read_text()
    assert page.count("<iframe srcdoc=") == 1
    assert "said Layers" in page


def test_a_table_without_a_figure_is_shown_as_numbers(tmp_path):
    table = pd.DataFrame({"learning_rate": [0.001], "em": [0.75]})
    write_table(table, tmp_path / "learning_rates.parquet", PROVENANCE)
    page = build_report(tmp_path, title="x").read_text()
    assert not re.search(DRAWN, page)
    assert '<td class="number">0.75</td>' in page


def test_a_table_without_rows_stands_on_the_page_and_keeps_no_other_from_it(run):
    """Such as the citations of examples that have no context."""
    write_table(pd.DataFrame(columns=list(COLUMNS)), run / "citations.parquet", PROVENANCE)
    assert "All 0 rows of <code>citations.parquet</code>" in build_report(run, title="x").read_text()
    section = SECTIONS["citations.parquet"]
    assert section.drawn(pd.DataFrame(columns=list(COLUMNS)), "citations.parquet") is None
    with pytest.raises(MoELensError, match=r"cannot draw a/citations.parquet: .* this table has no place"):
        section.drawn(pd.DataFrame({"a": [1]}), "a/citations.parquet")


def test_a_table_that_cannot_be_drawn_is_named_and_the_old_page_stays(run):
    before = build_report(run, title="x").read_bytes()
    write_table(answers().drop(columns="em_low"), run / "tasks.parquet", PROVENANCE)
    with pytest.raises(MoELensError, match=r"tasks\.parquet.*em_low"):
        build_report(run, title="x")
    assert (run / "report.html").read_bytes() == before


def test_a_folder_without_known_tables_lists_the_known_ones(tmp_path):
    with pytest.raises(MoELensError, match=r"masking\.parquet"):
        build_report(tmp_path, title="x")


def test_a_file_is_not_a_run_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MoELensError, match="is a file"):
        build_report(tmp_path / "file", title="x")


def test_figures_are_as_wide_as_the_page_and_their_titles_are_text_of_it(run):
    page = build_report(run, title="x").read_text()
    assert not re.search(r'"width":\s*680', page)
    assert page.count('"responsive": true') == 2
    assert "<h3>EM is 0.25 to 0.25 over the tasks</h3>" in page
    assert page.count('class="plotly-graph-div" style="height:100%; width:100%;"') == 2


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
def test_on_a_narrow_page_a_figure_makes_room_for_the_lines_of_its_legend(tmp_path):
    names = ("base", "router-tuned", "all experts tuned", "context-faithful experts")
    write_table(pd.concat(answers().assign(variant=name) for name in names), tmp_path / "tasks.parquet", PROVENANCE)
    page = build_report(tmp_path, title="x")
    sizes = []
    for width in (500, 1200):
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
        done = subprocess.run([*command, f"file://{page}"], capture_output=True, text=True, check=True, timeout=60)
        [size] = re.findall(r'<svg class="main-svg"[^>]*width="(\d+)" height="(\d+)"', done.stdout)[:1]
        sizes.append(tuple(map(int, size)))
    (narrow, taller), (wide, height) = sizes
    assert narrow < 500 < wide
    assert taller == height + 2 * 30


def test_figures_call_tasks_that_are_paths_by_what_tells_them_apart(run):
    rows = pd.concat(answers().assign(task=task) for task in ("/data/a/mine-one", "/data/b/mine-two"))
    write_table(rows, run / "tasks.parquet", PROVENANCE)
    page = build_report(run, title="x").read_text()
    assert '"mine-one"' in page
    assert '"mine-two"' in page
    assert ">/data/a/mine-one</td>" in page, "numbers stay as they are in the table"
    write_table(rows.assign(task=["/data/a/mine-one", "/data/b/mine-one"]), run / "tasks.parquet", PROVENANCE)
    assert '"mine-one"' not in build_report(run, title="x").read_text()


def test_the_words_of_a_page_are_explained_and_only_those(run):
    page = build_report(run, title="x").read_text()
    terms = re.findall(r"<dt>(.*?)</dt>", page)
    assert {"em", "swap"} <= set(terms)
    assert not {"CE", "closed_book", "reap"} & set(terms)


def test_every_score_task_and_metric_has_a_meaning():
    from moe_lens.choosing import SCORES
    from moe_lens.data.lookup import ORGANISM_TASKS

    unknown = [name for name in (*SCORES, *ORGANISM_TASKS, "CE", "OE", "CAG") if meaning(name) is None]
    assert unknown == []
    assert meaning("reaper") is None
    assert meaning("-last") is None
    assert "last token" in meaning("ce-gain-last")


def test_an_evaluations_folder_has_a_page(tmp_path):
    row = {"intervention": "none", "metric": "em", "n": 3, "mean": 0.5, "low": 0.1, "high": 0.9}
    write_table(pd.DataFrame([row]), tmp_path / "summary.parquet", PROVENANCE)
    answer = {"intervention": "none", "id": "1", "question": "zyxw " * 1000, "prediction": "Belmor <b>", "em": 1.0}
    write_table(pd.DataFrame([answer]), tmp_path / "answers.parquet", PROVENANCE)
    page = build_report(tmp_path, title="x").read_text()
    assert page.count("zyxw ") == LONGEST / len("zyxw ")
    assert re.findall(r"<h2>(.*?)</h2>", page)[:2] == ["Scores", "Single answers"]
    assert "Belmor &lt;b&gt;" in page


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--format", "gif"], "of pdf, svg, png; got gif"),
        (["--no-title"], "give both"),
    ],
)
def test_pictures_that_cannot_be_made_are_refused_before_the_page(run, arguments, says):
    done = command(str(run), *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert not (run / "report.html").exists()


def test_pictures_say_kindly_what_they_lack_and_leave_titles_out(run, monkeypatch):
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    with pytest.raises(MoELensError, match=r"there is no kaleido: pip install 'moe_lens\[image\]'"):
        pictures.checked("pdf", no_title=True)
    drawn = []

    def to_image(self, **asked):
        drawn.append((self.layout.title.text, self.layout.width, self.layout.height, asked["format"]))
        return b"picture"

    monkeypatch.setattr(go.Figure, "to_image", to_image)  # a browser takes seconds, and is not everywhere
    files = [path.relative_to(run).as_posix() for path in pictures.write_pictures(run, ["pdf"], titled=False)]
    assert files == ["figures/tasks.pdf", "figures/router-tuning.pdf"]
    list(pictures.write_pictures(run, ["svg"], titled=True))
    (bare, width, height, form), (title, own_width, own_height, _) = drawn[0], drawn[2]
    assert (bare, width, form) == (None, own_width, "pdf")
    assert title.startswith("EM is")
    assert height < own_height


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "moe_lens.report", *arguments], capture_output=True, text=True, check=False
    )


def test_command_writes_the_page_and_says_where(run):
    done = command(str(run), "--title", "From a shell")
    assert done.returncode == 0, done.stderr
    assert str(run / "report.html") in done.stdout.replace("\n", "")
    assert "<h1>From a shell</h1>" in (run / "report.html").read_text()


def test_command_ends_bad_input_with_one_message_and_code_2(tmp_path):
    done = command(str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert "not there" in done.stderr
    assert "Traceback" not in done.stderr


def test_drawing_needs_neither_torch_nor_nnsight_nor_transformers():
    code = """
import pkgutil, sys
import moe_lens.report
for module in pkgutil.walk_packages(moe_lens.report.__path__, "moe_lens.report."):
    if not module.name.endswith("__main__"):
        __import__(module.name)
for name in moe_lens.report.__all__:
    assert callable(getattr(moe_lens.report, name)), name
assert len(moe_lens.report.contents.SECTIONS) > 10
print(sorted({"torch", "nnsight", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
