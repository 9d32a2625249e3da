"""Checks of a lens on its own model: what it records and changes is compared with the bare model."""

import time
from collections.abc import Collection, Sequence

import pandas as pd

from moe_lens.checks.each import CHECKS, Check, Finding
from moe_lens.checks.reference import padded
from moe_lens.errors import MODEL_CRASHES, MoELensError, NotFiniteError
from moe_lens.lens.lens import MoELens
from moe_lens.lens.opened import OutOfOrderError
from moe_lens.progress import progress_bar

PROMPTS = (
    "The capital of France is",
    "Context: Ada lives in Lyon and works in Bern. Question: Where does Ada live? Answer:",
    "Once upon a time",
)
"""Texts to check a model on where there are none of one's own: of different lengths, so that padding is checked."""

FIRST_PASSES = 1
"""Forward passes before the checks, in which it is seen whether the model's numbers are finite."""

#: What ends a check but must not end the rest; the last is the tracing library's, where values come in another order
#: than they are read.
CRASHES = (*MODEL_CRASHES, OutOfOrderError)


def run_checks(
    lens: MoELens, prompts: Sequence[str], *, names: Collection[str] | None = None, progress: bool = False
) -> pd.DataFrame:
    """Run checks on `prompts`, some texts of different lengths, as one left-padded batch; the model stays as it is.

    names: of `CHECKS`; None for all. One row per check: check, outcome ("passed", "failed", or "refused" where the
    lens says that it cannot), error (the largest difference by the largest value; NaN without), allowed, seconds,
    detail (for a refusal its reason; for a check that an exception ended, which is "failed", its type and text).
    Raises MoELensError for an unknown name, for no prompts or for one without tokens, and NotFiniteError, before any
    check, for a model whose numbers are not finite.
    """
    if not prompts:
        raise MoELensError("expected one or more prompts to check on; got none")
    wanted = checks_named(names)
    padded(lens, prompts)  # MoELensError for one without tokens
    _expect_finite(lens, prompts)
    rows = []
    chosen = {name: CHECKS[name] for name in wanted}
    for name, check in progress_bar(chosen.items(), desc="checking", unit="check", disable=not progress):
        start = time.perf_counter()
        found, outcome = _outcome(check, lens, prompts)
        rows.append((name, outcome, found.error, found.allowed, time.perf_counter() - start, found.detail))
    return pd.DataFrame(rows, columns=["check", "outcome", "error", "allowed", "seconds", "detail"])


def _expect_finite(lens: MoELens, prompts: Sequence[str]) -> None:
    """NotFiniteError if the model's numbers are not finite; that it cannot be run is left to the checks to say."""
    try:
        lens.run_with_cache(prompts, capture=())
    except NotFiniteError:
        raise
    except CRASHES:
        return


def checks_named(names: Collection[str] | None) -> tuple[str, ...]:
    """The names of checks in the order in which they are run, all for None; MoELensError for an unknown one."""
    unknown = sorted(set(names or ()) - set(CHECKS))
    if unknown:
        raise MoELensError(f"checks are among {', '.join(CHECKS)}; got {', '.join(unknown)}")
    return tuple(name for name in CHECKS if names is None or name in names)


def _outcome(check: Check, lens: MoELens, prompts: Sequence[str]) -> tuple[Finding, str]:
    try:
        found = check(lens, prompts)
    except MoELensError as refusal:
        return Finding(float("nan"), float("nan"), str(refusal)), "refused"
    except CRASHES as crash:
        return Finding(float("nan"), float("nan"), f"{type(crash).__name__}: {crash}"), "failed"
    return found, "passed" if found.error <= found.allowed else "failed"
