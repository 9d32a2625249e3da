"""Statistics in files: parts that were saved, read again and joined are the whole; nothing else is taken."""

import numpy as np
import pandas as pd
import pytest

from moe_lens import MoELens, MoELensError, load_examples
from moe_lens.lens import Needs
from moe_lens.results import write_table
from moe_lens.statistics import AttentionMass, CoActivation, RouterLoad, add_saved, save_statistic
from moe_lens.statistics.measures import MEASURES

MADE_BY = {"model": "organism"}


@pytest.fixture(scope="module")
def lens():
    return MoELens.from_pretrained("organism")


@pytest.fixture(scope="module")
def records(lens):
    """Of each example one, with all that any measure needs."""
    needs = Needs(frozenset())
    for one in MEASURES.values():
        needs |= one.make(lens, "all").needs
    examples = load_examples("swap", limit=6)
    asked = {"capture": needs.captures, "positions": {"all", (0,)}, "with_answer": True, "batch_size": 1}
    return list(lens.records(examples, **asked, progress=False))


@pytest.mark.parametrize("name", MEASURES)
def test_parts_that_are_saved_and_joined_are_the_whole(name, lens, records, tmp_path):
    def filled(own):
        statistic = MEASURES[name].make(lens, "all")
        for record in own:
            statistic.update(record if statistic.needs.with_answer else record.without_answers())
        return statistic

    for place, own in enumerate((records[:2], records[2:], [])):
        save_statistic(filled(own), tmp_path / f"{place}.parquet", MADE_BY)
    joined = MEASURES[name].make(lens, "all")
    for place in (2, 0, 1):
        add_saved(joined, tmp_path / f"{place}.parquet")
    whole, found = filled(records).table(), joined.table()
    assert list(found) == list(whole)
    for column in whole:
        if whole[column].dtype.kind == "f":
            np.testing.assert_allclose(found[column], whole[column], rtol=1e-12, atol=1e-12)
        else:
            assert found[column].tolist() == whole[column].tolist()
    for column in [name.removesuffix("_low") for name in whole if name.endswith("_low")]:
        told = whole[[f"{column}_low", column, f"{column}_high"]].dropna()
        assert (told.diff(axis=1).iloc[:, 1:] >= -1e-12).all(axis=None), column


@pytest.mark.parametrize("name", [name for name, one in MEASURES.items() if one.against is not None])
def test_a_model_differs_from_itself_by_nothing(name, lens, records):
    first, second = (MEASURES[name].make(lens, "all") for _ in range(2))
    for record in records:
        for statistic in (first, second):
            statistic.update(record if statistic.needs.with_answer else record.without_answers())
    table = MEASURES[name].against(first, second, lens.architecture.n_experts)
    if "difference" not in table:
        assert table.iloc[:, table.columns.get_loc(name)].isin([0.0, 1.0]).all()
        return
    assert table["difference"].fillna(0).abs().max() == 0
    assert table[["difference_low", "difference_high"]].dropna().le(1).all(axis=None)


def test_another_statistic_or_setting_and_a_damaged_file_are_refused(records, tmp_path):
    path = tmp_path / "load.parquet"
    save_statistic(RouterLoad("last").update(records[0]), path, MADE_BY)
    for other in (CoActivation("last"), RouterLoad("all"), AttentionMass()):
        with pytest.raises(MoELensError, match="expected a saved"):
            add_saved(other, path)
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    with pytest.raises(MoELensError, match="damaged"):
        add_saved(RouterLoad("last"), path)
    write_table(pd.DataFrame({"a": [1]}), tmp_path / "other.parquet", MADE_BY)
    with pytest.raises(MoELensError, match="expected a saved RouterLoad"):
        add_saved(RouterLoad(), tmp_path / "other.parquet")


def test_settings_with_tuples_are_told_as_they_were(records, tmp_path):
    save_statistic(RouterLoad((0, -1)).update(records[0]), tmp_path / "x.parquet", MADE_BY)
    assert add_saved(RouterLoad((0, -1)), tmp_path / "x.parquet").table()["tokens"].eq(2).all()
