"""The prompt templates that have a name, and those that are read from a file."""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from moe_lens.data.prompts import FIGURE_10, PromptTemplate
from moe_lens.errors import MoELensError

PLAIN_TEMPLATE = PromptTemplate(with_context="{context}\n\nQuestion: {question}", closed_book="Question: {question}")
"""Nothing but the context and the question, for models that follow no instructions."""

BARE_TEMPLATE = PromptTemplate(with_context="{context}\n\n{question}", closed_book="{question}", answer_cue="")
"""The example's own words alone, for prompts that are no questions."""

RELEASED = PromptTemplate(
    with_context=FIGURE_10.with_context.replace(": {", ":\n{"), closed_book=FIGURE_10.closed_book.replace(": {", ":\n{")
)
"""Figure 10 as the authors' released code writes it: the texts stand on lines of their own."""

INSTRUCTION = "Instruction: read the given information and answer the corresponding question.\n\n"
QUOTED = 'Bob said "{context}"\nQ: {question} in Bob\'s opinion?'


def _schema(with_context: str, *, goes_on: bool = False) -> PromptTemplate:
    """A schema of context-faithful prompting. goes_on: it says more after the question, and has a mark of its own."""
    return PromptTemplate(
        with_context,
        closed_book="Q: {question}?" if goes_on else "Q: {question}",
        answer_cue="\nA:",
        bare_question=goes_on,
        unquoted_context='"{context}"' in with_context,
    )


SCHEMAS: Mapping[str, PromptTemplate] = {
    "base": _schema("{context}\nQ: {question}"),
    "attr": _schema("{context}\nQ: {question} based on the given text?", goes_on=True),
    "instr": _schema(INSTRUCTION + "{context}\nQ: {question}"),
    "opin": _schema(QUOTED, goes_on=True),
    "instr+opin": _schema(INSTRUCTION + QUOTED, goes_on=True),
}
"""Context-faithful prompting (Zhou et al. 2023): the context as it is, or as somebody's words, asked for what it says.

A question's mark is left out only where it has one (their code drops the last character, whatever it is), and each
demonstration has the instruction before it, not the first alone.
"""

TEMPLATES: Mapping[str, PromptTemplate] = {
    "figure-10": FIGURE_10,
    "plain": PLAIN_TEMPLATE,
    "bare": BARE_TEMPLATE,
    "released": RELEASED,
    **SCHEMAS,
}
"""The templates that have a name."""


def template_named(name: str | Path) -> PromptTemplate:
    """The template of this name, or of a .json or .toml file that has its texts (`PromptTemplate`) by name.

    Raises MoELensError for any other name, and for a file that does not hold a template.
    """
    if str(name) in TEMPLATES:
        return TEMPLATES[str(name)]
    if not isinstance(name, (str, Path)) or Path(name).suffix not in (".json", ".toml"):
        raise MoELensError(
            f"a template is one of {', '.join(TEMPLATES)}, or a .json or .toml file with with_context, closed_book and "
            f"answer_cue; got {str(name)!r}"
        )
    path = Path(name)
    try:
        text = path.read_text(encoding="utf-8")
        told = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise MoELensError(f"cannot read a template from {path}: {error}") from None
    known = {field.name for field in fields(PromptTemplate)} - {"demonstrations"}
    kinds = {"chat_template_kwargs": dict, "bare_question": bool, "unquoted_context": bool}
    texts = isinstance(told, dict) and all(isinstance(value, kinds.get(name, str)) for name, value in told.items())
    if not texts or not {"with_context", "closed_book"} <= set(told) <= known:
        raise MoELensError(
            f"{path}: expected the texts with_context, closed_book and answer_cue, for thoughts answer_after, and for "
            "chats system_prompt and a table of chat_template_kwargs (bare_question, unquoted_context: true or false); "
            f"got {told!r:.200}"
        )
    return PromptTemplate(**told)
