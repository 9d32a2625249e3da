"""The README's figures of the organism, written into docs/ from the tables that `make figures` saved.

python analyses/readme_figures.py runs/paper --finding RUN/finding-planted --finding RUN/finding --out docs
"""

from pathlib import Path
from typing import Annotated

import pandas as pd
from typer import Argument, Option

from moe_lens.commands import console
from moe_lens.errors import MoELensError
from moe_lens.report.contents import draw
from moe_lens.results import read_table
from moe_lens.storage import write_bytes

FIGURES = {"figure4/clusters.parquet": "clusters.webp", "figure6/attention_gain.parquet": "attention_gain.svg"}
LEFT = "left.parquet"


def main(
    run: Annotated[Path | None, Argument(help="Run directory of the figures.")] = None,
    finding: Annotated[list[Path], Option(help="Folders of finding.py, one per model, for masking.png.")] = (),
    out: Annotated[Path, Option(help="Folder for the pictures.")] = Path("docs"),
) -> None:
    """Draw them, and print their captions: what each figure says of itself."""
    tables = {} if run is None else {name: (table, read_table(run / table)) for table, name in FIGURES.items()}
    if finding:
        tables["masking.png"] = LEFT, pd.concat([read_table(folder / LEFT) for folder in finding])
    for name, (file, table) in tables.items():
        figure = draw(Path(file).name, table)
        try:
            picture = figure.to_image(format=Path(name).suffix[1:], scale=2)
        except RuntimeError as error:
            if "Chrome" not in str(error):
                raise
            raise MoELensError("pictures are drawn by kaleido in Chrome or Chromium; install one of these") from None
        write_bytes(out / name, picture)
        title = figure.layout.title
        print(f"{out / name}: {title.text}; {title.subtitle.text}".replace("<br>", " "))


if __name__ == "__main__":
    console.run(main)
