"""The page's contents are what the files of plots/ and views/ declare: each table once, in the order of the page."""

from types import ModuleType

import pandas as pd
import pytest

from moe_lens.errors import MoELensError
from moe_lens.report.contents import SECTIONS, draw, gather
from moe_lens.report.section import Section


def module(name: str, **places: int) -> ModuleType:
    """A file of plots/ that declares sections of the tables NAME.parquet, which draw nothing."""
    made = ModuleType(name)
    made.SECTIONS = {f"{table}.parquet": Section(table, "", draw=None, place=at) for table, at in places.items()}
    return made


def test_sections_of_all_files_stand_in_the_order_of_the_page():
    modules = [module("first", tasks=10, tuning=30), ModuleType("style"), module("second", usage=20)]
    assert list(gather(modules)) == ["tasks.parquet", "usage.parquet", "tuning.parquet"]


def test_two_sections_for_one_table_are_refused_with_the_names_of_both_files():
    with pytest.raises(MoELensError, match=r"first and second both declare one for tasks\.parquet"):
        gather([module("first", tasks=10), module("second", tasks=20)])


def test_the_page_goes_from_answers_to_training():
    tables = list(SECTIONS)
    assert tables[:4] == ["tasks.parquet", "summary.parquet", "answers.parquet", "metrics.parquet"]
    assert tables.index("usage.parquet") < tables.index("coactivation.parquet") < tables.index("masking.parquet")
    assert tables[-2:] == ["tuning.parquet", "learning_rates.parquet"]
    assert len({section.place for section in SECTIONS.values()}) == len(tables)


def test_a_table_is_drawn_by_its_name_also_by_a_pattern():
    table = pd.DataFrame({"layer": [0, 0], "expert": [0, 1], "score": [0.5, 0.25], "name": "ce"})
    assert "Score ce is highest" in draw("score-ce.parquet", table).layout.title.text


@pytest.mark.parametrize("name", ["unheard-of.parquet", "learning_rates.parquet"])
def test_a_table_that_no_section_draws_is_refused_with_the_known_ones(name):
    with pytest.raises(MoELensError, match=rf"no section draws a table named {name}.*tasks\.parquet.*score-\*"):
        draw(name, pd.DataFrame())
