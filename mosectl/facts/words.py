"""Where words begin and end, and what stands between two texts, in scripts with spaces between words and without."""

from __future__ import annotations

import re
import unicodedata

# Thai, Lao, Tibetan, Burmese; Khmer; Tai, Balinese, Javanese; Chinese and Japanese with their signs and wide forms; Yi.
_UNSPACED = (
    "\u0e00-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\u1b00-\u1b7f\ua980-\ua9ff\uaa60-\uaadf\u2e80-\u312f\u31a0-\u31ff"
    "\u3220-\u4dbf\u4e00-\ua4cf\uf900-\ufaff\ufe30-\ufe4f\uff01-\uff9f\U0001aff0-\U0001b16f\U00020000-\U0003ffff"
)
_NO_SPACES = re.compile(f"[{_UNSPACED}]")
# In Korean there are spaces, but particles follow a name directly.
_RUNS_ON = re.compile(f"[{_UNSPACED}\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7ff]")
_QUOTES = "\"'‘’“”«»‹›"


def within_word(before: str, after: str) -> bool:
    """Do these two neighbouring characters belong to one word? Not in scripts that run on without spaces."""
    if not before or not after or not _in_word(before):
        return False
    if unicodedata.category(after)[0] == "M":
        return True  # an accent of the letter before it
    return _in_word(after) and not _RUNS_ON.match(before) and not _RUNS_ON.match(after)


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_" or unicodedata.category(character)[0] == "M"


def is_word(text: str, start: int, end: int) -> bool:
    """Do no words run across the two ends of text[start:end]?"""
    left = within_word(text[start - 1 : start] if start else "", text[start : start + 1])
    return not left and not within_word(text[end - 1 : end], text[end : end + 1])


def last_word(text: str, word: str) -> int:
    """Where ``word`` stands last on the borders of words; if only inside others, last among those; −1 if nowhere."""
    at = inside = text.rfind(word) if word else -1
    while at >= 0 and not is_word(text, at, at + len(word)):
        at = text.rfind(word, 0, at + len(word) - 1)
    return at if at >= 0 else inside


def surrounding(text: str, start: int, end: int) -> str:
    """text[start:end] with what else belongs to its words."""
    while start and within_word(text[start - 1], text[start]):
        start -= 1
    while end < len(text) and within_word(text[end - 1], text[end]):
        end += 1
    return text[start:end]


def gap(prompt: str, target: str, space: bool | None = None) -> str:
    """What stands between a prompt and its target: a space or nothing.

    There is none behind white space, an opening bracket or quotation mark, or in a script without spaces between words.
    A target of another script stands behind such a script as that stands behind what is before it.

    Args:
        space: decides, where it is given.
    """
    if not prompt or prompt[-1].isspace() or target[:1].isspace() or space is False:
        return ""
    if space is None and (_opens(prompt) or _runs_on(prompt, target)):
        return ""
    return " "


def join(prompt: str, target: str, space: bool | None = None) -> str:
    """Prompt and target with :func:`gap` between them."""
    return prompt + gap(prompt, target, space) + target


def _opens(prompt: str) -> bool:
    """Does the prompt end with an opening bracket or quotation mark? Some marks open or close by where they stand."""
    last = prompt[-1]
    if last in _QUOTES:
        before = prompt[-2:-1]
        return (
            not before or before.isspace() or (before not in _QUOTES and unicodedata.category(before) in ("Ps", "Pd"))
        )
    return unicodedata.category(last) == "Ps" or last in "¿¡"


def _runs_on(prompt: str, target: str) -> bool:
    start = len(prompt)
    while start and unicodedata.category(prompt[start - 1])[0] == "P" and not _NO_SPACES.match(prompt[start - 1]):
        start -= 1  # “…: and the like belong to no script
    if not start or not _NO_SPACES.match(prompt[start - 1]):
        return False
    if _NO_SPACES.match(target[:1]):
        return True
    while start and not prompt[start - 1].isspace() and not _other_letter(prompt[start - 1]):
        start -= 1
    return not start or not prompt[start - 1].isspace()


def _other_letter(character: str) -> bool:
    return character.isalpha() and not _NO_SPACES.match(character)
