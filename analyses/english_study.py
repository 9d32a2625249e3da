"""The paper's study of one model on real text: commands one after the other, each of which goes on where it stopped.

    python analyses/english_study.py --model english --data nq-swap,squad,confiqa-mc --out RUN/english

Routers are tuned and experts found on the first data set; the second is spared, without its contexts.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Option

from moe_lens.commands import console
from moe_lens.data.lookup import names_in
from moe_lens.paper.markdown import of_masked, of_variants
from moe_lens.paper.real_text import (
    PAGE,
    VARIANTS,
    WRITTEN,
    Sizes,
    called,
    run_step,
    steps,
    variants_table,
    write_questions,
)
from moe_lens.report import build_report
from moe_lens.results import claim, provenance, read_table, write_table
from moe_lens.storage import try_folder


def main(
    out: Annotated[Path, Option(help="Folder for all that comes of it; OUT/page/report.html shows it.")],
    model: Annotated[str, Option(help="As the other commands' --model.")] = "english",
    device: Annotated[str | None, Option(help="As the other commands' --device.")] = None,
    data: Annotated[str, Option(help="Data sets, with commas.")] = "nq-swap,squad,confiqa-mc",
    sizes: Sizes = Sizes(),
    processes: Annotated[int, Option(min=1, help="Processes that share each command, by torchrun.")] = 1,
) -> None:
    """Tune routers and experts, answer, mask, bias, measure and report; stopped, the same command goes on."""
    try_folder(out)
    names = names_in(data)
    told = asdict(sizes) | {"tasks": [called(name) for name in names]}
    claim(out, provenance(model=model, facts=told), writes=WRITTEN)
    tasks = write_questions(names, model, sizes, out / "questions")
    opening = ["--model", model, *([] if device is None else ["--device", device])]
    for step in steps(opening, tasks, sizes, out, Path(__file__).parent):
        run_step(step, processes=processes)
    table = variants_table(out / "answers", VARIANTS, tasks)
    for metric, rows in table.groupby("metric"):
        own = out / PAGE / "headline" / str(metric) / "metrics.parquet"
        write_table(rows, own, provenance(model=model, facts=told))
    print(of_variants(table))
    for folder, name in (("masks", "masking"), ("doses", "doses")):
        rows, summary = (read_table(out / PAGE / folder / f"{one}.parquet") for one in (name, "summary"))
        print(f"\n{of_masked(rows, summary)}")
    console.say(f"written: {build_report(out / PAGE, title=f'The study of {model} on {data}')}")


if __name__ == "__main__":
    console.run(main)
