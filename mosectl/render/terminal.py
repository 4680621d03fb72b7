"""What each command shows of its result: tables and lines, printed by report.py."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mosectl.editing.methods import method
from mosectl.facts import groups as named_groups
from mosectl.facts.probe import not_counted
from mosectl.patch.record import HOLDS
from mosectl.render import scores
from mosectl.render.console import hint, line, size, table, warn
from mosectl.text.shown import answer_cell, counted, word

if TYPE_CHECKING:
    from mosectl.checkpoints.live import Asked
    from mosectl.editing.diagnosis import Diagnosis
    from mosectl.editing.edit import EditResult
    from mosectl.editing.outcome import FactResult
    from mosectl.editing.plan import Estimate
    from mosectl.editing.second_moments import Moments
    from mosectl.facts.records import Fact, FactsReport
    from mosectl.hypernetwork.file import Editor
    from mosectl.linalg.spectrum import Stability
    from mosectl.measure.evaluate import Evaluation
    from mosectl.measure.probes import ProbeAnswer
    from mosectl.model.tokens import TokenView
    from mosectl.patch.compose import Conflict
    from mosectl.patch.record import PatchFact


PROBES = 10  # that changed, shown on a terminal


def problems(found: FactsReport) -> None:
    """What is wrong in a facts file that is used all the same, and what is read in it for what."""
    for shape in found.shapes:
        hint(shape)
    for p in found.problems:
        hint(f"{p.where}: {p.what} ({'left out' if p.severity == 'error' else p.fix})")


def edit(result: EditResult, path: Path | None, model: str, missed: Path | None = None) -> None:
    """Before/after, scores, stability and times of an edit; ``missed``: the file of facts that did not take."""
    rows = [scores.of_fact(r.fact.prompt, r, _mark(r.status)) for r in result.facts]
    columns = ("prompt", "before", "after", ">P(new) before", ">P(new) after", "")
    table("Answers (greedy)", columns, rows[:60])
    if len(rows) > 60:
        line(f"… and {len(rows) - 60} more (all of them with --json, or in the patch)")
    s = result.scores
    title = f"Scores (protocol {s.protocol}: greedy decoding from the bare prompt)"
    table(title, scores.COLUMNS, list(scores.of_edit(s, result.shares)))
    line(scores.AS_QA)
    for told in not_counted(result.not_counted):
        line(told)
    _changed(result.probes, "--json has")
    if result.next_tokens:
        table(scores.next_title(result.patch.options), scores.NEXT, scores.of_next(result.next_tokens))
    stability("Stability of the changed W against W, float32", result.stability)
    line("time: " + ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in result.seconds.items()))
    own_wordings(result.facts)
    replies(result.patch.options, [f.fact.prompt for f in result.facts])
    _kept(result.facts)
    if unreached := sum(r.status in ("not reached", "not finite") for r in result.facts):
        edited = sum(r.status != "not edited" for r in result.facts)
        warn(f"{unreached} of {edited} edited facts were not reached", f": {result.remedy} may help")
    made = result.patch
    token = scores.token_of(made.method, made.options)
    if what := scores.disturbed(result.shares, token, method(made.method).gentler):
        hint(what)
    if not s.rephrasings and not s.locality_prompts and not result.not_counted:
        given = "no rephrasings and no locality prompts were given: "
        own = (
            "what else changed is measured at mosectl's own probes only"
            if result.probes
            else "what else changed is unknown"
        )
        hint(f"{given}{own}; give some in a facts file (mosectl edit FACTS or mosectl eval)")
    if path:
        line(f"patch {result.patch.id[:12]} → {path} ({size(path.stat().st_size)})")
        if missed:
            line(f"{counted(sum(not r.holds for r in result.facts), 'fact')} that did not take → {missed}")
        on, to = f"{word(path)} --model {word(model)}", "--to gguf-lora -o adapter.gguf"
        served = f"export {on} {to}" if str(model).lower().endswith(".gguf") else f"apply {on} -o edited/"
        hint(f"next: mosectl inspect {word(path)}   |   mosectl {served}")
        if missed:
            hint(f"then, on top of it: mosectl edit {word(missed)} --model edited/ -o more.safetensors")


def _kept(facts: Sequence[FactResult]) -> None:
    """What is left of the facts that held right after their batch, where there were several."""
    if asked := [r for r in facts if r.held_right_after is not None]:
        held = [r for r in asked if r.held_right_after]
        still = f", and {sum(r.holds for r in held)} of these hold at the end" if held else ""
        line(f"right after their batch {len(held)} of {counted(len(asked), 'fact')} held{still}")


def _changed(probes: Sequence[ProbeAnswer], elsewhere: str, title: str = "What else changed") -> None:
    """The probes whose answer should have stayed and did not, and those whose answer did not follow."""
    from mosectl.measure.probes import surprising  # here: torch is slow to import

    found = surprising(probes)
    if not found:
        if probes:
            line(f"{title}: nothing, at {counted(len(probes), 'probe')}")
        return
    table(title, scores.CHANGED, scores.of_probes(found[:PROBES]))
    if len(found) > PROBES:
        line(f"{len(found) - PROBES} more: {elsewhere} them all")


def _mark(status: str) -> str:
    """A status, loud where a fact was not reached."""
    return status if status in HOLDS else status.upper()


def own_wordings(facts: Sequence[FactResult] | Sequence[PatchFact]) -> None:
    """How many wordings of the model's own were edited along."""
    if own := sum(len(f.wordings) for f in facts):
        hint(f"edited with the prompts: {own} wordings of the model's own (--json lists them; --set wordings=0: none)")


def replies(options: Mapping[str, Any], prompts: Sequence[str]) -> None:
    """That facts were edited in a chat along with the text: those whose prompts are no questions (contexts.py)."""
    if options.get("replies") and (said := sum("?" not in p for p in prompts)):
        which = "" if said == len(prompts) else f" ({said} of {len(prompts)}; the rest are questions)"
        hint(f"edited in a chat, too, as replies in sentences{which} (--set replies=0: in text alone)")


def stability(title: str, drifts: Sequence[Stability]) -> None:
    """Norm, condition number and singular values of changed weights, and how far they moved."""
    rows = [
        (place(s.name), f"{s.norm_before:.4g}", f"{s.condition_before:.4g}",
         *(f"{x:.1e}" for x in (s.norm_drift, s.condition_drift, s.spectrum_drift)))
        for s in drifts
    ]  # fmt: skip
    table(title, scores.STABILITY, rows)


def estimate(e: Estimate, facts: int) -> None:
    """What an edit would take."""
    most = f", {size(e.patch_most)} where no rotation can be cut down" if e.patch_most > e.patch_bytes else ""
    rows = [
        ("model", f"{e.model} ({e.model_type}, {e.parameters / 1e6:,.1f} M parameters)"),
        ("device, dtype", f"{e.device}, {e.dtype}"),
        ("facts", str(facts)),
        ("layers", ", ".join(map(str, e.layers)) + ("  (auto: stand-ins for those chosen later)" if e.auto else "")),
        ("weights in memory", size(e.model_bytes)),
        ("peak memory", f"about {size(e.peak_bytes)}, beyond Python and PyTorch themselves (about 0.5 GB)"),
        ("patch file", f"about {size(e.patch_bytes)}{most}"),
        *((f"time: {phase}", f"about {seconds:,.0f} s") for phase, seconds in e.seconds.items()),
        ("time in all", f"about {sum(e.seconds.values()):,.0f} s"),
    ]
    table("Dry run: nothing was loaded or written", ("", ""), rows)


def check(report: FactsReport, views: Sequence[TokenView] | None) -> None:
    """Every problem of a facts file, and how the facts are tokenised."""
    if report.problems:
        table(
            "Problems", ("where", "", "what", "remedy"), [(p.where, p.severity, p.what, p.fix) for p in report.problems]
        )
    if views:
        table(
            "Tokens (span: the subject's first-last token of the prompt's, from 0; the target follows these)",
            ("fact", "subject tokens", "span", "target tokens", "note"),
            [
                (
                    f.source.rsplit("/", 1)[-1],
                    " ".join(v.subject),
                    f"{v.subject_span[0]}-{v.subject_span[1]} of {v.prompt_tokens}",
                    " ".join(v.target),
                    v.note,
                )
                for f, v in zip(report.facts, views, strict=True)
            ],
        )
    for shape in report.shapes:
        line(shape)
    rephrasings = sum(len(f.rephrase_prompts) for f in report.facts)
    usable = f"{counted(len(report.facts), 'fact')} usable, {report.skipped} not"
    told = [counted(rephrasings, "rephrasing"), _probes(report.facts, "locality")]
    told += [_probes(report.facts, "portability")] * any(f.portability for f in report.facts)
    probes = [p for f in report.facts for p in (*f.locality, *f.portability) if p.needs]
    if probes:
        n = len({need.prompt for p in probes for need in p.needs})
        told.append(f"{counted(len(probes), 'probe')} with conditions ({counted(n, 'prompt')})")
    line(f"{usable}; {', '.join(told)}")


def _probes(facts: Sequence[Fact], metric: str) -> str:
    """How many prompts facts have for a metric, and how many of them in each group."""
    groups = Counter(p.group for f in facts for p in getattr(f, metric))
    named = ", ".join(f"{n:,} {named_groups.shown(group)}" for group, n in groups.items() if group)
    return counted(groups.total(), f"{metric} prompt") + (f" ({named})" if named else "")


def doctor(d: Diagnosis, given: str) -> None:
    """What would be edited in a model, and what stands in the way; ``given``: what the user calls it."""
    a = d.architecture
    first = a.projections[0]
    rows = [
        ("model", d.model + (f" @ {d.revision}" if d.revision else "")),
        (
            "architecture",
            f"{a.model_type}{'' if a.listed else ' (unlisted: found by structure)'}, {len(a.projections)} layers",
        ),
        ("parameters", f"{d.parameters / 1e6:,.1f} M"),
        ("edited modules", f"{first.name} … {a.projections[-1].name}"),
        ("shape", first.described),
        ("bias", "yes (stays as it is)" if first.bias else "no"),
        *((f"memory, {kind}", size(n)) for kind, n in d.memory.items()),
        ("rotation", f"{size(4 * first.d**2)} a layer in a patch"),
        *(("note", n) for n in d.notes),
        *(("PROBLEM", p) for p in d.problems),
        ("verdict", "cannot be edited as it is" if d.problems else "ready to edit"),
        *([] if d.problems else [("an edit here takes", f"see mosectl edit FACTS --model {word(given)} --dry-run")]),
    ]
    table("Model", ("", ""), rows)
    table(
        "Tensors on disk",
        ("layer", "tensor", "dtype", "shape"),
        [
            (str(p.layer), n, dtype, str(list(shape)))
            for p, (n, dtype, shape) in zip(a.projections, d.tensors, strict=True)
        ],
    )


def place(name: str) -> str:
    """A module's or tensor's name in short, "24 mlp.down_proj": the number of its layer and what comes after it."""
    found = re.fullmatch(r"(?:[A-Za-z_]\w*\.)+?(\d+)\.(.+?)(?:\.weight)?", name)
    return f"{found[1]} {found[2]}" if found else name


def conflicts(found: Sequence[Conflict]) -> None:
    """What does not simply add up, on stderr: it stands beside a result."""
    for c in found:
        if c.kind != "order":
            hint(f"conflict: {c.where}: {c.what}")
    orders = [c for c in found if c.kind == "order"]
    if orders:
        largest = max(orders, key=lambda c: c.size or 0)
        pairs = len({(c.first, c.second) for c in orders})
        which = largest.what if pairs == 1 else f"the order of {pairs} pairs of patches matters"
        hint(f"note: {which}, most in {largest.where} (‖R₁R₂−R₂R₁‖/√n = {largest.size:.2g}): they go on as given")


def asked(answers: Sequence[Asked]) -> None:
    """Continuations before and after."""
    if all(a.after is None for a in answers):
        table("Answers (greedy)", ("prompt", "answer"), [(a.prompt, answer_cell(a.before.strip())) for a in answers])
    else:
        rows = [(a.prompt, *(answer_cell((text or "").strip()) for text in (a.before, a.after))) for a in answers]
        table("Answers (greedy)", ("prompt", "before", "after"), rows)


def evaluation(e: Evaluation) -> None:
    """Every metric with its interval, retention, the facts that do not hold, and what to know about it all."""
    from mosectl.measure.bootstrap import interval_text as interval  # here: numpy is slow to import
    from mosectl.measure.bootstrap import value_text as value

    rows = [
        (m.protocol, m.label, *(value(x, ".1%") for x in (m.before, m.right_after, m.after)),
         interval(m.after, ".1%"), str(m.asked))
        for m in e.metrics
        if (m.before, m.right_after, m.after) != (None, None, None)  # nothing of that kind was asked
    ]  # fmt: skip
    columns = ("protocol", "metric", ">before", ">right after", ">after", ">95 % interval", ">prompts")
    table(f"Evaluation of {e.subject.name}, {len(e.facts)} facts; before: {e.subject.base or 'none'}", columns, rows)
    for name, about in e.settings["protocols"].items():
        line(f"{name}: {about}")
    table(
        "Text",
        ("metric", ">before", ">after", ">95 % interval", "of what"),
        [
            (t.name, value(t.before, ".3f"), value(t.after, ".3f"), interval(t.after, ".3f"), t.about)
            for t in e.texts
            if (t.before, t.after) != (None, None)
        ],
    )
    title = "What else changed" if e.subject.base else "Probes without the expected answer"
    _changed(e.probes, "--json, --probes-csv and --html have", title)
    if e.next_tokens:
        table(scores.next_title(e.settings), scores.NEXT, scores.of_next(e.next_tokens))
    if e.abilities:
        title = f"Abilities (lm-evaluation-harness {e.settings['lm_eval']}; ±: standard error; interval: of the change)"
        table(title, scores.ABILITIES, scores.of_abilities(e.abilities))
    if retained := scores.retained(e):
        bins = [
            (f"{b.first}-{b.last}", "–" if b.right_after is None else f"{b.right_after:.0%}", f"{b.after:.0%}")
            for b in retained
        ]
        table("Retention (generation): facts in order that hold", ("facts", ">right after", ">after"), bins)
    if e.cohorts:
        table(scores.COHORTS_TITLE, scores.COHORTS, scores.of_cohorts(e.cohorts))
        line(scores.COHORTS_HELP)
    if lost := [f for f in e.facts if not f.holds]:
        rows = [(f.prompt, f.target_new, answer_cell(f.right_after), answer_cell(f.after)) for f in lost[:20]]
        table("Facts that do not hold (generation)", ("prompt", "new object", "right after", "after"), rows)
        if len(lost) > 20:
            line(f"… and {len(lost) - 20} more (all of them with --json, --csv or --html)")
    for note in e.notes:
        line(f"note: {note}")


def statistics(m: Moments) -> None:
    """What was computed for later edits."""
    error = f", C known to about {100 * m.error:.0f} %" if math.isfinite(m.error) else ""
    cached = " (from the cache)" if m.cached else ""
    line(f"second moments of {len(m.C)} layers over {m.tokens:,} tokens{error}{cached}")


def validated(h: Mapping[str, float]) -> None:
    """One validation of a training, as it goes on."""
    hint(
        f"step {h['step']:.0f}: validation {h['validation']:.2f} nats: new object "
        f"{h['edit']:.2f}, in other words {h['generalization']:.2f}, divergence elsewhere {h['locality']:.3f}; reached "
        f"{h['reached']:.0%}"
    )


def trained(editor: Editor, out: Path | None = None, model: str = "MODEL") -> None:
    """What a training came to, and into which file it was written just now."""
    rows = [
        (
            f"{h['step']:.0f}", f"{h['training']:.2f}" if "training" in h else "", f"{h['validation']:.2f}",
            f"{h['edit']:.2f}", f"{h['generalization']:.2f}", f"{h['locality']:.3f}", f"{100 * h['reached']:.0f} %",
        )
        for h in editor.history
    ]  # fmt: skip
    names = (">step", ">training", ">validation", ">new object", ">in other words", ">elsewhere", ">reached")
    table(f"{editor.method} on {len(editor.modules)} layers of {editor.model}, nats", names, rows)
    best = min(editor.history, key=lambda h: h["validation"])
    o = editor.options
    line(f"layers: {', '.join(editor.modules)}")
    told = ("rank", "blocks", "rate", "locality", "steps", "corpus", "seed")
    line("settings: " + ", ".join(f"{k}={o[k]}" for k in told if k in o))
    line(f"trained on {o['facts']} facts, validated on {o['validated_on']} others, up to {o['batch_size']} at once")
    line(f"kept: step {best['step']:.0f}; editor {editor.id[:12]}" + (f" → {out}" if out else ""))
    if best["step"] == o["steps"]:
        hint("the last validation was the best: more --steps may give a better one")
    if not best["step"]:
        warn("no step was better than the untrained network", ": try another --rate, more facts, more --steps")
    if out:
        hint(f"next: mosectl edit FACTS --model {word(model)} --method {word(editor.method)} --editor {word(out)}")
