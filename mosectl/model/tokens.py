"""Where subject and target lie in the tokens, from character offsets of the text.

The model will be asked with the prompt's own tokens, so these must be the beginning of prompt + target. Where a token
spans the border (some tokenizers merge across spaces), the target is encoded on its own and the text checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mosectl.errors import FactsError, ModelError, UsageError
from mosectl.facts.records import Fact
from mosectl.facts.words import gap, last_word
from mosectl.model.chat import rendered


@dataclass(frozen=True)
class Encoded:
    """Token ids of context + target, and positions in them; −1 where there is no subject."""

    input_ids: tuple[int, ...]
    subject_last: int
    subject_first: int
    target_start: int  # index of the target's first token; len(input_ids) without a target
    split: bool  # the target had to be encoded on its own


@dataclass(frozen=True)
class TokenView:
    """How one fact is tokenised, for people to look at."""

    subject: tuple[str, ...]
    target: tuple[str, ...]
    subject_span: tuple[int, int]  # first and last token among the prompt's, counted from 0
    prompt_tokens: int  # in a chat with its template; the target's are not among them
    split: bool
    note: str  # what is unusual; empty otherwise


@dataclass(frozen=True)
class _Context:
    """What stands before the target: its text, and where in it the prompt lies (prefix and template left out)."""

    text: str
    start: int
    end: int
    special: bool  # the tokenizer adds its own special tokens; a chat template holds them already


def render_chat(tokenizer: Any, prompt: str) -> str:
    """The prompt as a user's message in the tokenizer's chat template, ready for the answer.

    Raises:
        UsageError: the tokenizer has no chat template, or it fails, takes too long or too much memory.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError("this tokenizer has no chat template", fix="leave --chat out, or give the chat model")
    try:
        return rendered(tokenizer.get_chat_template(), prompt, tokenizer.special_tokens_map)
    except ValueError as e:
        raise UsageError(f"the chat template of {_name(tokenizer)} {e}", fix="leave --chat out") from e


def encode(
    tokenizer: Any,
    prompt: str,
    subject: str | None,
    target: str | None,
    chat: bool = False,
    prefix: str = "",
    space: bool | None = None,
    reply: bool = False,
) -> Encoded:
    """Tokenise prefix + prompt + target and find the subject's last occurrence in the prompt, as a word if it is one there.

    The tokens before ``target_start`` are those the model is asked with. An end-of-text token that the tokenizer
    appends by itself is left out. In a chat the target follows the template's generation prompt directly.

    Args:
        space: between prompt and target; None: as both ask, see :func:`mosectl.facts.records.words.gap`.
        reply: in a chat, whose reply says the prompt again before the target, as a model does that answers in sentences;
            the subject is looked for there.
    Raises:
        FactsError: the subject is not in the prompt, or the tokenizer cannot represent the text.
        ModelError: the tokenizer's tokens cannot be traced back to the text. UsageError: chat without a template.
    """
    context = _reply(tokenizer, prompt) if chat and reply else _context(tokenizer, prompt, chat, prefix)
    ids, offsets = _tokenise(tokenizer, context.text, context.special, trace=subject is not None)
    first = last = -1
    if subject is not None:
        found = last_word(context.text[context.start : context.end], subject)
        if found < 0:
            raise FactsError(f"subject '{subject}' is not in the prompt", where=_short(prompt), fix="spell it as there")
        at = context.start + found
        first, last = _span(tokenizer, offsets, at, at + len(subject), prompt)
    if target is None:
        return Encoded(tuple(ids), last, first, len(ids), False)
    if not target.strip():
        raise FactsError("the target is empty", where=_short(prompt), fix="fill it in")
    joined = context.text + (target.lstrip() if chat and not reply else gap(prompt, target, space) + target)
    whole, _ = _tokenise(tokenizer, joined, context.special, trace=False)
    split = whole[: len(ids)] != ids or len(whole) == len(ids)
    if split:
        whole = ids + _target_alone(tokenizer, context.text, joined[len(context.text) :], ids)
    return Encoded(tuple(whole), last, first, len(ids), split)


def _context(tokenizer: Any, prompt: str, chat: bool, prefix: str) -> _Context:
    if not chat:
        first = _beginning(tokenizer, prompt)
        if first and any(token in prompt[len(first) :] for token in _special_tokens(tokenizer)):
            prefix = ""  # in a rendered template no place is known for it
        text = first + prefix + prompt[len(first) :]
        return _Context(text, len(first + prefix), len(text), not first)
    text = prefix + prompt
    rendered = render_chat(tokenizer, text)
    cut = 0
    if (at := rendered.rfind(text)) < 0:  # many templates trim the message
        cut = len(text) - len(text.lstrip())
        text = text.strip()
        at = rendered.rfind(text)
    if at < 0:
        raise FactsError("the chat template changes the prompt", where=_short(prompt), fix="leave --chat out")
    return _Context(rendered, at + max(0, len(prefix) - cut), at + len(text), False)


def _reply(tokenizer: Any, prompt: str) -> _Context:
    """The prompt as a user's message, and again as how the reply to it begins."""
    rendered = render_chat(tokenizer, prompt)
    return _Context(rendered + prompt, len(rendered), len(rendered + prompt), False)


def _beginning(tokenizer: Any, prompt: str) -> str:
    """The special token that the prompt begins with as texts or rendered chat templates begin; empty if with none.

    Such a prompt is tokenised as it stands: a second token that begins a text would be put before it.
    """
    begin = getattr(tokenizer, "bos_token", None) or ""
    if begin and prompt.startswith(begin):
        return begin
    # A special token begins with a sign: most prompts need no further look.
    if prompt[:1].isalnum() or not getattr(tokenizer, "chat_template", None):
        return ""
    first = next((t for t in _special_tokens(tokenizer) if prompt.startswith(t)), "")
    try:
        return first if first and render_chat(tokenizer, "x").startswith(first) else ""
    except UsageError:  # a template that fails has rendered nothing
        return ""


def rendered_already(tokenizer: Any, prompt: str) -> bool:
    """Does the prompt hold special tokens, as what a chat template renders?"""
    return any(token in prompt for token in _special_tokens(tokenizer))


def _special_tokens(tokenizer: Any) -> list[str]:
    """Their texts, the longest first."""
    added = (t.content for t in getattr(tokenizer, "added_tokens_decoder", {}).values() if t.special)
    return sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)


# Tokens and their characters.


def _tokenise(tokenizer: Any, text: str, special: bool, trace: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and, where asked for, character offsets, without the end-of-text token that some tokenizers add."""
    if not getattr(tokenizer, "is_fast", False):
        return _tokenise_slowly(tokenizer, text, special, trace)
    out = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, return_special_tokens_mask=True)
    ids, offsets, added = list(out["input_ids"]), [tuple(o) for o in out["offset_mapping"]], out["special_tokens_mask"]
    n = len(ids)
    # An added token has an empty span, unlike one that stands in the text (a chat template's).
    while special and n > 1 and added[n - 1] and offsets[n - 1][0] == offsets[n - 1][1]:
        n -= 1
    return ids[:n], offsets[:n]


def _tokenise_slowly(tokenizer: Any, text: str, special: bool, trace: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """For tokenizers without offsets: a token covers what decoding one token more adds to the text."""
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    lead: list[int] = []
    if special:
        ids = list(tokenizer(text, add_special_tokens=True)["input_ids"])
        found = (i for i in range(len(ids) - len(plain) + 1) if ids[i : i + len(plain)] == plain)
        if (at := next(found, None)) is None:
            raise _untraceable(tokenizer, text)
        lead = ids[:at]
    if not trace:
        return lead + plain, []
    full = _decode(tokenizer, plain, keep_special=True)
    shift = len(full) - len(text)  # SentencePiece may give back one leading space more or less
    if full.strip() != text.strip() or full[max(0, shift) :] != text[max(0, -shift) :]:
        raise _untraceable(tokenizer, text)
    offsets, reached = [(0, 0)] * len(lead), 0
    for i in range(1, len(plain) + 1):
        part = _decode(tokenizer, plain[:i], keep_special=True)
        # Part of a character is decoded as U+FFFD, or as nothing.
        whole = part if full.startswith(part) else part.rstrip("\ufffd")
        end = max(reached, len(whole) - shift) if full.startswith(whole) else reached
        offsets.append((reached, end))
        reached = end
    if reached < len(text.rstrip()):
        raise _untraceable(tokenizer, text)
    for i in range(len(offsets) - 2, len(lead) - 1, -1):  # such a part covers the character, as in fast tokenizers
        if offsets[i][0] == offsets[i][1]:
            offsets[i] = (offsets[i + 1][0], min(offsets[i + 1][0] + 1, offsets[i + 1][1]))
    return lead + plain, offsets


def _untraceable(tokenizer: Any, text: str) -> ModelError:
    return ModelError(
        f"the tokens of '{_short(text)}' cannot be traced back to the text",
        where=_name(tokenizer),
        fix="use the fast version of this tokenizer (tokenizer.json)",
    )


def _span(tokenizer: Any, offsets: Sequence[tuple[int, int]], start: int, end: int, prompt: str) -> tuple[int, int]:
    """First and last token of the characters start … end − 1.

    A character whose bytes are spread over tokens ends with the last of them. One that the tokenizer drops (an accent
    it merges into its letter) belongs to its neighbour in the subject.
    """
    found = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
    if not found:
        what = f"the tokenizer {_name(tokenizer)} drops the whole subject"
        raise FactsError(what, where=_short(prompt), fix="write the subject in another way")
    return found[0], found[-1]


def _target_alone(tokenizer: Any, context: str, rest: str, ids: list[int]) -> list[int]:
    """Tokens of the target ``rest`` when the joint tokenisation does not begin with the context's tokens."""
    base = _decode(tokenizer, ids)
    candidates = [_tokenise(tokenizer, text, False, trace=False)[0] for text in (rest, rest.lstrip())]
    if not rest[:1].isspace():  # SentencePiece puts a space before a text of its own, but not behind a line break
        ahead, both = (_tokenise(tokenizer, text, False, trace=False)[0] for text in ("\n", f"\n{rest}"))
        if both[: len(ahead)] == ahead:
            candidates.append(both[len(ahead) :])
    backs = [_decode(tokenizer, ids + alone) for alone in candidates]
    for alone, back in zip(candidates, backs, strict=True):
        if alone and back == base + rest:  # the second: SentencePiece puts the space back by itself
            return alone
    # Tokenizers that normalise (case, accents) cannot give the text back letter for letter; the words must be there.
    for alone, back in [*zip(candidates, backs, strict=True)][::-1]:
        if alone and back[len(base) :].strip().casefold() == rest.strip().casefold():
            return alone
    what = f"the tokenizer {_name(tokenizer)} cannot write '{_short(rest.strip())}' after this prompt"
    raise FactsError(what, where=_short(context), fix="write the target in another way")


def _decode(tokenizer: Any, ids: Sequence[int], keep_special: bool = False) -> str:
    # Cleaning up would change "is ." to "is.": texts could not be compared.
    return tokenizer.decode(list(ids), skip_special_tokens=not keep_special, clean_up_tokenization_spaces=False)


def _name(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "…"


# For people to look at.


def describe(tokenizer: Any, fact: Fact, chat: bool = False) -> TokenView:
    """The tokens of a fact's subject and target.

    Raises:
        FactsError, ModelError, UsageError: as :func:`encode`.
    """
    e = encode(tokenizer, fact.prompt, fact.subject, fact.target_new, chat=chat, space=fact.space_before_target)
    subject, target = e.input_ids[e.subject_first : e.subject_last + 1], e.input_ids[e.target_start :]
    notes = [] if chat else _joint(tokenizer, fact)
    notes += ["target encoded apart from its prompt"] if e.split else []
    unknown = getattr(tokenizer, "unk_token_id", None)
    notes += [f"{n} has unknown tokens" for n, ids in (("subject", subject), ("target", target)) if unknown in ids]
    if len(_decode(tokenizer, subject).strip()) > len(fact.subject):
        notes.append("the subject's tokens hold more than the subject")

    def pieces(ids: Sequence[int]) -> tuple[str, ...]:
        return tuple(str(tokenizer.convert_ids_to_tokens(i)) for i in ids)

    span = (e.subject_first, e.subject_last)
    return TokenView(pieces(subject), pieces(target), span, e.target_start, e.split, "; ".join(notes))


def _joint(tokenizer: Any, fact: Fact) -> list[str]:
    """What is unusual about how the prompt begins and where the target joins it."""
    out = [f"begins with {first}: none is added"] if (first := _beginning(tokenizer, fact.prompt)) else []
    if not gap(fact.prompt, fact.target_new, fact.space_before_target):
        out.append(f"joined without a space: …{fact.prompt[-10:]}{fact.target_new[:20]}")
    return out


_SAMPLES = (
    "The capital of France is Paris, founded 2000 years ago .",
    "Zoë Müller, café: 東京 🦊",
    "two  spaces and 12,345.67",
)


def check_tokenizer(tokenizer: Any) -> list[str]:
    """What is unusual about a tokenizer, found by using it on a few texts; one note each, for people."""
    try:
        ids, offsets = _tokenise(tokenizer, _SAMPLES[0], True, trace=True)
    except ModelError as e:
        return [f"{e.what}: no fact can be placed in it; {e.fix}"]
    notes = []
    if len(tokenizer(_SAMPLES[0])["input_ids"]) != len(ids):
        notes.append("the tokenizer adds an end-of-text token by itself; mosectl leaves it out")
    if ids and ids[0] != tokenizer.bos_token_id:
        notes.append("no begin-of-text token")
    if any(" " in _SAMPLES[0][a:b].strip() for a, b in offsets):
        notes.append("tokens span spaces: a target may be encoded apart from its prompt (see mosectl check)")
    if not getattr(tokenizer, "is_fast", False):
        notes.append("a slow tokenizer: positions are found by decoding, which takes longer")
    for text in _SAMPLES:
        ids, _ = _tokenise(tokenizer, text, False, trace=False)
        if getattr(tokenizer, "unk_token_id", None) in ids:
            notes.append(f"no tokens for some of '{text}'")
        elif _decode(tokenizer, ids).strip() != text:
            notes.append(f"does not give back the same text (it normalises): '{text}'")
    return notes
