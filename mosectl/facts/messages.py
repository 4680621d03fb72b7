"""What is wrong with an entry of a facts file, in words, and what to do about it."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from mosectl.errors import FactsError
from mosectl.text.shown import word

MAX_LINE = 100_000  # characters; no fact is that long, a wrong file often is
SAMPLE = 'give lines like {"prompt": …, "subject": …, "target_new": …}'
WHOLE = "read the whole prompt as the subject: --read subject=prompt"
OTHER_NAMES = {  # what people write for a required field, where the spelling alone does not tell
    "prompt": ("question", "text", "query"),
    "subject": ("entity", "name"),
    "target_new": ("target", "object", "answer", "new_answer", "completion"),
}
_NOT_MEANT = ("rephrase_prompt", "rephrase_prompts", "locality_prompt", "portability_prompt", "target_true")


def bad(where: object, what: str, fix: str) -> FactsError:
    """The error to raise, or to hand on."""
    return FactsError(what, where=str(where), fix=fix)


def rename(field: str, given: Sequence[object], otherwise: str) -> str:
    """Did-you-mean for a missing field."""
    found = meant(field, given)
    if not found:
        return otherwise
    return f"did you mean '{field}' where it says '{found}'? It is read so with --read {word(f'{field}={found}')}"


def meant(field: str, given: Sequence[object]) -> object:
    """The name among those given that may stand for a missing field; "" if there is none."""
    names = {str(g).strip().lower(): g for g in given[:100] if g not in _NOT_MEANT and g not in OTHER_NAMES}
    near = [n for n in OTHER_NAMES.get(field, ()) if n in names]
    near += difflib.get_close_matches(field, list(names), n=1, cutoff=0.6)
    return names[near[0]] if near else ""


def empty(value: Any) -> bool:
    """Whether a field holds nothing."""
    return value is None or value in ("", [], {}, ())


def kind(value: Any) -> str:
    """The type of a JSON value, in words."""
    kinds = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number", str: "text"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)


def nearest(subject: str, prompt: str) -> str:
    """Did-you-mean: the same words in another case or Unicode form, or the most similar stretch of the prompt."""
    if len(subject) < 200 and (found := re.search(re.escape(subject), prompt, re.IGNORECASE)):
        return f"did you mean '{short(found[0])}'?"
    if unicodedata.normalize("NFKC", subject) in unicodedata.normalize("NFKC", prompt):
        return "the same letters in another Unicode form: write both in NFC"
    if " ".join(subject.split()) in " ".join(prompt.split()):
        return "the spaces differ: write the subject as the prompt does, space by space"
    words = prompt[:1000].split()  # a whole book would take minutes
    n = len(subject.split())
    stretches = [" ".join(words[i : i + n]).strip(".,;:?!'\"") for i in range(max(1, len(words) - n + 1))]
    near = difflib.get_close_matches(subject[:200], stretches, n=1, cutoff=0.6)
    return f"did you mean '{short(near[0])}'?" if near else "write the subject as the prompt spells it"


def unused(
    names: Mapping[str, int], read: Sequence[str], optional: Sequence[str], shown: int = 10
) -> tuple[str, str] | None:
    """What to say of fields that are not used, with how often each is given, and what to do.

    Args:
        read: the fields that are read.
        optional: what fields may be called that may be misspelt unnoticed.
    """
    if not names:
        return None
    told = [f"'{name}'" + (f" ({n} times)" if n > 1 else "") for name, n in list(names.items())[:shown]]
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    what = f"field {told[0]} is not used" if len(names) == 1 else f"fields {', '.join(told)}{more} are not used"
    near = {name: difflib.get_close_matches(name, optional, n=1, cutoff=0.75) for name in list(names)[:shown]}
    meant = [(f" for '{n}'" if len(names) > 1 else "", found[0]) for n, found in near.items() if found]
    if not meant:
        return what, f"read are: {', '.join(read)}"
    return what, "did you mean " + ", ".join(f"'{name}'{of}" for of, name in meant) + "?"


def short(text: str) -> str:
    """A text as messages quote it: 60 characters at most."""
    return text if len(text) <= 60 else text[:57] + "…"
