"""What options that name data mean."""

import pytest

from moe_lens.data.lookup import names_in
from moe_lens.errors import MoELensError


def test_data_is_named_with_commas_unless_a_path_holds_them(tmp_path):
    assert names_in("swap, novel") == ("swap", "novel")
    folder = tmp_path / "mine,yours"
    assert names_in(str(folder)) == (str(tmp_path / "mine"), "yours")
    folder.mkdir()
    assert names_in(str(folder)) == (str(folder),)


@pytest.mark.parametrize(
    ("text", "says"), [("swap,,novel", "with commas between"), ("swap, swap", "'swap' is named twice")]
)
def test_blank_and_repeated_names_are_refused(text, says):
    with pytest.raises(MoELensError, match=says):
        names_in(text)
