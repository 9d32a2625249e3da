"""What splitting a dense model into experts costs: nats per token, errors by layer, and answers found in contexts.

    make english
    python analyses/english.py --split ~/.cache/moe_lens/english --dense MODEL --data nq-swap --out RUN/english

Both models answer the same questions greedily, in sentences: beside EM and F1 stands whether they contain an answer.
"""

from pathlib import Path
from typing import Annotated

import pandas as pd
from typer import Option

from moe_lens.commands import console
from moe_lens.commands.options import Data, Reading
from moe_lens.lens.delta import weights_digest
from moe_lens.lens.loading import load_model, load_tokenizer
from moe_lens.metrics import bootstrap_interval, ratio_of_means
from moe_lens.organism.sentences_answered import METRICS, plain_answers
from moe_lens.organism.splitting import Asking, load_dense
from moe_lens.results import kept, provenance, read_table
from moe_lens.storage import try_folder


def main(
    dense: Annotated[str, Option(help="The dense model: a hub id, a folder, or a .gguf file.")],
    split: Annotated[Path, Option(help="Folder that moe_lens.organism.split wrote.")],
    data: Data,
    out: Annotated[Path, Option(help="Folder for dense.parquet and split.parquet, the answers.")],
    reading: Reading,
    limit: Annotated[int, Option(min=2, help="Questions of the test split.")] = 300,
    max_new_tokens: Annotated[int, Option(min=1, help="Longest answer, in tokens.")] = 24,
    batch_size: Annotated[int, Option(min=1, help="Questions answered at once.")] = 16,
) -> None:
    """Answer with both models, unless their answers are there, and print the tables of docs/english.md."""
    try_folder(out)
    tokenizer = load_tokenizer(str(split / "model"))
    loaded = reading.load(data, split="test")
    examples = reading.fit(loaded, Asking(tokenizer), of=data).examples[:limit]
    found = {}
    for name in ("dense", "split"):
        model = load_dense(dense)[0] if name == "dense" else load_model(split / "model", dtype=None, device_map=None)
        facts = {"weights": weights_digest(model), "max_new_tokens": max_new_tokens, "limit": limit}
        made_by = provenance(model=name, data=examples, facts=facts)
        found[name] = kept(
            out / f"{name}.parquet",
            made_by,
            lambda model=model: plain_answers(
                model, tokenizer, examples, max_new_tokens=max_new_tokens, batch_size=batch_size
            ),
        )
    rows = []
    for metric in METRICS:
        ours, theirs = (found[name][metric].to_numpy() for name in ("split", "dense"))
        of_each = {name: bootstrap_interval(own[metric].to_numpy(), bounds=(0, 1)) for name, own in found.items()}
        if ours.any() and theirs.any():  # a share of nothing is none, and one that is nothing has no spread
            of_each["share"] = ratio_of_means(ours, theirs)
        told = {name: f"{one.mean:.3f} [{one.low:.3f}, {one.high:.3f}]" for name, one in of_each.items()}
        rows.append({"metric": metric, **told})
    console.show(read_table(split / "split.parquet"), title="Nats per token of texts that were not learned from")
    layers = read_table(split / "layers.parquet").pivot(index="layer", columns="stage", values=["error", "entropy"])
    console.show(layers.set_axis([f"{name} {stage}" for name, stage in layers], axis=1).reset_index(), title="By layer")
    console.show(pd.DataFrame(rows), title=f"{len(examples)} questions of {data}; share: of what the dense one has")


if __name__ == "__main__":
    console.run(main)
