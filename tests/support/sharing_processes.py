"""Run by torchrun, or alone: statistics, scores and attribution, shared; each process leaves what it got."""

import sys
from pathlib import Path

import torch

from moe_lens import MoELens, load_examples
from moe_lens.causal import Attribution, attribution
from moe_lens.choosing.measuring import Models, score_tables
from moe_lens.choosing.scores import score_named
from moe_lens.lens.parallel import connected, sharing
from moe_lens.statistics import save_statistic
from moe_lens.statistics.measures import MEASURES

MEASURED = [name for name in MEASURES if name != "shared"]
"""What a model without shared experts shows."""
SCORED = ("ce", "ce-mass", "reap", "esft-gate", "attribution(answer)")


def main(out: Path) -> None:
    torch.set_num_threads(1)
    state = connected()
    lens = MoELens.from_pretrained("organism")
    for parameter in lens.module.parameters():  # where weights lie in their file decides the order of float32 sums
        parameter.data = parameter.data.clone()
    lens.batch_size, lens.progress = 3, False
    examples = load_examples("swap", limit=13)
    lens.project_on_vocab(lens.module.get_input_embeddings().weight[:1].detach())  # it checks itself at its first use
    made = {name: MEASURES[name].make(lens, "all") for name in MEASURED}
    ran: list[int] = []
    hook = lens.module.get_input_embeddings().register_forward_pre_hook(
        lambda module, inputs: ran.append(1) if inputs[0].shape[1] > 1 else None  # the logit lens reads one by one
    )
    with sharing():
        lens.measure(examples, *made.values())
        hook.remove()
        scores = score_tables(
            [score_named(name) for name in SCORED], Models.opened(lens, lens), examples, out=out, made_by={"of": "test"}
        )
        [gates] = attribution(lens, examples, Attribution(target="answer"))
    tables = scores | {"gates": gates}
    if state.is_main_process:
        for name, statistic in made.items():
            save_statistic(statistic, out / f"statistic-{name}.parquet", {})
    for name, table in tables.items():
        table.to_parquet(out / f"{name}-{state.process_index}.parquet")
    (out / f"batches-{state.process_index}").write_text(str(len(ran)))
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
