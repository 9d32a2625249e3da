"""The commands of docs/paper.md for the paper's models, run as printed on a tiny model of each of their families."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from conftest import build_model
from remote_models import KINDS, remote_folder
from training_cases import EXAMPLES

from moe_lens.architecture.paper_models import PAPER_MODELS
from moe_lens.commands import console
from moe_lens.lens.delta import read_facts
from moe_lens.results import read_provenance, read_table

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("## On the paper's own models")[2].partition("\n## ")[0]
BLOCK = SECTION.partition("```bash\n")[2].partition("```")[0]
COMMANDS = re.findall(r"^python (analyses/\S+) (.*)$", BLOCK, flags=re.MULTILINE)
FAMILIES = {one.name: one for one in PAPER_MODELS}
DATA_SETS = ("squad", "nq", "hotpotqa", "nq-swap", "confiqa-mc")


@pytest.fixture
def home(tmp_path, tokenizer, monkeypatch) -> Path:
    """A folder with the authors' data as they publish it and the public data sets that are joined to them, all tiny."""
    rows = [{"context": one.context, "question": one.question, "answer": one.answers[0]} for one in EXAMPLES]
    for name in DATA_SETS:
        folder = tmp_path / "RouterLens" / "data" / name
        folder.mkdir(parents=True)
        for split in ("train", "dev", "test"):
            (folder / f"{split}.json").write_text(json.dumps(rows[:3]))
    data = tmp_path / "RouterLens" / "data"
    swapped = [
        {
            "question": row["question"],
            "sub_context": row["context"],
            "sub_answer": [row["answer"]],
            "org_answer": ["old"],
        }
        for row in rows
    ]
    (data / "nq-swap" / "public.json").write_text(json.dumps(swapped))
    conflicts = [
        {"question": row["question"], "cf_context": row["context"], "cf_answer": row["answer"], "orig_answer": "old"}
        for row in rows
    ]
    (data / "confiqa-mc" / "ConFiQA-MC.json").write_text(json.dumps(conflicts))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "analyses")
    monkeypatch.setattr(console, "find_spec", lambda name: None)  # no browser
    return tmp_path


def model_of(family: str, home: Path, tokenizer) -> str:
    """The options that open a tiny model of this family, in a folder of the paper's name for it."""
    model = FAMILIES[family]
    folder = home / family
    if model.own_code:
        remote_folder(folder, tokenizer, KINDS["summed"])
        return f"--model {family} --trust-remote-code"
    window = {"sliding_window": None} if "mixtral" in model.model_type else {}  # as in the model itself
    build_model(model.model_type, len(tokenizer), **window).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"--model {family}"


def run(line: str, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, *, code: int = 0) -> None:
    """A command of the page, as bash would read it with these variables; it ends with this exit code."""
    for _ in range(3):  # as one names another
        line = re.sub(r"\$(\w+)", lambda found: variables[found[1]], line)
    program, *arguments = line.replace('"', "").split()
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit) as ended:
        if program.startswith("analyses/"):
            runpy.run_path(str(ROOT / program), run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__")
    assert (ended.value.code or 0) == code, line


def variables(model: str) -> dict[str, str]:
    """What the page sets before its commands, with the model's options."""
    assigned = re.findall(r"^(\w+)=(\S+|\".*\")$", BLOCK, flags=re.MULTILINE)
    return dict(assigned) | {"M": model, "OUT": "runs"}


def test_each_item_has_a_command_and_each_model_its_id():
    scripts = {name for name, _ in COMMANDS}
    own = {f"analyses/{file.name}" for kind in ("table", "figure") for file in (ROOT / "analyses").glob(f"{kind}*.py")}
    assert own - scripts <= {"analyses/figure1_two_experts.py"}
    assert scripts <= own
    for model in PAPER_MODELS:
        assert f"--model {model.hub}{' --trust-remote-code' if model.own_code else ''}" in SECTION
        assert f"| {model.name} | router |" in SECTION, "what it is expected to need"


SCRIPTS = ("table1_router_tuning", "figure3_masking", "figure6_attention_gain", "figure9_parameters")
TINY = "--limit 3 --max-new-tokens 2 --train-batch-size 3"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The attention mask API")
@pytest.mark.parametrize("family", FAMILIES)
def test_commands_run_as_printed_on_a_tiny_model_of_the_family(family, home, tokenizer, monkeypatch, capsys):
    model, own_code = model_of(family, home, tokenizer), FAMILIES[family].own_code
    for name in SCRIPTS:
        [options] = [options for script, options in COMMANDS if script == f"analyses/{name}.py"]
        refused = own_code and name == "figure6_attention_gain"
        run(f"analyses/{name}.py {options} {TINY}", variables(model), monkeypatch, code=2 if refused else 0)
        assert ("this model has no attention" in capsys.readouterr().err) == refused
    rows = read_table(home / "runs" / "table1" / "tasks_beside_paper.parquet")
    assert len(rows) == 2 * 5
    assert rows["em, paper"].notna().all()
    assert set(rows["published in"]) == {"Table 1"}
    epochs = {name: read_facts(folder)["epochs"] for name, folder in _trained(home / "runs").items()}
    assert epochs == {name: 3 if name in ("nq-swap", "confiqa-mc") else 1 for name in DATA_SETS}
    assert read_provenance(home / "runs" / "table1" / "tasks.parquet")["preset"]["name"] == "paper"
    common = f"$M --data $SWAP --limit 3 --out $OUT/{family}"
    run(f"moe_lens.tune {common}-released --method router --preset released", variables(model), monkeypatch)
    facts = read_facts(home / "runs" / f"{family}-released")
    assert (facts["method"], facts["rank"], facts["epochs"]) == ("router-lora", 8, 3)
    script, data = "analyses/table2_simple_reading.py", "--data $SWAP --limit 3 --out runs/released"
    run(f"{script} $M --preset released {data}", variables(model), monkeypatch)
    facts = read_facts(_trained(home / "runs" / "released")["nq-swap"])
    told = ("method", "rank", "alpha", "score", "evaluate_every", "max_new_tokens", "epochs")
    assert [facts[name] for name in told] == ["router-lora", 8, 32, "log_likelihood", 0.1, 32, 3]
    assert "Context:\n{context}" in facts["template"]["with_context"]
    lora = "--method router" if own_code else "--method fft --lora-rank 4 --lora-alpha 4 --lora-on attention,mlp"
    trained = f"{common}-dpo {lora} --objective dpo --preset paper --max-new-tokens 2"
    run(f"moe_lens.tune {trained}", variables(model), monkeypatch)
    assert read_facts(home / "runs" / f"{family}-dpo")["objective"] == "dpo"
    evaluated = f"{common}-answers --delta $OUT/{family}-dpo --preset paper --metrics em,f1,memory"
    run(f"moe_lens.evaluate {evaluated}", variables(model), monkeypatch)
    answers = read_table(home / "runs" / f"{family}-answers" / "answers.parquet")
    assert answers["memory"].notna().all(), "what memory says was joined from the public data"


def _trained(runs: Path) -> dict[str, Path]:
    """The folders of the routers that were tuned, by data set."""
    folders = list((runs / "trained").iterdir())
    return {read_facts(folder)["task"].partition("@")[0]: folder for folder in folders}
