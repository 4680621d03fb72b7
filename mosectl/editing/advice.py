"""What may help where facts were not reached: told from what the edit was given, so that nobody is sent where they were."""

from __future__ import annotations

from mosectl.editing.methods.base import Method
from mosectl.editing.options import EditOptions, default_options

MANY = 2  # times a method's usual rounds: from here on more of them bring nothing
NARROW = 3  # layers, below which an edit has little room
TOGETHER = 100  # facts in one batch: of tens more are lost, 500 at once spoil a small model (docs/explanation)


def advice(solver: Method, options: EditOptions, layers: int, facts: int, stopped: str = "") -> str:
    """What to try next, to be followed by "may help".

    Args:
        options: settled, but for the layers, which are as they were asked for.
        layers: that were edited. facts: of the run. stopped: why the guard has ended it; empty where it has not.
    """
    if stopped:
        return solver.gentler
    if solver.remedy != Method.remedy:  # what helps it is not what helps a search
        return solver.remedy
    parts = [*_of_search(solver, options), *_of_size(options, layers, facts)]
    return ", ".join(parts[:-1]) + (" or " if len(parts) > 1 else "") + parts[-1]


def _of_search(solver: Method, options: EditOptions) -> list[str]:
    """Settings of the search and the solve that may have held it back."""
    usual, own = default_options(solver.name), {**solver.defaults, **options.solver}
    parts = []
    if solver.searches and not options.published:
        if options.targets.steps == 1 < usual.targets.steps and options.rounds == 1:  # --targets gradient
            parts.append("--targets steps")
        elif options.rounds < MANY * usual.rounds:
            parts.append("more --rounds")
        if 1 < options.targets.steps < usual.targets.steps:
            parts.append("more --set steps=…")
        if options.targets.max_displacement < usual.targets.max_displacement:
            parts.append("a larger --set max_displacement=…")
    if "preserve" in own and (options.published or own["preserve"] > solver.defaults["preserve"]):
        parts.append("a smaller --set preserve=…")
    if options.solver.get("rank"):
        parts.append("a larger --set rank=…")
    return parts


def _of_size(options: EditOptions, layers: int, facts: int) -> list[str]:
    """Facts at once, and layers."""
    size = min(options.batch_size or facts, facts)
    other = "smaller" if size > TOGETHER else "larger" if facts > TOGETHER > size and not options.published else ""
    batches = [f"{other} batches (--batch-size {TOGETHER})"] if other else []
    if options.layers == "auto":
        return batches or ["other --layers"]  # for many facts they are chosen with settings of their own
    return [*batches, "more --layers" if layers < NARROW else "other --layers, such as auto"]
