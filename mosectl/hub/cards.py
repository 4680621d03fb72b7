"""The model card of a patch or an editor."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from mosectl.facts.probe import recorded_not_counted
from mosectl.hypernetwork.file import Editor
from mosectl.patch.file import Patch
from mosectl.text.markdown import code, front_matter, inline, table
from mosectl.text.shown import before_and_after, word

ROWS = 100  # facts shown in a card


def card_of(patch: Patch, repo: str) -> str:
    """README.md of a patch's repository."""
    columns = ("prompt", "before", "after", ">P(new object) before", ">after", "")
    facts = [
        (f.prompt, *before_and_after(f.before, f.after, f.probability_before, f.probability_after), f.status)
        for f in patch.facts[:ROWS]
    ]
    body = [
        f"# Knowledge edit of {inline(patch.model)}",
        "",
        f"{len(patch.facts)} facts changed by {code(patch.method)}, patch `{patch.id}`. Base: {_base(patch)}.",
        "",
        *table(columns, facts),
        *([f"\n… and {len(patch.facts) - ROWS} more."] if len(patch.facts) > ROWS else []),
        "",
        "## Measured when it was made",
        "",
        *_measured(patch.metrics),
        "",
        "## How to use it",
        "",
        f"    mosectl inspect hf://{repo}                    # without a download",
        f"    mosectl apply hf://{repo} --model {_given(patch.model)} -o edited/",
        f"    mosectl revert {patch.id[:12]} --model edited/",
        "",
        f"Made with {', '.join(inline(f'{k} {v}') for k, v in patch.versions.items())}.",
    ]
    return front_matter(patch.model, "adapter") + "\n" + "\n".join(body) + "\n"


def _base(made: Patch | Editor) -> str:
    at = f" @ {code(made.revision)}" if made.revision else ""
    return f"{inline(made.model)}{at} ({inline(made.model_type)})"


def _given(model: str) -> str:
    """A model's name as a word of a command; not one that is no plain name."""
    return word(model) if re.fullmatch(r"\w[\w ./-]{0,199}", model) else "MODEL"


def editor_card(editor: Editor, repo: str) -> str:
    """README.md of an editor's repository."""
    best = min(editor.history, key=lambda h: h["validation"])
    o = editor.options
    shapes = [(name, "×".join(map(str, editor.base[name]["shape"]))) for name in editor.modules]
    body = [
        f"# {inline(editor.method)} editor of {inline(editor.model)}",
        "",
        f"A network that computes knowledge edits of {_base(editor)}, editor `{editor.id}`.",
        "",
        *table(("layer", "shape"), shapes),
        "",
        f"Validation at step {best['step']:.0f}: new object {best['edit']:.2f} nats, in other words "
        f"{best['generalization']:.2f}, divergence elsewhere {best['locality']:.3f}. Trained on {inline(str(o['facts']))} "
        f"facts, validated on {inline(str(o['validated_on']))} others, by mosectl {inline(editor.version)}.",
        "",
        "## How to use it",
        "",
        f"    mosectl edit facts.jsonl --model {_given(editor.model)} --method {word(editor.method)} --editor hf://{repo}",
    ]
    return front_matter(editor.model) + "\n" + "\n".join(body) + "\n"


def _measured(metrics: dict[str, Any]) -> Iterator[str]:
    scores = metrics.get("scores")
    if isinstance(scores, dict):
        shares = [f"{inline(k)} {v:.1%}" for k, v in scores.items() if isinstance(v, float)]
        yield f"Protocol {code(str(scores.get('protocol')))} (greedy decoding from the bare prompt): {', '.join(shares)}."
        yield from (f"{inline(told)}." for told in recorded_not_counted(metrics))
    stability = metrics.get("stability")
    for s in stability if isinstance(stability, list) else []:
        if isinstance(s, dict) and "name" in s:
            names = ("norm_drift", "condition_drift", "spectrum_drift")
            drifts = ", ".join(f"{k} {s[k]:.1e}" for k in names if isinstance(s.get(k), int | float))
            yield f"- {code(str(s['name']))}: {drifts}"
