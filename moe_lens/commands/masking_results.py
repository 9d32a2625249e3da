"""What a masking command leaves: the tables and the figure of a run, and its rows on the console."""

from pathlib import Path
from typing import Any

from moe_lens.choosing.controls import CONTROL
from moe_lens.choosing.masking import Masked, write_masked
from moe_lens.commands import console
from moe_lens.report.plots import masking_figure

SHOWN = (
    "intervention", "size", "n", "em", "em_low", "em_high", "memory", "em_drop", "q_value", "below_random",
    "below_random_low", "below_random_high", "random_p", "rank",
)  # fmt: skip


def leave_masked(found: Masked, out: Path, made_by: dict[str, Any], *, title: str) -> None:
    """Write the tables and the figure of a masking run to `out`, and print its rows, the random sets as their mean."""
    files = write_masked(found, out, made_by)
    files += [path.name for path in console.save_figure(masking_figure(found.rows), out / "figure3.html")]
    rows = found.rows[found.rows["family"] != CONTROL]
    console.show(rows, [name for name in SHOWN if name in rows], title=title)
    console.say(f"written to {out}: {', '.join(files)}")
