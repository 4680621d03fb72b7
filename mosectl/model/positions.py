"""How much a model can read: positions, and tokens that it has an embedding for.

Models with learned positions fail beyond them, with an IndexError in the middle of the work; those with rotary positions
go on and only were not trained there. What is too long is told before the work, and shortened where it is our own text.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mosectl.errors import FactsError, Notice, UsageError
from mosectl.facts.records import Fact, Probe, Problem
from mosectl.model.tokens import encode, render_chat

UNLIMITED = 1_000_000
NO_TOKENS = "give a prompt of at least one word"  # the remedy where a prompt has no token
SHOWN = 3  # problems told one by one
MOST_A_CHARACTER = 64  # tokens, outside ASCII: normalising makes up to 18 letters of one, each of a few bytes


@dataclass(frozen=True)
class Window:
    """What a model can read."""

    limit: int  # positions, by its configuration
    hard: bool  # it fails beyond them; otherwise it was only not trained there
    rows: int  # tokens that have an embedding: ids below it

    @property
    def most(self) -> int:
        """Tokens that the model can read at once."""
        return self.limit if self.hard else UNLIMITED

    def refuses(self, ids: Sequence[int]) -> str:
        """Why these tokens cannot be read, in words; empty where they can."""
        if len(ids) > self.most:
            return f"has {len(ids)} tokens, the model reads {self.limit} (its positions)"
        if not ids:
            return "has no token to begin with"
        if (token := max(ids)) >= self.rows:
            return f"has a token, {token}, that the model has no embedding for (it has {self.rows})"
        return ""

    def strains(self, ids: Sequence[int]) -> str:
        """Why these tokens are read, but badly, in words; empty where they are not."""
        if len(ids) <= self.limit:
            return ""
        return f"has {len(ids)} tokens, the model was made for {self.limit} (its positions)"


def window(model: Any) -> Window:
    """What a model, or its :func:`mosectl.model.architecture.skeleton`, can read."""
    config = model.config.get_text_config()
    # Rotary phases and ALiBi's slopes are made for any length; GPT-J's phases and MPT's slopes are tables (no such flags).
    open_ended = getattr(config, "alibi", False) is True or any(
        name.endswith("inv_freq") for name, _ in model.named_buffers()
    )
    limit = context_length(model)
    return Window(limit, not open_ended and limit < UNLIMITED, model.get_input_embeddings().weight.shape[0])


def context_length(model: Any) -> int:
    """The most tokens the model can read, by its configuration; a large number where it has no limit."""
    config = model.config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
    return next((n for name in names if isinstance(n := getattr(config, name, None), int) and n > 1), UNLIMITED)


def prompt_ids(tokenizer: Any, prompt: str, chat: bool) -> Sequence[int]:
    """The tokens a model is asked with."""
    if chat:
        return tokenizer(render_chat(tokenizer, prompt), add_special_tokens=False)["input_ids"]
    return encode(tokenizer, prompt, None, None).input_ids


def check_prompt(window: Window, prompt: str, ids: Sequence[int]) -> None:
    """Raises UsageError: the model cannot read the prompt."""
    if what := window.refuses(ids):
        fix = "shorten it, or ask another model" if ids else NO_TOKENS
        raise UsageError(f"the prompt {what}", where=_short(prompt), fix=fix)


def note_prompts(model: Any, tokenizer: Any, prompts: Sequence[str], chat: bool) -> None:
    """Say which prompts are longer than the model was made for; those that it cannot read raise UsageError."""
    seen = window(model)
    for prompt in prompts:
        ids = prompt_ids(tokenizer, prompt, chat)
        check_prompt(seen, prompt, ids)
        if what := seen.strains(ids):
            warnings.warn(f"'{_short(prompt)}' {what}", Notice, stacklevel=2)


# Facts.


def fitted(
    facts: Sequence[Fact], tokenizer: Any, window: Window, *, chat: bool = False, on_error: str = "fail"
) -> list[Fact]:
    """Facts whose every prompt the model can read, with its answer behind it; what is only long is told as a Notice.

    Args:
        on_error: "skip" leaves out what cannot be read (a probe, or the fact itself) and tells it.
    Raises:
        FactsError: something cannot be read ("fail"), or no fact is left ("skip").
    """
    kept, problems = fit(facts, tokenizer, window, chat)
    errors = [p for p in problems if p.severity == "error"]
    if errors and (on_error != "skip" or not kept):
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        fix = f"{errors[0].fix}, or leave it out: --on-error skip; mosectl check FACTS --model MODEL lists them all"
        raise FactsError(errors[0].what + more, where=errors[0].where, fix=fix)
    told = [f"{p.where}: {p.what}{': left out' if p.severity == 'error' else ''}" for p in problems]
    if len(told) > SHOWN:
        told[SHOWN:] = [f"and {len(told) - SHOWN} more such prompts (mosectl check FACTS --model MODEL lists them)"]
    for text in told:
        warnings.warn(text, Notice, stacklevel=2)
    return list(kept)


def fit(
    facts: Sequence[Fact], tokenizer: Any, window: Window, chat: bool = False
) -> tuple[tuple[Fact, ...], tuple[Problem, ...]]:
    """The facts without what the model cannot read, and a problem for each such prompt and each that is only long."""
    kept: list[Fact] = []
    problems: list[Problem] = []
    short = _surely_short(tokenizer, window, chat)
    for fact in facts:
        bad: set[tuple[str, str]] = set()
        for name, prompt, answers in _asked(fact):
            if _at_most(prompt + max(answers, key=_at_most, default="")) < short:
                continue
            space = fact.space_before_target
            ids = max((_ids(tokenizer, prompt, answer, chat, space) for answer in answers or ("",)), key=len)
            if what := window.refuses(ids):
                bad.add((name, prompt))
            if what or (what := window.strains(ids)):
                severity = "error" if (name, prompt) in bad else "warning"
                about = f"the {name} '{_short(prompt)}' {what}" + " (with its answer)" * bool(answers)
                problems.append(Problem(fact.source, about, "shorten it" if ids else NO_TOKENS, severity))
        if ("prompt", fact.prompt) not in bad:
            kept.append(_without(fact, bad) if bad else fact)
    return tuple(kept), tuple(problems)


def _asked(fact: Fact) -> Iterator[tuple[str, str, list[str]]]:
    """What kind of prompt, the prompt, the answers that may be scored behind it."""
    objects = [a for a in (fact.target_new, fact.ground_truth) if a]
    yield "prompt", fact.prompt, objects
    yield from (("rephrasing", prompt, objects) for prompt in fact.rephrase_prompts)
    for name, probes in (("locality prompt", fact.locality), ("portability prompt", fact.portability)):
        for probe in probes:
            yield name, probe.prompt, [probe.answer, fact.target_new] if probe.answer else []
            yield from (("condition", n.prompt, []) for n in probe.needs if n.prompt != probe.prompt)


def _without(fact: Fact, bad: set[tuple[str, str]]) -> Fact:
    def good(name: str, probes: tuple[Probe, ...]) -> tuple[Probe, ...]:
        asked = ((p, {(name, p.prompt), *(("condition", n.prompt) for n in p.needs)}) for p in probes)
        return tuple(p for p, prompts in asked if not prompts & bad)

    return replace(
        fact,
        rephrase_prompts=tuple(p for p in fact.rephrase_prompts if ("rephrasing", p) not in bad),
        locality=good("locality prompt", fact.locality),
        portability=good("portability prompt", fact.portability),
    )


def _ids(tokenizer: Any, prompt: str, answer: str, chat: bool, space: bool | None) -> Sequence[int]:
    if not answer:
        return prompt_ids(tokenizer, prompt, chat)
    try:
        return encode(tokenizer, prompt, None, answer, chat=chat, space=space).input_ids
    except FactsError:  # what cannot be written behind this prompt is told by those who need it there
        alone = tokenizer(" " + answer, add_special_tokens=False)["input_ids"]
        return [*prompt_ids(tokenizer, prompt, chat), *alone]


def _surely_short(tokenizer: Any, window: Window, chat: bool) -> int:
    """Tokens, as :func:`_at_most` has them, below which a prompt needs no counting; 0: every prompt does."""
    if len(tokenizer) > window.rows:
        return 0
    return window.limit - len(prompt_ids(tokenizer, "x", chat))


def _at_most(text: str) -> int:
    """More tokens than a text can have."""
    return (1 if text.isascii() else MOST_A_CHARACTER) * len(text) + 4


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "…"
