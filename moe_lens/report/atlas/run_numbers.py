"""What a run's folder says of single experts: the scores that it kept of every expert, and its dose curves."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.results import read_provenance, read_table
from moe_lens.storage import nameable

KEPT = ("score-*.parquet", "scores-*.parquet")
"""The files of scores of every expert, below a run's folder; those of moe_lens.find have several each."""
SCORE = ("name", "layer", "expert", "score")
OTHERS = ("none", "random", "random mean", "saved")
"""Rows of a masking run that are of no set of experts that somebody chose."""
DOSE = ("set", "family", "experts", "mode", "strength", "em", "em_low", "em_high")


@dataclass(frozen=True)
class RunNumbers:
    """scores: columns name, layer, expert, score, score_low, score_high (NaN where there is no interval).

    doses: rows of a masking run with strengths, the unmasked one and the random ones among them.
    weights: digests of the models that the tables say they are of, one of each table that says so.
    """

    scores: pd.DataFrame
    doses: pd.DataFrame
    weights: tuple[frozenset[str], ...] = ()

    @property
    def sets(self) -> dict[str, str]:
        """The experts of each set that has a dose curve, random ones left out, by its name."""
        chosen = self.doses[~self.doses["family"].isin(OTHERS) & self.doses["strength"].notna()]
        return dict(zip(chosen["set"], chosen["experts"], strict=True))

    @property
    def experts(self) -> set[tuple[int, int]]:
        """All that it has numbers of, (layer, expert)."""
        scored = self.scores[["layer", "expert"]].itertuples(index=False, name=None)
        return {*scored, *(key for experts in self.sets.values() for key in ExpertSet.parse(experts))}

    def expect_of(self, weights: str, *, name: str) -> None:
        """MoELensError where a table says that it is of other weights than these; name: of the run."""
        if any(weights not in told for told in self.weights):
            raise MoELensError(
                f"the run {name} measured another model than the one of this atlas, whose expert 3 of layer 1 need not "
                "be the other's; open the model of that run, with its --delta and --dtype, or leave its --scores out"
            )


def read_runs(folders: Sequence[str | Path]) -> dict[str, RunNumbers]:
    """The numbers of runs by their folders' names; MoELensError where these repeat, and as from `read_run`."""
    names = [nameable(folder).resolve().name for folder in folders]
    if len(set(names)) < len(names):
        raise MoELensError(f"runs are told by the names of their folders, which repeat: {', '.join(names)}")
    return {name: read_run(folder) for name, folder in zip(names, folders, strict=True)}


def read_run(folder: str | Path) -> RunNumbers:
    """The numbers of a run; MoELensError where its folder has neither scores nor dose curves."""
    if not nameable(folder).is_dir():
        raise MoELensError(f"expected the folder of a run; got {folder}, which is none")
    scores = [path for name in KEPT for path in sorted(Path(folder).rglob(name))]
    of_scores = {path: table for path in scores if set(SCORE) <= set(table := read_table(path))}
    doses = sorted(Path(folder).rglob("doses.parquet"))
    of_doses = {path: table for path in doses if set(DOSE) <= set(table := read_table(path))}
    found, curves = list(of_scores.values()), list(of_doses.values())
    if not found and not curves:
        raise MoELensError(
            f"{folder} keeps no scores of every expert ({', '.join(KEPT)}) and no doses.parquet; give the folder of "
            "moe_lens.find, or of moe_lens.intervene with scores or strengths"
        )
    columns = [*SCORE, "score_low", "score_high"]
    whole = pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=columns)
    whole = whole.reindex(columns=columns).drop_duplicates([*SCORE], ignore_index=True)
    if (twice := whole.duplicated(["name", "layer", "expert"])).any():
        name = whole.loc[twice, "name"].iloc[0]
        raise MoELensError(f"{folder} has the score {name} of several runs; give the folder of each by itself")
    return RunNumbers(
        whole,
        pd.concat(curves, ignore_index=True) if curves else pd.DataFrame(columns=DOSE),
        tuple(told for path in (*of_scores, *of_doses) if (told := _weights(read_provenance(path)))),
    )


def _weights(provenance: dict[str, Any]) -> frozenset[str]:
    """Digests of the models, tuned and base, that a table says it is of."""
    return frozenset(provenance[name] for name in ("weights", "base_weights") if name in provenance)
