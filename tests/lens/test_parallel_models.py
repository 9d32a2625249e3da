"""A model that two processes hold together, by a tensor- or expert-parallel plan, is that of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_model

from moe_lens.lens.loading import resolve

TESTS = Path(__file__).parents[1]
SCRIPT = TESTS / "support" / "parallel_models.py"
BUILT = ("mixtral", "deepseek_v3")
MODELS = (Path(resolve("organism")).name, *BUILT)


def said(folders: list[Path], out: Path, *launch: str) -> dict[tuple[str, str], dict[str, object]]:
    out.parent.mkdir()
    path = ":".join(map(str, (TESTS.parent, TESTS)))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, *launch, str(SCRIPT), *map(str, folders), str(out)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=False)


@pytest.fixture(scope="module")
def told(tokenizer, tmp_path_factory):
    """What one process says of each model, and what two say that hold it together, by model and plan."""
    root = tmp_path_factory.mktemp("parallel")
    for name in BUILT:
        build_model(name, len(tokenizer)).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    folders = [Path(resolve("organism")), *(root / name for name in BUILT)]
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    return said(folders, root / "one" / "told.pt") | said(folders, root / "two" / "told.pt", *two)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensor", "expert"])
@pytest.mark.parametrize("model", MODELS)
def test_captures_interventions_gradients_and_answers_are_those_of_one_process(model, kind, told):
    whole, split = told[model, "one"], told[model, kind]
    assert set(split) == set(whole)
    for name, found in whole.items():
        if not isinstance(found, dict):
            assert split[name] == found, name
            continue
        for key, value in found.items():
            if key.endswith("experts"):
                assert torch.equal(split[name][key], value), (name, key)
            else:
                torch.testing.assert_close(split[name][key], value, rtol=1e-3, atol=2e-4, msg=f"{name} {key}")
