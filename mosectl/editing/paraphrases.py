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
from mosectl.model.generation import continuations, ends, seeded
from mosectl.model.positions import window
from mosectl.model.scoring import encode_pairs, paired, score
from mosectl.model.tokens import encode

SAMPLES = 32  # texts written about a subject, at most
ROUND = 8  # of them at a time: who has enough wordings gets no more
PATIENCE = 16  # texts without a single wording after which a subject is given up,
SELDOM = 5  # and after the first round already where not even one subject in so many has any: such texts seldom name it
AT_ONCE = 16  # subjects
POLL = 64  # subjects after which the others are spared it, as long as less than one
RARE = 10  # in so many has any: a thousand would take minutes for a few dozen wordings
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
    olds = [f.ground_truth or a for f, a in zip(facts, answers, strict=False)]
    found: list[tuple[str, ...]] = []
    with seeded(model, seed):
        for start in range(0, len(facts), AT_ONCE):
            if start >= POLL and RARE * sum(map(bool, found)) < start:
                if on_step:
                    on_step(len(facts), len(facts))
                break
            end = start + AT_ONCE

            def settled(n: int, start: int = start) -> None:
                if on_step:
                    on_step(start + n, len(facts))

            found += _sure(model, tokenizer, facts[start:end], olds[start:end], most, settled)
    return found + [()] * (len(facts) - len(found))


def _sure(
    model: Any, tokenizer: Any, facts: Sequence[Fact], olds: Sequence[str], most: int, settled: Callable[[int], None]
) -> list[tuple[str, ...]]:
    """:func:`own_wordings` of some facts: rounds of samples, each only for the facts that still lack wordings.

    After each round ``settled`` is told how many facts need no more.
    """
    counted: list[Counter[str]] = [Counter() for _ in facts]
    sure: list[list[str]] = [[] for _ in facts]
    tried: list[set[str]] = [set() for _ in facts]
    for done in range(0, SAMPLES, ROUND):
        seldom = done > 0 and SELDOM * sum(map(bool, sure)) < len(facts) >= SELDOM
        patience = ROUND if seldom else PATIENCE
        hopeful = [i for i, old in enumerate(olds) if 0 < len(old) <= LONGEST and (counted[i] or done < patience)]
        lacking = [i for i in hopeful if len(sure[i]) < most]
        settled(len(facts) - len(lacking))
        if not lacking:
            break
        for i, texts in zip(lacking, _written(model, tokenizer, [facts[i] for i in lacking]), strict=True):
            counted[i] += _wordings(facts[i], olds[i], texts)
        new = {i: [w for w in counted[i] if w not in tried[i]] for i in lacking}
        held = _held(model, tokenizer, [(facts[i], w, olds[i]) for i in lacking for w in new[i]])
        for i in lacking:
            tried[i] |= {*new[i]}
            sure[i] += [w for w in new[i] if (facts[i], w, olds[i]) in held]
    settled(len(facts))
    found = []
    for own, c in zip(sure, counted, strict=True):
        likely = [w for w, _ in c.most_common() if w in own]
        found.append(tuple(likely[:most]))
    return found


def _written(model: Any, tokenizer: Any, facts: Sequence[Fact]) -> list[list[str]]:
    """ROUND texts about each fact's subject."""
    subjects = [encode(tokenizer, f.subject, None, None).input_ids for f in facts]
    texts = continuations(model, tokenizer, [ids for ids in subjects for _ in range(ROUND)], TOKENS, sampled=True)
    return [texts[i : i + ROUND] for i in range(0, len(texts), ROUND)]


def _held(model: Any, tokenizer: Any, asked: Sequence[tuple[Fact, str, str]]) -> set[tuple[Fact, str, str]]:
    """Those of (fact, wording, old object) that the model goes on with as said."""
    if not asked:
        return set()
    seen, pairs = window(model), {one: paired(*one) for one in asked}
    encoded = encode_pairs(tokenizer, list(pairs.values()))
    known = score(model, {pair: e for pair, e in encoded.items() if not seen.refuses(e.input_ids)})
    sure = {pair for pair, scored in known.items() if scored.hits == len(scored.target)}
    return {one for one, pair in pairs.items() if pair in sure}


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
