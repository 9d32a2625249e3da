"""The training command: what it trains, what it writes, and what it refuses, through its real entry."""

import json
import math
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import build_model
from remote_models import KINDS, remote_folder
from safetensors.torch import load_file
from training_cases import EXAMPLES
from transformers import AutoModelForCausalLM

from moe_lens import Example, ExpertSaliency, ExpertSet, MoELens, PromptTemplate, tune
from moe_lens.architecture.remote_code import load_remote
from moe_lens.causal.evaluation import answer_table
from moe_lens.choosing import planted_experts
from moe_lens.commands import console
from moe_lens.data import FIGURE_10, Encoded, encode
from moe_lens.lens.delta import TENSORS_FILE, read_facts
from moe_lens.results import read_provenance, read_table
from moe_lens.statistics import ExpertUsage

TEXTS = [example.context for example in EXAMPLES[:3]]
QUICK = "--epochs 1 --batch-size 4 --learning-rate 2e-2 --score log_likelihood --max-new-tokens 2"


@pytest.fixture(scope="module")
def home(tmp_path_factory, tokenizer) -> Path:
    """A folder with a tiny model, and with training and dev examples as files."""
    folder = tmp_path_factory.mktemp("home")
    build_model("olmoe", len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {"id": one.id, "context": one.context, "question": one.question, "answer": one.answers[0]} for one in EXAMPLES
    ]
    (folder / "train.json").write_text(json.dumps(rows))
    pd.DataFrame(rows).to_parquet(folder / "train.parquet")
    pd.DataFrame(rows[:3]).to_csv(folder / "dev.csv", index=False)
    return folder


@pytest.fixture
def command(home, monkeypatch):
    """The command in this process, from the folder of its model and data; without a browser, which takes seconds."""
    monkeypatch.setattr(console, "find_spec", lambda name: None)

    def run(options: str, *, quick: str = QUICK) -> None:
        monkeypatch.chdir(home)
        given = f"--model model --data train.json --dev dev.csv {quick} {options}"
        monkeypatch.setattr(sys, "argv", ["tune", *given.split()])
        with pytest.raises(SystemExit) as ended:
            console.run(tune.main)
        if ended.value.code:
            raise ended.value

    return run


def experts_of(folder: Path) -> ExpertSet:
    return ExpertSet.of({int(layer): ids for layer, ids in read_facts(folder)["experts"].items()})


def encoded(lens: MoELens, examples: list[Example]) -> list[Encoded]:
    return [encode(example, lens.tokenizer, template=lens.template, with_answer=True) for example in examples]


def logits(lens: MoELens) -> torch.Tensor:
    return lens.run_with_cache(TEXTS)[0]


def test_routers_of_some_layers_are_tuned_and_all_is_written(command, home, tmp_path):
    command(f"--method router --layers 0,2 --data train.parquet --out {tmp_path}")
    assert {"delta.json", TENSORS_FILE, "tuning.parquet", "learning_rates.parquet", "tuning.html", "dev.json"} <= {
        file.name for file in tmp_path.iterdir()
    }
    names = [f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 2)]
    assert sorted(load_file(tmp_path / TENSORS_FILE)) == names
    facts = read_facts(tmp_path)
    assert (facts["method"], facts["layers"], facts["trainable"]) == ("router", [0, 2], 2 * 8 * 32)
    assert facts["data"]["examples"] == len(EXAMPLES)
    made_by = read_provenance(tmp_path / "tuning.parquet")
    assert made_by.items() <= facts.items()
    assert len(read_table(tmp_path / "tuning.parquet")) == 3
    base, tuned = (MoELens.from_pretrained(home / "model", delta=delta) for delta in (None, tmp_path))
    assert not torch.allclose(logits(base), logits(tuned), atol=1e-3)


def test_esft_takes_the_most_used_experts_of_the_base_until_their_scores_reach_p(command, home, tmp_path):
    command(f"--method esft --experts esft-token:p=0.4 --out {tmp_path / 'token'}")
    command(f"--method esft --experts esft-gate:3 --layers 1 --out {tmp_path / 'gate'}")
    lens = MoELens.from_pretrained(home / "model")
    settings = (("token", "all", "frequency"), ("token", "all", "gate"))
    token, gate = lens.measure(
        EXAMPLES, *(ExpertUsage(reduce, at, value=value) for reduce, at, value in settings), progress=False
    )
    assert experts_of(tmp_path / "token") == ExpertSet.cumulative(token.table(), 0.4)
    assert experts_of(tmp_path / "gate") == ExpertSet.top(gate.table(), 3).restrict([1])
    assert read_facts(tmp_path / "gate")["method"] == "esft"


def test_ceft_tunes_routers_first_or_takes_tuned_ones_to_the_same_end(command, home, tmp_path, capsys):
    both, routers, experts = tmp_path / "both", tmp_path / "routers", tmp_path / "experts"
    command(f"--method ceft --experts ce:2 --router-rate 5e-2 --out {both}")
    command(f"--method router --learning-rate 5e-2 --out {routers}")
    command(f"--method ceft --experts ce:2 --router-delta {routers} --out {experts}")
    assert (both / "router" / TENSORS_FILE).read_bytes() == (routers / TENSORS_FILE).read_bytes()
    assert (both / TENSORS_FILE).read_bytes() == (experts / TENSORS_FILE).read_bytes()
    [ratio] = MoELens.from_pretrained(home / "model", delta=routers).measure(EXAMPLES, ExpertUsage(), progress=False)
    assert experts_of(both) == ExpertSet.top(ratio.table(), 2)
    own = load_file(both / TENSORS_FILE)
    assert {name.rpartition(".")[0] for name in own} == {f"model.layers.{layer}.mlp.experts" for layer in range(3)}
    before = (both / "score-ce.parquet").stat().st_mtime_ns, (both / TENSORS_FILE).read_bytes()
    command(f"--method ceft --experts ce:2 --router-rate 5e-2 --out {both}")  # again: nothing is left to do
    assert ((both / "score-ce.parquet").stat().st_mtime_ns, (both / TENSORS_FILE).read_bytes()) == before
    with pytest.raises(SystemExit) as ended:
        command(f"--method ceft --experts ce:2 --router-delta {experts} --out {tmp_path / 'none'}")
    assert ended.value.code == 2
    assert "--router-delta takes tuned routers; the delta" in capsys.readouterr().err


def test_any_score_chooses_what_learns_and_is_kept(command, home, tmp_path):
    command(f"--method ceft --experts reap:2 --out {tmp_path}")
    [saliency] = MoELens.from_pretrained(home / "model").measure(EXAMPLES, ExpertSaliency(), progress=False)
    assert experts_of(tmp_path) == ExpertSet.top(saliency.table(), 2, score="reap")
    kept = read_table(tmp_path / "score-reap.parquet")
    assert ExpertSet.top(kept, 2) == experts_of(tmp_path)
    assert not (tmp_path / "router").exists()  # none had to be tuned for it


def test_a_template_reaches_training_the_dev_score_the_scores_and_all_provenance(command, home, tmp_path):
    texts = {"with_context": "{context} | {question}", "closed_book": "{question}", "answer_cue": " ="}
    (tmp_path / "mine.json").write_text(json.dumps(texts))
    own, usual = tmp_path / "own", tmp_path / "usual"
    command(f"--method ceft --experts ce:2 --template {tmp_path / 'mine.json'} --out {own}")
    command(f"--method ceft --experts ce:2 --out {usual}")
    assert read_facts(own)["template"] == read_facts(own / "router")["template"] == texts
    assert read_facts(usual)["template"] == FIGURE_10.facts()
    for table in own.rglob("*.parquet"):
        assert read_provenance(table)["template"] == texts, table
    assert len(list(own.rglob("*.parquet"))) == 7

    asked = MoELens.from_pretrained(home / "model", delta=own / "router", template=PromptTemplate(**texts))
    [usage] = asked.measure(EXAMPLES, ExpertUsage(), progress=False)
    kept = read_table(own / "score-ce.parquet")
    assert kept["score"].to_numpy() == pytest.approx(usage.table()["score"].to_numpy())
    assert kept["score"].to_numpy() != pytest.approx(read_table(usual / "score-ce.parquet")["score"].to_numpy())
    tuned = MoELens.from_pretrained(home / "model", delta=own, template=PromptTemplate(**texts))
    answers = answer_table(tuned, EXAMPLES[:3], max_new_tokens=2, progress=False)
    assert json.loads((own / "dev.json").read_text())["f1"] == pytest.approx(answers["f1"].mean())
    tokens = sum(len(one.input_ids) - one.prompt_length for one in encoded(tuned, EXAMPLES[:3]))
    dev = sum(tuned.answer_log_probabilities(EXAMPLES[:3], progress=False)) / tokens
    assert read_table(own / "learning_rates.parquet")["dev_log_likelihood"].tolist() == pytest.approx([dev], rel=1e-4)
    with pytest.warns(UserWarning, match="trained on prompts of another template"):
        MoELens.from_pretrained(home / "model", delta=own)


def test_experts_may_be_random_or_given(command, home, tmp_path):
    chosen = ExpertSet.of({0: [1, 5], 2: [7]})
    (tmp_path / "chosen.json").write_text(chosen.to_json())
    command(f"--method ceft --experts {tmp_path / 'chosen.json'} --out {tmp_path / 'file'}")
    command(f"--method ceft --experts 0:1,5;2:7 --out {tmp_path / 'literal'}")
    assert experts_of(tmp_path / "file") == experts_of(tmp_path / "literal") == chosen
    drawn = {}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        command(f"--method ceft --experts random:2 --seed {seed} --out {tmp_path / name}")
        drawn[name] = experts_of(tmp_path / name)
    assert drawn["a"] == drawn["b"] != drawn["c"]
    assert {len(drawn["a"][layer]) for layer in range(3)} == {2}
    assert (tmp_path / "a" / TENSORS_FILE).read_bytes() == (tmp_path / "b" / TENSORS_FILE).read_bytes()


def test_the_planted_experts_of_the_organism_can_be_trained(command, tmp_path):
    command(f"--model organism:planted --method ceft --experts planted --out {tmp_path}")
    assert experts_of(tmp_path) == planted_experts("organism:planted")


def test_lora_on_routers_and_experts(command, home, tmp_path):
    command(f"--method router --lora-rank 2 --lora-alpha 6 --out {tmp_path / 'router'}")
    command(f"--method ceft --experts 0:1;2:7 --lora-rank 2 --out {tmp_path / 'ceft'}")
    facts = read_facts(tmp_path / "router")
    assert [facts[name] for name in ("method", "rank", "alpha", "trainable")] == ["router-lora", 2, 6, 3 * 2 * (8 + 32)]
    base = load_file(home / "model" / "model.safetensors")
    for name, value in load_file(tmp_path / "router" / TENSORS_FILE).items():
        assert torch.linalg.matrix_rank(value - base[name], rtol=1e-3) == 2
    facts = read_facts(tmp_path / "ceft")
    assert [facts[name] for name in ("method", "rank", "alpha")] == ["ceft-lora", 2, 4]
    assert experts_of(tmp_path / "ceft") == ExpertSet.of({0: [1], 2: [7]})


def test_preferences_are_trained_as_asked_and_told(command, home, tmp_path):
    rows = json.loads((home / "train.json").read_text())
    for place, row in enumerate(rows[1:]):
        row["original_answer"] = f"old {place}"
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    data, lora = f"--data {tmp_path / 'pairs.json'} --objective dpo", "--method fft --lora-rank 2 --lora-on attention"
    command(f"{data} {lora} --beta 0.2 --out {tmp_path / 'lora'}")
    facts = read_facts(tmp_path / "lora")
    told = ("method", "objective", "beta", "unpaired", "trainable")
    count = 3 * 2 * 2 * ((32 + 32) + (32 + 16))  # of queries and the output, of keys and values
    assert [facts[name] for name in told] == ["attention-lora", "dpo", 0.2, 1, count]
    assert read_table(tmp_path / "lora" / "tuning.parquet")["loss"][0] == pytest.approx(math.log(2), abs=1e-5)
    command(f"{data} --method ceft --experts ce:2 --router-rate 5e-2 --out {tmp_path / 'ceft'}")
    command(f"--data {tmp_path / 'pairs.json'} --learning-rate 5e-2 --out {tmp_path / 'routers'}")
    first, alone = (load_file(tmp_path / out / TENSORS_FILE) for out in ("ceft/router", "routers"))
    assert all(torch.equal(first[name], value) for name, value in alone.items()), "routers tuned first learn answers"
    assert "objective" not in read_facts(tmp_path / "ceft" / "router")
    assert read_facts(tmp_path / "ceft")["beta"] == 0.1
    with pytest.raises(SystemExit):
        command(f"{data} {lora} --beta 0.3 --out {tmp_path / 'lora'}")


def test_the_merged_folder_is_the_tuned_model_for_anyone(command, home, tmp_path):
    command(f"--method fft --merge --out {tmp_path}")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    lens = MoELens.from_pretrained(home / "model", delta=tmp_path)
    ids = torch.tensor([lens.tokenizer(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, lens.module(ids).logits)
    assert torch.equal(logits(MoELens.from_pretrained(tmp_path / "merged")), logits(lens))
    assert not torch.allclose(logits(MoELens.from_pretrained(home / "model")), logits(lens), atol=1e-3)


@pytest.mark.filterwarnings("ignore:The attention mask API")
def test_a_model_with_its_own_code_is_trained_and_merged_with_it(command, tokenizer, tmp_path):
    model = remote_folder(tmp_path / "remote", tokenizer, KINDS["choosing"])
    given = f"--model {model} --method ceft --experts 0:1;2:7 --merge --out {tmp_path / 'out'}"
    with pytest.raises(SystemExit):
        command(given)
    command(f"{given} --trust-remote-code")
    lens = MoELens.from_pretrained(model, delta=tmp_path / "out", trust_remote_code=True)
    merged = load_remote(tmp_path / "out" / "merged").eval()
    assert (tmp_path / "out" / "merged" / "modeling_listed.py").is_file()
    with torch.no_grad():
        for text in TEXTS:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            found = merged(ids, attention_mask=torch.ones_like(ids)).logits
            torch.testing.assert_close(found, lens.run_with_cache(text)[0], rtol=1e-4, atol=1e-4)
    before, after = (load_file(file / "model.safetensors") for file in (model, tmp_path / "out" / "merged"))
    changed = {name.partition(".w")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"model.layers.0.mlp.experts.1", "model.layers.2.mlp.experts.7"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--method dropout", "--method must be one of router, ceft, esft, fft"),
        ("--experts ce:2", "are for ceft and esft"),
        ("--method fft --layers 0", "--layers is for"),
        ("--method fft --lora-rank 2", "--lora-rank is for"),
        ("--lora-alpha 2", "give that too"),
        ("--lora-alpha 0 --lora-rank 2", "rank and alpha must be above 0; got rank = 2, alpha = 0.0"),
        ("--router-rate 1e-2", "--router-rate are for ceft and esft; --method is router"),
        ("--method esft --router-rate 1e-2", "esft-token:p=0.2 needs no tuned routers"),
        ("--method ceft --experts random:2 --router-delta routers", "random:2 needs no tuned routers"),
        ("--method ceft --router-rate nan", "--router-rate must be finite and above 0"),
        ("--method ceft --experts 0:9", "n_experts = 8"),
        ("--method ceft --experts random:9", "each layer has 8 experts; 'random:9' wants 9 of them"),
        ("--method ceft --experts 0:1 --layers 1", "is in the layers 1; they are in 0"),
        ("--method ceft --experts ce:9", "each layer has 8 experts; 'ce:9' wants 9 of them"),
        ("--method ceft --experts ce:2 --layers 7", "layer 7 has no routed experts"),
        ("--method ceft --router-delta nowhere", "expected a delta checkpoint"),
        ("--layers 7", "layer 7 has no routed experts"),
        ("--model nowhere --layers a", "--layers must be numbers"),
        ("--learning-rate fast", "--learning-rate must be numbers"),
        ("--model nowhere", "nowhere"),
        ("--max-length 3", "all 9 have more than 3 tokens"),
        ("--out model/config.json/run", "cannot write"),
    ],
)
def test_bad_options_end_with_a_message_and_exit_code_2(command, tmp_path, capsys, options, message):
    out = "" if "--out" in options else f"--out {tmp_path / 'out'}"
    with pytest.raises(SystemExit) as ended:
        command(f"{options} {out}")
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "router").exists()  # before routers are tuned


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--lora-rank 0", "rank = 0"),
        ("--beta 0.2", "--beta is for --objective dpo"),
        ("--objective dpo --beta 0", "beta must be finite and above 0; got 0.0"),
        ("--lora-rank 2 --lora-on mlp", "--lora-on says where --method fft puts LoRA"),
        ("--method fft --lora-on mlp", "--lora-on says where --method fft puts LoRA"),
        ("--method fft --lora-rank 2 --lora-on heads", "the parts of a layer are attention and mlp"),
        ("--method esft --experts esft-token:p=x", "or esft-token:p=0.2 for the highest"),
        ("--method esft --experts esft-token:p=2", "above 0 and at most 1; got 'esft-token:p=2'"),
        ("--method ceft --experts ce:x", "with whole numbers, such as ce:4"),
        ("--method ceft --experts ce:1,2", "'ce:1,2' names 2: name one of them"),
        ("--method ceft --experts nonsense", "cannot read the experts"),
        ("--template nonsense", "a template is one of figure-10, plain, bare, released"),
        ("--lora-rank -1", "rank = -1"),
        ("--method ceft --router-rate 1e-2 --router-delta routers", "leave --router-rate out"),
        ("--learning-rate 1e-3,0", "--learning-rate must be finite and above 0; got '1e-3,0'"),
        ("--learning-rate=-1", "--learning-rate must be finite and above 0"),
        ("--learning-rate nan", "--learning-rate must be finite and above 0"),
        ("--learning-rate inf", "--learning-rate must be finite and above 0"),
        ("--shard --device cpu", "--shard puts each part on its process's own device; leave --device out"),
        ("--shard --method ceft", "ce:1 takes tuned routers, and with --shard one command trains once"),
        ("--shard --learning-rate 1e-3,2e-3", "split over processes is trained once; give one learning rate, not 2"),
    ],
)
def test_numbers_and_options_that_make_no_sense_are_refused_before_the_model_is_loaded(
    command, tmp_path, capsys, options, message
):
    with pytest.raises(SystemExit) as ended:
        command(f"--model nowhere --out {tmp_path / 'out'} {options}")
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("data", ["train.json", "train.parquet", "dev.csv"])
def test_files_need_dev_data_of_their_own(home, monkeypatch, tmp_path, capsys, data):
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "argv", ["tune", *f"--model model --data {data} --out {tmp_path}".split()])
    with pytest.raises(SystemExit) as ended:
        console.run(tune.main)
    assert ended.value.code == 2
    assert f"error: {data} has no dev split" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_with_its_step_and_examples(command, home, tokenizer, tmp_path, capsys):
    of_one, of_dev = (
        {token for one in part for token in encode(one, tokenizer).input_ids} for part in (EXAMPLES[3:4], EXAMPLES[:3])
    )
    broken = build_model("olmoe", len(tokenizer))
    with torch.no_grad():
        [token, *_] = of_one - of_dev
        broken.model.embed_tokens.weight[token] = torch.nan
    broken.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit) as ended:
        command(f"--model {tmp_path / 'model'} --out {tmp_path / 'out'}")
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert re.search(r"the loss became nan at step \d of 3 \(examples [^)]*Dorland-", message)
