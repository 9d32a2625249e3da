"""Section: what a run's page says about a table, where it says it, and how the table is drawn."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import pandas as pd
import plotly.graph_objects as go

from moe_lens.errors import MoELensError
from moe_lens.report.document import View
from moe_lens.report.tables import with_short_tasks


@dataclass(frozen=True)
class Section:
    """A heading, a sentence and a drawing, declared in the file of the figure: `SECTIONS = {"x.parquet": Section(…)}`.

    The key is the table's file name, or a pattern of such names.

    draw: from the table to its figure or view; None for a table that is shown as numbers only.
    place: sections stand in its rising order; it goes in tens, so that a new one fits between any two.
    """

    heading: str
    sentence: str
    _: KW_ONLY
    draw: Callable[[pd.DataFrame], go.Figure | View] | None
    place: int

    def drawn(self, table: pd.DataFrame, name: str) -> go.Figure | View | None:
        """The table's figure; None where it has none, or no rows. MoELensError for any other names the table."""
        if self.draw is None or table.empty:
            return None
        try:
            return self.draw(with_short_tasks(table))
        except MoELensError as error:
            raise MoELensError(f"cannot draw {name}: {error}") from None
