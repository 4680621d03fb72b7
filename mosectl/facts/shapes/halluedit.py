"""HalluEditBench: questions that a model answers wrongly, with eleven other questions about each.

CSV files under data/questions/ of https://github.com/llm-editing/HalluEditBench, asked as code/edit_all_method.py does:
`subject`, `question`, `object`; `paraphrased_question` is a rephrasing, `locality_question` most often asks something else
about the subject; portability: `yes_question`, `no_question`, `reversed_relation_question` (the subject is the answer),
multiple choice (a letter), `question_2hop` … `question_6hop`. `output_MODEL` is what that model said: where it is the one
to be edited, --read ground_truth=output_MODEL takes it as the old object.
"""

from __future__ import annotations

from collections.abc import Iterator

from mosectl.facts.groups import SAME_SUBJECT
from mosectl.facts.messages import empty
from mosectl.facts.shapes.shape import Asked, Part, Row, Shape

HOPS = range(2, 7)
LETTERS = "multiple_choice_with_letters"


def _parts(row: Row, where: str) -> Iterator[Part]:
    other = row.get("locality_question")
    about = SAME_SUBJECT if isinstance(other, str) and str(row.get("subject")) in other else ""
    asked = [Asked("locality", "locality_question", other, None, about), *_consequences(row)]
    outputs = {n for n in row if str(n).startswith(("output_", "eval_"))}
    yield Part(row, {}, tuple(asked), (("", {n: v for n, v in row.items() if n not in outputs}),))


def _consequences(row: Row) -> Iterator[Asked]:
    fixed = (
        ("yes_question", "Yes", "yes"),
        ("no_question", "No", "no"),
        ("reversed_relation_question", row.get("subject"), "reversed_relation"),
    )
    for name, answer, group in fixed:
        yield Asked("portability", name, row.get(name), answer, group)
    if not empty(row.get(LETTERS)):
        prompt = f"{row.get('question')} {row[LETTERS]}"
        yield Asked("portability", LETTERS, prompt, row.get("multiple_choice_labels"), "multiple_choice")
    for n in HOPS:
        yield Asked(
            "portability", f"question_{n}hop", row.get(f"question_{n}hop"), row.get(f"answer_{n}hop"), f"{n}hop"
        )


HALLUEDITBENCH = Shape(
    "HalluEditBench",
    "https://github.com/llm-editing/HalluEditBench",
    (("question", "object"),),
    {"prompt": ("question",), "target_new": ("object",), "rephrase_prompts": ("paraphrased_question",)},
    (
        *("locality_question", "yes_question", "no_question", "reversed_relation_question", LETTERS),
        *("multiple_choice_labels", *(f"{kind}_{n}hop" for n in HOPS for kind in ("question", "answer"))),
    ),
    ("topic", "label", "multiple_choices"),
    parts=_parts,
)
