"""The paper's study of one model on real text: the commands that it is made of, and the questions they are asked."""

import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from time import perf_counter, process_time
from typing import Annotated

import pandas as pd
from typer import Option

from moe_lens.commands import console
from moe_lens.commands.options import Reading
from moe_lens.errors import MoELensError
from moe_lens.lens.loading import load_tokenizer
from moe_lens.metrics import METRICS, compare
from moe_lens.organism.splitting import Asking
from moe_lens.paper.question_files import by_itself, write_examples
from moe_lens.paper.study import file_name
from moe_lens.results import read_table

FOUND = ("ce:2", "oe:2", "ce-last:2", "contrast:2", "attribution-from_question(answer):2")
"""Ways to find experts in the router-tuned model, at two of a layer."""
BIASED, DOSES = ("contrast:2", "attribution-from_question(answer):2"), "bias:1,2,4"
"""Those that can be found in the base model are biased in it."""
CLOSED = "-closed"
"""How the name of questions without their contexts ends."""
PAGE = "page"
"""The folder of what stands on the study's page; single answers to many questions do not."""
WRITTEN = ("questions/*/*", "answers/*/*/*", f"{PAGE}/*", f"{PAGE}/*/*")
"""What the study writes into its folder."""
STEP = 8
"""Examples of a step of training, as in the paper."""
SCORED = ("em", "f1", "contains", "memory", "memory_ratio")
BASE, TUNED, CEFT = VARIANTS = ("base", "router-tuned", "CEFT")


@dataclass(frozen=True)
class Sizes:
    """How much is asked, and what is tried."""

    max_length: Annotated[int, Option(min=1, help="The longest prompt with its answer, in tokens.")] = 300
    train: Annotated[int, Option(min=1, help="Training questions of the first data set.")] = 300
    dev: Annotated[int, Option(min=1, max=100, help="Dev questions by which rates are chosen.")] = 100
    questions: Annotated[int, Option(min=2, help="Test questions of each data set: answers and gains.")] = 300
    masked: Annotated[int, Option(min=2, help="Of these, for masks and routing vectors.")] = 100
    dosed: Annotated[int, Option(min=2, help="Of these, for doses.")] = 50
    scored: Annotated[int, Option(min=1, help="Of the training questions, those on which experts are found.")] = 100
    random_sets: Annotated[int, Option(min=2, help="Random sets beside those masked; beside doses two.")] = 5
    router_rates: Annotated[str, Option(help="Learning rates of the routers, with commas.")] = "1e-3,1e-2"
    expert_rates: Annotated[str, Option(help="Learning rates of CEFT, with commas.")] = "1e-4,1e-3"
    batch_size: Annotated[int, Option(min=1, help="Questions at once.")] = 32

    def __post_init__(self) -> None:
        """MoELensError for rates that are none, which single steps would refuse hours later."""
        for what, text in (("--router-rates", self.router_rates), ("--expert-rates", self.expert_rates)):
            console.rates(text, what=what)


def write_questions(names: Sequence[str], tokenizer_of: str, sizes: Sizes, folder: Path) -> list[str]:
    """The questions of every step, those that fit, as data in `folder`; their names: the first alone has train and dev.

    Beside each stand the same questions without contexts, of which `by_itself` says what they are asked for.
    """
    folders = [folder / called(name) for name in names]
    if len(set(folders)) < len(folders) or any(Path(name).is_file() for name in names):
        raise MoELensError(
            "expected data sets with splits whose names, or folders' last parts, differ, since they tell the questions "
            f"apart; got {', '.join(names)}"
        )
    asking, reading = Asking(load_tokenizer(tokenizer_of)), Reading(max_length=sizes.max_length)
    found: list[str] = []
    for name, own in zip(names, folders, strict=True):
        splits = {"test": sizes.questions}
        if not found:
            splits |= {"train": sizes.train, "dev": sizes.dev}
        for split, wanted in splits.items():
            loaded = reading.load(name, split=split, limit=8 * wanted)
            examples = reading.fit(loaded, asking, of=f"{name}, {split}", with_answer=True).examples[:wanted]
            if len(examples) < wanted:
                console.note(f"{name}, {split}: {len(examples)} questions, where {wanted} are asked for")
            write_examples(examples, own / f"{split}.jsonl")
            if split == "test":
                write_examples(by_itself(examples), own.with_name(own.name + CLOSED) / "test.jsonl")
        found.append(str(own))
    return found


def called(name: str) -> str:
    """What a data set is called here: its name without the place or revision that it is read from, or its folder's."""
    return Path(re.split("[@:]", name)[0]).name


def steps(model: Sequence[str], tasks: Sequence[str], sizes: Sizes, out: Path, analyses: Path) -> list[list[str]]:
    """The command lines, a script or module with its options, in the order in which they need each other.

    model: how it is opened, as options. tasks: what `write_questions` gave. analyses: the folder of the scripts.
    """
    first, *others = tasks
    page = out / PAGE
    router, ceft = page / "trained" / f"{file_name(first)}-router-0", page / "ceft"
    found: list[list[str]] = []

    def step(command: str, *options: object, size: int | None = None) -> None:
        run = str(analyses / command) if command.endswith(".py") else f"moe_lens.{command}"
        limit = [] if size is None else ["--limit", size]
        common = ["--max-length", sizes.max_length, "--batch-size", STEP if command == "tune" else sizes.batch_size]
        found.append([run, *model, *map(str, [*options, *limit, *common])])

    def answer(variant: str, *delta: object) -> None:
        for task in (name + end for end in ("", CLOSED) for name in tasks):
            told = ("--metrics", ",".join(SCORED), "--max-new-tokens", 24)
            step("evaluate", *delta, "--data", task, *told, "--out", out / "answers" / variant / Path(task).name)

    tuned, every = ("--score", "log_likelihood", "--learning-rate"), max(sizes.train, sizes.questions)
    studied = ("--data", first, *tuned, sizes.router_rates, "--train-batch-size", STEP, "--test-limit", sizes.questions)
    step("figure6_attention_gain.py", *studied, "--out", page, size=every)  # the files have no more to train on
    answer(BASE)
    answer(TUNED, "--delta", router)
    trained = ("--method", "ceft", "--router-delta", router, "--data", first, *tuned, sizes.expert_rates)
    step("tune", *trained, "--epochs", 1, "--out", ceft, size=sizes.train)
    answer(CEFT, "--delta", ceft)
    scored = ("--metrics", "contains,answer_log_probability", "--score-limit", sizes.scored)
    asked, closed = (*scored, "--data", first, "--spare"), f"{(others or tasks)[0]}{CLOSED}"
    masks = [word for name in FOUND for word in ("--experts", name)]
    masks += ["--control", f"random:{sizes.random_sets}", "--out", str(page / "masks")]
    step("intervene", "--delta", router, *asked, closed, *masks, size=sizes.masked)
    step("figure8_answer_probability.py", *studied, "--out", page, size=every)
    if others:
        what = ("--what", "information,clustering", "--positions", "question")
        step("measure", "--data", ",".join(tasks), *what, "--out", page / "vectors", size=sizes.masked)
    doses = [word for name in BIASED for word in ("--experts", name)]
    doses += ["--control", "random:2", "--mode", DOSES, "--positions", "from_question"]
    step("intervene", *asked, closed, *doses, "--out", page / "doses", size=sizes.dosed)
    return found


def variants_table(answers: Path, variants: Sequence[str], tasks: Sequence[str]) -> pd.DataFrame:
    """One row per task, variant and score that some answer has: mean, low, high and n, of evaluate's tables.

    above, above_low, above_high: the paired difference to the first variant's score with its interval, missing of that
    one. further, further_low, further_high: that to the variant before, missing of the first two.
    """
    rows = []
    for task, variant in product((Path(name).name + end for end in ("", CLOSED) for name in tasks), variants):
        scored = {one: read_table(answers / one / task / "answers.parquet").set_index("id") for one in variants}
        summary = read_table(answers / variant / task / "summary.parquet")
        earlier = variants[: variants.index(variant)]
        for row in summary[summary["n"] > 0][["metric", "n", "mean", "low", "high"]].to_dict("records"):
            metric = METRICS[row["metric"]]
            for column, other in zip(("above", "further"), [*earlier[:1], *earlier[1:][-1:]], strict=False):
                if not metric.paired:
                    continue
                before = scored[other][metric.name]
                scores = (scored[variant].loc[before.index, metric.name].to_numpy(), before.to_numpy())
                by = compare(*scores, bounds=metric.bounds_of_difference).difference
                row |= {column: by.mean, f"{column}_low": by.low, f"{column}_high": by.high}
            rows.append({"task": task, "variant": variant} | row)
    return pd.DataFrame(rows)


def run_step(line: Sequence[str], *, processes: int = 1) -> None:
    """Runs a command line of `steps` in this process; MoELensError where it ends with an error, which it has told.

    Where Ctrl-C ended it, SystemExit with that code, too.

    processes: with more it runs in so many others, which share it.
    """
    words = [*line] if line[0].endswith(".py") else ["-m", *line]
    if processes > 1:
        words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *words]
    told = f"python {shlex.join(words)}"
    console.say(f"$ {told}")
    clock, used = perf_counter(), process_time()
    code = _here(line) if processes == 1 else _beside(words)
    console.say(f"{perf_counter() - clock:.0f} s by the clock, {process_time() - used:.0f} s of this process's CPU")
    if code == console.OF_CTRL_C:
        raise SystemExit(code)
    if code:
        raise MoELensError(f"a step ended with code {code}: {told}; mend that, and go on")


def _beside(words: Sequence[str]) -> int:
    """The exit code of Python with these arguments, in a process that ends before this one does."""
    child = subprocess.Popen([sys.executable, *words], process_group=0)  # a terminal's Ctrl-C comes to this one alone
    try:
        return child.wait()
    except BaseException:
        child.terminate()  # killed, it would leave what it has started
        child.wait()
        raise


def _here(line: Sequence[str]) -> str | int | None:
    """The exit code of a script or module that runs in this process with these options."""
    script = line[0].endswith(".py")
    # a module's own file, as `python -m` has it: what it keeps is then the same
    before, sys.argv = sys.argv, [line[0] if script else f"{line[0].replace('.', '/')}.py", *line[1:]]
    try:
        (runpy.run_path if script else runpy.run_module)(line[0], run_name="__main__")
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before
    return None
