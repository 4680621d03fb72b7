"""Several patches at once: made into one, compared, and checked for conflicts. No model is needed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch

from mosectl.errors import BaseMismatch, PatchError, UsageError
from mosectl.linalg.rotation import apart, commutator, product_svd
from mosectl.patch.change import COMPACT, Change, combined
from mosectl.patch.file import Patch, check_size
from mosectl.patch.record import BaseTensor, PatchFact
from mosectl.storage.inputs import parse_json
from mosectl.text.table import Grid

COMMUTES = 1e-6  # a commutator below this is rounding
SMALL = 2**26  # bytes that nobody minds


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
    return fact.subject.casefold().strip(), _asked(fact.subject, fact.prompt)


def _asked(subject: str, prompt: str) -> str:
    return " ".join(prompt.replace(subject, "{}").casefold().split())


def conflicts(patches: Sequence[Patch]) -> tuple[Conflict, ...]:
    """Facts that contradict each other, then rotations whose order matters, of every pair of ``patches``.

    Raises:
        BaseMismatch: they are for weights of different sizes.
    """
    check_sizes(patches)
    pairs = list(combinations([(p.id, p) for p in patches], 2))  # an id is a hash of all that a patch holds
    return tuple(c for a, b in pairs for c in _contradictions(*a, *b)) + tuple(
        c for a, b in pairs for c in _orders(*a, *b)
    )


def check_sizes(patches: Sequence[Patch]) -> None:
    """Refuse patches for models of different sizes.

    Raises:
        BaseMismatch: they edit one weight in two shapes, or their models have no width in common.
    """
    for a, b in combinations(patches, 2):
        pairs = [(a.base[m].shape, b.base[m].shape, m) for m in a.base if m in b.base]
        wrong = next((pair for pair in pairs if pair[0] != pair[1]), None)
        for module in (m for m in a.changes if m in b.changes):  # in factors, whatever the records claim
            u, v = (p.changes[module].widths() for p in (a, b))
            if any(u[k] != v.get(k, u[k]) for k in u):
                wrong = wrong or (a.base[module].shape, b.base[module].shape, module)
        ours, theirs = ({n for t in p.base.values() for n in t.shape} for p in (a, b))
        if wrong or ours.isdisjoint(theirs):
            x, y, where = wrong or (max(t.shape for t in a.base.values()), max(t.shape for t in b.base.values()), "")
            sizes = f"{a.id[:12]} ({a.model}) is for weights {list(x)}, {b.id[:12]} ({b.model}) for {list(y)}"
            fix = "give patches for one model"
            raise BaseMismatch(f"patches for models of different sizes: {sizes}", where=where, fix=fix)


def _questions(fact: PatchFact) -> tuple[str, set[str]]:
    """The fact's subject, and what is asked about it: in the prompt and in the other wordings that were edited along."""
    return question(fact)[0], {_asked(fact.subject, prompt) for prompt in (fact.prompt, *fact.wordings)}


def _contradictions(first: str, a: Patch, second: str, b: Patch) -> Iterator[Conflict]:
    known: dict[str, dict[str, PatchFact]] = {}
    for f in a.facts:
        subject, asked = _questions(f)
        known.setdefault(subject, {}).update(dict.fromkeys(asked, f))
    for f in b.facts:
        subject, asked = _questions(f)
        there = known.get(subject, {})
        other = next((there[q] for q in asked if q in there), None)
        if other and other.target_new.strip() != f.target_new.strip():
            what = f"'{other.target_new}' in {first[:12]}, '{f.target_new}' in {second[:12]}"
            yield Conflict("fact", first, second, f.prompt, what, None)


def _orders(first: str, a: Patch, second: str, b: Patch) -> Iterator[Conflict]:
    for module in (m for m in a.changes if m in b.changes):
        sizes = [
            commutator(R, S)
            for name in COMPACT
            if (R := a.changes[module].rotation(name)) is not None
            and (S := b.changes[module].rotation(name)) is not None
        ]
        if sizes and max(sizes) > COMMUTES:
            what = f"the order of {first[:12]} and {second[:12]} matters"
            yield Conflict("order", first, second, module, what, max(sizes))


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
        (A, B), (A2, B2) = ((c.factors["A"].double(), c.factors["B"].double()) for c in (a, b))
        first, between = product_svd(B, A)[1], product_svd(torch.cat([B, -B2], 1), torch.cat([A, A2]))[1]
        return float(between.norm() / first.norm().clamp_min(1e-30))
    if "A" in a.factors or "A" in b.factors:
        return None
    return max(apart(a.rotation(name), b.rotation(name)) for name in COMPACT)


def conflict_table(found: Sequence[Conflict]) -> Grid:
    """Conflicts as a table, a line each."""
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
        UsageError: fewer than two. BaseMismatch: for models of different sizes. PatchError: for other bases, in the
        wrong order, given twice, rotations and additions mixed, or more facts than one patch file can hold.
    """
    if len(patches) < 2:
        raise UsageError("there is nothing to merge", fix="give two patches or more")
    check_sizes(patches)
    if len({p.side == "additive" for p in patches}) > 1:
        fix = "apply them one after the other instead"
        raise PatchError("rotations and additive changes cannot become one change", fix=fix)
    first = patches[0]
    below, ids = list(first.parents), [p.id for p in patches]
    for i in range(len(patches)):
        _check_fits(patches[: i + 1], ids[: i + 1], below)
    modules = dict.fromkeys(m for p in patches for m in p.changes)
    bases = {m: next(p for p in patches if m in p.base).base[m] for m in modules}
    records = [{"id": own, **json.loads(p.record)} for own, p in zip(ids, patches, strict=True)]
    facts = tuple(f for p in patches for f in p.facts)
    options = {"merged": records, "chat": _same_chat(patches)}
    merged = replace(first, changes={}, method="merge", options=options, base=bases, facts=facts, metrics={})
    _check_record(merged, len(modules))  # before the work
    changes = {m: combined([p.changes[m] for p in patches if m in p.changes]) for m in modules}
    sides = {c.side() for c in changes.values()}
    if len(sides) > 1:  # one side only in some layers: the other one is left as it is
        changes = _both_sided(changes, bases)
    return replace(merged, changes=changes, side="both" if len(sides) > 1 else str(next(iter(sides))))


def _check_record(merged: Patch, modules: int) -> None:
    """Could the merged patch be read again?"""
    check_size(merged.record, modules)
    try:
        parse_json(merged.record)
    except ValueError as e:  # merges of merges of merges …
        raise PatchError(f"the merged record would be too much: {e}", fix="merge the original patches at once") from e


def _check_fits(patches: Sequence[Patch], ids: Sequence[str], below: Sequence[str]) -> None:
    """Can the last of ``patches`` be merged with those before it, all made on top of ``below``? Raises PatchError."""
    first, (*before, p), (*sooner, own) = ids[0], patches, ids
    for q in before:
        check_sizes([q, p])
    if own in sooner:
        raise PatchError(f"patch {own[:12]} is given twice", fix="leave one of the two out")
    if list(p.parents) not in (list(below), [*below, *sooner]):
        needed = ", ".join(x[:12] for x in p.parents) or "the base model"
        rest = f"give it before {first[:12]}, which was made on top of others"
        fix = "give those before it, in that order" if p.parents else rest
        raise PatchError(f"patch {own[:12]} was computed on top of {needed}", fix=fix)
    for module, made_for in p.base.items():
        other = next((q.base[module] for q in before if module in q.base), None)
        independent = list(p.parents) == list(below)
        if other and independent and other.dtype == made_for.dtype and other.sha256 != made_for.sha256:
            what = f"patches {first[:12]} and {own[:12]} are for different weights"
            raise PatchError(what, where=module, fix="merge patches for one model")


def _both_sided(changes: Mapping[str, Change], bases: Mapping[str, BaseTensor]) -> dict[str, Change]:
    """The same with an identity of rank 1 on every side that has no rotation.

    Raises:
        PatchError: its width, which only the record claims, would take much more than all that the patches hold.
    """
    held = sum(c.nbytes for c in changes.values())
    missing: dict[str, dict[str, int]] = {}  # width by the name of its side, by module
    for module, change in changes.items():
        known, shape = set(change.widths().values()), bases[module].shape
        n = next((s for s in shape if s not in known), shape[0])
        missing[module] = {dense: n for dense, (U, _) in COMPACT.items() if not {dense, U} & set(change.factors)}
    claimed = 4 * sum(n for widths in missing.values() for n in widths.values())
    if claimed > max(held, SMALL):
        what = (
            f"weights as wide as the records say would take {claimed / 1e9:.3g} GB, the patches hold {held / 1e9:.3g}"
        )
        raise PatchError(what, fix="do not use these patches")
    out = {}
    for module, change in changes.items():
        factors = dict(change.factors)
        for dense, n in missing[module].items():
            U, Q = COMPACT[dense]
            factors |= {U: torch.eye(n, 1), Q: torch.ones(1, 1)}
        out[module] = Change(factors)
    return out


def _same_chat(patches: Sequence[Patch]) -> bool:
    return any(p.options.get("chat") is True for p in patches)
