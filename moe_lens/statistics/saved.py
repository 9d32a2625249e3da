"""Statistics in files: what one has seen, so that another run, or another machine, goes on with it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import pandas as pd

from moe_lens.errors import MoELensError
from moe_lens.lens.needs import Statistic
from moe_lens.results import read_provenance, read_table, write_table
from moe_lens.storage import as_json


class Storable(Statistic, Protocol):
    """A statistic that tells what it has seen, as a table, and takes up what another has."""

    def state(self) -> pd.DataFrame:
        """What it has seen so far."""

    def add_state(self, state: pd.DataFrame) -> Self:
        """Adds what another of the same settings has seen."""


S = TypeVar("S", bound=Storable)


def save_statistic(statistic: Storable, path: str | Path, made_by: Mapping[str, Any]) -> None:
    """Writes what a statistic has seen, with its kind and settings; made_by: the provenance, of model and data."""
    write_table(statistic.state(), path, {**made_by, "statistic": _told(statistic)})


def add_saved(statistic: S, path: str | Path) -> S:
    """Adds what `save_statistic` wrote to a statistic of that kind and these settings, and gives it back.

    >>> load = add_saved(add_saved(RouterLoad(), "first.parquet"), "second.parquet")    # as of all their examples

    Raises MoELensError for another kind, other settings or another model, and for a file that is damaged.
    """
    told, wanted = read_provenance(path).get("statistic"), json.loads(as_json(_told(statistic)))
    if told != wanted:
        raise MoELensError(f"expected a saved {wanted['name']}({wanted['settings']}) in {path}; it holds {told}")
    return statistic.add_state(read_table(path))


def _told(statistic: Storable) -> dict[str, Any]:
    return {"name": type(statistic).__name__, "settings": statistic.settings}
