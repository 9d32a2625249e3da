"""Extension of griffe: docstrings as Markdown, with what is said of each argument as an item, and examples as code."""

import re

import griffe

ARGUMENT = re.compile(r"^(\w+(?:, \w+)*): (?=\S)", re.MULTILINE)
APART = re.compile(r"^(?=Raises |Returns |Gives )", re.MULTILINE)


class AsMarkdown(griffe.Extension):
    """Of each object that is documented."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Once its docstring has been read."""
        if obj.docstring is not None:
            obj.docstring.value = "\n\n".join(map(as_markdown, obj.docstring.value.split("\n\n")))


def as_markdown(paragraph: str) -> str:
    """A paragraph of a docstring: `name: words` at a line's start is an item, `>>>` makes code, axes are no links."""
    if paragraph.startswith(">>>"):
        return f"```pycon\n{paragraph}\n```"
    told = paragraph.replace("][", "]\\[")
    first = ARGUMENT.search(told)
    if first is None:
        return told
    items = ARGUMENT.sub(r"- `\1`: ", APART.sub("\n", told[first.start() :]))
    return f"{told[: first.start()]}\n{items}"
