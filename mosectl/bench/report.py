"""A bench as tables and pictures, from its records alone: they can be made again at any time.

Tables follow MOSE's Tables 1 (what the edits reached) and 2 (what general ability they cost), one pair a kind of run;
the pictures are drawn in pictures.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mosectl.bench.config import OTHERS, Bench, Cell, RunKind
from mosectl.bench.pictures import svg_abilities, svg_frontier, svg_norms, svg_retention
from mosectl.bench.runner import Record, records_of
from mosectl.facts.groups import SAME_SUBJECT, shown
from mosectl.facts.probe import recorded_not_counted
from mosectl.measure.bootstrap import over_seeds, paired_lead
from mosectl.measure.groups import Part
from mosectl.storage.atomic import output_errors, write_bytes
from mosectl.text.markdown import inline, table
from mosectl.text.table import Grid

PROTOCOL = "protocol generation: greedy answers, asked after all edits"
SHARES = ("reliability", "generalization", "locality")
PROPER = ("layers", "wordings", "targets", "solve", "guard", "check")  # phases of the edit proper
_GROUPS = (
    "\n(QA): compared as question answering does: differences in case, articles, punctuation and a leading 'the city of' "
    "are ignored; a locality prompt is kept if the model gives the known answer again or, where none is known or it gave "
    "another one before, if the first three words of its answer are the same. Known wordings: rephrasings that the unedited "
    "model answered with the old object. Harmonic mean of four: of reliability, generalization over known wordings, "
    "neighbours and same subject, all (QA); where a data set names no groups, of its locality prompts and mosectl's own "
    "same-subject prompts (up to 50 facts)."
)
_AGES = (
    "\nThe oldest, middle and newest facts of a run in batches, in the order of the edit: 100 of each from 300 facts on, a "
    "tenth of the run (10 at least) below. Right after: reliability when a fact's own batch was done, asked as at the end "
    "(protocol `generation`). Kept: of the facts that held right after, the share that holds at the end. The prompts around "
    "a fact are asked at the end only."
)


def write_report(bench: Bench, wanted: Sequence[Cell], found: Mapping[str, Record], folder: Path) -> list[Path]:
    """(Re)write tables.md, norms.svg, abilities.svg and those pictures that there is something for; returns these files.

    These are frontier.svg, where data sets name groups, and retention.svg, where a run had facts enough and batches.
    """
    records = records_of(wanted, found)
    pictures = {"norms": svg_norms(records), "abilities": svg_abilities(records)}
    for name, drawn in {"frontier": svg_frontier(records), "retention": svg_retention(records)}.items():
        if drawn:
            pictures[name] = drawn
        else:  # one of an earlier configuration would pass for this one's
            with output_errors(folder / f"{name}.svg"):
                (folder / f"{name}.svg").unlink(missing_ok=True)
    files = {"tables.md": markdown(bench, tables(wanted, found), tuple(pictures))}
    files |= {f"{name}.svg": text for name, text in pictures.items()}
    for name, text in files.items():
        write_bytes(folder / name, text.encode())
    return [folder / name for name in files]


def tables(wanted: Sequence[Cell], found: Mapping[str, Record]) -> list[Grid]:
    """Two tables a kind of run, one row a model, dataset and method, and one by the age of facts; seeds are averaged."""
    out = []
    head = ("model", "dataset", "method")
    for run in dict.fromkeys(c.run for c in wanted):
        rows = _grouped([c for c in wanted if c.run == run])
        reached, cost = [], []
        groups = _groups([found[c.key] for names in rows.values() for c in names if c.key in found])
        first: dict[tuple[str, str], list[Record]] = {}  # of each model and dataset: the runs others are compared with
        for names, cells in rows.items():
            records = [found[c.key] for c in cells if c.key in found]
            good = [r for r in records if r["status"] == "done"]
            note = _note(len(cells), records)
            led = first.setdefault(names[:2], good)
            left_out = recorded_not_counted(good[0]) if good else []  # by the unedited model, the same for every seed
            told = "; ".join(filter(None, (note, *left_out)))
            reached.append((*names, *_reached(good), _lead(led, good, _of_three), *_by_group(good, groups, led), told))
            cost.append((*names, *_cost(good), note))
        columns = (*(f">{n}" for n in SHARES), ">on unseen wordings", ">harmonic mean", ">behind the first")
        columns += (*(f">{name}" for name in _group_columns(groups)), "note")
        out.append(Grid(f"{run}: what they reached ({PROTOCOL})", (*head, *columns), tuple(reached)))
        columns = (">text loss before", ">after", ">perplexity before", ">after", ">other facts kept")
        columns += (">‖W‖ drift", ">κ(W) drift", ">largest σ drift", ">seconds", ">edits/s", "note")
        out.append(Grid(f"{run}: what they cost", (*head, *columns), tuple(cost)))
        out += _by_age(run, {names: [found[c.key] for c in cells if c.key in found] for names, cells in rows.items()})
    return out


def _by_age(run: RunKind, rows: Mapping[tuple[str, ...], Sequence[Record]]) -> list[Grid]:
    """What the oldest, middle and newest facts kept, a row each; no table where no run has told them apart."""
    told = {names: [c for r in records for c in r.get("cohorts", ())] for names, records in rows.items()}
    parts = list(dict.fromkeys(_part(p) for found in told.values() for c in found for p in c["parts"]))
    out = []
    for names, found in told.items():
        for age in dict.fromkeys(c["name"] for c in found):
            same = [c for c in found if c["name"] == age]  # of each seed
            where = dict.fromkeys(f"{c['first']}-{c['last']}" for c in same)  # others where the guard has ended a run
            shares = [_summary([c.get(name) for c in same], _percent) for name in ("right_after", "after", "kept")]
            by_part = [{_part(p): p["after"] for p in c["parts"]} for c in same]
            shares += [_summary([shares_of.get(part) for shares_of in by_part], _percent) for part in parts]
            out.append((*names, f"{age} {', '.join(where)}", *shares))
    columns = ["model", "dataset", "method", "facts", ">right after", ">at the end", ">kept"]
    columns += [f">{Part(*part).label()} (QA)" for part in parts]
    return [Grid(f"{run}: what the oldest, middle and newest facts kept", tuple(columns), tuple(out))] if out else []


def _part(found: Record) -> tuple[str, str, bool]:
    return found["metric"], found["group"], found["own"]


OWN = Part("locality", SAME_SUBJECT, own=True)  # mosectl's probes


def _groups(records: Sequence[Record]) -> list[str]:
    """The groups of locality prompts that the data sets name, and last OWN's label where mosectl asked its own."""
    named = dict.fromkeys(name for r in records for name in r.get("groups", {}))
    return [*named, *([OWN.label()] if any(r.get("own_same_subject") for r in records) else [])]


def _group_columns(groups: Sequence[str]) -> list[str]:
    if not groups:
        return []
    of_four = ["harmonic mean of four", "of four, behind the first"]
    return ["on known wordings (QA)", *(f"{shown(g)} (QA)" for g in groups), *of_four]


def _by_group(records: Sequence[Record], groups: Sequence[str], first: Sequence[Record]) -> list[str]:
    if not groups:
        return []
    out = [_summary([r.get("known") for r in records], _percent)]
    shares = [{**r.get("groups", {}), OWN.label(): r.get("own_same_subject")} for r in records]
    out += [_summary([found.get(name) for found in shares], _percent) for name in groups]
    four = [{"value": v} for r in records if (v := r.get("harmonic_of_four")) is not None]
    return [*out, _summary(four, _percent), _lead(first, records, _of_four)]


def _grouped(cells: Sequence[Cell]) -> dict[tuple[str, str, str], list[Cell]]:
    """Cells that differ in their seed only."""
    out: dict[tuple[str, str, str], list[Cell]] = {}
    for c in cells:
        out.setdefault((c.model, c.dataset.name, c.label), []).append(c)
    return out


def _note(cells: int, records: Sequence[Record]) -> str:
    """What did not go as asked."""
    failed = [r["reason"] for r in records if r["status"] == "failed"]
    out = []
    if len(records) < cells:
        out.append("not run yet" if not records else f"{cells - len(records)} of {cells} seeds not run yet")
    if failed:
        out.append(("failed" if cells == 1 else f"{len(failed)} of {cells} seeds failed") + f": {failed[0]}")
    out += [f"stopped early: {r['stopped']}" for r in records if r.get("stopped")][:1]
    return "; ".join(out)


def _reached(records: Sequence[Record]) -> list[str]:
    out = [_summary([r["scores"].get(name) for r in records], _percent) for name in SHARES]
    out.append(_summary([r.get("unseen") for r in records], _percent))
    return [*out, _summary([{"value": r["harmonic"]} for r in records], _percent)]


Mean = tuple[float | None, Any]  # a record's harmonic mean, and (total, weight) of every fact for each of its shares


def _of_three(r: Record) -> Mean:
    return r["harmonic"], r.get("tallies") and [r["tallies"][name] for name in SHARES]


def _of_four(r: Record) -> Mean:
    return r.get("harmonic_of_four"), r.get("tallies_of_four")


def _lead(first: Sequence[Record], records: Sequence[Record], mean_of: Callable[[Record], Mean]) -> str:
    """How far a harmonic mean lies behind the first method's: points, with the 95 % interval of the paired difference."""
    if records is first:
        return "–"
    pairs = [(a, b) for a in first for b in records if a["seed"] == b["seed"]]
    found = [(mean_of(a), mean_of(b)) for a, b in pairs]
    leads = [a - b for (a, _), (b, _) in found if a is not None and b is not None]
    if not leads:
        return "–"
    if len(leads) > 1:
        mean, half = over_seeds(leads)
        low, high = mean - half, mean + half
    elif all(kept for _, kept in found[0]) and pairs[0][0]["edits"] == pairs[0][1]["edits"]:
        mean, low, high = paired_lead(*(kept for _, kept in found[0]))
    else:
        return _percent(leads[0])
    return f"{_percent(mean)} ({_percent(low)} to {_percent(high)})"


def _cost(records: Sequence[Record]) -> list[str]:
    out = []
    for name in ("text_loss", "perplexity"):
        out += [_summary([r[name].get(side) for r in records], "{:.3f}".format, False) for side in ("before", "after")]
    out.append(_summary([r.get("kept") for r in records], _percent))
    for name in ("norm", "condition", "spectrum"):
        out.append(_summary([{"value": r["drift"].get(name)} for r in records], "{:.1e}".format))
    out.append(_summary([{"value": r["seconds"].get("all")} for r in records], "{:.1f}".format))
    return [*out, _summary([{"value": pace} for r in records if (pace := _pace(r))], "{:.2g}".format)]


def _pace(record: Record) -> float | None:
    """Facts a second of the edit proper: no loading, no statistics, nothing asked."""
    took = sum(record["seconds"].get(phase, 0.0) for phase in PROPER)
    return record["edits"] / took if took else None


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _summary(measures: Sequence[Any], form: Callable[[float], str], interval: bool = True) -> str:
    """One seed: the value and its interval; several: their mean and its interval. null in a record was not finite."""
    asked = [m for m in measures if m is not None]
    if not asked:
        return "–"
    values = [m["value"] for m in asked]
    if any(v is None for v in values):
        return "not finite"
    if len(values) > 1:
        mean, half = over_seeds(values)
        return f"{form(mean)} ± {form(half)}" if half else form(mean)
    low, high = asked[0].get("low"), asked[0].get("high")
    bounds = f" ({form(low)}–{form(high)})" if interval and low is not None and high is not None and low < high else ""
    return form(values[0]) + bounds


def markdown(bench: Bench, grids: Sequence[Grid], pictures: Sequence[str] = ("norms", "abilities")) -> str:
    """All tables, how to read them, and the pictures by these names."""
    several = len(bench.seeds) > 1
    named = any("harmonic mean of four" in c for grid in grids for c in grid.columns)
    lines = [
        f"# {inline(bench.name)}",
        "",
        "Shares in percent under the protocol `generation`, asked after all edits, "
        + (
            f"mean over {len(bench.seeds)} seeds ± half of its 95 % interval (Student's t; none: the same in all). "
            if several
            else "with 95 % intervals over facts. "
        )
        + "Unseen wordings: rephrasings that were not edited along as the model's own wordings of the fact. Behind the "
        + "first: harmonic mean of the first method less this one's, in points, interval of the paired difference over "
        + ("seeds. " if several else "facts. ")
        + "Text loss in nats a token. "
        + f"Other facts kept: of up to {OTHERS} facts that follow the edited ones, those answered as before. "
        + "Drifts are relative, the largest over the edited weights, in float32. The collapse guard is off unless set. "
        + "Curves are taken after each batch, that of the text on the collapse guard's few pieces of the corpus: what a "
        + "method does once at the end (prune) comes after their last point.",
        *([_GROUPS] if named else []),
        *([_AGES] if any(">kept" in grid.columns for grid in grids) else []),
        *(f"\nNote: {inline(note)}." for note in bench.notes),
    ]
    for grid in grids:
        lines += ["", f"## {inline(grid.title)}", "", *table(grid.columns, grid.rows)]
    for name in pictures:
        lines += ["", f"![{name}]({name}.svg)"]
    return "\n".join([*lines, ""])
