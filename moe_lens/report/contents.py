"""The tables that a report knows, in the order of its page: what the files of plots/ and views/ declare."""

from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

import pandas as pd
import plotly.graph_objects as go

from moe_lens.errors import MoELensError
from moe_lens.report import plots, views
from moe_lens.report.document import View
from moe_lens.report.section import Section
from moe_lens.report.tables import with_short_tasks


def gather(modules: Iterable[ModuleType]) -> dict[str, Section]:
    """The `SECTIONS` of modules as one, in the order of the page; a module may have none.

    Raises MoELensError for a table that two of them declare.
    """
    found: dict[str, Section] = {}
    homes: dict[str, str] = {}
    for module in modules:
        for table, section in getattr(module, "SECTIONS", {}).items():
            if table in found:
                raise MoELensError(
                    f"a table has one section, but {homes[table]} and {module.__name__} both declare one for {table}; "
                    "draw a table of another name in one of them"
                )
            found[table], homes[table] = section, module.__name__
    return dict(sorted(found.items(), key=lambda item: item[1].place))


def _modules() -> Iterator[ModuleType]:
    """The files of plots/ and views/."""
    for package in (plots, views):
        for module in iter_modules(package.__path__, f"{package.__name__}."):
            yield import_module(module.name)


#: Known tables by (a pattern of) their file name, in the order of the page.
SECTIONS = gather(_modules())


def draw(name: str, table: pd.DataFrame) -> go.Figure | View:
    """The figure or view of a table by its file's name; MoELensError for a name that no section draws."""
    for pattern, section in SECTIONS.items():
        if section.draw is not None and fnmatch(name, pattern):
            return section.draw(with_short_tasks(table))
    known = ", ".join(pattern for pattern, section in SECTIONS.items() if section.draw is not None)
    raise MoELensError(f"no section draws a table named {name}; name it as one of {known}")
