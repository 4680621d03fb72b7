"""What a reader of a shape says: what the shape's fields are called, and the facts that an entry of it holds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mosectl.facts.messages import bad, kind

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Asked:
    """A prompt of an entry that is asked before and after, with its answers, as the file has them: not checked yet."""

    metric: str  # "locality" or "portability"
    field: str  # where it stands in the entry, for messages
    prompt: Any
    answers: Any = None  # one, or several that are all right, the usual one first
    group: str = ""
    needs: tuple[Asked, ...] = ()  # its conditions; one without an answer counts as met


@dataclass(frozen=True)
class Part:
    """One fact of an entry, as the file has it: not checked yet."""

    given: Row  # values by name, the shape's or mosectl's own
    called: Mapping[str, str] = field(default_factory=dict)  # where a name stands in the entry, if not at its top
    asked: tuple[Asked, ...] = ()
    objects: tuple[tuple[str, Row], ...] = ()  # within the entry, by their place: their unknown fields are told
    remarks: tuple[tuple[str, str], ...] = ()  # what was read between the lines, and how to avoid it: said once a file


def whole(row: Row, where: str) -> Iterator[Part]:
    """An entry that is one fact, all of it at its top."""
    yield Part(row, objects=(("", row),))


@dataclass(frozen=True)
class Shape:
    """How a data set writes facts. A field that it does not name is called as in mosectl's own shape."""

    name: str
    source: str  # where it is documented
    tells: tuple[tuple[str, ...], ...]  # fields by which it is known: one of these groups, all of it
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of our fields; the first that is filled counts
    reads: Collection[str] = ()  # fields that ``parts`` reads besides
    others: Collection[str] = ()  # what it carries besides; mosectl has no use for it
    guesses: Collection[str] = ()  # names of old answers that need not be right: where they differ nothing is said
    parts: Callable[[Row, str], Iterator[Part]] = whole  # of an entry and its place
    cases: bool = False  # an entry is a case of several edits, and cases share edits
    whole_prompt: bool = False  # it names no subject: where an entry does not either, the whole prompt is the subject

    def fits(self, row: Row) -> bool:
        """Is an entry of this shape?"""
        return any(group <= row.keys() for group in self._telling)

    @cached_property
    def _telling(self) -> tuple[frozenset[str], ...]:
        return tuple(map(frozenset, self.tells))

    @cached_property
    def fields(self) -> frozenset[str]:
        """All that an entry of it may hold and that is not mosectl's own."""
        named = (name for names in self.names.values() for name in names)
        return frozenset((*named, *self.reads, *self.others, *(name for group in self.tells for name in group)))


def an_object(value: Any, place: str, shape: str, where: str) -> Row:
    """A value that has to be a JSON object.

    Raises:
        FactsError: it is something else.
    """
    if not isinstance(value, Mapping):
        raise bad(where, f"'{place}' is {kind(value)}, not an object", f"see {shape}'s shape")
    return value


def objects(value: Any, place: str, shape: str, where: str) -> list[tuple[str, Row]]:
    """The objects of a list, each with its place; none where it is missing.

    Raises:
        FactsError: it is no list, or an entry of it is no object.
    """
    if value is not None and not isinstance(value, list):
        raise bad(where, f"'{place}' is {kind(value)}, not a list", f"see {shape}'s shape")
    return [(f"{place}[{i}]", an_object(v, f"{place}[{i}]", shape, where)) for i, v in enumerate(value or ())]
