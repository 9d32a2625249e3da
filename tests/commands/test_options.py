"""The options that commands share: one meaning in every command line, and what is said of what was read."""

import json
import subprocess
import sys
from dataclasses import replace
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from byte_level_tokenizer import byte_level_tokenizer

from moe_lens import MoELensError, evaluate, intervene, tune
from moe_lens.commands import console, options
from moe_lens.commands.named_experts import NamedExperts
from moe_lens.commands.options import BaseOpening, Opening, Reading
from moe_lens.commands.prompt_lists import Asked
from moe_lens.data import FIGURE_10
from moe_lens.lens.delta import weights_digest
from moe_lens.lens.interventions import parse_mode
from moe_lens.results import read_provenance, read_table
from moe_lens.tuning import TuneRouters, save_trained

ROWS = [
    {"q": "Who landed?", "passage": "Paul landed.", "gold": {"text": "Paul"}},
    {"q": "Who sang?", "passage": "word " * 100 + "Ann sang. " + "word " * 100, "gold": {"text": "Ann"}},
]
NAMES = "question=q,context=passage,answer=gold.text"


@pytest.fixture
def file(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps(ROWS[0]), "{oops", json.dumps(ROWS[1]), json.dumps(ROWS[0] | {"gold": {"text": ""}})]
    Path("mine.jsonl").write_text("\n".join(lines))
    return "mine.jsonl"


@pytest.mark.parametrize("command", [evaluate, intervene, tune], ids=lambda module: module.__name__)
def test_every_command_takes_the_same_options_for_data(command):
    parameters = signature(command.main).parameters
    assert (parameters["data"].annotation, parameters["reading"].annotation) == (options.Data, Reading)


def test_bad_rows_are_printed_with_their_lines_and_only_by_the_first_process(file, capsys, monkeypatch):
    examples = Reading(NAMES, skip_bad=True).load(file, split="test")
    assert [example.answers for example in examples] == [("Paul",), ("Ann",)]
    first, *rows = capsys.readouterr().out.splitlines()
    assert first == "mine.jsonl: left out 2 bad rows of 4"
    assert [row.split(":")[0].strip() for row in rows] == ["mine.jsonl, line 2", "mine.jsonl, line 4"]
    monkeypatch.setenv("RANK", "1")
    assert Reading(NAMES, skip_bad=True).load(file, split="test") == examples
    assert capsys.readouterr().out == ""
    with pytest.raises(MoELensError, match=r"mine\.jsonl, line 2: not JSON"):
        Reading(NAMES).load(file, split="test")


def test_many_bad_rows_are_counted_after_the_first_ones(file, capsys):
    Path(file).write_text(json.dumps(ROWS[0]) + "\n{" * 30)
    Reading(NAMES, skip_bad=True).load(file, split="test")
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("left out 30 bad rows of 31")
    assert (len(said), said[-1]) == (22, "  and 10 more")


def test_what_does_not_fit_is_said_and_kept_in_the_provenance(file, capsys):
    asker = SimpleNamespace(tokenizer=byte_level_tokenizer(chat=False), template=FIGURE_10)
    examples = Reading(NAMES, skip_bad=True).load(file, split="test")
    capsys.readouterr()
    drop, cut = Reading(max_length=150), Reading(max_length=150, too_long="truncate")
    dropped, truncated = (reading.fit(examples, asker, of=file) for reading in (drop, cut))
    assert [len(fitted.examples) for fitted in (dropped, truncated)] == [1, 2]
    assert capsys.readouterr().out.splitlines() == [
        "mine.jsonl: 1 of 2 examples dropped, 0 truncated; in 0 no answer stands in the context",
        "mine.jsonl: 0 of 2 examples dropped, 1 truncated; in 0 no answer stands in the context",
    ]
    assert cut.facts(truncated) == {"max_length": 150, "too_long": "truncate", "dropped": 0, "truncated": 1}


@pytest.mark.parametrize(
    ("group", "values", "says"),
    [
        (Reading, {"max_length": 0}, "--max-length is a number of tokens, at least 1; got 0"),
        (
            Opening,
            {"model": "organism", "dtype": "int8"},
            "dtype must be one of float32, bfloat16, float16; got 'int8'",
        ),
        (
            Opening,
            {"model": "organism", "template": "mine"},
            "a template is one of figure-10, plain, bare, released",
        ),
        (BaseOpening, {"model": "organism", "template": "nowhere.toml"}, "cannot read a template from nowhere.toml"),
    ],
)
def test_values_that_make_no_sense_are_refused_before_reading(group, values, says):
    with pytest.raises(MoELensError, match=says):
        group(**values)


def test_what_is_done_with_long_prompts_is_a_choice(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", "evaluate --model organism --out out --data swap --too-long cut".split())
    with pytest.raises(SystemExit) as stopped:
        console.run(evaluate.main)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert all(f"'{word}'" in said for word in ("--too-long", "cut", "drop", "truncate"))


SIZES = ("--batch-size", "--limit", "--max-new-tokens")
BELOW = {
    evaluate: SIZES,
    intervene: (*SIZES, "--score-limit"),
    tune: (*SIZES, "--epochs", "--micro-batch", "--patience", "--evaluate-every"),
}
LEAST = [
    *((command, option, 1) for command, given in BELOW.items() for option in given),
    *((command, "--seed", 0) for command in BELOW),
    (tune, "--weight-decay", 0),
    (tune, "--checkpoint-seconds", 0),
]


@pytest.mark.parametrize(("command", "option", "least"), LEAST, ids=lambda value: getattr(value, "__name__", value))
def test_numbers_below_the_least_that_makes_sense_end_with_exit_code_2(
    command, option, least, tmp_path, capsys, monkeypatch
):
    needed = {evaluate: "", intervene: "--experts 0:1", tune: ""}[command]
    line = f"command --model nowhere --data swap --out {tmp_path / 'out'} {needed} {option} {least - 1}"
    monkeypatch.setattr(sys, "argv", line.split())
    with pytest.raises(SystemExit) as stopped:
        console.run(command.main)
    assert stopped.value.code == 2
    assert option in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("sqaud", "did you mean squad?"),
        ("nowhere.json", "No such file"),
        ("empty.json", "empty.json is empty"),
        (".", "the folder . is no data set"),
        ("swap --split validation", "swap has the splits"),
        ("mine.jsonl --columns question=nothing", "no column 'nothing'; it has q, passage, gold"),
        ("mine.jsonl --columns query=q", "columns can rename id, context"),
        ("mine.jsonl --columns q", "field=column"),
        ("mine.jsonl", "line 1: context, question, answer missing; it has q, passage, gold; name its columns"),
        ("mine.jsonl --skip-bad", "none of the 4 rows of mine.jsonl makes an example"),
        ("swap --limit 3 --max-length 5", "all 3 have more than 5 tokens"),
    ],
)
def test_what_cannot_be_read_ends_with_one_message_and_exit_code_2(wrong, says, file, capsys, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    Path("empty.json").touch()
    monkeypatch.setattr(sys, "argv", f"evaluate --model organism --out out --data {wrong}".split())
    with pytest.raises(SystemExit) as stopped:
        console.run(evaluate.main)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err.strip().splitlines()[-1]
    assert not Path("out").exists()


def test_a_file_is_evaluated_as_the_options_say(file, capsys, monkeypatch):
    line = f"evaluate --model organism --data {file} --columns {NAMES} --skip-bad --max-length 60 --too-long truncate"
    monkeypatch.setattr(sys, "argv", [*line.split(), "--max-new-tokens", "2", "--out", "out"])
    with pytest.raises(SystemExit) as stopped:
        console.run(evaluate.main)
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "left out 2 bad rows of 4" in said
    assert "0 of 2 examples dropped, 1 truncated" in said
    assert len(read_table("out/answers.parquet")) == 2
    facts = read_provenance("out/answers.parquet")
    assert (facts["max_length"], facts["too_long"], facts["truncated"]) == (60, "truncate", 1)


def test_a_model_is_opened_as_the_options_say(tmp_path):
    texts = {"with_context": "{context} | {question}", "closed_book": "{question}", "answer_cue": " ="}
    (tmp_path / "mine.json").write_text(json.dumps(texts))
    opening = Opening("organism", dtype="bfloat16", device="cpu", template=str(tmp_path / "mine.json"))
    lens = opening.load()
    assert lens.module.dtype == torch.bfloat16
    assert lens.template.facts() == texts
    assert opening.facts(lens) == {"dtype": "bfloat16", "template": texts, "weights": weights_digest(lens.module)}
    plain = BaseOpening("organism")
    lens = plain.load()
    assert plain.facts(lens) == {"dtype": None, "template": FIGURE_10.facts(), "weights": weights_digest(lens.module)}


def test_what_is_for_chats_is_put_on_the_template():
    asked = BaseOpening("organism", system_prompt="Be brief.", chat_template_kwargs="a=false, b=low,c=[1]").asked()
    assert asked.system_prompt == "Be brief."
    assert asked.chat_template_kwargs == {"a": False, "b": "low", "c": [1]}
    assert BaseOpening("organism", template="plain", chat_template_kwargs="a=1").asked().with_context.startswith("{con")
    nested = "[" * 100_000
    assert BaseOpening("organism", chat_template_kwargs=f"a={nested}").asked().chat_template_kwargs == {"a": nested}


@pytest.mark.parametrize("text", ["enable_thinking", "", "a=1,,b=2", "2x=1", "tokenize=true"])
def test_what_is_no_argument_of_a_chat_template_is_refused(text):
    with pytest.raises(MoELensError, match=r"NAME=VALUE|leave tokenize out"):
        BaseOpening("organism", chat_template_kwargs=text)


def test_a_delta_is_put_on_the_model_that_the_options_name_and_not_on_its_base(tmp_path):
    lens = BaseOpening("organism").load()
    with TuneRouters().attached(lens) as trained, torch.no_grad():
        lens.module.get_parameter(trained.names[0]).neg_()
    save_trained(lens.module, trained, tmp_path, facts={})
    opening = Opening("organism", delta=tmp_path)
    for opened, of in ((opening, lens), (replace(opening, delta=None), BaseOpening("organism").load())):
        assert weights_digest(opened.load().module) == weights_digest(of.module)
    assert weights_digest(BaseOpening("organism").load(delta=tmp_path).module) == weights_digest(lens.module)


def test_a_log_holds_nothing_of_an_opening():
    script = "from moe_lens.commands.options import Opening; Opening('organism').load()"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stderr == b""


DOORS = ("tune", "intervene", "evaluate", "find", "measure", "compare", "doctor", "demo")
DOORS += ("organism.measure", "organism.pretrain")
HEAVY = {"torch", "transformers", "nnsight", "pandas", "pyarrow", "scipy", "sklearn", "plotly"}
SCRIPT = """
import runpy, sys
sys.argv = ["command", "--help"]
try:
    runpy.run_module(NAME, run_name="__main__")
except SystemExit as ended:
    assert not ended.code
print(*sys.modules)
"""


@pytest.mark.parametrize("name", ["moe_lens", *(f"moe_lens.{door}" for door in DOORS)])
def test_asking_for_help_needs_no_heavy_package(name):
    script = SCRIPT.replace("NAME", repr(name))
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True).stdout
    assert "--help" in printed
    assert HEAVY.isdisjoint(printed.splitlines()[-1].split())


def test_help_flows_in_any_terminal_but_for_its_commands():
    text = """First line.

    A sentence that is cut
    by the file's width.

    \b
        python -m one \\
            --option
    """
    assert console.flowing(text) == (
        "First line.\n\nA sentence that is cut by the file's width.\n\n\b\n    python -m one \\\n        --option"
    )


def test_values_with_commas_are_one_argument():
    told = BaseOpening("organism", chat_template_kwargs='x=[1,2], y="a,b",z={"a": 1, "b": 2},w=3b').asked()
    assert told.chat_template_kwargs == {"x": [1, 2], "y": "a,b", "z": {"a": 1, "b": 2}, "w": "3b"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("enable_thinking=False", "give enable_thinking=false"),
        ("enable_thinking=True,a=1", "give enable_thinking=true"),
        ("a=None", "give a=null"),
        ("a=no", "give a=false"),
        ("a=1,a=2", "has a twice"),
        ("a=NaN", "what JSON can say"),
        ("a=[1e999]", "what JSON can say"),
    ],
)
def test_values_that_json_spells_otherwise_are_no_texts(text, told):
    with pytest.raises(MoELensError, match=told):
        BaseOpening("organism", chat_template_kwargs=text)
    assert BaseOpening("organism", chat_template_kwargs='a="False"').asked().chat_template_kwargs == {"a": "False"}


@pytest.mark.parametrize("out", [["--out", ""], ["--out="]])
def test_an_empty_folder_is_not_the_current_one(out, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tune", "--model", "organism", "--data", "swap", *out])
    with pytest.raises(SystemExit) as end:
        console.run(tune.main)
    assert end.value.code == 2
    assert "--out names a folder; got an empty text" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [evaluate, intervene], ids=lambda module: module.__name__)
def test_an_empty_stop_is_refused_before_a_model_is_looked_for(command, tmp_path, monkeypatch, capsys):
    line = f"x --model {tmp_path}/nowhere --data swap --out {tmp_path}/out"
    given = ["--experts", "0:1"] if command is intervene else []
    monkeypatch.setattr(sys, "argv", [*line.split(), *given, "--stop", ""])
    with pytest.raises(SystemExit):
        console.run(command.main)
    assert "--stop is a text" in capsys.readouterr().err


def test_a_base_that_no_score_needs_and_a_rate_above_one_are_told(capsys):
    NamedExperts(
        ["0:1"], Opening("organism"), options.Scoring(base="other"), Asked(Reading()), "swap", mode=parse_mode("zero")
    )
    console.rates("5e-4,1e30", what="--learning-rate")
    said = capsys.readouterr().err
    assert "--base changes nothing" in said
    assert "--learning-rate 1e+30 moves each weight" in said
