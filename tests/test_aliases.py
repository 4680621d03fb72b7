"""Other names of the new object and of known answers: right answers, from the file to the judgement and the patch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mosectl
from mosectl.checkpoints import conflicts
from mosectl.errors import EditFailed, PatchError
from mosectl.facts.records import Fact, Probe
from mosectl.measure import qa
from mosectl.measure.answers import interview, same_answer, talk
from mosectl.measure.own_probes import counts, objects_by_subject, own_probes
from mosectl.measure.protocols import PROTOCOLS, Answers
from mosectl.model.generation import says
from mosectl.model.questions import generate
from mosectl.model.scoring import encode_pairs, paired, score
from mosectl.patch.file import Patch
from support.facts import CORPUS, few
from support.models import make_tokenizer, pico, save
from support.patches import make, patch_for

FACT = Fact(
    "The capital of Ava is", "Ava", "New Brin", "Quill", ("Ava's seat is",),
    (Probe("Oz is in", "Emland", "", ("the Em",)), Probe("The cello", "x")),
    (Probe("Who rules Ava?", "Bo", "", ("King Bo",)),), target_aliases=("Brin II", "NB"),
)  # fmt: skip
SILENT = Answers("", ("",), ("", ""), ("",), {})


def test_one_of_several() -> None:
    assert says(" NB is", "New Brin", "NB") and not says(" NBX", "New Brin", "NB") and not says(" NB")
    assert qa.says(" the nb", "New Brin", "NB") and not qa.says(" nb", "New Brin") and not qa.says("x", "!!")
    assert (
        same_answer(" Em", " Ko", "Em", "Ko")
        and not same_answer(" Em", " Oz", "Em", "Ko")
        and not same_answer("a", "b")
    )
    assert qa.kept(" The Em", " ko", "Em", "Ko") and not qa.kept(" Em", " Oz", "Em", "Ko")


@pytest.mark.parametrize("protocol", ["generation", "qa"])
def test_aliases_are_right_answers(protocol: str) -> None:
    def judged(now: Answers, before: Answers | None = SILENT) -> dict[str, float]:
        return {name: tally.total for name, tally in PROTOCOLS[protocol].judge(FACT, now, before).items()}

    now = Answers(" NB.", (" Brin II",), (" the Em", " y"), (" King Bo rules",), {})
    old = replace(SILENT, local=(" Emland", " z"))
    assert judged(now, old) == {"reliability": 1, "generalization": 1, "locality": 1, "portability": 1}
    assert judged(now, None)["locality"] == 1
    bare = replace(FACT, target_aliases=(), locality=(Probe("Oz is in", "Emland"), Probe("The cello", "x")), portability=(
        Probe("Who rules Ava?", "Bo"),
    ))  # fmt: skip
    assert {n: t.total for n, t in PROTOCOLS[protocol].judge(bare, now, old).items()} == dict.fromkeys(judged(now), 0)


def test_teacher_forced_protocols_score_the_first_name() -> None:
    asked = [pair for name in ("easyedit", "memit", "zsre") for pair in PROTOCOLS[name].needs(FACT)]
    assert paired(FACT, FACT.prompt, "New Brin") in asked
    assert {pair[1] for pair in asked} == {"New Brin", "Quill", "Emland", "x", "Bo"}


def test_a_probe_of_our_own_that_says_an_alias_watches_the_fact() -> None:
    (objects,) = objects_by_subject([FACT], [""])
    assert not counts(objects, " NB again") and counts(objects, " large")
    assert own_probes([replace(FACT, prompt="Ava", subject="Ava")], False) == ((),), "a prompt that is all subject"


def test_answers_are_as_long_as_the_longest_name_asks() -> None:
    model, tokenizer = pico("llama"), make_tokenizer()
    (said,) = generate(model, tokenizer, ["I met Tomas Veldrin"], max_new_tokens=14)
    long = " ".join(said.split())
    fact = Fact("I met Tomas Veldrin", "Tomas Veldrin", "x", target_aliases=(long,))
    assert len(tokenizer(" x")["input_ids"]) + 2 < 14, "the target alone asks for less"
    heard = interview(model, tokenizer, [fact]).answers[0].text
    assert " ".join(heard.split()).startswith(long)
    hop = Probe("I met Tomas Veldrin", "x", "", (long,))
    local = interview(
        model, tokenizer, [replace(fact, prompt="Who", subject="Who", target_aliases=(), locality=(hop,))]
    )
    assert " ".join(local.local[0][0].split()).startswith(long)
    bare = replace(fact, prompt="Who", subject="Who", target_aliases=())
    scores = score(model, encode_pairs(tokenizer, [paired(bare, "Who", "x")]))
    heard = talk(model, tokenizer, [bare], [[hop]], scores, long=False).portable[0][0]
    assert " ".join(heard.split()).startswith(long)


def test_a_model_that_says_an_alias_knows_the_fact(tmp_path: Path) -> None:
    model, tokenizer = pico("llama"), make_tokenizer()
    (tmp_path / "corpus.txt").write_text(CORPUS)
    (said,) = generate(model, tokenizer, ["We went to Avaland"], max_new_tokens=1)
    known = Fact("We went to Avaland", "Avaland", "and", target_aliases=(said.strip(),))
    if not said.strip() or not says(said, said.strip()):
        pytest.skip("this model's first token is no word")
    with pytest.raises(EditFailed, match="the model already says every new target"):
        mosectl.edit([known], model, tokenizer, options=few(str(tmp_path / "corpus.txt"), wordings=0))


# Patches.


def test_a_patch_keeps_aliases(tmp_path: Path) -> None:
    (fact,) = make().facts
    named = replace(fact, target_aliases=("B", "bee"))
    assert "target_aliases" not in fact.to_record() and named.to_record()["target_aliases"] == ("B", "bee")
    make(facts=(named,)).save(tmp_path / "p")
    back = Patch.load(tmp_path / "p")
    assert back.facts == (named,) and back.facts[0].targets == ("b", "B", "bee")
    wrong: Any = ("B", 7)
    make(facts=(replace(fact, target_aliases=wrong),)).save(tmp_path / "q")
    with pytest.raises(PatchError, match=r"facts\[0\].target_aliases\[1\]: must be a text"):
        Patch.load(tmp_path / "q")


def test_a_fact_that_says_an_alias_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "m")
    patch = patch_for(folder)
    (fact,) = make().facts
    named = replace(
        fact, prompt="I met Tomas", subject="Tomas", target_new="and", after="plus", target_aliases=("plus",)
    )
    monkeypatch.setattr(conflicts, "generate", lambda model, tokenizer, prompts, **_: [" plus one"] * len(prompts))
    both = [replace(patch, facts=(f,)) for f in (named, replace(named, target_aliases=(), after="and"))]
    told = conflicts._lost(both, [], folder, None, "cpu", None)
    assert [(c.kind, c.first) for c in told] == [("lost", both[1].id)]
