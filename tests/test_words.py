"""Where words begin and end, and what stands between two texts, in scripts with and without spaces."""

from __future__ import annotations

import unicodedata

import pytest

from mosectl.facts.words import gap, is_word, join, last_word, surrounding, within_word
from mosectl.model.generation import says


@pytest.mark.parametrize(
    ("prompt", "target", "joined"),
    [
        ("The capital is", "Paris", "The capital is Paris"),
        ("中国的首都是", "上海", "中国的首都是上海"),
        ("日本の首都は", "東京", "日本の首都は東京"),
        ("เมืองหลวงคือ", "กรุงเทพ", "เมืองหลวงคือกรุงเทพ"),
        ("中国的首都是：", "上海", "中国的首都是：上海"),
        ("中国的首都是:", "上海", "中国的首都是:上海"),
        ("首都は「", "東京", "首都は「東京"),
        ("他说“", "你好", "他说“你好"),
        ("中国的首都是", "Shanghai", "中国的首都是Shanghai"),
        ("iPhone是由", "Apple", "iPhone是由Apple"),
        ("iPhone 是由", "Apple", "iPhone 是由 Apple"),  # written with spaces between scripts
        ("He lives in 東京", "now", "He lives in 東京 now"),
        ("The capital of China is", "北京", "The capital of China is 北京"),
        ("대한민국의 수도는", "서울", "대한민국의 수도는 서울"),  # Korean has spaces
        ("Q: where?\nA:\n", "Paris", "Q: where?\nA:\nParis"),
        ("a\t", "b", "a\tb"),
        ("a ", "b", "a b"),
        ("a", " b", "a b"),
        ("", "b", "b"),
        ('He said: "', "Hi", 'He said: "Hi'),
        ('The "thing"', "is", 'The "thing" is'),
        ("('", "x", "('x"),
        ("the cats'", "paws", "the cats' paws"),
        ("Er sagte: „", "Ja", "Er sagte: „Ja"),
        ("Er sagte: „Ja“", "und", "Er sagte: „Ja“ und"),
        ("Il dit «", "oui", "Il dit «oui"),
        ("f(", "x", "f(x"),
        ("[", "1", "[1"),
        ("f(x)", "is", "f(x) is"),
        ("¿", "Quién", "¿Quién"),
        ("It is:", "red", "It is: red"),
        ("...", "x", "... x"),
        ("I like 🦊", "foxes", "I like 🦊 foxes"),
    ],
)
def test_what_stands_between(prompt: str, target: str, joined: str) -> None:
    assert join(prompt, target) == joined


def test_a_given_space_decides() -> None:
    assert (gap("中国的首都是", "上海", True), gap("The capital is", "Paris", False)) == (" ", "")
    assert gap("(", "x", True) == " " and gap("a ", "b", True) == "", "but there are never two"


@pytest.mark.parametrize(
    ("text", "word", "at"),
    [
        ("Niger and Nigeria", "Niger", 0),
        ("Nigeria, Niger, Nigeria", "Niger", 9),
        ("Nigeria", "Niger", 0),  # only within others: the last of these
        ("xJava Javax", "Java", 6),
        ("Java_x Java-x", "Java", 7),
        ("Frédéric Fr", "Fr", 9),
        ("Fre\u0301de\u0301ric", "Fre", 0),
        ("中国人中国", "中国", 3),
        ("서울은 크다", "서울", 0),
        ("aaaa", "aa", 2),
        ("Ava's", "'s", 3),
        ("C++ and C", "C", 8),
        ("x", "y", -1),
        ("x", "", -1),
    ],
)
def test_last_word(text: str, word: str, at: int) -> None:
    assert last_word(text, word) == at


def test_words_and_what_surrounds_them() -> None:
    assert is_word("Ava is", 0, 3) and not is_word("Avaland", 0, 3) and not is_word("xAva", 1, 4)
    assert surrounding("in JavaScript, yes", 3, 7) == "JavaScript" and surrounding("Ava", 0, 3) == "Ava"
    assert not is_word("Fre\u0301", 0, 3), "an accent belongs to its letter"
    assert within_word("e", "\u0301") and not within_word("❤", "\ufe0f") and not within_word("", "a")


def test_a_long_text_takes_no_time() -> None:
    assert last_word("a" * 100_000, "a" * 5_000) == 95_000


@pytest.mark.parametrize(
    ("text", "expected", "right"),
    [
        (" Paris.", "Paris", True),
        ("Paris", "Paris", True),
        ("Parisian", "Paris", False),
        ("Frédéric", "Fr", False),
        (unicodedata.normalize("NFD", "Frédéric"), "Fre", False),
        ("Fr. Smith", "Fr", True),
        ("Müllerstraße", "Müller", False),
        ("Ивановна", "Иван", False),
        ("Иван Петров", "Иван", True),
        ("1918", "19", False),
        ("19,5", "19", True),
        ("上海是一座城市", "上海", True),  # without spaces nobody can tell
        ("กรุงเทพมหานคร", "กรุงเทพ", True),
        ("서울이다", "서울", True),  # a particle
        ("上海A", "上海", True),
        ("U.S.A", "U.S.", True),
        ("foo_bar", "foo", False),
        ("paris", "Paris", False),
        ("東京都", "京", False),
    ],
)
def test_says(text: str, expected: str, right: bool) -> None:
    assert says(text, expected) is right
