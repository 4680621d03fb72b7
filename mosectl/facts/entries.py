"""One row of a facts file, whatever its data set calls the fields: texts checked, probes found, nothing dropped unsaid."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from mosectl.facts.groups import NEIGHBOURS, canonical
from mosectl.facts.readers import MAX_LINE, SAMPLE, bad, rename

# What is read: our name for a field, and what it is called. Where several are filled the first counts.
NAMES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt",),
    "subject": ("subject",),
    "target_new": ("target_new",),
    "ground_truth": ("ground_truth", "target_true", "target_old"),
    "rephrase_prompts": (
        "rephrase_prompts", "rephrase_prompt", "rephrase", "rephrases", "paraphrase_prompts", "paraphrases",
    ),
    "space_before_target": ("space_before_target",),
}  # fmt: skip
ZSRE = {
    "prompt": ("src",),
    "target_new": ("alt",),
    "ground_truth": ("answers", "pred"),
}  # these are called otherwise there
PROBES = {  # where probes stand, and where their answers stand if not with them
    "locality": {
        "locality": "", "locality_inputs": "", "locality_prompt": "locality_ground_truth",
        "neighborhood_prompts": "ground_truth", "loc": "loc_ans",  # CounterFact's neighbours share the true object
    },
    "portability": {
        "portability": "", "portability_inputs": "", "portability_prompt": "portability_ground_truth",
    },
}  # fmt: skip
PROMPT = ("prompt", "question", "New Question")  # within a probe
GROUP = "group"  # a probe may say which group it stands in
ANSWER = ("ground_truth", "answer", "answers", "target", "New Answer")
# What known data sets carry besides; mosectl has no use for it.
OTHERS = {
    *(
        "",
        "id",
        "idx",
        "index",
        "case_id",
        "known_id",
        "pararel_idx",
        "relation",
        "relation_id",
        "template",
        "prediction",
    ),
    *("attribute", "attribute_prompts", "generation_prompts", "cond", "requested_rewrite", "Recalled Relation"),
    *("Unnamed: 0", "labels", "concept", "source", "split", "category", "type"),
    *(name for names in ZSRE.values() for name in names),
}
OPTIONAL = {
    *(name for field in ("ground_truth", "rephrase_prompts", "space_before_target") for name in NAMES[field]),
    *(name for places in PROBES.values() for pair in places.items() for name in pair if name),
}
KNOWN = OPTIONAL | OTHERS | {name for names in NAMES.values() for name in names}
MOST_UNKNOWN = 100  # names remembered of one row, and of one file
MAX_NAME = 5_000  # characters of a subject or target
ProbeText = tuple[str, str | None, str]  # prompt, answer, group
_BREAK = re.compile("[\n\r\v\f\x85\u2028\u2029]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")  # and half characters


class Entry:
    """A row under construction; messages name the fields as the file does.

    ``unknown`` are names of fields that are not used, ``notes`` (what, what happens) is said of what is used all the same.
    """

    def __init__(self, row: Mapping[str, Any], where: str) -> None:
        """Raises FactsError: the row is no object, or of no known shape."""
        if not isinstance(row, Mapping):
            raise bad(where, f"is {kind(row)}, not an object", SAMPLE.replace("lines", "entries"))
        self.where, self.given, self.names, self.paths = where, dict(row), NAMES, dict[str, str]()
        self.room = 20 * MAX_LINE  # characters of all prompts
        self.unknown: dict[str, None] = {}
        self.notes: list[tuple[str, str]] = []
        self._not_used(row, KNOWN, "")
        if "requested_rewrite" in row:  # CounterFact
            rewrite = row["requested_rewrite"]
            if not isinstance(rewrite, Mapping):
                raise bad(where, f"'requested_rewrite' is {kind(rewrite)}, not an object", "see CounterFact's shape")
            self._not_used(rewrite, KNOWN, "requested_rewrite.")
            self.given |= rewrite
            self.paths = {n: f"requested_rewrite.{n}" for n in (*rewrite, "prompt", "subject", "target_new")}
        elif "src" in row and "prompt" not in row:
            self.names = NAMES | ZSRE
        for field in ("target_new", "ground_truth"):
            for name in self.names[field]:
                if isinstance(value := self.given.get(name), Mapping):  # as in ROME's and MEMIT's requests
                    self.given[name] = value.get("str")
                    self.paths[name] = self.paths.get(name, name) + ".str"

    def _not_used(self, fields: Mapping[Any, Any], known: set[str], within: str) -> None:
        for name in map(str, fields):
            if name not in known and not empty(fields.get(name)) and len(self.unknown) < MOST_UNKNOWN:
                self.unknown[f"{within}{name[:60]}"] = None

    def name(self, field: str) -> str:
        """What a field is called here, quoted."""
        names = self.names.get(field, (field,))
        name = next((n for n in names if n in self.given), names[0])
        return f"'{self.paths.get(name, name)}'"

    def filled(self, field: str) -> dict[str, Any]:
        """All that is given for a field, by the name it is given under; said if two of them differ."""
        found = {n: self.given[n] for n in self.names[field] if not empty(self.given.get(n))}
        self._compare(found, field == "rephrase_prompts")
        return found

    def _compare(self, found: Mapping[str, Any], all_used: bool = False, of: str = "") -> None:
        first, *others = found or [""]
        if self.names is not NAMES and "pred" in others:
            return  # what the model of zsRE said, which need not be an answer
        for other in others:
            if sorted(map(str, _leaves(found[first]))) != sorted(map(str, _leaves(found[other]))):
                used = "all of it is used" if all_used else f"'{first}' is used"
                self.notes.append((f"'{first}' and '{other}'{of} differ", used))

    # Texts.

    def text(self, field: str, *, lines: bool = False) -> str:
        """A required field."""
        name = self.name(field)
        value = next((self.given[n] for n in self.names[field] if n in self.given), None)
        if value is None and (name != f"'{field}'" or field not in self.given):
            add = f'add {name}: "…"'.replace("'", '"')
            if field == "target_new" and "attribute" in self.given:
                add = "the file tells what is known ('attribute'), not what shall be: " + add
            raise bad(self.where, f"{name} is missing", rename(field, list(self.given), add))
        return self.checked(value, name, lines=lines)

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

    def probes(self, field: str) -> list[ProbeText]:
        """Prompts with known answers and groups, from all places; what stands in two of them is taken once."""
        out: list[ProbeText] = []
        for name, answers in PROBES[field].items():
            value = self.given.get(name)
            if empty(value):
                continue
            if answers and not (isinstance(value, list) and any(isinstance(v, Mapping) for v in value)):
                known = self.filled(answers) if answers in self.names else {answers: self.given.get(answers)}
                if name == "loc" and isinstance(value, str):
                    value = value.removeprefix("nq question: ")
                value = {"prompt": value, "ground_truth": next(iter(known.values()), None)}
            before = {probe[:2] for probe in out}
            out += [probe for probe in self._probes(value, name) if probe[:2] not in before]
        return out

    def _probes(self, value: Any, name: str) -> Iterator[ProbeText]:
        """A list of objects or texts, one object, or EasyEdit's named groups of them."""
        for group, entry in _ungroup(value):
            if isinstance(entry, str):
                entry = {"prompt": entry}
            if not isinstance(entry, Mapping) or not any(n in entry for n in PROMPT):
                fix = 'write {"prompt": "…", "ground_truth": "…"}'
                raise bad(self.where, f"an entry of '{name}' has no prompt", fix)
            self._not_used(entry, {*PROMPT, *ANSWER, *OTHERS, GROUP}, f"{name}.")
            self._compare({n: entry[n] for n in ANSWER if not empty(entry.get(n))}, of=f" of '{name}'")
            answers = next((entry[n] for n in ANSWER if not empty(entry.get(n))), None)
            prompts = max((entry[n] for n in PROMPT if n in entry), key=lambda p: not empty(p))  # the first filled one
            of = self._group(entry.get(GROUP) or group or (NEIGHBOURS if name == "neighborhood_prompts" else ""), name)
            for p, a in self._paired(prompts, answers, name):
                known = self.answers(a, f"an answer of '{name}'")
                if p != "":
                    yield self.checked(p, f"a prompt of '{name}'").rstrip(" "), known[0] if known else None, of

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


def unused(names: Mapping[str, int], shown: int = 10) -> tuple[str, str] | None:
    """What to say of fields that are not used, with how often each is given, and what to do."""
    if not names:
        return None
    told = [f"'{name}'" + (f" ({n} times)" if n > 1 else "") for name, n in list(names.items())[:shown]]
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    what = f"field {told[0]} is not used" if len(names) == 1 else f"fields {', '.join(told)}{more} are not used"
    near = {name: difflib.get_close_matches(name, OPTIONAL, n=1, cutoff=0.75) for name in list(names)[:shown]}
    meant = [(f" for '{n}'" if len(names) > 1 else "", found[0]) for n, found in near.items() if found]
    if not meant:
        return what, f"read are: {', '.join((*NAMES, *PROBES))}"
    return what, "did you mean " + ", ".join(f"'{name}'{of}" for of, name in meant) + "?"


def short(text: str) -> str:
    """A text as messages quote it: 60 characters at most."""
    return text if len(text) <= 60 else text[:57] + "…"
