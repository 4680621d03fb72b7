"""The shapes of known data sets, one reader a file; an entry's shape is found by the names of its fields."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from mosectl.facts.shapes.cknowedit import CKNOWEDIT
from mosectl.facts.shapes.counterfact import COUNTERFACT
from mosectl.facts.shapes.fever import FEVER
from mosectl.facts.shapes.halluedit import HALLUEDITBENCH
from mosectl.facts.shapes.knowedit import KNOWEDIT
from mosectl.facts.shapes.mend import MEND
from mosectl.facts.shapes.mquake import MQUAKE
from mosectl.facts.shapes.own import OTHERS, OWN, REQUIRED
from mosectl.facts.shapes.qaedit import QAEDIT
from mosectl.facts.shapes.rippleedits import RIPPLEEDITS
from mosectl.facts.shapes.shape import Row, Shape
from mosectl.facts.shapes.ultraeditbench import ULTRAEDITBENCH
from mosectl.facts.shapes.wikibigedit import WIKIBIGEDIT
from mosectl.facts.shapes.zsre import ZSRE

# An entry is of the first that fits: those of requests, then mosectl's own, then those that lack one of its fields.
SHAPES = (
    MQUAKE, COUNTERFACT, OWN, QAEDIT, FEVER, ULTRAEDITBENCH, CKNOWEDIT, KNOWEDIT, HALLUEDITBENCH, WIKIBIGEDIT, ZSRE,
    MEND, RIPPLEEDITS,
)  # fmt: skip
KNOWN = OWN.fields | OTHERS
Chosen = Mapping[str, tuple[str, ...]]  # our fields, and what they are called in a file, as the user says


def shape_of(row: Row) -> Shape:
    """The shape of an entry; mosectl's own where it is of none."""
    if "prompt" in row and "requested_rewrite" not in row:
        return next((s for s in SHAPES if s.fits(row) and any("prompt" in group for group in s.tells)), OWN)
    return next((s for s in SHAPES if s.fits(row)), OWN)


def names_of(shape: Shape, chosen: Chosen) -> dict[str, tuple[str, ...]]:
    """What our fields are called in entries of a shape."""
    names = {**OWN.names, **shape.names, **chosen}
    if shape.whole_prompt and "subject" not in chosen:
        names["subject"] = (*names["subject"], *names["prompt"])
    if set(names["target_new"]) & set(names["ground_truth"]):  # the right answers are edited in, as in MEMIT's zsRE
        names["ground_truth"] = chosen.get("ground_truth", ("ground_truth",))
    return names


def nearest_shape(names: Collection[str]) -> tuple[Shape, list[str]] | None:
    """For an entry of no shape: the one whose fields it has most of, and what it lacks; None where that is mosectl's own."""
    least = sum(name in names for name in REQUIRED) / len(REQUIRED)
    best = None
    for shape in SHAPES:
        for group in shape.tells:
            share = sum(name in names for name in group) / len(group)
            if share > least and any(name in names for name in group if name not in KNOWN):
                best, least = (shape, group), share
    if best is None:
        return None
    shape, group = best
    called = names_of(shape, {})
    needed = [called[field] for field in REQUIRED if field in shape.names or (shape.names and field == "subject")]
    lacking = [*(name for name in group if name not in names), *(c[0] for c in needed if not {*c} & {*names})]
    return shape, list(dict.fromkeys(lacking))
