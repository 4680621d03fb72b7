"""RippleEdits: an edit as a whole sentence, with six groups of test queries.

https://github.com/edenbiran/RippleEdits (README; to_dict in src/fact.py, src/query.py, src/testcase.py). Locality:
Relation_Specificity (Relation_Specifity in the README) and Forgetfulness; portability: Logical_Generalization,
Subject_Aliasing, Compositionality_I and _II. All answers of a query and their aliases are right; aliases of one letter are
not, as there. A test's `condition_queries` are its queries' conditions; one without an answer counts as met, as there.
Otherwise than there any answer is enough, of queries with several, too, and the queries of a test count one by one, whatever
`test_condition` says: of the tests that src/build_*.py makes, all "OR", only two about new siblings hold more than one.

`edit` names its subject and objects by their ids in Wikidata only, so they are read off the rest of the entry. The target is
(1) `target_new`, if somebody added it to `edit`, (2) what a query answers with `target_id`, (3) what `original_fact` says
otherwise, (4) what follows the only "is", "are", "by" or "follows". The subject is (1) `subject`, (2) what a query answers
with `subject_id`, (3) the words that the edit shares with the queries about `subject_id`, without those of relations, which
is said. Where none of it tells, the entry is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence, Set
from dataclasses import replace

from mosectl.facts.messages import bad, empty, short
from mosectl.facts.shapes.shape import Asked, Part, Row, Shape, an_object, objects
from mosectl.facts.words import last_word

NAME = "RippleEdits"
GROUPS = {
    **dict.fromkeys(("Relation_Specificity", "Relation_Specifity", "Forgetfulness"), "locality"),
    **dict.fromkeys(
        ("Logical_Generalization", "Subject_Aliasing", "Compositionality_I", "Compositionality_II"), "portability"
    ),
}
_VERBS = ("is", "are", "by", "follows")  # what every sentence has before its object
# What sentences have before their subject, besides words of the relation, and behind it.
_BEFORE = {
    "the", "name", "names", "of", "which", "in", "has", "is", "number", "gender", "tongue", "award", "children",
}  # fmt: skip
_BEHIND = {
    *_VERBS, "has", "won", "plays", "in", "associated", "with", "a", "member", "of", "part", "the", "capital", "followed",
    "still", "alive",
}  # fmt: skip
_WORDS = 200  # of a sentence that are compared
_ADD = 'add "{}": "…" to \'edit\''
REMARK = (
    "an edit's subject is read off its prompt: the words that it shares with the queries about the subject",
    f"{_ADD.format('subject')} where that is wrong",
)


def _parts(row: Row, where: str) -> Iterator[Part]:
    edit = an_object(row["edit"], "edit", NAME, where)
    sentence = edit.get("prompt")
    if not isinstance(sentence, str) or not sentence.strip():
        raise bad(where, "'edit.prompt' is missing, or no text", f"see {NAME}'s shape")
    found = [(group, *test) for group in GROUPS for test in _queries(row, group, where)]
    asked = tuple(replace(_asked(q, place, where, group), needs=needs) for group, place, q, needs in found)
    queries = [q for _, _, q, _ in found]
    given, called, remarks = _read(sentence.strip(), edit, _labels(queries), queries, where)
    yield Part(given, called, asked, (("", row), ("edit.", edit)), remarks)


def _queries(row: Row, group: str, where: str) -> Iterator[tuple[str, Row, tuple[Asked, ...]]]:
    """The queries of a group's tests: where each stands, the query, and the conditions of its test."""
    for place, test in objects(row.get(group), group, NAME, where):
        conditions = objects(test.get("condition_queries"), f"{place}.condition_queries", NAME, where)
        needs = tuple(_asked(q, at, where, group) for at, q in conditions)
        for at, q in objects(test.get("test_queries"), f"{place}.test_queries", NAME, where):
            yield at, q, needs


def _asked(query: Row, place: str, where: str, group: str) -> Asked:
    return Asked(GROUPS[group], f"{place}.prompt", query.get("prompt"), _answers(query, place, where), group)


def _answers(query: Row, place: str, where: str) -> list[object]:
    """Every object of a query with its aliases, the usual names first."""
    found = [a for _, a in objects(query.get("answers"), f"{place}.answers", NAME, where)]
    aliases = [x for a in found for x in (a.get("aliases") or ()) if isinstance(a.get("aliases"), list)]
    known = [x for x in aliases if not isinstance(x, str) or len(x) > 1 or x.isdigit()]
    return [*(a.get("value") for a in found), *known]


def _labels(queries: Sequence[Row]) -> dict[str, tuple[str, ...]]:
    """The names of what queries answer, by its id: the usual one first."""
    out: dict[str, tuple[str, ...]] = {}
    for query in queries:
        ids, answers = query.get("second_hop_target_ids") or query.get("target_ids"), query.get("answers")
        if isinstance(ids, list) and isinstance(answers, list) and len(ids) == len(answers):
            for i, a in zip(ids, answers, strict=True):
                aliases = a["aliases"] if isinstance(a.get("aliases"), list) else []
                names = [x for x in (a.get("value"), *aliases) if isinstance(x, str) and len(x) > 1]
                if names and isinstance(i, str):
                    out.setdefault(i, tuple(names))
    return out


def _read(
    sentence: str, edit: Row, labels: dict[str, tuple[str, ...]], queries: Sequence[Row], where: str
) -> tuple[dict[str, object], dict[str, str], tuple[tuple[str, str], ...]]:
    """The fields of the fact, where they stand, and what is to be said of how they were found."""
    if not (target := _target(sentence, edit, labels)):
        what = f"the new object in 'edit.prompt' is not told: '{short(sentence)}'"
        raise bad(where, what, _ADD.format("target_new"))
    prompt = sentence.rstrip(" .").removesuffix(target.rstrip(" .")).rstrip()
    given: dict[str, object] = {"prompt": prompt, "target_new": target, "ground_truth": _old(prompt, edit)}
    given["target_aliases"] = [name for name in _named(edit, "target_id", labels) if name != target]
    called = {name: f"edit.{name if name in edit else 'prompt'}" for name in given} | {"subject": "edit.subject"}
    if "ground_truth" not in edit:
        called["ground_truth"] = "edit.original_fact"
    if not empty(edit.get("subject")):
        return given | {"subject": edit["subject"]}, called, ()
    label = next((n for n in _named(edit, "subject_id", labels)[:1] if last_word(prompt, n) >= 0), "")
    subject = label or _shared(prompt, edit, queries)
    if not subject:
        return given, called, ()
    return given | {"subject": subject}, called | {"subject": "edit.prompt"}, () if label else (REMARK,)


def _named(edit: Row, key: str, labels: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    found = edit.get(key)
    return labels.get(found, ()) if isinstance(found, str) else ()


def _target(sentence: str, edit: Row, labels: dict[str, tuple[str, ...]]) -> str:
    """The new object, as the sentence spells it; "" where nothing tells it."""
    bare = sentence.rstrip(" .")
    for name in (edit.get("target_new"), *_named(edit, "target_id", labels)):
        if isinstance(name, str) and name.strip(" .") and bare.endswith(name.rstrip(" .")):
            return name.strip()
    words, old = bare.split(" "), str(_sentence(edit)).rstrip(" .").split(" ")
    differ = next((i for i, (a, b) in enumerate(zip(words, old, strict=False)) if a != b), min(len(words), len(old)))
    verbs = [i + 1 for i, word in enumerate(words) if word in _VERBS]
    if old != [""]:
        return " ".join(words[max((v for v in verbs if v <= differ), default=differ) :])
    return " ".join(words[verbs[0] :]) if len(verbs) == 1 else ""


def _sentence(edit: Row) -> object:
    """The sentence of the fact as it was; "" if there is none."""
    original = edit.get("original_fact")
    found = original.get("prompt") if isinstance(original, dict) else ""
    return found if isinstance(found, str) else ""


def _old(prompt: str, edit: Row) -> object:
    """The old object: what `original_fact` has after the same prompt."""
    if "ground_truth" in edit:
        return edit["ground_truth"]
    old = str(_sentence(edit)).rstrip(" .")
    return old.removeprefix(prompt).strip() if old.startswith(f"{prompt} ") else None


def _shared(prompt: str, edit: Row, queries: Sequence[Row]) -> str:
    """The words that the edit's prompt shares with queries about its subject, in other relations, without the relations'."""
    mine = (edit.get("subject_id"), edit.get("relation"))
    about = [
        q for q in queries if q.get("subject_id") == mine[0] and q.get("relation") != mine[1] and not q.get("phrase")
    ]
    prompts = [_words(p) for q in about if isinstance(p := q.get("prompt"), str)]
    if not prompts or mine[0] is None:
        return ""
    names = " ".join(str(r).lower() for r in (mine[1], *(q.get("relation") for q in about)))
    before = _BEFORE | set(re.split("[_ ]", names))
    run = _words(prompt)
    for other in prompts:
        run = _run(run, other, before | _BEHIND)
    while run and run[0] in before:
        run = run[1:]
    while run and run[-1] in _BEHIND:
        run = run[:-1]
    return " ".join(run)


def _words(prompt: str) -> list[str]:
    first, *others = prompt.rstrip(" ?").split(" ")[:_WORDS]
    return [first.lower() if first in ("The", "Is") else first, *others]


def _run(a: Sequence[str], b: Sequence[str], common: Set[str]) -> list[str]:
    """Of the runs of words in both, the one with the most words that are not ``common``, the longest of these."""
    best, most = list[str](), (0, 0)
    lengths: dict[int, int] = {}  # of the run that ends at the word before, by where that is in b
    for i, word in enumerate(a):
        lengths = {j: lengths.get(j - 1, 0) + 1 for j, other in enumerate(b) if other == word}
        run = list(a[i + 1 - max(lengths.values(), default=0) : i + 1])
        found = sum(bool(w) and w not in common for w in run), len(run)
        if found[0] and found > most:
            best, most = run, found
    return best


RIPPLEEDITS = Shape(
    NAME,
    "https://github.com/edenbiran/RippleEdits",
    (("edit",),),
    reads=(*GROUPS, "original_fact", "relation", "subject_id", "target_id"),
    others=("example_type",),
    parts=_parts,
)
