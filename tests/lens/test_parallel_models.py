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


def said(kind: str, folder: Path, out: Path) -> dict[str, object]:
    launch = [] if kind == "one" else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = ":".join(map(str, (TESTS.parent, TESTS)))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, *launch, str(SCRIPT), kind, str(folder), str(out)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=False)


@pytest.fixture(scope="module", params=["organism", "mixtral", "deepseek_v3"])
def model(request, tokenizer, tmp_path_factory):
    """A model's folder, and what one process says of it."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "organism":
        return Path(resolve("organism")), said("one", Path(resolve("organism")), folder / "one.pt")
    build_model(request.param, len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, said("one", folder, folder / "one.pt")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensor", "expert"])
def test_captures_interventions_and_answers_are_those_of_one_process(kind, model, tmp_path):
    folder, whole = model
    split = said(kind, folder, tmp_path / "split.pt")
    refused = split.pop("refused")
    assert len(refused) == 2
    assert all("cannot share examples" in text for text in refused)
    assert set(split) == set(whole)
    for name, found in whole.items():
        if not isinstance(found, dict):
            assert split[name] == found, name
            continue
        for key, value in found.items():
            if key.endswith("experts"):
                assert torch.equal(split[name][key], value), (name, key)
            else:
                torch.testing.assert_close(split[name][key], value, rtol=1e-3, atol=2e-4)
