"""What is measured of the organism before and after router tuning: kept, gone on with, and never of another run."""

import sys
from pathlib import Path

import pytest
import torch

from moe_lens import MoELens, load_examples
from moe_lens.causal.evaluation import answer_table
from moe_lens.commands import console
from moe_lens.errors import MoELensError
from moe_lens.organism import measure, pretrain, tuning_effects
from moe_lens.organism.tuning_effects import measure_organism
from moe_lens.results import read_table
from moe_lens.tuning import Schedule

TENSORS = "router-0/delta.safetensors"


@pytest.fixture
def quick(monkeypatch) -> None:
    """One task and one short training at one rate."""
    monkeypatch.setattr(tuning_effects, "ANSWERED", ("swap",))
    monkeypatch.setattr(tuning_effects, "RATES", (5e-2,))
    monkeypatch.setattr(tuning_effects, "SCHEDULE", Schedule(epochs=1, batch_size=4))


def measured(out: Path) -> None:
    measure_organism("organism", out, seeds=[0], split="test", limit=4)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a | b)


def test_the_tables_are_of_the_base_and_of_the_routers_beside_them_and_are_kept(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", f"measure --model organism --out {tmp_path} --seeds 0 --limit 4".split())
    with pytest.raises(SystemExit) as ended:
        console.run(measure.main)
    assert not ended.value.code
    table = read_table(tmp_path / "tasks.parquet").set_index("variant")
    for variant, delta in (("base", None), ("router-tuned", tmp_path / "router-0")):
        lens = MoELens.from_pretrained("organism", delta=delta)
        answers = answer_table(lens, load_examples("swap", limit=4), max_new_tokens=8, progress=False)
        assert table.loc[variant, "em"] == answers["em"].mean()
    assert read_table(tmp_path / "learning_rates.parquet")["learning_rate"].tolist() == [5e-2]
    monkeypatch.setattr(tuning_effects, "tune_and_save", None)
    monkeypatch.setattr(tuning_effects, "task_table", None)
    measured(tmp_path)  # nothing is left to do


def test_another_run_in_the_same_folder_is_refused_and_nothing_of_it_is_lost(quick, tmp_path, monkeypatch):
    measured(tmp_path)
    first = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    monkeypatch.setattr(tuning_effects, "RATES", (1e-3,))
    with pytest.raises(MoELensError, match=r"another run: its rates is \[0\.05\], here it is \[0\.001\]"):
        measured(tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == first


def test_pretraining_knows_two_variants(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", f"pretrain --variant other --out {tmp_path / 'out'}".split())
    with pytest.raises(SystemExit) as ended:
        console.run(pretrain.main)
    assert ended.value.code == 2
    assert "--variant must be one of conflict, planted, not 'other'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
