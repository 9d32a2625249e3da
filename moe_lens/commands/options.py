"""The options that commands share: how a model is opened, how data are read, and what is then said of what was read."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, Self

from typer import Option

from moe_lens.commands import console
from moe_lens.commands.presets import Section
from moe_lens.data.files import ENDINGS
from moe_lens.data.lookup import ORGANISM_TASKS, SOURCES
from moe_lens.data.prompts import FIGURE_10, PromptTemplate
from moe_lens.data.shown import demonstrations_named
from moe_lens.data.templates import SCHEMAS, TEMPLATES, template_named
from moe_lens.errors import MoELensError
from moe_lens.progress import is_drawn, is_quiet

if TYPE_CHECKING:
    from accelerate import PartialState
    from transformers import PreTrainedTokenizerBase

    from moe_lens.commands.saved_interventions import Saved
    from moe_lens.data import Example, Fitted
    from moe_lens.decoding import Decoding as AnswerDecoding
    from moe_lens.lens.interventions import Mode
    from moe_lens.lens.lens import MoELens

Data = Annotated[
    str,
    Option(
        help=f"A task of the organism ({', '.join(ORGANISM_TASKS)}); a data set ({', '.join(SOURCES)}), or "
        f"NAME:PATH for one in its original format, a file or the folder of its splits, NAME@authors:FOLDER for the "
        f"paper's own splits; a {', '.join(ENDINGS)} file "
        "with the columns context, question, answer, or prompt, answer; or whatever `datasets` loads: ID, ID@REVISION, "
        "FOLDER."
    ),
]
Trace = Annotated[
    list[Path] | None,
    Option(
        help="A trace of a serving engine (several times) in the place of a run: a .jsonl, .csv or .parquet file as "
        "docs/traces.md says. Of --model only the configuration and tokenizer are read; with --data the trace has to "
        "be of its prompts."
    ),
]
Control = Annotated[
    str,
    Option(
        help="What to compare with: random:N masks N random sets of the same sizes; matched:N, for each set, N random "
        "ones of the same sizes that are about as much used (on the first of --data, where the mode acts); none masks "
        "none."
    ),
]
Stop = Annotated[
    list[str] | None,
    Option(
        help="A text before which an answer ends (several times), for base models that go on after it; \\n is a line "
        "break."
    ),
]
Decoding = Annotated[
    str,
    Option(
        help="How answers come about: plain (the most likely token each time); cad:ALPHA, context-aware decoding: "
        "ALPHA times the logits without the context are taken off, ALPHA times those with it added; adacad: ALPHA is "
        "how much both differ at each token (adacad:PLUS: and so much more); cite:K, ContextCite: again from the K "
        "sentences of the context that the first answer rests on most."
    ),
]
PRESET = Option(
    help="Set options as the paper did (paper) or as its authors' released code does (released), wherever you give no "
    "other value; what is set is printed, and what cannot be reproduced."
)
TunePreset = Annotated[str | None, PRESET, Section("tune")]
EvaluatePreset = Annotated[str | None, PRESET, Section("evaluate")]
ScriptPreset = Annotated[str | None, PRESET, Section("script")]
Epochs = Annotated[
    str,
    Option(help="Passes over the training data; NAME=N for those of a data set, such as 1,nq-swap=3,confiqa-mc=3."),
]
EvaluateEvery = Annotated[
    float | None,
    Option(
        help="Steps between measurements on the dev data, or, below 1, a share of all steps; default one per epoch."
    ),
]
NOT_JSON = {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false", "off": "false"} | {
    "none": "null",
    "null": "null",
}
"""How JSON spells what is written otherwise elsewhere."""
NUMBER = r"\d{1,9}"
"""A whole number of an option, as a regular expression; Python refuses to read one of thousands of digits."""
SHOWN = 20
"""Bad rows that are printed; the others are counted."""


@dataclass(frozen=True)
class BaseOpening:
    """How a command opens a model that is not tuned yet.

    Raises MoELensError for values that make no sense, before anything is loaded.
    """

    model: Annotated[str, Option(help="'organism', 'organism:planted', a folder, or a hub id.")]
    dtype: Annotated[str | None, Option(help=f"{', '.join(console.DTYPES)}; default the checkpoint's own.")] = None
    device: Annotated[
        str | None,
        Option(help="As transformers' device_map: cpu, cuda, or auto to spread a model over several GPUs."),
    ] = None
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="Run the Python code that some models bring beside their weights.")
    ] = False
    template: Annotated[
        str | None,
        Option(
            "--template",
            "--prompt",
            help=f"How examples are asked: {', '.join(TEMPLATES)} (the last {len(SCHEMAS)} are the schemas of "
            "context-faithful prompting), or a .json or .toml file with the texts with_context, closed_book and "
            "answer_cue. Default the paper's, figure-10.",
        ),
    ] = None
    demonstrations: Annotated[
        str | None,
        Option(
            help="Answered examples before each prompt: counterfactual:16:DATA, the first 16 of DATA's training "
            "examples that contradict memory; original:16:DATA, such examples as memory has them."
        ),
    ] = None
    system_prompt: Annotated[
        str | None, Option(help="A system turn before each question, for a model whose tokenizer has a chat template.")
    ] = None
    chat_template_kwargs: Annotated[
        str | None,
        Option(
            help="With commas, what the tokenizer's chat template takes beside the turns: enable_thinking=false, or of "
            "several templates chat_template=NAME. Values are JSON, or else texts."
        ),
    ] = None

    answer_after: Annotated[
        str | None,
        Option(
            help="A regular expression, such as '####': the answer is what comes after its first match, and what is "
            "before it a thought (--positions thought, answer). An answer without a match counts as none."
        ),
    ] = None

    def __post_init__(self) -> None:
        console.check_dtype(self.dtype)
        self.asked()

    def asked(self) -> PromptTemplate:
        """The template of --template, with what --system-prompt, --chat-template-kwargs, --answer-after add."""
        template = FIGURE_10 if self.template is None else template_named(self.template)
        if self.demonstrations is not None:
            template = replace(template, demonstrations=demonstrations_named(self.demonstrations))
        if self.system_prompt is not None:
            template = replace(template, system_prompt=self.system_prompt)
        if self.chat_template_kwargs is not None:
            template = replace(template, chat_template_kwargs=_arguments(self.chat_template_kwargs))
        if self.answer_after is not None:
            template = replace(template, answer_after=self.answer_after)
        return template

    def load(self, *, delta: Path | None = None, distributed_config: Any = None) -> "MoELens":
        """The model, opened, with the delta on it; distributed_config: as in `MoELens.from_pretrained`.

        In a log, or where all is quiet, transformers then draws no bars of its own any more.
        """
        from transformers.utils import logging

        from moe_lens.lens.lens import MoELens

        if is_quiet() or not is_drawn():
            logging.disable_progress_bar()
        return MoELens.from_pretrained(
            self.model,
            delta=delta,
            dtype=console.dtype_named(self.dtype),
            device_map=self.device,
            template=self.asked(),
            trust_remote_code=self.trust_remote_code,
            distributed_config=distributed_config,
        )

    def load_shapes(self) -> "MoELens":
        """The same without values, on the meta device: of a process that gets its part from the first one's."""
        from moe_lens.lens.lens import MoELens
        from moe_lens.lens.loading import load_skeleton

        trust, dtype = self.trust_remote_code, console.dtype_named(self.dtype)
        skeleton = load_skeleton(self.model, dtype=dtype, trust_remote_code=trust)
        return MoELens.from_pretrained(skeleton, self.model, template=self.asked(), trust_remote_code=trust)

    def facts(self, lens: "MoELens") -> dict[str, Any]:
        """For the provenance of what a lens gives: what changes its numbers and is not named there anyway."""
        from moe_lens.lens.delta import weights_digest

        return {"dtype": self.dtype, "template": lens.template.facts(), "weights": weights_digest(lens.module)}


@dataclass(frozen=True)
class Opening(BaseOpening):
    """How a command opens its model, tuned or not; `dataclasses.replace` makes another of it, such as the base."""

    delta: Annotated[
        Path | None, Option(help="Folder of a delta that moe_lens.tune wrote, which is put on the model.")
    ] = None
    parallel: Annotated[
        Literal["tensor", "expert"] | None,
        Option(
            help="One model held together by the processes of torchrun, for what no device holds: split as tensors, or "
            "its experts whole and the rest as tensors. Every process then runs all examples."
        ),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parallel and self.device:
            raise MoELensError("--parallel puts each part on its process's own device; leave --device out")

    def load(self, *, delta: Path | None = None, distributed_config: Any = None) -> "MoELens":
        return super().load(delta=delta or self.delta, distributed_config=distributed_config or self._split())

    def _split(self) -> Any:
        """How transformers is to split the model over all processes; None for a whole one in each."""
        if self.parallel is None:
            return None
        from transformers.distributed import DistributedConfig

        from moe_lens.lens.parallel import connected

        count = connected().num_processes
        if count == 1:
            raise MoELensError(
                "--parallel splits a model over several processes and there is one; start the command as "
                "torchrun --nproc-per-node N -m …, or leave --parallel out"
            )
        return DistributedConfig(tp_size=count, ep_size=count if self.parallel == "expert" else 1)

    def of_process(self, processes: "PartialState") -> "Self":
        """The same for one of several processes that share the work: on its own device, where none is named."""
        if self.device is not None or self.parallel or processes.num_processes == 1:
            return self
        return replace(self, device="cpu" if processes.device.type == "cpu" else str(processes.device))


@dataclass(frozen=True)
class Scoring:
    """On what the scores that rank experts are measured."""

    base: Annotated[
        str | None,
        Option(help="The model before tuning, for scores that need it; default --model without --delta."),
    ] = None
    score_split: Annotated[
        str, Option(help="Which split of --data scores are measured on (a file has no splits: all of it).")
    ] = "train"
    score_limit: Annotated[int | None, Option(min=1, help="Measure scores on the first so many examples only.")] = None


@dataclass(frozen=True)
class Doing:
    """What a command does to the experts that it names, how strongly, where and when."""

    mode: Annotated[
        str,
        Option(
            help="zero: gating weight 0 (the paper's text). renormalize: and the others rescaled. reroute: removed "
            "before top-k (the paper's released code). force: always among the selected. With strengths, a run for "
            "each: bias:1,2,5 added to the experts' router logits; scale:0,0.5,2 times their gating weights; "
            "topk:1,2,4 experts for every token (without naming experts)."
        ),
    ] = "zero"
    positions: Annotated[
        str,
        Option(
            help="Where: all, prompt, context, question, from_question (and all after it), last (of the prompt), "
            "thought (before --answer-after), answer, decode, or numbers counted from the prompt's last token, such as "
            "0,1."
        ),
    ] = "all"
    steps: Annotated[
        str, Option(help="When: all, prefill (while the prompt is read), decode, or numbers of steps, such as 0,1.")
    ] = "all"
    layers: Annotated[
        str | None,
        Option(help="In which layers, of those with the experts: numbers, such as 0,2,3; default all."),
    ] = None
    intervention: Annotated[
        list[str] | None,
        Option(
            help="Answer under this saved intervention too (several times): a folder that Intervention.save or tune "
            "--method bias wrote, or one of several such folders; FOLDER:0.5,1,2 for so many times its strength. As "
            "every mask it acts alone, on the model with its --delta; its place is its own."
        ),
    ] = None

    @property
    def within(self) -> tuple[int, ...] | None:
        """The layers of --layers, None for all; MoELensError for what are no numbers."""
        return None if self.layers is None else tuple(console.numbers(self.layers, int, what="--layers"))

    def parsed(self) -> "Mode":
        """The mode with its strengths and place; MoELensError for what makes none."""
        from moe_lens.lens.interventions import parse_mode

        positions, steps = place_named(self.positions), place_named(self.steps)
        return parse_mode(self.mode, layers=self.within, positions=positions, steps=steps)

    def saved(self) -> "dict[str, Saved]":
        """The saved interventions by name; MoELensError where two have one name."""
        from moe_lens.commands.saved_interventions import read_saved

        return read_saved(self.intervention or [])


def place_named(text: str) -> Any:
    """A word, or a tuple of numbers."""
    numbers = re.fullmatch(rf"-?{NUMBER}(,-?{NUMBER})*", text.strip())
    return tuple(map(int, text.split(","))) if numbers else text.strip()


def _arguments(text: str) -> dict[str, Any]:
    """The arguments of --chat-template-kwargs; MoELensError for what are none."""
    arguments: dict[str, Any] = {}
    rest: str | None = text
    while rest is not None:
        named = re.match(r"\s*([^\W\d]\w*)\s*=\s*", rest)
        if named is None:
            raise MoELensError(f"--chat-template-kwargs is NAME=VALUE,…, such as enable_thinking=false; got {text!r}")
        if named[1] in arguments:
            raise MoELensError(f"--chat-template-kwargs has {named[1]} twice; got {text!r}")
        arguments[named[1]], rest = _argument(named[1], rest[named.end() :])
    return arguments


def _argument(name: str, text: str) -> tuple[Any, str | None]:
    """The value at the start of the text, JSON or else a text, and what comes after its comma; None where none does."""
    value, end = None, 0
    try:
        value, end = json.JSONDecoder().raw_decode(text)
        plain = re.match(r"\s*(,|$)", text[end:]) is None
    except (ValueError, RecursionError):
        plain = True
    if plain:
        end = text.find(",") if "," in text else len(text)
        value = text[:end].strip()
        if (meant := NOT_JSON.get(value.casefold())) is not None:
            raise MoELensError(
                f"--chat-template-kwargs takes JSON values, and {value!r} is none: give {name}={meant}, or as a text "
                f'{name}="{value}"'
            )
    _, comma, rest = text[end:].partition(",")
    return value, rest if comma else None


class Asker(Protocol):
    """What turns examples into tokens: a lens, or what is known of one."""

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase": ...

    @property
    def template(self) -> PromptTemplate: ...


@dataclass(frozen=True)
class Reading:
    """How a command reads its data.

    Raises MoELensError for values that make no sense, before anything is read.
    """

    columns: Annotated[
        str | None,
        Option(
            help="The names that columns have in the data, such as question=q,answer=gold.text; also of id, context, "
            "original_answer, options and group. prompt=P,answer=A: prompts without a context, which are the user's "
            "whole turn; verbatim=P: the whole text that the model reads."
        ),
    ] = None
    skip_bad: Annotated[
        bool, Option("--skip-bad", help="Leave out rows that make no example, and say which, instead of stopping.")
    ] = False
    max_length: Annotated[
        int | None, Option(help="The longest prompt, in tokens; --too-long says what is done with longer ones.")
    ] = None
    too_long: Annotated[
        Literal["drop", "truncate"],
        Option(
            help="drop: leave longer examples out. truncate: cut their context around the answer, and leave out only "
            "what is too long even so.",
        ),
    ] = "drop"

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise MoELensError(f"--max-length is a number of tokens, at least 1; got {self.max_length}")

    def load(self, data: str, *, split: str, limit: int | None = None) -> "list[Example]":
        """The first `limit` examples; bad rows, where they are skipped, are printed with their places."""
        from moe_lens.data import parse_columns, read_examples

        columns = None if self.columns is None else parse_columns(self.columns)
        loaded = read_examples(data, split=split, limit=limit, columns=columns, skip_bad=self.skip_bad)
        if loaded.bad:
            _say_left_out(f"{data}: left out {len(loaded.bad)} bad rows of {loaded.rows}", loaded.bad)
        return loaded.examples

    def fit(
        self,
        examples: "Sequence[Example]",
        asker: Asker,
        *,
        of: str,
        with_answer: bool = False,
    ) -> "Fitted":
        """Those that fit --max-length as `asker`, a lens, asks them; how many do not is printed, `of` naming the data.

        with_answer: the answer that training appends counts too.
        """
        from moe_lens.data import fit_length

        fitted = fit_length(
            examples,
            asker.tokenizer,
            template=asker.template,
            max_length=self.max_length,
            too_long=self.too_long,
            with_answer=with_answer,
            skip_bad=self.skip_bad,
        )
        if fitted.bad:
            _say_left_out(f"{of}: left out {len(fitted.bad)} examples", fitted.bad)
        console.say(f"{of}: {fitted}")
        return fitted

    def facts(self, *fitted: "Fitted") -> dict[str, Any]:
        """For the provenance: the options, and the counts of what was read under them."""
        counts = [one.facts() for one in fitted]
        summed = {name: sum(count[name] for count in counts) for name in ("dropped", "truncated")}
        return {"max_length": self.max_length, "too_long": self.too_long, **summed}


def epochs_for(text: str, data: str) -> int:
    """The passes that --epochs means for --data; MoELensError for anything else than numbers and NAME=number."""
    name = data.partition(":")[0].partition("@")[0]
    found: dict[str, int] = {}
    for part in text.split(","):
        of, _, number = part.rpartition("=")
        if of in found or not re.fullmatch(NUMBER, number.strip()) or int(number) < 1:
            raise MoELensError(f"--epochs is a number of at least 1, and NAME=number for a data set; got {text!r}")
        found[of] = int(number)
    if name not in found and "" not in found:
        raise MoELensError(f"--epochs says nothing of {name}; give a number for all others, such as 1,{text}")
    return found.get(name, found.get("", 0))


def steps_between(given: float | None) -> int | float | None:
    """What `Schedule` takes for --evaluate-every: a whole number of steps, or a share below 1."""
    if given is not None and (not 0 < given < inf or (given >= 1 and given != int(given))):
        raise MoELensError(f"--evaluate-every is a whole number of steps, or below 1 a share of all; got {given}")
    return int(given) if given is not None and given >= 1 else given


def ends(stop: Sequence[str] | None) -> list[str]:
    """The texts of --stop, with the line breaks and tabs that a shell does not take; MoELensError for an empty one."""
    found = [text.replace("\\n", "\n").replace("\\t", "\t") for text in stop or ()]
    if not all(found):
        raise MoELensError("--stop is a text before which an answer ends; an empty one would leave nothing")
    return found


def told_decoding(decoding: "AnswerDecoding", examples: "Sequence[Example]") -> dict[str, Any]:
    """Its facts, for the provenance; how many of the examples it answers plainly, and why, is printed."""
    for why, count in decoding.untouched(examples).items():
        if count:
            console.note(f"{decoding}: {count} of {len(examples)} examples are {why}, and are answered plainly")
    return decoding.facts(examples)


def _say_left_out(counted: str, reasons: Sequence[str]) -> None:
    """Prints the count and the first reasons."""
    more = len(reasons) - SHOWN
    console.say(counted, *(f"  {reason}" for reason in reasons[:SHOWN]), *([f"  and {more} more"] if more > 0 else []))
