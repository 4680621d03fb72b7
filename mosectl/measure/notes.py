"""What a reader of an evaluation must know to read its numbers right."""

from __future__ import annotations

from collections.abc import Sequence

from mosectl.facts.corpus import Corpus
from mosectl.facts.groups import NEIGHBOURS, SAME_SUBJECT
from mosectl.facts.probe import NotCounted, not_counted
from mosectl.facts.records import Fact
from mosectl.measure.answers import unseen
from mosectl.measure.before_after import Subject
from mosectl.measure.bootstrap import measure
from mosectl.measure.groups import GREEDY
from mosectl.measure.metrics import Metric, Sides
from mosectl.measure.own_probes import made
from mosectl.measure.perplexity import TextLoss, read_note
from mosectl.patch.record import PatchFact
from mosectl.text.shown import counted


def notes_of(
    facts: Sequence[Fact],
    protocols: Sequence[str],
    subject: Subject,
    sides: Sides,
    text: TextLoss,
    bound: float | None,
    corpus: Corpus,
    chat: bool,
    records: Sequence[PatchFact | None],
) -> list[str]:
    """What a reader must know to read the numbers right."""
    out = []
    if subject.base is None:
        out.append(
            "there is no model from before the edit: locality under generation, qa and easyedit is against the facts' "
            "known answers (right or wrong), not against the earlier answers (changed or not); --base gives that model"
        )
    out += _unknown_answers(facts, protocols, subject)
    no_truth = sum(f.ground_truth is None for f in facts)
    if no_truth and "memit" in protocols:
        out.append(f"{no_truth} facts without ground_truth do not count for reliability and generalization under memit")
    if corpus.sha256 in subject.corpora:
        out.append(f"the perplexity text ({corpus.name}) also served the edit as statistics: it is not held out")
    elif corpus.name == "embedded":
        out.append("perplexity is on mosectl's small embedded corpus; --text measures it on yours")
    if note := read_note(text, bound):
        out.append(note)
    out += _chat_notes(subject, chat)
    own = [r.wordings if r else () for r in records]
    if along := sum(p in w for f, w in zip(facts, own, strict=True) for p in f.rephrase_prompts):
        others = measure(unseen(facts, [a.rephrased for a in sides.now], own))
        share = f"on the others generalization is {others.value:.1%}" if others else "there are no others"
        out.append(
            f"{counted(along, 'rephrasing')} edited along, as the model's own wordings of the facts: {share} (generation)"
        )
    known = sum(r is not None for r in records)
    if known < len(facts) and subject.patches:
        out.append(f"{known} of {len(facts)} facts stand in the patches; only these have a 'right after'")
    if unknown := sum(r is not None and r.right_after is None for r in records):
        out.append(
            f"of {counted(unknown, 'fact')} the patch does not say what the model answered right after its own batch: there "
            "'right after' is when the patch was made"
        )
    return out


def _chat_notes(subject: Subject, chat: bool) -> list[str]:
    out = []
    if subject.patches and subject.chat != chat:
        out.append(f"the patch was made {'with' if subject.chat else 'without'} --chat, and is asked otherwise here")
    if chat:
        out.append(
            "in a chat many models answer in a sentence: reliability and generalization ask for answers that begin with the "
            "new object, and the first three words that qa compares may say nothing of it yet"
        )
    return out


def _unknown_answers(facts: Sequence[Fact], protocols: Sequence[str], subject: Subject) -> list[str]:
    """Which protocols judge locality prompts without a known answer."""
    unknown = sum(p.answer is None for f in facts for p in f.locality)
    if not unknown or (subject.base is not None and set(protocols) <= set(GREEDY)):
        return []
    without = f"the facts file gives no answer for {counted(unknown, 'locality prompt')}"
    if subject.base is None:
        return [
            f"{without}: without the unedited model (--base) there is nothing to compare with, so they are left out"
        ]
    return [f"{without}: generation and qa compare the answers before and after, the other protocols leave them out"]


def own_notes(facts: Sequence[Fact], metrics: Sequence[Metric]) -> list[str]:
    """Which numbers rest on probes of mosectl's own."""
    own = {m.group for m in metrics if m.own}
    out = [made(facts)] if SAME_SUBJECT in own else []
    if NEIGHBOURS in own:
        out.append(
            "the neighbours are mosectl's own choice, as the facts name none: facts of the file with the wording of "
            "an edited one that the patches do not hold"
        )
    return out


def condition_notes(facts: Sequence[Fact], subject: Subject, left_out: Sequence[NotCounted]) -> list[str]:
    """What does not count, as the model did not know what it builds on; or that nobody knows whether it did."""
    unknown = sum(bool(p.needs) for f in facts for p in (*f.locality, *f.portability))
    if subject.base is None and unknown:
        what = f"{counted(unknown, 'prompt')} with conditions count whether or not they were met"
        return [f"there is no model from before the edit: {what}"]
    return not_counted(left_out)
