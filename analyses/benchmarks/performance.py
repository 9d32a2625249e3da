"""The page docs/performance.md: what this package's ways cost beside transformers' own, other tools', and PEFT.

    python analyses/benchmarks/performance.py --out RUN/performance --page docs/performance.md \\
        --nnterp VENV/bin/python --transformer-lens VENV/bin/python

    pip install torch==2.13.0 transformers==5.23.0 nnterp==1.3.0 "nnsight<0.7"      # into the first of these
    pip install torch==2.13.0 transformers==5.23.0 transformer-lens==4.3.0          # into the second

Each part takes some minutes of one core, in turns with what it is compared with, and is kept: the same command goes on
where it stopped, `--parts` does some. The other tools run in environments of their own, whose Python is given; without
it they are left out. Times are of CPU work, so that other processes do not blur them. Linux only, for memory.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import evaluation
import interventions
import opened
import pandas as pd
import performance_page
import torch
import training_cost
from training_cost import known
from turns import Row, in_turns
from typer import Option

from moe_lens import MoELens, MoELensError, load_examples
from moe_lens.commands import console
from moe_lens.data import collate, encode
from moe_lens.results import provenance, write_json, write_table
from moe_lens.storage import try_folder, write_bytes

ROWS, TOKENS = 4, 128
PLAIN = "plain"
TRAINED = ("stock", "ceft", "router", "ceft-lora", "peft-lora")
NAMES = ("captures", "memory", "generation", "sweep", "answers", "training")
Ask = Callable[[str, int], Row]


def main(
    out: Annotated[Path, Option(help="Folder for a table of each part, and for the model that the tools open.")],
    page: Annotated[Path | None, Option(help="Where to write the page; default nowhere, it is printed.")] = None,
    parts: Annotated[str, Option(help="Those to do, with commas.")] = ",".join(NAMES),
    nnterp: Annotated[str, Option(help="The Python of an environment with nnterp.")] = "",
    transformer_lens: Annotated[str, Option(help="The Python of one with TransformerLens.")] = "",
    turns: Annotated[int, Option(min=1, help="Turns that each way takes, after one that is not timed.")] = 5,
    size: Annotated[str, Option(help=f"Of the random models: {', '.join(opened.SETTINGS)}.")] = "mid",
) -> None:
    """Measure what is not there yet, and print the page of all that is."""
    try_folder(out)
    pythons = {"transformers": sys.executable, "moe_lens": sys.executable}
    pythons |= {"nnterp": nnterp} if nnterp else {}
    pythons |= {"transformer_lens": transformer_lens} if transformer_lens else {}
    for part in known(parts, NAMES, "--parts"):
        if not (table := out / f"{part}.parquet").exists():
            rows = PARTS[part](out, pythons, turns, size)
            facts = {"size": size, "turns": turns, "threads": torch.get_num_threads()} | versions(pythons)
            write_table(pd.DataFrame(rows), table, provenance(model=size, seed=0, facts=facts))
    text = performance_page.text({part: out / f"{part}.parquet" for part in NAMES})
    if page is None:
        console.say(text)
    else:
        write_bytes(page, text.encode())


def versions(pythons: dict[str, str]) -> dict[str, str]:
    """Of each tool, in its environment."""
    names = {"transformer_lens": "transformer-lens"}
    asked = "import importlib.metadata as m, sys; print(*(m.version(n) for n in sys.argv[1:]))"
    found = {}
    for tool, python in pythons.items():
        command = [python, "-c", asked, names.get(tool, tool), "torch", "transformers"]
        found[tool] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return found


def captures(out: Path, pythons: dict[str, str], turns: int, size: str) -> list[Row]:
    """Each tool's ways, all in turns with transformers' plain pass; MoELensError where they captured unlike things."""
    rows: list[Row] = []
    with ExitStack() as stack:
        ways: dict[str, Callable[[], Row]] = {}
        for tool, python in pythons.items():
            names, ask = stack.enter_context(peer(tool, python, saved_model(out, size)))
            ways |= {way_of(tool, name): partial(ask, name, ROWS) for name in names}
        for turn in range(-1, turns):
            for way in list(ways)[:: -1 if turn % 2 else 1]:
                rows.append({"way": way, "plain": PLAIN, "turn": turn} | ways[way]())
    agree(rows)
    return [row for row in rows if row["turn"] >= 0]


def memory(out: Path, pythons: dict[str, str], turns: int, size: str) -> list[Row]:
    """By how much each way raises the peak of a process that has done it before on one row, and does nothing else."""
    rows: list[Row] = []
    for tool, python in pythons.items():
        with peer(tool, python, saved_model(out, size)) as (names, _):
            pass
        for name in names:
            with peer(tool, python, saved_model(out, size)) as (_, ask):
                ask(name, 1)
                rows.append({"way": way_of(tool, name), "added": ask(name, ROWS)["added"]})
    return rows


def way_of(tool: str, name: str) -> str:
    """What is captured and by whom: "routing, transformers by hooks"."""
    what, by, how = name.partition(", by ")
    return name if name == PLAIN else f"{what}, {tool}" + (f" by {how}" if by else "")


def agree(rows: Sequence[Row]) -> None:
    """MoELensError unless all ways of capturing one thing captured the same, to a ten-thousandth of its sum."""
    sums = pd.DataFrame(rows).groupby("way")["sum"].first()
    for what, of in sums.groupby(sums.index.str.partition(", ").get_level_values(0)):
        if of.max() - of.min() > 1e-4 * of.max():
            raise MoELensError(f"expected each tool to capture the same {what}; sums of what they did: {of.to_dict()}")


def saved_model(out: Path, size: str) -> Path:
    """A folder with a random model of that size and one batch of texts, made once."""
    folder = out / "model"
    if not (folder / "inputs.pt").exists():
        lens = opened.random_lens(size, layers=None, device="cpu", dtype=torch.float32)
        prompts = [encode(example, lens.tokenizer) for example in opened.examples_of(lens, ROWS, TOKENS)]
        batch = collate(prompts, 0)
        lens.module.save_pretrained(folder)
        lens.tokenizer.save_pretrained(folder)
        write_json(folder / "texts.json", [prompt.text for prompt in prompts])
        torch.save({"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}, folder / "inputs.pt")
    return folder


@contextmanager
def peer(tool: str, python: str, folder: Path) -> Iterator[tuple[list[str], Ask]]:
    """The names of a tool's ways, and what runs one of them on so many rows, in a process that ends with the block."""
    command = [python, str(Path(__file__).with_name("peer.py")), tool, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def answer() -> Any:
            line = process.stdout.readline()
            if not line:
                raise MoELensError(f"the process of {tool} ended with code {process.wait()}; what it said is above")
            return json.loads(line)

        def ask(name: str, rows: int) -> Row:
            process.stdin.write(f"{rows} {name}\n")
            process.stdin.flush()
            found = answer()
            return found | {"seconds": found["cpu_seconds"]}

        try:
            yield answer(), ask
        finally:
            process.stdin.close()
            process.wait()


def generation(out: Path, pythons: dict[str, str], turns: int, size: str) -> list[Row]:
    """16 tokens after each of 8 prompts, plain and under interventions; and zeroing by a hook of one's own."""
    lens = opened.random_lens(size, layers=None, device="cpu", dtype=torch.float32)
    examples = opened.examples_of(lens, 8, 48)
    ways = interventions.generation(lens, examples, 16)
    zeroed = interventions.interventions_of(lens, examples)["Zero"][0].experts

    def by_hand() -> None:
        def hook(layer: int) -> Callable[..., Any]:
            experts = torch.tensor(zeroed[layer])
            return lambda _, __, out: (out[0], out[1].masked_fill(torch.isin(out[2], experts), 0), out[2])

        hooks = [lens.module.model.layers[n].mlp.gate.register_forward_hook(hook(n)) for n in zeroed.layers]
        ways[PLAIN]()
        for one in hooks:
            one.remove()

    chosen = (PLAIN, "lens.generate", "Zero", "Reroute", "Bias", "AddVector in each layer", "Patch of the residual")
    return list(in_turns({name: ways[name] for name in chosen} | {"zeroed by a hook": by_hand}, turns, "cpu"))


def sweep(out: Path, pythons: dict[str, str], turns: int, size: str) -> list[Row]:
    """Every expert of the organism zeroed, beside as many plain passes."""
    examples = load_examples("swap", limit=32 if size == "mid" else 2)
    return list(in_turns(opened.sweep(MoELens.from_pretrained("organism"), examples), min(turns, 2), "cpu"))


def answers(out: Path, pythons: dict[str, str], turns: int, size: str) -> list[Row]:
    """Questions answered and scored, beside loops of `generate`."""
    lens = MoELens.from_pretrained("organism")
    ways = evaluation.answering(lens, evaluation.asked(limit=50), batch_size=32, max_new_tokens=16)
    order = ("loop, batches", "loop, one by one", "evaluate")
    return list(in_turns({name: ways[name] for name in order}, turns, "cpu"))


def training(out: Path, pythons: dict[str, str], turns: int, size: str) -> list[Row]:
    """Steps beside full fine-tuning as transformers runs it, PEFT's LoRA among them; time and memory."""
    setting = training_cost.Setting("mid" if size == "mid" else "small", "cpu", torch.float32, 1)
    rows: list[Row] = []
    for name in TRAINED:
        case = training_cost.Case(name)
        held = training_cost.memory_of(case, setting)
        for row in training_cost.turns_of(case, ["stock"], setting, turns, clock="cpu_seconds"):
            rows.append({"way": name, "plain": "stock", **held, **row})
    return rows


PARTS = dict(zip(NAMES, (captures, memory, generation, sweep, answers, training), strict=True))

if __name__ == "__main__":
    console.run(main)
