"""MQuAKE: cases of one to four edits, with multi-hop questions whose answer follows from all of them.

https://github.com/princeton-nlp/MQuAKE (README, data format). Each of `requested_rewrite` is a fact, its `question` a
rephrasing. `questions` with `new_answer` and its aliases are portability prompts of the case's last edit. Of
`new_single_hops`, those that are edited give the aliases of the new object; the others hold before and after, and are
locality prompts. Where cases share an edit it is made once, with the questions of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mosectl.facts.groups import MULTI_HOP
from mosectl.facts.messages import bad
from mosectl.facts.shapes.counterfact import REQUEST, request
from mosectl.facts.shapes.shape import Asked, Part, Row, Shape, objects

NAME = "MQuAKE"
HOPS = "new_single_hops"
SINGLE_HOP = "single_hop"


def _parts(row: Row, where: str) -> Iterator[Part]:
    rewrites = objects(row[REQUEST], REQUEST, NAME, where)
    hops = objects(row.get(HOPS), HOPS, NAME, where)
    if not rewrites:
        raise bad(where, f"'{REQUEST}' is empty", "give the edits of the case")
    edited = [_hop(rewrite, hops) for _, rewrite in rewrites]
    known = [hop for hop in hops if not any(hop is of for of in edited)]
    for i, (place, rewrite) in enumerate(rewrites):
        given, called = request(rewrite, place)
        hop = edited[i]
        last = i == len(rewrites) - 1
        yield Part(
            {
                **given,
                "rephrase_prompts": rewrite.get("question"),
                "target_aliases": hop and hop[1].get("answer_alias"),
            },
            called
            | {"rephrase_prompts": f"{place}.question", "target_aliases": f"{hop[0]}.answer_alias" if hop else HOPS},
            tuple(_asked(row, known)) if last else (),
            ((f"{place}.", rewrite), *((("", row),) if last else ())),
        )


def _hop(rewrite: Row, hops: list[tuple[str, Row]]) -> tuple[str, Row] | None:
    """The single hop of an edit: the same question, or the same prompt, with the new object for an answer."""
    target = rewrite.get("target_new")
    new = target.get("str") if isinstance(target, dict) else target
    prompt, subject = rewrite.get("prompt"), rewrite.get("subject")
    cloze = prompt.replace("{}", subject) if isinstance(prompt, str) and isinstance(subject, str) else None
    asked = [hop for hop in hops if new is not None and hop[1].get("answer") == new]
    same = ("question", rewrite.get("question")), ("cloze", cloze)
    return next((hop for name, text in same if text for hop in asked if hop[1].get(name) == text), None)


def _asked(row: Row, known: list[tuple[str, Row]]) -> Iterator[Asked]:
    questions = row.get("questions")
    for question in questions if isinstance(questions, list) else [questions]:
        yield Asked("portability", "questions", question, _answers(row, "new_answer"), MULTI_HOP)
    for place, hop in known:
        yield Asked("locality", place, hop.get("cloze") or hop.get("question"), _answers(hop, "answer"), SINGLE_HOP)


def _answers(row: Row, name: str) -> list[Any]:
    """An answer and its aliases."""
    aliases = row.get(f"{name}_alias")
    return [row.get(name), *(aliases if isinstance(aliases, list) else [aliases])]


MQUAKE = Shape(
    NAME,
    "https://github.com/princeton-nlp/MQuAKE",
    ((REQUEST, "questions", "new_answer"),),
    reads=("question", "new_answer_alias", HOPS),
    others=("answer", "answer_alias", "answer_extended", "single_hops", "orig"),  # of the model as it was
    parts=_parts,
    cases=True,
)
