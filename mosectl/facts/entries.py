"""One fact of a facts file, whatever its data set calls the fields: texts checked, probes found, nothing dropped unsaid."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mosectl.errors import FactsError
from mosectl.facts.groups import NEIGHBOURS, canonical
from mosectl.facts.messages import MAX_LINE, WHOLE, bad, empty, kind, meant, rename, short
from mosectl.facts.probe import Probe
from mosectl.facts.shapes import KNOWN, Chosen, names_of, nearest_shape
from mosectl.facts.shapes.own import OTHERS, OWN, PROBES, REQUIRED
from mosectl.facts.shapes.shape import Part, Shape
from mosectl.facts.words import last_word
from mosectl.text.shown import word

PROMPT = ("prompt", "question", "New Question", "loc")  # within a probe
GROUP = "group"  # a probe may say which group it stands in
ANSWER = ("ground_truth", "answer", "answers", "target", "New Answer", "loc_ans")
ALIASES = "aliases"  # a probe may name other right answers
NEEDS = "needs"  # and its conditions: prompts with answers
_OF_PROBES = {*PROMPT, *ANSWER, *OTHERS, GROUP, ALIASES, NEEDS}
MOST_UNKNOWN = 100  # names remembered of one row, and of one file
MAX_NAME = 5_000  # characters of a subject or target
NO_SUBJECT = (
    "an entry names no subject: its whole prompt is read as the subject, and edited at its last token",
    'add "subject": "…", or say which field has it: --read subject=FIELD',
)
NO_ANSWER = ("a portability prompt has no answer in the file", "it is not asked")
NO_CONDITION = ("a condition has no answer in the file", "it counts as met")
_BREAK = re.compile("[\n\r\v\f\x85\u2028\u2029]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")  # and half characters


class Entry:
    """A fact under construction; messages name the fields as the file does.

    ``unknown`` are names of fields that are not used, ``notes`` (what, what happens) is said of what is used all the same,
    ``remarks`` are such notes of what a data set has in many entries: each is said once a file.
    """

    def __init__(self, part: Part, shape: Shape, where: str, chosen: Chosen) -> None:
        self.where, self.shape, self.chosen, self.asked = where, shape, chosen, part.asked
        self.given, self.paths = dict(part.given), dict(part.called)
        self.names = names_of(shape, chosen)
        self.room = 20 * MAX_LINE  # characters of all prompts
        self.unknown: dict[str, None] = {}
        self.notes: list[tuple[str, str]] = []
        self.remarks: list[tuple[str, str]] = []
        for place, fields in part.objects:
            self._not_used(fields, (KNOWN, shape.fields, *chosen.values()), place)
        for ours in REQUIRED:  # so may the user call them, too
            if ours not in self.given and (name := self._first(ours)) in self.given:
                self.given[ours], self.paths[ours] = self.given[name], self.paths.get(name, name)
        for field in ("target_new", "ground_truth"):
            for name in self.names[field]:
                if isinstance(value := self.given.get(name), Mapping):  # as in ROME's and MEMIT's requests
                    self.given[name] = value.get("str")
                    self.paths[name] = self.paths.get(name, name) + ".str"

    def _not_used(self, fields: Mapping[Any, Any], known: Sequence[Collection[str]], within: str) -> None:
        for name in map(str, fields):
            used = any(name in names for names in known)
            if not used and not empty(fields.get(name)) and len(self.unknown) < MOST_UNKNOWN:
                self.unknown[f"{within}{name[:60]}"] = None

    def _first(self, field: str) -> str:
        """The first of a field's names that is filled, or is there, or is the usual one."""
        names = self.names.get(field, (field,))
        if len(names) == 1:
            return names[0]
        filled = (n for n in names if not empty(self.given.get(n)))
        return next(filled, next((n for n in names if n in self.given), names[0]))

    def name(self, field: str) -> str:
        """What a field is called here, quoted."""
        name = self._first(field)
        return f"'{self.paths.get(name, name)}'"

    def origins(self) -> str:
        """Which fields of the file are read for ours, where they are called otherwise."""
        filled = (f for f in ("ground_truth", "rephrase_prompts") if not empty(self.given.get(self._first(f))))
        fields = (*REQUIRED, *filled)
        return ", ".join(f"{field} from {name}" for field in fields if (name := self.name(field)) != f"'{field}'")

    def filled(self, field: str) -> dict[str, Any]:
        """All that is given for a field, by the name it is given under; said if two of them differ."""
        found = {n: self.given[n] for n in self.names[field] if not empty(self.given.get(n))}
        self._compare(found, field == "rephrase_prompts")
        return found

    def _compare(self, found: Mapping[str, Any], all_used: bool = False, of: str = "") -> None:
        first, *others = found or [""]
        for other in (o for o in others if o not in self.shape.guesses):
            if sorted(map(str, _leaves(found[first]))) != sorted(map(str, _leaves(found[other]))):
                used = "all of it is used" if all_used else f"'{first}' is used"
                self.notes.append((f"'{first}' and '{other}'{of} differ", used))

    # Texts.

    def text(self, field: str, *, lines: bool = False) -> str:
        """A required field."""
        self.filled(field)
        name = self._first(field)
        if name not in self.given or (self.given[name] is None and name in self.paths):
            raise self._missing(field)
        return self.checked(self.given[name], self.name(field), lines=lines)

    def _missing(self, field: str) -> FactsError:
        name, given = self.name(field), list(self.given)
        near = nearest_shape(given) if self.shape is OWN and field not in self.chosen else None
        if near:
            shape, lacking = near
            also = " and ".join(f"'{n}'" for n in lacking)
            ours = [f"--read {f}={word(str(n)) if (n := meant(f, given)) else '…'}" for f in REQUIRED if f not in given]
            what = f"of no known shape: the nearest, {shape.name}, has {also} besides"
            return bad(self.where, what, f"add {also}, or say what the fields are called: {' '.join(ours)}")
        fix = f'add {name}: "…"'.replace("'", '"')
        if field == "target_new" and "attribute" in self.given:
            fix = "the file tells what is known ('attribute'), not what shall be: " + fix
        if self.shape is OWN:
            fix = rename(field, given, fix)
        return bad(self.where, f"{name} is missing", f"{fix}, or {WHOLE}" if field == "subject" else fix)

    def subject(self, prompt: str) -> str:
        """What the fact is about; of several fields that the user named the first that stands in the prompt."""
        names = [n for n in self.names["subject"] if not empty(self.given.get(n))]
        if names and "subject" not in self.chosen and self.shape.whole_prompt:
            self.remarks += [NO_SUBJECT] * (self.paths.get(names[0], names[0]) in self.names["prompt"])
            return self.checked(self.given[names[0]], self.name("subject")).strip()
        if "subject" not in self.chosen or not names:
            return self.text("subject")
        found = [self.checked(self.given[n], f"'{self.paths.get(n, n)}'").strip() for n in names]
        at = next((i for i, s in enumerate(found) if "{}" in prompt or last_word(prompt, s) >= 0), 0)
        if at:
            self.notes.append(
                (f"subject '{short(found[0])}' is not in the prompt", f"'{names[at]}' is read as the subject")
            )
        return found[at]

    def target(self) -> tuple[str, tuple[str, ...]]:
        """The new object, and its aliases; of a list that the user named the first is the object, the others its aliases."""
        name, others = self._first("target_new"), list[str]()
        value = self.given.get(name)
        if isinstance(value, list) and "target_new" in self.chosen:
            value, *others = self.answers(value, self.name("target_new")) or [""]
            self.given[name] = value
        target = self.text("target_new")
        for given in self.filled("target_aliases").values():
            others += self.answers(given, self.name("target_aliases"))
        return target, tuple(alias for alias in dict.fromkeys(others) if alias != target)

    def checked(self, value: Any, name: str, *, lines: bool = True) -> str:
        """``value`` as clean text; ``lines`` allows line breaks and tabs."""
        if not isinstance(value, str):
            fix = f'write it as "{value}"' if type(value) is int else 'write it as "…"'
            raise bad(self.where, f"{name} is {kind(value)}, not text", fix)
        if all(c.isspace() or unicodedata.category(c) == "Cf" for c in value):
            raise bad(self.where, f"{name} is empty", "fill it in")
        if not lines and (_BREAK.search(value) or "\t" in value):
            raise bad(self.where, f"{name} holds a line break or tab", "write it on one line")
        if found := _CONTROL.search(value):
            what = f"{name} holds the control character U+{ord(found[0]):04X} at {found.start()}"
            raise bad(self.where, what, "remove it")
        if len(value) >= (most := MAX_LINE if lines else MAX_NAME):
            raise bad(self.where, f"{name} has {len(value):,} characters", f"keep it under {most:,}")
        return value if lines else value.strip()

    def filled_in(self, text: str, subject: str) -> str:
        """``text`` with the subject in place of "{}" and without spaces at its end."""
        size = len(text) + text.count("{}") * len(subject)
        self.room -= size
        if size >= MAX_LINE or self.room < 0:
            raise bad(self.where, "too long with the subject in place of '{}'", f"keep a prompt under {MAX_LINE:,}")
        return text.replace("{}", subject).rstrip(" ")

    def rephrasings(self) -> list[str]:
        """Texts under all names; what stands under two of them is taken once, empty ones count as not given."""
        out: list[str] = []
        for name, value in self.filled("rephrase_prompts").items():
            values = [value] if isinstance(value, str) else value
            if not isinstance(values, list | tuple) or not all(isinstance(v, str) for v in values):
                raise bad(self.where, f"'{name}' is not text or a list of texts", 'write ["…", "…"]')
            before = set(out)
            out += [self.checked(v, f"'{name}'") for v in values if v.strip() and v not in before]
        return out

    def truths(self) -> list[str]:
        """The old answers."""
        found = self.filled("ground_truth")
        return self.answers(next(iter(found.values()), None), self.name("ground_truth"))

    def answers(self, value: Any, name: str) -> list[str]:
        """The accepted answers, the first being the usual one: text, or a list, or EasyEdit's list of lists."""
        out: list[str] = []
        for v in value if isinstance(value, list | tuple) else [value]:
            for text in v if isinstance(v, list | tuple) else [v]:
                if text is not None and not (isinstance(text, str) and not text.strip()):
                    out.append(self.checked(text, name).strip())
        return out

    def flag(self, field: str) -> bool | None:
        """true or false, or the same as text (in CSV); None where it is not given."""
        value = self.given.get(field)
        if value is None or value == "":
            return None
        if isinstance(value, str):
            value = {"true": True, "false": False}.get(value.strip().lower(), value)
        if not isinstance(value, bool):
            raise bad(
                self.where, f"'{field}' is {kind(value)}, not true or false", "write true or false, or leave it out"
            )
        return value

    # Probes.

    def probes(self, field: str) -> list[Probe]:
        """Prompts with known answers and groups, from all places; what stands in two of them is taken once."""
        out: list[Probe] = []
        for name, answers in PROBES[field].items():
            value = self.given.get(name)
            if empty(value):
                continue
            if answers and not (isinstance(value, list) and any(isinstance(v, Mapping) for v in value)):
                known = self.filled(answers) if answers in self.names else {answers: self.given.get(answers)}
                if name == "loc" and isinstance(value, str):
                    value = value.removeprefix("nq question: ")
                value = {"prompt": value, "ground_truth": next(iter(known.values()), None)}
            before = {(probe.prompt, probe.answer) for probe in out}
            out += [probe for probe in self._probes(value, name) if (probe.prompt, probe.answer) not in before]
        for a in self.asked:
            if a.metric == field and not empty(a.prompt):
                probe = self._probe(a.prompt, a.answers, self._group(a.group, a.field), a.field)
                needs = [self._probe(n.prompt, n.answers, "", n.field) for n in a.needs]
                self.remarks += [NO_CONDITION for n in needs if not n.answer]
                out.append(replace(probe, needs=tuple(n for n in needs if n.answer)))
        return out

    def _probes(self, value: Any, name: str) -> Iterator[Probe]:
        """A list of objects or texts, one object, or EasyEdit's named groups of them."""
        for group, entry in _ungroup(value):
            if isinstance(entry, str):
                entry = {"prompt": entry}
            if not isinstance(entry, Mapping) or not any(n in entry for n in PROMPT):
                fix = 'write {"prompt": "…", "ground_truth": "…"}'
                raise bad(self.where, f"an entry of '{name}' has no prompt", fix)
            self._not_used(entry, (_OF_PROBES,), f"{name}.")
            self._compare({n: entry[n] for n in ANSWER if not empty(entry.get(n))}, of=f" of '{name}'")
            answers = next((entry[n] for n in ANSWER if not empty(entry.get(n))), None)
            prompts = max((entry[n] for n in PROMPT if n in entry), key=lambda p: not empty(p))  # the first filled one
            of = self._group(entry.get(GROUP) or group or (NEIGHBOURS if name == "neighborhood_prompts" else ""), name)
            needs = () if empty(entry.get(NEEDS)) else self._needs(entry[NEEDS], f"{name}.{NEEDS}")
            for p, a in self._paired(prompts, answers, name):
                if p != "" or name.endswith(f".{NEEDS}"):
                    yield replace(self._probe(p, a, of, name, entry.get(ALIASES)), needs=needs)

    def _needs(self, value: Any, name: str) -> tuple[Probe, ...]:
        """A probe's conditions, which are written as probes are."""
        found = tuple(self._probes(value, name))
        if any(n.answer is None for n in found):
            fix = 'add "ground_truth": "…", what the model has to answer before the edit'
            raise bad(self.where, f"a prompt of '{name}' has no answer", fix)
        if any(n.needs for n in found):
            raise bad(self.where, f"a prompt of '{name}' has conditions itself", "give them all to the probe")
        return found

    def _probe(self, prompt: Any, answers: Any, group: str, name: str, aliases: Any = None) -> Probe:
        """One prompt; of its answers the first is the usual one, the others are right, too."""
        told = f"an answer of '{name}'"
        known = list(dict.fromkeys((*self.answers(answers, told), *self.answers(aliases, told))))
        text = self.checked(prompt, f"a prompt of '{name}'").rstrip(" ")
        return Probe(text, known[0] if known else None, group, tuple(known[1:]))

    def _group(self, group: Any, name: str) -> str:
        return canonical(self.checked(group, f"the name of a group of '{name}'", lines=False)) if group != "" else ""

    def _paired(self, prompts: Any, answers: Any, name: str) -> Iterator[tuple[Any, Any]]:
        """One prompt or several, each with its answer."""
        if not isinstance(prompts, list | tuple):
            prompts = [prompts]
        if len(prompts) == 1 and not (isinstance(answers, list | tuple) and len(answers) == 1):
            answers = [answers]  # several answers to one prompt are alternatives
        elif not isinstance(answers, list | tuple):
            answers = [answers] * len(prompts)
        if len(answers) != len(prompts):
            what = f"'{name}' has {len(prompts)} prompts and {len(answers)} answers"
            raise bad(self.where, what, "give each prompt one answer")
        return zip(prompts, answers, strict=True)


def _ungroup(value: Any) -> list[tuple[str, Any]]:
    """Entries, each with the name of the group it stands in ("": none)."""
    grouped = isinstance(value, Mapping) and value and not any(n in value for n in PROMPT)
    if grouped and all(isinstance(g, Mapping | list) or g is None for g in value.values()):
        return [(str(n), e) for n, g in value.items() for e in (g if isinstance(g, list) else [g]) if e]
    return [("", entry) for entry in (value if isinstance(value, list | tuple) else [value])]


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for v in value:
            yield from _leaves(v)
    elif not empty(value):
        yield value.strip() if isinstance(value, str) else value
