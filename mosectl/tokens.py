"""Where subject and target lie in the tokens, from character offsets of the joined string.

The model will be asked with the prompt's own tokens, so these must be the beginning of prompt + target. Where a token
spans the border (some tokenizers merge across spaces), the target is encoded on its own and the text checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mosectl.errors import FactsError, ModelError, UsageError
from mosectl.facts import Fact, join


@dataclass(frozen=True)
class Encoded:
    """Token ids of context + target, and positions in them; −1 where there is no subject."""

    input_ids: tuple[int, ...]
    subject_first: int
    subject_last: int
    target_start: int  # index of the target's first token; len(input_ids) without a target
    split: bool  # the target had to be encoded on its own


@dataclass(frozen=True)
class TokenView:
    """How one fact is tokenised, for people to look at."""

    subject: tuple[str, ...]
    target: tuple[str, ...]
    subject_span: tuple[int, int]  # first and last token, inclusive
    tokens: int
    split: bool


def render_chat(tokenizer: Any, prompt: str) -> str:
    """The prompt as a user's message in the tokenizer's chat template, ready for the answer.

    Raises:
        UsageError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError("this tokenizer has no chat template", fix="leave --chat out, or give the chat model")
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)


def encode(
    tokenizer: Any, prompt: str, subject: str | None, target: str | None, chat: bool = False, prefix: str = ""
) -> Encoded:
    """Tokenise prefix + prompt + target and find the subject's last occurrence in the prompt.

    Raises:
        FactsError: the subject is not in the prompt, or the tokenizer cannot represent the text.
        ModelError: the tokenizer gives no character offsets. UsageError: --chat without a template.
    """
    text, context = prefix + prompt, prefix + prompt
    start = 0
    if chat:
        context = render_chat(tokenizer, text)
        start = context.rfind(text)
        if start < 0:  # templates trim the message
            text, start = text.strip(), context.rfind(text.strip())
        if start < 0:
            raise FactsError("the chat template changes the prompt", where=prompt, fix="leave --chat out")
    ids, offsets = _tokenise(tokenizer, context, special=not chat)
    first = last = -1
    if subject is not None:
        at = context.rfind(subject, max(0, start + len(text) - len(prompt)), start + len(text))
        if at < 0:
            raise FactsError(
                f"subject '{subject}' is not in the prompt", where=prompt, fix="spell it as the prompt does"
            )
        first = _covering(offsets, at, prompt)[0]
        last = _covering(offsets, at + len(subject) - 1, prompt)[-1]
    if target is None:
        return Encoded(tuple(ids), first, last, len(ids), False)
    joined = context + target.lstrip() if chat else join(context, target)
    whole, _ = _tokenise(tokenizer, joined, special=not chat)
    split = whole[: len(ids)] != ids or len(whole) == len(ids)
    if split:
        whole = ids + _target_alone(tokenizer, joined, context, ids)
    return Encoded(tuple(whole), first, last, len(ids), split)


def _tokenise(tokenizer: Any, text: str, *, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and character offsets, without the end-of-text token that some tokenizers add."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            "this tokenizer gives no character offsets",
            where=type(tokenizer).__name__,
            fix="use its fast version (tokenizer.json)",
        )
    out = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    ids, offsets = list(out["input_ids"]), [tuple(o) for o in out["offset_mapping"]]
    ends = {tokenizer.eos_token_id, getattr(tokenizer, "sep_token_id", None)} - {None}
    # An empty span: the tokenizer's own addition, not a special token that stands in the text (a chat template's).
    while special and len(ids) > 1 and ids[-1] in ends and offsets[-1][0] == offsets[-1][1]:
        ids, offsets = ids[:-1], offsets[:-1]
    return ids, offsets


def _covering(offsets: Sequence[tuple[int, int]], at: int, prompt: str) -> list[int]:
    """Tokens that hold the character ``at``; several where its bytes are spread over tokens."""
    found = [i for i, (a, b) in enumerate(offsets) if a <= at < b]
    if not found:
        raise FactsError("the tokenizer drops a character of the subject", where=prompt, fix="check the spelling")
    return found


def _target_alone(tokenizer: Any, joined: str, context: str, ids: list[int]) -> list[int]:
    """Tokens of the target when the joint tokenisation does not begin with the context's tokens."""
    rest = joined[len(context) :]
    base = tokenizer.decode(ids, skip_special_tokens=True)
    for text in (rest, rest.lstrip()):  # SentencePiece puts the space back by itself
        alone, _ = _tokenise(tokenizer, text, special=False)
        if alone and tokenizer.decode(ids + alone, skip_special_tokens=True) == base + rest:
            return alone
    alone, _ = _tokenise(tokenizer, rest, special=False)
    back = tokenizer.decode(ids + alone, skip_special_tokens=True)
    # Tokenizers that normalise (case, accents) cannot give the text back letter for letter; the words must be there.
    if not alone or back[len(base) :].strip().casefold() != rest.strip().casefold():
        raise FactsError(
            f"the tokenizer cannot write '{rest.strip()}' after this prompt", where=context, fix="check the spelling"
        )
    return alone


def describe(tokenizer: Any, fact: Fact, chat: bool = False) -> TokenView:
    """The tokens of a fact's subject and target.

    Raises:
        FactsError, ModelError, UsageError: as :func:`encode`.
    """
    e = encode(tokenizer, fact.prompt, fact.subject, fact.target_new, chat=chat)

    def pieces(ids: Sequence[int]) -> tuple[str, ...]:
        return tuple(tokenizer.convert_ids_to_tokens(i) for i in ids)

    return TokenView(
        subject=pieces(e.input_ids[e.subject_first : e.subject_last + 1]),
        target=pieces(e.input_ids[e.target_start :]),
        subject_span=(e.subject_first, e.subject_last),
        tokens=len(e.input_ids),
        split=e.split,
    )


def check_tokenizer(tokenizer: Any) -> list[str]:
    """What is unusual about a tokenizer, found by using it."""
    notes = []
    text = "The capital of France is Paris, founded 2000 years ago: café."
    ids, offsets = _tokenise(tokenizer, text, special=True)
    raw = list(tokenizer(text)["input_ids"])
    if len(raw) != len(ids):
        notes.append("the tokenizer adds an end-of-text token by itself; mosectl leaves it out")
    if ids and ids[0] != tokenizer.bos_token_id:
        notes.append("no begin-of-text token")
    if any(" " in text[a:b].strip() for a, b in offsets):
        notes.append("tokens span spaces: a target may be encoded apart from its prompt (see mosectl check)")
    if tokenizer.decode(ids, skip_special_tokens=True).strip() != text:
        notes.append("the tokenizer does not give back the same text (it normalises)")
    return notes
