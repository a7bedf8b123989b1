"""Texts of selected tokens: every character once, and every omission is seen."""

from flowgraph.text.quoting import quote, shortened


def test_a_character_of_several_tokens_is_quoted_once():
    texts = ["汤", "汤", "汤", "姆", "姆", "有", "3"]
    spans = [(0, 1), (0, 1), (0, 1), (1, 2), (1, 2), (2, 3), (3, 4)]
    assert quote(range(7), texts, spans, "汤姆有3") == "汤姆有3"
    assert quote([1, 2, 3], texts, spans, "汤姆有3") == "汤姆"


def test_blanks_between_tokens_are_kept_and_other_characters_are_an_ellipsis():
    text = "7 apples and 12"
    spans = [(0, 1), (2, 8), (9, 12), (13, 15)]
    assert quote([0, 1], ["7", "apples", "and", "12"], spans, text) == "7 apples"
    assert quote([3, 0], ["7", "apples", "and", "12"], spans, text) == "7 … 12"
    assert quote([], ["7"], [(0, 1)], "7") == ""


def test_without_a_text_the_tokens_are_joined():
    assert quote([0, 2], ["3", " +", " 4"], [(0, 0)] * 3, "") == "3 4"


def test_a_shortened_text_ends_in_an_ellipsis_and_is_never_longer():
    assert shortened("seven", 5) == "seven"
    assert shortened("seven apples", 6) == "seven…"
