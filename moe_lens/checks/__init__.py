"""Checks of a lens on its own model: what it records and changes is compared with the bare model."""

import time
from collections.abc import Collection, Sequence

import pandas as pd

from moe_lens.checks.each import CHECKS, Finding
from moe_lens.errors import MoELensError
from moe_lens.lens import MoELens

__all__ = ["CHECKS", "Finding", "run_checks"]


def run_checks(lens: MoELens, prompts: Sequence[str], *, names: Collection[str] | None = None) -> pd.DataFrame:
    """Run checks on `prompts`, some texts of different lengths, as one left-padded batch; the model stays as it is.

    names: of `CHECKS`; None for all. One row per check: check, outcome ("passed", "failed", or "refused" where the
    lens says that it cannot), error (the largest difference by the largest value; NaN if refused), allowed, seconds,
    detail (for a refusal its reason). Raises MoELensError for an unknown name or for no prompts.
    """
    unknown = sorted(set(names or ()) - set(CHECKS))
    if unknown or not prompts:
        raise MoELensError(f"expected some prompts and checks among {', '.join(CHECKS)}; got {unknown or 'no prompts'}")
    rows = []
    for name, check in CHECKS.items():
        if names is not None and name not in names:
            continue
        start = time.perf_counter()
        try:
            found = check(lens, prompts)
            outcome = "passed" if found.error <= found.allowed else "failed"
        except MoELensError as refusal:
            found, outcome = Finding(float("nan"), float("nan"), str(refusal)), "refused"
        rows.append((name, outcome, found.error, found.allowed, time.perf_counter() - start, found.detail))
    return pd.DataFrame(rows, columns=["check", "outcome", "error", "allowed", "seconds", "detail"])
