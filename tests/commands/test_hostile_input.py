"""Whatever is typed or lies in a file that an option names, a command ends with its result or with one message."""

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_lens import MoELens, evaluate, intervene, load_examples, tune
from moe_lens.causal.judge import parse_verdict
from moe_lens.checks.suite import checks_named
from moe_lens.choosing.controls import Controls
from moe_lens.choosing.selection import parse
from moe_lens.commands import console, options
from moe_lens.commands.shards import Shard
from moe_lens.data import parse_columns
from moe_lens.data.prompts import FIGURE_10
from moe_lens.data.shown import demonstrations_named
from moe_lens.data.templates import template_named
from moe_lens.decoding import parse_decoding
from moe_lens.errors import MoELensError
from moe_lens.interruption import INTERRUPTED
from moe_lens.lens.delta import read_facts
from moe_lens.lens.interventions import check_mode
from moe_lens.lens.positions import check_positions
from moe_lens.metrics.catalogue import metrics_named
from moe_lens.report.page import build_report
from moe_lens.storage import try_folder

NINES, DEEP = "9" * 5000, "[" * 100_000
PARTS = """\0 \ud800 \udcff ² ٣ ٣:٤ -1 nan inf 1e999 . .. / ~ : ; , = @ # % \n \u2028 é 0x1 1_000 0.2 p= .json .gz .csv
 swap squad: mmlu@ organism organism: nowhere.json http://u:p@h/ ce: ce:4 random: planted esft-gate:p= 3:5,7;4:0
 question= zero em figure-10 capture router""".split(" ")
TEXTS = st.one_of(
    st.lists(st.sampled_from([*PARTS, " ", "", NINES, DEEP, '{"a":' * 9999, "x" * 300]), max_size=4).map("".join),
    st.text(max_size=30),
)
FILES = {
    "experts.json": parse,
    "template.json": template_named,
    "template.toml": template_named,
    "data.json": lambda file: load_examples(file, limit=1),
    "data.jsonl": lambda file: load_examples(file, limit=1),
    "data.csv": lambda file: load_examples(file, limit=1),
    "data.parquet": lambda file: load_examples(file, limit=1),
    "data.jsonl.gz": lambda file: load_examples(file, limit=1),
}
OPTIONS = {
    "--experts": parse,
    "--mode": check_mode,
    "--control": Controls.parse,
    "--learning-rate": lambda text: console.rates(text, what="--learning-rate"),
    "--layers": lambda text: console.numbers(text, int, what="--layers"),
    "--columns": parse_columns,
    "--template": template_named,
    "--metrics": lambda text: metrics_named(text.split(",")),
    "--positions": lambda text: check_positions(options.place_named(text)),
    "--epochs": lambda text: options.epochs_for(text, "swap"),
    "--shard": lambda text: Shard.parse(f"0/{text}"),
    "--demonstrations": lambda text: demonstrations_named(f"counterfactual:{text}:"),
    "--answer-after": lambda text: replace(FIGURE_10, answer_after=text),
    "--decoding": lambda text: parse_decoding(f"cite:{text}"),
    "--checks": lambda text: checks_named(text.split(",")),
    "--dtype": console.check_dtype,
    "--delta": read_facts,
    "--out": lambda text: try_folder(Path(text)),
    "report": lambda text: build_report(text, title="none") if text.strip("./ ") else None,
    "a judge's reply": parse_verdict,
}
quick = settings(deadline=None, max_examples=80, suppress_health_check=list(HealthCheck))
offline = settings(quick, max_examples=15)


@pytest.fixture(autouse=True)
def _no_collection():
    """What is collected where nesting has used up all recursion cannot end well, and would be told as a failure."""
    gc.disable()
    yield
    gc.enable()


def taken(read: Callable[[str], object], text: str) -> None:
    """It is read, or refused."""
    with suppress(MoELensError):
        read(text)


@pytest.mark.filterwarnings("ignore:Possible nested set")  # what re may mean by "[[" one day
@pytest.mark.parametrize("option", OPTIONS)
def test_any_text_in_an_option_is_taken_or_refused(option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick(given(text=TEXTS)(lambda text: taken(OPTIONS[option], text)))()


@pytest.mark.parametrize("option", ["--positions", "--epochs", "--shard", "--demonstrations", "--decoding"])
@pytest.mark.parametrize("number", [NINES, "²", "-1" + "0" * 5000])
def test_what_python_does_not_read_as_a_number_is_refused_as_none(option, number):
    with pytest.raises(MoELensError):
        OPTIONS[option](number)


@pytest.mark.parametrize("pattern", ["a{99999999999999}", "(" * 5000, "("])
def test_a_pattern_that_python_cannot_compile_is_refused(pattern):
    with pytest.raises(MoELensError, match="answer_after is a regular expression"):
        replace(FIGURE_10, answer_after=pattern)


@pytest.mark.parametrize("given", [float("nan"), float("inf"), -1.0, 0.0, 1.5])
def test_steps_between_measurements_that_no_run_has_are_refused(given):
    with pytest.raises(MoELensError, match="--evaluate-every"):
        options.steps_between(given)


@pytest.mark.parametrize("name", FILES)
def test_any_file_that_an_option_names_is_taken_or_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    near = ["[]", "{}", "[{}]", "[[1]]", '{"data": [1]}', f'{{"1": [{NINES}]}}', f'{{"{NINES}": []}}']
    contents = st.one_of(st.binary(max_size=60), TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")))

    def one(content: bytes) -> None:
        Path(name).write_bytes(content)
        taken(FILES[name], name)

    quick(given(content=st.one_of(contents, st.sampled_from(near).map(str.encode)))(one))()


@pytest.mark.parametrize("read", [lambda text: load_examples(text, limit=1), MoELens.from_pretrained])
def test_any_name_of_data_or_a_model_is_taken_or_refused(read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for switch in ("datasets.config.HF_HUB_OFFLINE", "huggingface_hub.constants.HF_HUB_OFFLINE"):
        monkeypatch.setattr(switch, True)
    offline(
        given(text=TEXTS.filter(lambda text: "swap" not in text and "organism" not in text))(
            lambda text: taken(read, text)
        )
    )()


@pytest.mark.parametrize("package", ["typer", "torch"])
def test_ctrl_c_says_that_the_same_command_goes_on_also_while_packages_are_imported(package, tmp_path):
    """A package that is interrupted while it is imported stands before the real one."""
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("raise KeyboardInterrupt")
    package_root = Path(console.__file__).parents[2]
    script = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(package_root)!r}]"
    (tmp_path / "sitecustomize.py").write_text(script)
    command = "moe_lens.evaluate --model organism --data swap --limit 1 --out out".split()
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{package_root}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.splitlines() == [INTERRUPTED]
    assert done.returncode in (130, -2)
    assert not (tmp_path / "out").exists()


def test_a_job_that_a_scheduler_ends_finishes_as_with_ctrl_c(tmp_path):
    """SIGTERM alone ends a process without a word, and what it could keep on its way out is lost."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, time\n"
        "from moe_lens.commands import console\n"
        "def main() -> None:\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        print('kept')\n"
        "console.run(main)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("kept\n", console.OF_CTRL_C)
    assert INTERRUPTED in done.stderr


@pytest.mark.parametrize("command", ["evaluate", "intervene --experts 0:1", "tune --method router"])
def test_a_folder_that_cannot_be_written_ends_a_command_before_its_model_is_looked_for(
    command, tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").touch()
    name, *words = command.split()
    main = {"evaluate": evaluate, "intervene": intervene, "tune": tune}[name].main
    options = f"--model nowhere --data swap --limit 1 --out {tmp_path / 'file'}".split()
    monkeypatch.setattr(sys, "argv", [name, *options, *words])
    with pytest.raises(SystemExit) as end:
        console.run(main)
    assert end.value.code == 2
    assert "cannot write to the folder" in capsys.readouterr().err


def test_an_argument_that_is_no_utf_8_is_told_before_anything_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["evaluate", "--model", "nowhere", "--data", "swap", "--out", f"{tmp_path}/\udcff"]
    )
    with pytest.raises(SystemExit) as end:
        console.run(evaluate.main)
    assert end.value.code == 2
    assert "arguments are UTF-8 text" in capsys.readouterr().err


def test_experts_in_json_that_is_too_deep_or_too_long_are_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in (DEEP, f'{{"1": [{NINES}]}}', json.dumps({NINES: [1]})):
        Path("experts.json").write_text(content)
        with pytest.raises(MoELensError, match=r"expected experts as JSON|must be layer numbers"):
            parse("experts.json")
