"""Where answers stand: as whole words in every script and normal form, never inside a longer word, number or sign."""

import unicodedata

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_lens.data.words import occurrences, words

INSIDE = {
    "Latin, composed": ("Ren", "René came"),
    "Latin, its end": ("né", "René came"),
    "Devanagari": ("कम", "कमी बहुत है"),
    "Devanagari, its end": ("मी", "कमी बहुत है"),
    "Bengali": ("কল", "কলা খাই"),
    "Tamil": ("தமிழ", "தமிழ் மொழி"),
    "Hebrew with points": ("של", "שלֹום רב"),
    "Arabic with vowels": ("كتب", "كتبَهم"),
    "Arabic": ("كتب", "مكتبة"),
    "Persian, joined without a space": ("می", "می‌خواهم"),
    "Greek": ("Αθήνα", "Αθήνας"),
    "Cyrillic": ("Киев", "в Киеве"),
    "Georgian": ("თბილის", "თბილისი"),
    "Korean, half a syllable": ("가", "각자"),
    "Thai, without its vowel sign": ("ก", "กำ กี"),
    "a number": ("9", "in 1939"),
    "a number with a point": ("3", "of 3.5 and 4.3"),
    "a number with a comma": ("234", "1,234 and 234,000"),
    "a number of Thai digits": ("๙", "ปี๑๙๓๙"),
    "an emoji of two": ("👩", "a 👩‍🔬"),
    "an emoji of two, its end": ("🔬", "a 👩‍🔬"),
    "an emoji with its colour": ("👩", "a 👩🏽"),
    "a hyphen that is not seen": ("land", "Vater\u00adland"),
}
THERE = {
    "between stops": ("René", "(René), “René”. René's", 3),
    "Hindi": ("नई दिल्ली", "राजधानी नई दिल्ली।", 1),
    "Chinese": ("北京", "我在北京的家,北京", 2),
    "Japanese": ("タワー", "東京タワー", 1),
    "Korean": ("서울", "서울에서", 1),
    "Thai": ("กรุงเทพ", "เมืองกรุงเทพ", 1),
    "a number before a stop": ("3.5", "is 3.5. Or 3,5", 1),
    "a number in Chinese": ("2008", "2008年", 1),
    "a number in a list": ("1939", "1938, 1939, 1940", 1),
    "right after its own beginning": ("a a", "xa a a", 1),
    "an emoji of two": ("👩‍🔬", "👩‍🔬👩‍🔬", 2),
}
FORMS = pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])


@FORMS
@pytest.mark.parametrize("case", INSIDE)
def test_an_answer_inside_a_longer_word_is_not_there(case, form):
    answer, context = (unicodedata.normalize(form, text) for text in INSIDE[case])
    assert occurrences((answer,), context) == []


@pytest.mark.parametrize("case", THERE)
@FORMS
def test_an_answer_that_stands_alone_is_there_whatever_the_normal_forms(case, form):
    answer, context, times = THERE[case]
    context = unicodedata.normalize(form, context)
    found = occurrences((answer,), context)
    assert len(found) == times
    assert all(unicodedata.normalize("NFC", context[span]) == answer for span in found)


LETTERS = {
    "Latin": "aeéñßž",
    "Greek": "αβώή",
    "Cyrillic": "абй",
    "Armenian": "աբգ",
    "Hebrew": "אבש" + "\u05b8\u05bc",
    "Arabic": "ابكم" + "\u064e\u0651",
    "Devanagari": "कमन" + "\u093e\u0940\u094d",
    "Bengali": "কলন" + "\u09be\u09bf",
    "Tamil": "கமன" + "\u0bbe\u0bcd",
    "Ethiopic": "ሀለሐ",
    "digits": "019",
    "Arabic digits": "٠١٩",
}


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure
@given(st.data(), st.sampled_from(sorted(LETTERS)), st.sampled_from(["NFC", "NFD"]), st.sampled_from(["NFC", "NFD"]))
def test_in_scripts_with_spaces_a_word_is_found_as_often_as_it_stands_alone(data, script, form, other):
    """Against the words of the text, cut at its spaces."""
    word = st.text(LETTERS[script], min_size=1, max_size=3).filter(lambda text: unicodedata.category(text[0])[0] != "M")
    text = data.draw(st.lists(word, min_size=1, max_size=6))
    answer = data.draw(st.sampled_from(text) | word)
    same = [unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", answer) for one in text]
    found = occurrences((unicodedata.normalize(form, answer),), unicodedata.normalize(other, " ".join(text)))
    assert len(found) == sum(same)


def test_words_keep_their_marks_and_are_characters_where_none_are_spaced():
    assert words("São Paulo's 3.5") == ["São", "Paulo", "s", "3", "5"]
    assert words("नई दिल्ली, שלֹום") == ["नई", "दिल्ली", "שלֹום"]
    assert words("東京は") == ["東", "京", "は"]
    decomposed = unicodedata.normalize("NFD", "Zürich 가")
    assert words(decomposed) == decomposed.split()
