"""Options said once: a command takes a group of them as one parameter, whose type is a dataclass of their fields."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import partial, wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_type_hints

from typer import Context, Exit, Option

from moe_lens import __version__
from moe_lens.commands.presets import Section, with_preset
from moe_lens.progress import is_drawn, no_bars_of_others, quietly


def print_version(asked: bool) -> None:
    """Prints the version and ends the command, if that is what was asked."""
    if asked:
        print(f"moe_lens {__version__}")
        raise Exit


Version = Annotated[bool, Option("--version", is_eager=True, callback=print_version, help="Show the version and exit.")]


@dataclass(frozen=True)
class Common:
    """What every command takes."""

    quiet: Annotated[bool, Option("--quiet", help="No progress bars, and nothing said but results.")] = False
    version: Version = False


def grouped(main: Callable[..., None]) -> Callable[..., None]:
    """The command as typer takes it: an option for each field of its groups, and those of `Common`.

    A group's default gives the defaults of its options, also where the field has none. Options that must be given come
    first. An option that is marked as a `Section` names a preset, whose values stand for what the user has not given.
    Raises what a group raises for values that make no sense, before the command runs.
    """
    taken = [*signature(main, eval_str=True).parameters.values(), _COMMON]
    section = next((one.name for own in taken for one in _metadata(own) if isinstance(one, Section)), None)
    groups: dict[str, Any] = {one.name: one.annotation for one in taken if is_dataclass(one.annotation)}

    @wraps(main)
    def command(**values: Any) -> None:
        quiet = values["quiet"]
        if quiet or not is_drawn():
            no_bars_of_others()
        with quietly() if quiet else nullcontext():
            if section is not None:
                context: Context = values.pop(_CONTEXT.name)
                values = with_preset(values, section, partial(_is_given, context))
            for name, group in groups.items():
                values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
            del values[_COMMON.name]
            main(**values)

    options = [option for one in taken for option in (_options(one) if one.name in groups else [one])]
    options += [] if section is None else [_CONTEXT]
    options = [option.replace(kind=Parameter.KEYWORD_ONLY) for option in options]
    options.sort(key=lambda option: option.default is not Parameter.empty)
    vars(command)["__signature__"] = Signature(options)
    command.__annotations__ = {option.name: option.annotation for option in options}
    return command


_CONTEXT = Parameter("context", Parameter.KEYWORD_ONLY, annotation=Context)
_COMMON = Parameter("common", Parameter.KEYWORD_ONLY, default=Common(), annotation=Common)


def _metadata(parameter: Parameter) -> tuple[Any, ...]:
    return getattr(parameter.annotation, "__metadata__", ())


def _is_given(context: Context, name: str) -> bool:
    """Whether the user has given an option, which then is no default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _options(group: Parameter) -> Iterator[Parameter]:
    """A parameter for each field of a group, with its default from the group's, or else from the field."""
    annotations = get_type_hints(group.annotation, include_extras=True)
    for field in fields(group.annotation):
        default = field.default if group.default is Parameter.empty else getattr(group.default, field.name)
        yield Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=Parameter.empty if default is MISSING else default,
            annotation=annotations[field.name],
        )
