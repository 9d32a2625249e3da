"""Chats as a tokenizer's chat template writes them: the prompt up to the answer, and what goes wrong in templates."""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

from moe_lens.data.thoughts import closed
from moe_lens.errors import MODEL_CRASHES, MoELensError

ANSWER_MARK = "\ue000"
"""Stands for an answer where only what a chat template writes around it matters; a private-use character."""
EXTENSIONS = ("jinja2.ext.loopcontrols",)
OWN_ARGUMENTS = frozenset(
    ("conversation", "add_generation_prompt", "continue_final_message", "tokenize", "return_dict", "return_tensors")
)
"""What of the arguments of `apply_chat_template` is not the user's to choose."""


def turn(role: str, content: str) -> dict[str, str]:
    """A turn of a chat."""
    return {"role": role, "content": content}


@dataclass(frozen=True)
class Chat:
    """The chat template of a tokenizer with arguments for it; errors name the example that it is used for."""

    tokenizer: "PreTrainedTokenizerBase"
    arguments: Mapping[str, Any]
    example: str

    def asked(self, turns: Sequence[dict[str, str]]) -> tuple[str, str | None]:
        """The text of the turns up to where the answer to them starts, and the white space before the answer.

        None instead of the latter if the template writes an answered chat in another way. Raises MoELensError if the
        template fails.
        """
        text = self._applied(turns, add_generation_prompt=True)
        self._tell_unread()
        try:
            answered = self._applied([*turns, turn("assistant", ANSWER_MARK)], add_generation_prompt=False)
        except MoELensError:  # some take nothing but a question last
            answered = ""
        before, mark, _ = answered.partition(ANSWER_MARK)
        lead = before[len(text) :] if mark and before.startswith(text) else None
        if lead is not None and lead.strip():
            before = before.rstrip(" ")
            text, lead = before, lead[len(before) - len(text) :]
        whole = closed(text)
        return (text, lead) if whole == text else (whole, "")

    def _applied(self, turns: Sequence[dict[str, str]], *, add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            written = self.tokenizer.apply_chat_template(
                list(turns), tokenize=False, add_generation_prompt=add_generation_prompt, **self.arguments
            )
        except (TemplateError, *MODEL_CRASHES) as error:
            raise MoELensError(
                f"the tokenizer's chat template fails on example {self.example!r} ({type(error).__name__}: "
                f"{str(error)[:200]}); {self._remedy()}"
            ) from error
        return cast(str, written)

    def _tell_unread(self) -> None:
        """A warning of arguments that the template never reads; always the same text, which Python tells once."""
        if not self.arguments:
            return  # a signature takes longer than the rest
        others = self.arguments.keys() - signature(self.tokenizer.apply_chat_template).parameters.keys()
        if not others:
            return
        read = _variables(self.tokenizer.get_chat_template(self.arguments.get("chat_template")))
        if read and others - read:
            warnings.warn(
                f"the tokenizer's chat template never reads {', '.join(sorted(others - read))}, so that giving it "
                f"changes nothing; it reads {', '.join(sorted(read))}",
                stacklevel=2,
            )

    def _remedy(self) -> str:
        """What can be done about a template that fails."""
        several = self.tokenizer.chat_template
        if isinstance(several, dict) and "chat_template" not in self.arguments:
            name = next(iter(several))
            return (
                f"it has templates for {', '.join(several)}: name one with chat_template_kwargs={{'chat_template': "
                f"{name!r}}}, on a command line --chat-template-kwargs chat_template={name}"
            )
        return (
            "give it what it wants, such as a system turn (system_prompt=…, --system-prompt) or arguments "
            "(--chat-template-kwargs NAME=VALUE), or set tokenizer.chat_template to another, or to None for plain text"
        )


@cache
def _variables(source: str) -> frozenset[str]:
    """The variables that a chat template reads; none where it cannot be told."""
    from jinja2 import Environment, TemplateError, meta

    parsed = re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", source)  # a tag of transformers
    try:
        return frozenset(meta.find_undeclared_variables(Environment(extensions=EXTENSIONS).parse(parsed)))
    except TemplateError:
        return frozenset()
