"""Several patches at once: made into one, compared, and checked for conflicts. No model is needed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch

from mosectl.change import COMPACT, Change, combined
from mosectl.errors import BaseMismatch, PatchError, UsageError
from mosectl.grid import Grid
from mosectl.patch import Patch, PatchFact
from mosectl.rotation import commutator

COMMUTES = 1e-6  # a commutator below this is rounding


@dataclass(frozen=True)
class Conflict:
    """Two patches that do not simply add up."""

    # "fact": they give one question different answers; "order": their rotations do not commute; "lost": with the second, a
    # fact of the first no longer holds
    kind: str
    first: str  # ids
    second: str
    where: str  # prompt, or module
    what: str
    size: float | None  # of "order": ‖R₁R₂ − R₂R₁‖_F / √n, the larger of both sides


@dataclass(frozen=True)
class Difference:
    """What distinguishes two patches."""

    only_first: tuple[PatchFact, ...]
    only_second: tuple[PatchFact, ...]
    common: tuple[PatchFact, ...]  # the same question, the same object
    conflicts: tuple[Conflict, ...]
    # By module: how far the changes lie apart; None: in one of them only, or a rotation here and an addition there
    modules: tuple[tuple[str, float | None], ...]


def question(fact: PatchFact) -> tuple[str, str]:
    """What a fact is about: its subject, and its prompt without it."""
    return fact.subject.casefold().strip(), " ".join(fact.prompt.replace(fact.subject, "{}").casefold().split())


def conflicts(patches: Sequence[Patch]) -> tuple[Conflict, ...]:
    """Facts that contradict each other, then rotations whose order matters, of every pair of ``patches``."""
    check_sizes(patches)
    pairs = list(combinations(patches, 2))
    return tuple(c for a, b in pairs for c in _contradictions(a, b)) + tuple(c for a, b in pairs for c in _orders(a, b))


def check_sizes(patches: Sequence[Patch]) -> None:
    """Refuse patches for models of different sizes.

    Raises:
        BaseMismatch: they edit one weight in two shapes, or their models have no width in common.
    """
    for a, b in combinations(patches, 2):
        pairs = [(a.base[m].shape, b.base[m].shape, m) for m in a.base if m in b.base]
        wrong = next((pair for pair in pairs if pair[0] != pair[1]), None)
        ours, theirs = ({n for t in p.base.values() for n in t.shape} for p in (a, b))
        if wrong or ours.isdisjoint(theirs):
            x, y, where = wrong or (max(t.shape for t in a.base.values()), max(t.shape for t in b.base.values()), "")
            sizes = f"{a.id[:12]} ({a.model}) is for weights {list(x)}, {b.id[:12]} ({b.model}) for {list(y)}"
            fix = "give patches for one model"
            raise BaseMismatch(f"patches for models of different sizes: {sizes}", where=where, fix=fix)


def _questions(fact: PatchFact) -> set[tuple[str, str]]:
    """The fact's question, and its other wordings that were edited along."""
    return {question(replace(fact, prompt=prompt)) for prompt in (fact.prompt, *fact.wordings)}


def _contradictions(a: Patch, b: Patch) -> Iterator[Conflict]:
    known = {q: f for f in a.facts for q in _questions(f)}
    for f in b.facts:
        other = next((known[q] for q in _questions(f) if q in known), None)
        if other and other.target_new.strip() != f.target_new.strip():
            what = f"'{other.target_new}' in {a.id[:12]}, '{f.target_new}' in {b.id[:12]}"
            yield Conflict("fact", a.id, b.id, f.prompt, what, None)


def _orders(a: Patch, b: Patch) -> Iterator[Conflict]:
    for module in (m for m in a.changes if m in b.changes):
        sizes = [
            commutator(R, S)
            for name in COMPACT
            if (R := a.changes[module].rotation(name)) is not None
            and (S := b.changes[module].rotation(name)) is not None
        ]
        if sizes and max(sizes) > COMMUTES:
            what = f"the order of {a.id[:12]} and {b.id[:12]} matters"
            yield Conflict("order", a.id, b.id, module, what, max(sizes))


def diff(a: Patch, b: Patch) -> Difference:
    """Compare two patches: their facts, and what they do to each weight.

    The distance of two rotations is ‖R_a − R_b‖_F / √n, the larger of both sides; of additions, ‖B A − B' A'‖ / ‖B A‖.
    """
    ours, theirs = {question(f): f for f in a.facts}, {question(f): f for f in b.facts}
    same = [q for q in ours if q in theirs and ours[q].target_new.strip() == theirs[q].target_new.strip()]
    modules = [*a.changes, *(m for m in b.changes if m not in a.changes)]
    return Difference(
        only_first=tuple(f for q, f in ours.items() if q not in theirs),
        only_second=tuple(f for q, f in theirs.items() if q not in ours),
        common=tuple(ours[q] for q in same),
        conflicts=conflicts([a, b]),
        modules=tuple((m, _distance(a.changes.get(m), b.changes.get(m))) for m in modules),
    )


def _distance(a: Change | None, b: Change | None) -> float | None:
    if a is None or b is None:
        return None
    if "A" in a.factors and "A" in b.factors:
        first, second = (c.factors["B"].double() @ c.factors["A"].double() for c in (a, b))
        return float((first - second).norm() / first.norm().clamp_min(1e-30))
    ours, theirs = a.dense().factors, b.dense().factors
    if "A" in ours or "A" in theirs:
        return None
    still = {name: torch.eye(len(R)) for name, R in {**ours, **theirs}.items()}  # no rotation on a side: the identity
    return max(
        float((ours.get(name, eye) - theirs.get(name, eye)).norm()) / len(eye) ** 0.5 for name, eye in still.items()
    )


def conflict_table(found: Sequence[Conflict]) -> Grid:
    rows = tuple((c.kind, c.where, c.what, "–" if c.size is None else f"{c.size:.2g}") for c in found)
    return Grid("Conflicts", ("kind", "where", "what", ">‖R₁R₂−R₂R₁‖/√n"), rows)


def difference_tables(d: Difference) -> list[Grid]:
    """Facts in one patch or both, conflicts, and how far the changes of each weight lie apart."""
    facts = [("first only", f) for f in d.only_first] + [("second only", f) for f in d.only_second]
    rows = tuple((where, f.prompt, f.target_new) for where, f in [*facts, *(("both", f) for f in d.common)])
    modules = tuple((m, "not comparable" if x is None else f"{x:.3g}") for m, x in d.modules)
    return [
        Grid("Facts", ("in", "prompt", "new object"), rows),
        conflict_table(d.conflicts),
        Grid("Weights", ("module", ">distance"), modules),
    ]


def merge(patches: Sequence[Patch]) -> Patch:
    """One patch that does what ``patches`` do in their order; its record keeps all of theirs.

    Raises:
        UsageError: fewer than two. BaseMismatch: for models of different sizes. PatchError: for different bases, in the
        wrong order, given twice, or rotations and additions mixed.
    """
    if len(patches) < 2:
        raise UsageError("there is nothing to merge", fix="give two patches or more")
    check_sizes(patches)
    first = patches[0]
    below = list(first.parents)
    for i, p in enumerate(patches):
        _check_fits(p, first, patches[:i], below)
    modules = dict.fromkeys(m for p in patches for m in p.changes)
    changes = {m: combined([p.changes[m] for p in patches if m in p.changes]) for m in modules}
    sides = {c.side() for c in changes.values()}
    if len(sides) > 1:  # one side only in some layers: the other one is left as it is
        changes = {m: _both_sided(c, next(p for p in patches if m in p.base).base[m].shape) for m, c in changes.items()}
    return Patch(
        changes=changes,
        method="merge",
        side="both" if len(sides) > 1 else str(next(iter(sides))),
        options={"merged": [{"id": p.id, **json.loads(p.record)} for p in patches], "chat": _same_chat(patches)},
        model=first.model,
        revision=first.revision,
        model_type=first.model_type,
        base={m: next(p for p in patches if m in p.base).base[m] for m in modules},
        facts=tuple(f for p in patches for f in p.facts),
        metrics={},
        seed=first.seed,
        versions=first.versions,
        parents=first.parents,
    )


def _check_fits(p: Patch, first: Patch, before: Sequence[Patch], below: Sequence[str]) -> None:
    ids = [q.id for q in before]
    if p.id in ids:
        raise PatchError(f"patch {p.id[:12]} is given twice", fix="leave one of the two out")
    if list(p.parents) not in (list(below), [*below, *ids]):
        needed = ", ".join(x[:12] for x in p.parents) or "the base model"
        sooner = f"give it before {first.id[:12]}, which was made on top of others"
        fix = "give those before it, in that order" if p.parents else sooner
        raise PatchError(f"patch {p.id[:12]} was computed on top of {needed}", fix=fix)
    for module, made_for in p.base.items():
        other = next((q.base[module] for q in before if module in q.base), None)
        independent = list(p.parents) == list(below)
        if other and independent and other.dtype == made_for.dtype and other.sha256 != made_for.sha256:
            what = f"patches {first.id[:12]} and {p.id[:12]} are for different weights"
            raise PatchError(what, where=module, fix="merge patches for one model")


def _both_sided(change: Change, shape: tuple[int, ...]) -> Change:
    """The same with an identity of rank 1 on a side that has no rotation; ``shape`` is the weight's."""
    factors = dict(change.factors)
    known = {len(f) for name, f in factors.items() if name in ("R", "U", "R_in", "U_in")}
    for dense, (U, Q) in COMPACT.items():
        if dense not in factors and U not in factors:
            n = next((s for s in shape if s not in known), shape[0])
            factors |= {U: torch.eye(n, 1), Q: torch.ones(1, 1)}
    return Change(factors)


def _same_chat(patches: Sequence[Patch]) -> bool:
    return any(p.options.get("chat") is True for p in patches)
