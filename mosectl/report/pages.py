"""The page of a folder: an overview, what contradicts each other, then every patch, evaluation and bench."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mosectl._version import __version__
from mosectl.patch.record import HOLDS
from mosectl.render import html, page, patch_page
from mosectl.render.page import DASH, Cell, Mark, Page, Section, Table, Words, table
from mosectl.render.terminal import place
from mosectl.report.folder import EvaluationFile, Folder, PatchFile
from mosectl.text.shown import counted

BENCH = (
    "!method", "model", "!data", "!run", ">seed", ">reliability", ">generalization", ">locality", ">harmonic mean",
    ">known wordings", ">text loss before", ">text loss after", ">‖W‖ drift", ">largest σ drift", ">seconds", "!status",
)  # fmt: skip
AGES = ("!method", "model", "!data", ">seed", "!facts", ">right after", ">at the end", ">kept")


def render(found: Folder) -> str:
    """The whole page."""
    title, foot = f"mosectl report: {found.folder}", (DASH, f"mosectl {__version__}")
    return page.draw(Page(title, (summary(found),), (), _parts(found), True, foot))


def summary(f: Folder) -> str:
    """What was found, in a few sentences."""
    facts = [fact for p in f.patches for fact in p.inspection.patch.facts]
    said = []
    if f.model:
        stack = counted(len(f.model.patches), "patch", "patches")
        order = ", listed in their order" if len(f.model.patches) > 1 else ""
        said.append(f"An edited model: {html.named(f.model.model)} with {stack} applied{order}.")
    if f.patches:
        held = f"{sum(x.status in HOLDS for x in facts):,} held when made"
        said.append(f"{counted(len(f.patches), 'patch', 'patches')} with {counted(len(facts), 'fact')}: {held}.")
    rest = [(len(f.evaluations), "evaluation", ""), (len(f.results), "run of a bench", "runs of a bench")]
    rest.append((len(f.left_out), "file left out", "files left out"))
    if told := ", ".join(counted(n, one, several) for n, one, several in rest if n):
        said.append(f"{told[:1].upper()}{told[1:]}.")
    return " ".join(said)


def _parts(f: Folder) -> tuple[Section, ...]:
    return page.sections(
        Section("Patches", patch_page.overview([(p.file, p.written, p.inspection) for p in f.patches])),
        Section("Conflicts", tuple(_conflicts(f))),
        *map(_patch, f.patches),
        *(_evaluation(e) for e in f.evaluations),
        Section("Bench", _bench(f.results), page.sections(*_of_bench(f.results))),
        Section("Left out", table(("file", "~why"), [(x.file, x.why) for x in f.left_out], cards=True)),
    )


def _patch(p: PatchFile) -> Section | None:
    return patch_page.section(p.file, p.written, p.inspection, p.cohorts, p.missed)


def _evaluation(found: EvaluationFile) -> Section:
    e = found.evaluation
    notes = [Words(f"Note: {note}.") for note in e.notes]
    told = (Words(f"{html.named(e.subject.name)}: {html.lead(e)}", soft=False), *notes, Words(html.foot(e.settings)))
    return Section(f"Evaluation {found.file}", told, html.parts(e))


def _conflicts(f: Folder) -> Iterator[Table | Words]:
    if len(f.patches) < 2:
        return
    names = {p.inspection.patch.id: patch_page.short(p.file, p.inspection.patch) for p in f.patches}
    facts = [(c.where, c.what, names[c.first], names[c.second]) for c in f.conflicts if c.kind == "fact"]
    yield from table(("~prompt", "objects", "in", "and in"), facts, cards=True)
    orders = [
        (place(c.where), names[c.first], names[c.second], f"{c.size:.2g}") for c in f.conflicts if c.size is not None
    ]
    about = "The rotations of these weights do not commute: what the stack gives depends on the order of its patches."
    yield from table(
        ("!weight", "in", "and in", ">‖R₁R₂−R₂R₁‖/√n"), orders, title="Where the order matters", about=about
    )
    pairs = len(f.patches) * (len(f.patches) - 1) // 2 - f.apart
    if not f.conflicts and pairs:
        yield Words(f"None, in {counted(pairs, 'pair')} of patches.", soft=False)
    if f.apart:
        yield Words(f"{counted(f.apart, 'pair')} of patches for models of different sizes: these cannot be stacked.")


# A bench: cells as results.jsonl holds them, checked by the bench's own reader.


def _name(r: Mapping[str, Any]) -> tuple[str, str, str]:
    label, model, data = (str(r.get(name, "–")) for name in ("label", "model", "dataset"))
    return label, html.named(model), data


def _run(r: Mapping[str, Any]) -> str:
    size = r["batch_size"]
    how = "in one batch" if size in (0, r["edits"]) else "one by one" if size == 1 else f"{size:,} at a time"
    return f"{counted(r['edits'], 'fact')} {how}"


def _bench(results: Sequence[Mapping[str, Any]]) -> tuple[Table, ...]:
    return table(BENCH, [_cell(r) for r in results])


def _cell(r: Mapping[str, Any]) -> tuple[Cell, ...]:
    head = (*_name(r), _run(r), str(r["seed"]))
    if r["status"] != "done":
        return (*head, *["–"] * (len(BENCH) - len(head) - 1), Mark(r["status"], False))
    loss, drift = r["text_loss"], r["drift"]
    shares = [r["scores"].get(name) for name in ("reliability", "generalization", "locality")]
    return (
        *head, *(_value(m, ".1%") for m in shares), f"{r['harmonic']:.1%}", _value(r.get("known"), ".1%"),
        *(_value(loss.get(side), ".3f") for side in ("before", "after")),
        *(_number(drift.get(name), ".1e") for name in ("norm", "spectrum")), _number(r["seconds"].get("all"), ".1f"),
        Mark("stopped early", False) if r.get("stopped") else Mark("done", True),
    )  # fmt: skip


def _of_bench(results: Sequence[Mapping[str, Any]]) -> Iterator[Section]:
    why = [
        (*_name(r)[:2], _run(r), str(r["reason"] or r["stopped"])) for r in results if r["reason"] or r.get("stopped")
    ]
    yield Section("Runs that failed or were stopped", table(("!method", "model", "!run", "~why"), why))
    ages = [
        (*_name(r), str(r["seed"]), f"{c['name']} {c['first']}-{c['last']}",
         *(_value(c.get(name), ".1%") for name in ("right_after", "after", "kept")))
        for r in results
        for c in r.get("cohorts", ())
    ]  # fmt: skip
    yield Section("Old facts and new ones", table(AGES, ages))


def _value(measure: Mapping[str, Any] | None, form: str) -> str:
    return "–" if measure is None else _number(measure["value"], form)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"
