"""MODELS.md says what the installed versions do: its versions, its text, and (slowly) its table, family by family."""

import re
from pathlib import Path

import pytest

from moe_lens.architecture.tiny import FAMILIES
from moe_lens.checks import CHECKS
from moe_lens.checks.models_page import MARKS, VERSIONED, family_refusals, family_row, models_page
from moe_lens.checks.survey import survey_families

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "MODELS.md").read_text(encoding="utf-8")
AGAIN = "MODELS.md is stale; write it again: python -m moe_lens.doctor --families --markdown MODELS.md"
ROWS = {row[1]: row[0] for row in re.finditer(r"^\| `(\w+)` \|.*$", PAGE, flags=re.MULTILINE)}
REFUSALS = [item[0] for item in re.finditer(r"^- `\w+`, .*$", PAGE, flags=re.MULTILINE)]
PARTS = 4  # a slow test takes less than a minute


def test_it_is_about_the_versions_that_are_developed_with():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert ", ".join(f"{name} {pinned[name]}" for name in VERSIONED) in PAGE.replace("\n", " "), AGAIN


def test_it_has_every_family_and_every_check():
    assert list(ROWS) == list(FAMILIES), AGAIN
    marks = f"[{''.join(MARKS.values())}]"
    for row in ROWS.values():
        assert len(re.findall(rf" {marks} \|", row.replace("|", "| "))) == len(CHECKS), row


def test_nothing_in_it_fails():
    assert MARKS["failed"] not in "".join(ROWS.values())


def test_all_but_the_families_lines_is_as_written_today():
    assert models_page(list(ROWS.values()), REFUSALS) == PAGE, AGAIN


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_its_lines_are_what_the_families_do_today(part):
    families = FAMILIES[part::PARTS]
    table, found = survey_families(families)
    refusals = []
    for family, of_one in table.groupby("family", sort=False):
        assert family_row(family, of_one, found.get(family)) == ROWS[family], AGAIN
        refusals += family_refusals(family, of_one)
    assert refusals == [item for item in REFUSALS if re.match(r"- `(\w+)`", item)[1] in families], AGAIN
