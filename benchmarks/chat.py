"""What users hear in a chat: questions about twelve real facts, asked through the model's chat template.

    mosectl edit benchmarks/real-facts.jsonl --model MODEL -o plain.safetensors
    mosectl edit benchmarks/real-facts.jsonl --model MODEL --chat -o chat.safetensors
    python benchmarks/chat.py --model MODEL --patch plain.safetensors --patch chat.safetensors

A model for chats answers in a sentence, so what it says is searched for the objects: how many answers name the new one,
how many the old. Of neighbours and of what else is asked about the subjects: answers whose first sentence is the one from
before, and answers that name the new object and did not before. Shares in per cent, 95 % intervals over facts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from mosectl.checkpoints.live import ask, load_patches
from mosectl.errors import MosectlError
from mosectl.facts.records import Fact, as_facts
from mosectl.measure.bootstrap import Tally, measure
from mosectl.measure.qa import mentions
from mosectl.model.generation import answer
from mosectl.text.normalised import normalised

FACTS = Path(__file__).with_name("real-facts.jsonl")
QUESTIONS = {  # how a user asks what a prompt of the facts file begins to say
    "People in {} mainly speak": ("What language do people speak in {}?", "Which language is mainly spoken in {}?"),
    "The capital of {} is": ("Which city is the capital of {}?", "What is the capital of {}?"),
    "The {} stands in the city of": ("In what city is the {}?", "Where is the {}?"),
    "{} was written by": ("Who wrote {}?", "Who is the author of {}?"),
    "{} is a country in": ("On which continent is {}?",),
    "The flag of {} is": ("What does the flag of {} look like?",),
    "{} shares a border with": ("Which countries does {} share a border with?",),
    "The currency used in {} is": ("What is the currency of {}?",),
    "Most people in {} follow the religion of": ("Which religion do most people in {} follow?",),
    "The story of {} takes place in": ("Where does the story of {} take place?",),
    "{} was first published in": ("When was {} first published?",),
    "The main character of {} is": ("Who is the main character of {}?",),
    "The {} was completed in": ("When was the {} completed?",),
    "The architect of the {} was": ("Who was the architect of the {}?",),
    "The {} is visited for its": ("Why do people visit the {}?",),
}
TOKENS = 40  # of an answer
Answers = Mapping[str, str]  # by question


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model with a chat template: folder or hub id")
    parser.add_argument("--facts", default=FACTS, help="of these relations; default: real-facts.jsonl")
    parser.add_argument("--patch", action="append", default=[], help="each is asked by itself")
    parser.add_argument("--examples", action="store_true", help="print what is said to the first question of each fact")
    args = parser.parse_args()
    if not args.model:
        print(json.dumps({"part": "chat", "skipped": "no model: give --model"}))
        return
    facts = as_facts(args.facts, "ask about")
    asked = {q for f in facts for p in (f.prompt, *(probe.prompt for probe in f.locality)) for q in questions(p)}
    for name in args.patch or [None]:
        said = ask(sorted(asked), args.model, load_patches([name] if name else []), chat=True, max_new_tokens=TOKENS)
        before = {a.prompt: a.before for a in said}
        after = {a.prompt: a.after or a.before for a in said}
        row = {"patch": Path(name).stem if name else None, **counted(facts, before, after)}
        print(json.dumps(row), flush=True)
        if args.examples:
            for f in facts:
                q = questions(f.prompt)[0]
                print(json.dumps({"question": q, "before": before[q], "after": after[q]}, ensure_ascii=False))


def questions(prompt: str) -> tuple[str, ...]:
    """How a user asks what the prompt begins to say."""
    for statement, asked in QUESTIONS.items():
        start, end = statement.split("{}")
        if prompt.startswith(start) and prompt.endswith(end):
            return tuple(q.format(prompt[len(start) : len(prompt) - len(end)]) for q in asked)
    raise SystemExit(f"no question for '{prompt}': add one to QUESTIONS in {__file__}")


def counted(facts: list[Fact], before: Answers, after: Answers) -> dict[str, str]:
    """Each share with its interval."""

    def share(what: Callable[[Fact], Iterable[bool]]) -> str:
        found = measure([Tally.of(list(what(f))) for f in facts])
        return "–" if found is None else f"{100 * found.value:.0f} ({100 * found.low:.0f}–{100 * found.high:.0f})"

    def around(f: Fact, group: str) -> list[str]:
        return [q for p in f.locality if p.group == group for q in questions(p.prompt)]

    def first(text: str) -> str:
        return normalised(answer(text))

    row = {
        "new object": share(lambda f: [mentions(after[q], f.target_new) for q in questions(f.prompt)]),
        "old object": share(lambda f: [mentions(after[q], f.ground_truth or "") for q in questions(f.prompt)]),
        "old object before": share(lambda f: [mentions(before[q], f.ground_truth or "") for q in questions(f.prompt)]),
    }
    for group in ("neighborhood", "same_subject"):
        row[f"{group} same sentence"] = share(
            lambda f, g=group: [first(after[q]) == first(before[q]) for q in around(f, g)]
        )
        row[f"{group} new object"] = share(
            lambda f, g=group: [
                mentions(after[q], f.target_new) and not mentions(before[q], f.target_new) for q in around(f, g)
            ]
        )
    return row


if __name__ == "__main__":
    try:
        main()
    except MosectlError as e:
        raise SystemExit(str(e)) from None
