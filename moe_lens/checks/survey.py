"""Every MoE family of the installed transformers under every check, on a tiny random model of each."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from moe_lens.architecture.tiny import FAMILIES, tiny_model, tiny_tokenizer
from moe_lens.checks.description import describe
from moe_lens.checks.each import CHECKS
from moe_lens.checks.suite import PROMPTS, run_checks
from moe_lens.errors import MoELensError
from moe_lens.lens.lens import MoELens
from moe_lens.progress import progress_bar


def survey_families(
    families: Sequence[str] = FAMILIES, *, names: Sequence[str] | None = None, progress: bool = False
) -> tuple[pd.DataFrame, dict[str, dict[str, Any]]]:
    """The checks of each family, and what `describe` finds in those that can be opened.

    names: of `CHECKS`; None for all. The columns are `family` and those of `run_checks`; a family that the lens does
    not open has all its checks refused for that reason.
    """
    tokenizer, tables, found = tiny_tokenizer(), [], {}
    for family in progress_bar(families, desc="families", unit="family", disable=not progress):
        try:
            lens = MoELens(tiny_model(family), tokenizer)
        except MoELensError as refusal:
            table = _all_refused(names or list(CHECKS), str(refusal))
        else:
            found[family] = describe(lens.module, lens.architecture)
            table = run_checks(lens, PROMPTS, names=names)
        tables.append(table.assign(family=family))
    whole = pd.concat(tables, ignore_index=True)
    return whole[["family", *(name for name in whole.columns if name != "family")]], found


def _all_refused(names: Sequence[str], reason: str) -> pd.DataFrame:
    nan = float("nan")
    row = {"outcome": "refused", "error": nan, "allowed": nan, "seconds": 0.0, "detail": reason}
    return pd.DataFrame([{"check": name, **row} for name in names])
