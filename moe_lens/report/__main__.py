"""A page of a run from the command line: `python -m moe_lens.report --help`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from moe_lens.commands import console


def main(
    folder: Annotated[Path, Argument(help="A run directory: its tables, also those in folders below, are shown.")],
    title: Annotated[str, Option(help="The page's heading.")] = "moe_lens report",
    formats: Annotated[
        str | None,
        Option(
            "--format",
            help="Also write each figure to FOLDER/figures, with commas, as pdf, svg or png: takes Chrome "
            "and kaleido, of the package's extra `image`.",
        ),
    ] = None,
    no_title: Annotated[
        bool, Option("--no-title", help="Leave the titles out of these figures, for papers with captions.")
    ] = False,
) -> None:
    """Write FOLDER/report.html: figures, numbers and provenance of a run on one page that works offline."""
    from moe_lens.report.page import build_report
    from moe_lens.report.pictures import checked, write_pictures

    wanted = checked(formats, no_title=no_title)
    console.say(f"wrote {build_report(folder, title=title)}")
    if wanted:
        for path in write_pictures(folder, wanted, titled=not no_title):
            console.say(f"wrote {path}")


if __name__ == "__main__":
    console.run(main)
