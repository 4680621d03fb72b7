"""How a model itself words a fact: prompts of its own that it completes with the old object.

A fact is edited through one prompt, and asked about in others. Texts that the model writes after the bare subject are
searched for the old object; what stands before it is a wording the model knows the fact by, and is edited along with the
prompt. Nothing but the model is needed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from mosectl.facts.records import Fact
from mosectl.facts.words import is_word
from mosectl.model.generation import BATCH, continuations, ends, seeded
from mosectl.model.positions import window
from mosectl.model.scoring import encode_pairs, paired, score
from mosectl.model.tokens import encode

SAMPLES = 32  # texts written about a subject
TOKENS = 16  # each, at most
LONGEST = 40  # characters of an old object: a longer one is a sentence, which no other wording would end in


def own_wordings(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Fact],
    answers: Sequence[str],
    most: int,
    *,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> list[tuple[str, ...]]:
    """For each fact up to ``most`` wordings that begin with its subject, the model's most frequent ones first.

    Args:
        answers: what the model answers to each prompt now; it is the old object where a fact does not name one.
    """
    found: list[tuple[str, ...]] = []
    at_once, seen = max(1, BATCH // SAMPLES), window(model)
    with seeded(model, seed):
        for start in range(0, len(facts), at_once):
            part = facts[start : start + at_once]
            olds = [f.ground_truth or a for f, a in zip(part, answers[start:], strict=False)]
            asked = [encode(tokenizer, f.subject, None, None).input_ids for f in part for _ in range(SAMPLES)]
            texts = continuations(model, tokenizer, asked, TOKENS, sampled=True)
            counted = [
                _wordings(fact, old, texts[i * SAMPLES : (i + 1) * SAMPLES])
                for i, (fact, old) in enumerate(zip(part, olds, strict=True))
            ]
            pairs = [paired(f, w, old) for f, c, old in zip(part, counted, olds, strict=True) for w in c]
            encoded = encode_pairs(tokenizer, pairs)
            known = score(model, {pair: e for pair, e in encoded.items() if not seen.refuses(e.input_ids)})
            sure_of = {pair for pair, scored in known.items() if scored.hits == len(scored.target)}
            for f, c, old in zip(part, counted, olds, strict=True):
                sure = [w for w, _ in c.most_common() if paired(f, w, old) in sure_of]
                found.append(tuple(sure[:most]))
            if on_step:
                on_step(len(found), len(facts))
    return found


def _wordings(fact: Fact, old: str, texts: Sequence[str]) -> Counter[str]:
    """What stands between the subject and the old object, within one sentence."""
    counted: Counter[str] = Counter()
    if not old or len(old) > LONGEST:
        return counted
    for text in texts:
        places = (found.span() for found in re.finditer(re.escape(old), text))
        at = next((start for start, end in places if is_word(text, start, end)), 0)
        between = text[:at].rstrip()
        broken = ends(between) or "\ufffd" in between  # half a character
        if between and not broken and fact.subject + between != fact.prompt:
            counted[fact.subject + between] += 1
    return counted
