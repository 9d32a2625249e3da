"""A page of a run from the command line: `python -m moe_lens.report --help`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from moe_lens.commands import console


def main(
    folder: Annotated[Path, Argument(help="A run directory: its tables, also those in folders below, are shown.")],
    title: Annotated[str, Option(help="The page's heading.")] = "moe_lens report",
) -> None:
    """Write FOLDER/report.html: figures, numbers and provenance of a run on one page that works offline."""
    from moe_lens.report.page import build_report

    console.say(f"wrote {build_report(folder, title=title)}")


if __name__ == "__main__":
    console.run(main)
