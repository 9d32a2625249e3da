"""Interventions on models whose own code keeps experts in a list are as exact as on others."""

import pytest
from remote_models import KINDS, remote_folder

from moe_lens.checks import PROMPTS, run_checks
from moe_lens.lens import MoELens


@pytest.mark.parametrize("kind", KINDS)
def test_strengths_and_sources_are_as_exact_on_listed_experts(tokenizer, tmp_path, kind):
    lens = MoELens.from_pretrained(remote_folder(tmp_path / kind, tokenizer, KINDS[kind]), trust_remote_code=True)
    table = run_checks(lens, PROMPTS, names=["bias", "scale", "force", "top_k", "replay", "route_as", "patch"])
    assert set(table["outcome"]) == {"passed"}, table.to_string()
