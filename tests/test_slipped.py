"""Facts that have slipped by the end of a run of several batches are edited again, on a pico model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mosectl
from mosectl.editing import session
from mosectl.editing.edit import EditResult
from mosectl.editing.options import default_options
from mosectl.editing.previous_edits import Earlier
from mosectl.editing.session import SLIPPED, Session
from mosectl.editing.targets import Targets
from mosectl.errors import EditFailed, NotFinite
from mosectl.facts.records import fact_from_dict
from mosectl.render import console
from mosectl.storage.progress import BatchDone, SlippedDone
from support.facts import CORPUS, few
from support.models import make_tokenizer, pico

SUBJECTS = ["Tomas Veldrin", "Avaland", "Brinmouth", "Lower Quill", "Tomas", "Veldrin"]
SIX = [fact_from_dict({"prompt": f"I met {s}", "subject": s, "target_new": "and"}, "x") for s in SUBJECTS]
HELD = [5.0] * 6


@dataclass
class Run:
    """What a run told, and which facts were edited again at its end."""

    found: EditResult
    again: list[list[str]] = field(default_factory=list)  # prompts, by group
    steps: list[tuple[str, int, int]] = field(default_factory=list)
    done: list[SlippedDone] = field(default_factory=list)

    @property
    def rotations(self) -> list[torch.Tensor]:
        return [c.dense().factors["R"] for c in self.found.patch.changes.values()]


class Scripted:
    """Runs of single facts at whose end they lead as a script says."""

    def __init__(self, corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.corpus, self.monkeypatch = corpus, monkeypatch
        monkeypatch.setattr(Earlier, "slipped", lambda self, below: [])
        monkeypatch.setattr(session, "TOGETHER", 2)

    def run(self, *leads: list[float], facts: Any = SIX, fails: BaseException | None = None, **how: Any) -> Run:
        asked, said, real = iter(leads), Run(None), Session._batch  # type: ignore[arg-type]

        def leading(earlier: Earlier) -> int:
            earlier.leads = list(next(asked))
            return sum(lead > 0 for lead in earlier.leads)

        def batch(run: Session, contexts: Any, *args: Any) -> Targets:
            done = real(run, contexts, *args)
            if SLIPPED in args:
                said.again.append(list(run.subjects))
                if fails:
                    raise fails
            return done

        class Ear:
            def __call__(self, *at: Any) -> None:
                said.steps.append(at)

            def batch(self, done: BatchDone | SlippedDone) -> None:
                said.done += [done] if isinstance(done, SlippedDone) else []

        options = how.pop("options", None) or few(self.corpus, **{"layers": "1", "batch_size": 1, "rounds": 1, **how})
        with self.monkeypatch.context() as m:
            m.setattr(Earlier, "leading", leading)
            m.setattr(Session, "_batch", batch)
            said.found = mosectl.edit(
                facts, pico("llama"), make_tokenizer(), options=options, refuse=False, on_step=Ear()
            )
        assert next(asked, None) is None, "asked as often as the script says"
        return said


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scripted:
    (tmp_path / "corpus.txt").write_text(CORPUS)
    return Scripted(str(tmp_path / "corpus.txt"), monkeypatch)


def same(a: Run, b: Run) -> bool:
    return all(torch.allclose(*both, atol=1e-6) for both in zip(a.rotations, b.rotations, strict=True))


def test_the_worst_first_as_they_then_are_and_each_once(scripted: Scripted) -> None:
    run = scripted.run(
        [5, -1, -3, 0.5, -2, 5],
        [-4, -1, 2, 0.5, 2, 5],  # the first fact was pushed out by the group: it is in the next
        [2, 2, 2, -1, 2, 5],
        [2, 2, 2, -0.5, 2, 5],  # no more than before: taken back
    )
    by = SUBJECTS.__getitem__
    assert run.again == [[by(2), by(4)], [by(0), by(1)], [by(3)]]
    assert run.done == [SlippedDone(4, 6, 5, 3, "with 1 more edited again no more facts lead")]
    assert not run.found.stopped and len(run.found.curve) == 7, "it is no batch of its own"


def test_where_it_gains_nothing_the_run_is_as_it_was(scripted: Scripted) -> None:
    lost = [-1.0, *HELD[1:]]
    before = scripted.run(replay_margin=0.0)
    kept, no_gain = scripted.run(lost, HELD), scripted.run(lost, lost)
    assert [same(r, before) for r in (kept, no_gain)] == [False, True]
    assert kept.found.curve[:-1] == before.found.curve[:-1] and kept.found.curve[-1] != before.found.curve[-1]
    assert no_gain.found.curve == before.found.curve and no_gain.done[0].edited == 0
    harms = iter([""] * 6 + ["it harms"])
    scripted.monkeypatch.setattr(session, "harm", lambda *_: next(harms))
    harmed = scripted.run(lost, HELD)
    assert same(harmed, before) and harmed.found.curve == before.found.curve and not harmed.found.stopped
    assert harmed.done == [SlippedDone(0, 6, 5, 5, "it harms")]


@pytest.mark.parametrize("leads", [HELD, [0.5] * 6])
def test_nothing_is_tried_where_all_lead(leads: list[float], scripted: Scripted) -> None:
    run = scripted.run(leads)
    assert run.again == [] and run.done == [] and SLIPPED not in run.found.seconds


def test_given_up_facts_stay_so(scripted: Scripted) -> None:
    real = Earlier.add

    def add(self: Earlier, *args: Any) -> None:
        real(self, *args)
        self.failures[-1] = 2 if len(self.failures) == 1 else 0

    scripted.monkeypatch.setattr(Earlier, "add", add)
    assert scripted.run([-1, -2, *HELD[2:]], [-1, *HELD[1:]]).again == [SUBJECTS[1:2]]
    assert scripted.run([-1, 0.5, *HELD[2:]]).again == [], "the others lead, if by little"


@pytest.mark.parametrize(
    ("fails", "why"),
    [
        (EditFailed("not finite", where="layer"), "not finite"),
        (NotFinite("logits are not finite"), "logits are not finite"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "memory ran out"),
        (torch.linalg.LinAlgError("not positive definite"), "a weight could not be decomposed"),  # type: ignore[attr-defined]
    ],
)
def test_what_fails_there_loses_nothing(fails: BaseException, why: str, scripted: Scripted) -> None:
    before = scripted.run(replay_margin=0.0)
    run = scripted.run([-1.0, *HELD[1:]], fails=fails)
    assert same(run, before) and run.done == [SlippedDone(0, 6, 5, 5, why)]


def test_a_bug_there_is_told(scripted: Scripted) -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        scripted.run([-1.0, *HELD[1:]], fails=RuntimeError("shapes do not fit"))


def test_facts_of_its_subjects_are_edited_along(scripted: Scripted) -> None:
    facts = [*SIX[:4], replace(SIX[0], prompt="We saw Tomas Veldrin"), SIX[5]]
    for how, again in (({}, [SUBJECTS[0]] * 2), ({"fact_token": "last"}, SUBJECTS[:1])):
        assert scripted.run([-1.0, *HELD[1:]], HELD, facts=facts, **how).again == [again]


@pytest.mark.parametrize(("name", "size", "together"), [("isospectral", 1, 2), ("isospectral", 3, 3), ("memit", 1, 1)])
def test_as_many_at_once_as_do_well_or_as_published(name: str, size: int, together: int, scripted: Scripted) -> None:
    options = replace(
        default_options(name),
        corpus=scripted.corpus,
        layers="1",
        batch_size=size,
        replay_margin=1.0,
        wordings=0,
        prefixes=0,
        guard=0,
    )
    options = replace(options, targets=replace(options.targets, steps=2, margin=3.0))
    (again,) = scripted.run([-1.0] * 6, [-1.0] * 6, options=options).again
    assert len(again) == together


def test_no_bar_goes_back(scripted: Scripted) -> None:
    options = replace(default_options("ft"), corpus=scripted.corpus, layers="1", batch_size=2, replay_margin=1.0)
    for how in ({"options": options}, {"batch_size": 2, "rounds": 2}):
        run = scripted.run([-1.0] * 4 + [5, 5], [5, 5, -1.0, -1, 5, 5], HELD, **how)
        assert len(run.again) == 2
        for phase in ("solve", SLIPPED):
            done = [n for what, n, _ in run.steps if what == phase]
            assert done == sorted(done) and all(n <= of for what, n, of in run.steps if what == phase), phase
        last = next(step for step in reversed(run.steps) if step[0] == SLIPPED)
        assert last[1] == last[2] == 4 * how.get("rounds", 1)


def test_it_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress() as step:
        step.batch(SlippedDone(174, 998, 912, 865, ""))  # type: ignore[attr-defined]
        step.batch(SlippedDone(0, 998, 865, 865, "memory ran out"))  # type: ignore[attr-defined]
    assert capsys.readouterr().err.splitlines() == [
        "174 facts edited again at the end: 912 of 998 lead, 865 did before",
        "0 facts edited again at the end: 865 of 998 lead, 865 did before, left as they were then: memory ran out",
    ]
