"""What a model of train_factlm.py knows, and how sure of it it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from factlm_data import questions
from torch import nn

from mosectl.facts.records import Fact
from mosectl.model.scoring import Pair, encode_pairs, score

KNOWN = 0.98  # share of the true answers from which on the facts count as known
ORDINARY = (5.0, 9.0)  # nats a token that a new target costs in a real model before the edit


@dataclass(frozen=True)
class Measured:
    """Shares between 0 and 1 of true answers that greedy decoding gives, None where nothing was asked."""

    facts: int
    prompt: float | None
    rephrase: float | None
    locality: float | None
    known: float  # of all these prompts together
    new_target: float  # loss of the new target behind the prompt, nats: mean over its tokens, then over facts

    @property
    def ordinary(self) -> bool:
        return ORDINARY[0] <= self.new_target <= ORDINARY[1]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ordinary": self.ordinary}

    def __str__(self) -> str:
        shares = {"prompt": self.prompt, "rephrase": self.rephrase, "locality": self.locality}
        known = ", ".join(f"{name} {_percent(share)}" for name, share in shares.items())
        return f"known: {known}; new target {self.new_target:.2f} nats"


def measure(
    model: nn.Module, tokenizer: Any, facts: Sequence[Fact], batch_size: int = 256
) -> tuple[Measured, list[bool]]:
    """Ask for all true answers of ``facts``; also: of which facts the prompt and every locality prompt are known.

    Greedy decoding gives an answer and its full stop exactly when each of these tokens is the likeliest after those
    before it, so one forward that is shown them tells it.
    """
    asked = [_pairs(f) for f in facts]
    flat = list(dict.fromkeys(pair for kinds in asked for pairs in kinds for pair in pairs))
    scored = score(model, questions(flat, tokenizer), batch_size=batch_size)
    right = {pair: s.accuracy == 1 for pair, s in scored.items()}
    hits = [[right[pair] for kinds in asked for pair in kinds[kind]] for kind in range(3)]
    new = [(f.prompt, f.target_new) for f in facts]
    losses = score(model, encode_pairs(tokenizer, new), batch_size=batch_size)
    prompt, rephrase, locality = map(_share, hits)
    known = fmean(hit for kind in hits for hit in kind)
    measured = Measured(len(facts), prompt, rephrase, locality, known, fmean(losses[pair].nll for pair in new))
    return measured, [all(right[pair] for pair in (*prompts, *local)) for prompts, _, local in asked]


def table(measured: Measured, took: dict[str, Any]) -> str:
    """The end of a run for people to read."""
    low, high = ORDINARY
    verdict = f"{'within' if measured.ordinary else 'OUTSIDE'} the {low:.0f} to {high:.0f} of a real model"
    verdict += "" if measured.known >= KNOWN else " (which says little: the facts are not known)"
    lines = {
        f"true answers of {measured.facts} facts": "greedy decoding, saved bfloat16 model",
        "  prompt": _percent(measured.prompt),
        "  rephrased prompt": _percent(measured.rephrase),
        "  locality prompt": _percent(measured.locality),
        "new target before any edit": f"{measured.new_target:.2f} nats a token: {verdict}",
        **{name: str(value) for name, value in took.items()},
    }
    return "\n".join(f"{name:32}{value}" for name, value in lines.items())


def _pairs(fact: Fact) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """Prompt, rephrasings and locality prompts, each with its true answer."""
    true = fact.ground_truth or ""
    local = [(p.prompt, p.answer) for p in fact.locality if p.answer]
    return [(fact.prompt, true)], [(p, true) for p in fact.rephrase_prompts], local


def _share(hits: Sequence[bool]) -> float | None:
    return fmean(hits) if hits else None


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
