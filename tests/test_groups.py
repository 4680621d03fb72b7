"""Groups of probes from the file to the tables: comparison as QA does, known wordings, own probes, next tokens."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mosectl
from mosectl.bench.report import _lead, _of_four, tables
from mosectl.bench.runner import _check
from mosectl.checkpoints.live import patched
from mosectl.editing.layers import settled
from mosectl.editing.options import options_from
from mosectl.errors import NotFinite, PatchError, UsageError
from mosectl.facts.groups import SAME_SUBJECT
from mosectl.facts.records import Fact, Probe, fact_from_dict
from mosectl.measure import groups, next_tokens, probes, qa
from mosectl.measure.answers import FactAnswer, Interview, interview
from mosectl.measure.bootstrap import Tally
from mosectl.measure.groups import KNOWN, Part, Share, parts, tallies, unedited_neighbours
from mosectl.measure.own_probes import MOST_FACTS, own_probes, spread
from mosectl.measure.protocols import Answers
from mosectl.patch.file import Patch
from mosectl.render import html, terminal
from mosectl.render.scores import disturbed, token_of
from mosectl.storage.schema import Misfit
from support.commands import EASY, run
from support.evaluations import FACTS, World
from support.facts import CORPUS, few
from support.models import make_tokenizer, pico, save
from support.patches import patch_for
from support.paths import ROOT


@pytest.mark.parametrize(
    ("text", "expected", "strictly"),
    [
        (" rome, the eternal city", "Rome", False),
        (" the city of Rome.", "Rome", False),
        (" The City of Rome.The", "Rome", False),
        (" a Netherlands", "the Netherlands", False),
        (" U.S. and more", "US", False),
        (" “Rome”", "Rome", False),
        (" Rome's walls", "Rome", True),  # as QA would write it, "romes"
        ("罗马是", "罗马", True),
        (" The The", "The The", True),  # nothing is left of it
        (" Romemaster", "Rome", None),
        (" city office", "office", None),
        (" is Rome", "Rome", None),
        (" x", "!!", None),
        ("", "Rome", None),
    ],
)  # fmt: skip
def test_comparison_as_qa_does(text: str, expected: str, strictly: bool | None) -> None:
    from mosectl.model.generation import says

    assert qa.says(text, expected) == (strictly is not None) and says(text, expected) == bool(strictly)


def test_kept_is_the_known_answer_or_the_first_three_words() -> None:
    assert qa.kept(" Dublin, a city", " the city of Dublin", "Dublin")
    assert not qa.kept(" Dublin, a city", " Cork", "Dublin")
    assert qa.kept(" a love of music and dance", " love of music. Also"), "articles aside, three words"
    assert not qa.kept(" love of music", " love of dance")
    assert qa.kept(" Cork in the far south", " Cork in the far north", "Dublin"), "wrong before: the same words again"
    assert qa.kept("", " ") and not qa.kept("", " Cork")
    assert qa.mentions("of old Dublin town", "The Dublin") and not qa.mentions("Dubliners", "Dublin")


FACT = Fact(
    "The capital of Ava is", "Ava", "Rome", "Brin", ("Ava's seat is", "Ava obeys", "Q: Ava? A:"),
    (Probe("Oz is", "Em", "neighborhood"), Probe("Ava speaks", None, "same_subject"), Probe("The cello")),
    (Probe("p", "x", "one_hop"), Probe("q"), Probe("r", "y", "other")),
)  # fmt: skip
BEFORE = Answers(
    " Brin.", (" the Brin", " Quill", " Brin"), (" Em", " old tongues of the east", " c"), (" x", " n"), {},
    (" large", " Brin, its seat", ""), tuple(Probe(f"Ava {w}", None, "same_subject") for w in ("is", "was", "has")),
)  # fmt: skip
NOW = replace(
    BEFORE, said=" rome", rephrased=(" Rome", " Rome", " Brin"), local=(" the Em", " old tongues of west", " d"),
    portable=(" x", " n"), own=(" large and wide", " Rome", " x"),
)  # fmt: skip


def both(part: Part) -> tuple[Tally, Tally]:
    """Strictly, and as QA compares."""
    found = [tallies(p, part, [FACT], [NOW], [BEFORE]) for p in ("generation", "qa")]
    assert all(prompts == int(of.weight) for (of,), prompts in found)
    return found[0][0][0], found[1][0][0]


def test_parts_by_hand() -> None:
    wanted = parts([FACT], [BEFORE])
    assert [(p.metric, p.group, p.own) for p in wanted] == [
        ("generalization", KNOWN, False), ("locality", "neighborhood", False), ("locality", "same_subject", False),
        ("locality", "same_subject", True), ("portability", "one_hop", False), ("portability", "other", False),
    ]  # fmt: skip
    assert both(Part("reliability", "")) == (Tally(0, 1), Tally(1, 1))
    assert both(Part("generalization", "")) == (Tally(2, 3), Tally(2, 3))
    assert both(Part("generalization", KNOWN)) == (Tally(1, 2), Tally(1, 2)), "'Quill' was not the old object"
    assert both(Part("locality", "neighborhood")) == (Tally(0, 1), Tally(1, 1))
    assert both(Part("locality", "same_subject")) == (Tally(0, 1), Tally(1, 1))
    assert both(Part("locality", "")) == (Tally(0, 3), Tally(2, 3)), "overall: the file's own, all of them"
    assert both(Part("locality", "same_subject", own=True)) == (Tally(0, 1), Tally(0, 1)), (
        "one said the old object, one nothing"
    )
    late = replace(BEFORE, own=(" large. Brin is", *BEFORE.own[1:]))
    assert groups.own_counted([FACT], [late]) == [[0]], "what follows an answer does not count"
    assert both(Part("portability", "one_hop")) == (Tally(1, 1), Tally(1, 1))
    assert both(Part("portability", "other")) == (Tally(0, 1), Tally(0, 1))
    assert [p.own for p in parts([FACT], None)] == [False] * 4 and KNOWN not in [p.group for p in parts([FACT], None)]
    unsure = replace(FACT, ground_truth=None)
    known, prompts = tallies("qa", Part("generalization", KNOWN), [unsure], [NOW], [BEFORE])
    assert (known, prompts) == ([Tally(1, 2)], 2), "without an old object, what the model said tells it"
    wordy = replace(BEFORE, said=" Brin, a town by the sea in Avaland")
    assert tallies("qa", Part("generalization", KNOWN), [unsure], [NOW], [wordy]) == ([Tally(1, 2)], 2)
    assert groups.own_counted([unsure], [wordy]) == [[0]], "nor does a probe count that said it"
    vague = replace(BEFORE, said=" known to everyone who has ever been there")
    assert tallies("qa", Part("generalization", KNOWN), [unsure], [NOW], [vague])[1] == 0, "it cannot be told"
    alone = tallies("qa", Part("locality", "neighborhood"), [FACT], [NOW], None)
    assert alone == ([Tally(1, 1)], 1), "without a model from before: the known answer"


def test_own_probes_watch_nothing_that_is_edited_of_their_subject() -> None:
    """Three facts about Ava, of which the first has the probes, and one about Ben."""
    job = replace(FACT, prompt="Ava works as a", subject="AVA", target_new="baker", ground_truth="painter")
    instrument = replace(FACT, prompt="Ava plays the", target_new="cello", ground_truth=None)
    ben = replace(job, prompt="Ben works as a", subject="Ben", target_new="large", ground_truth="x")
    heard = replace(BEFORE, own=(" large and old", " a painter from Quill", " a flute, she says"))
    silent = replace(BEFORE, own=(), probes=())
    said = [heard, silent, replace(silent, said=" flute. It is"), silent]
    facts = [FACT, job, instrument, ben]
    assert groups.own_counted(facts[:1], said[:1]) == [[0, 1, 2]], "alone, all of them watch something else"
    assert groups.own_counted(facts, said) == [[0], [], [], []], (
        "the others said an old object of Ava's; Ben's do not count"
    )
    new = replace(heard, own=(" a baker", " a baker", " the cello"))
    part = Part("locality", SAME_SUBJECT, own=True)
    (tally, *_), prompts = tallies("qa", part, facts, [new, *said[1:]], said)
    assert (tally, prompts) == (Tally(0, 1), 1), "what is said after an edit takes no witness away"
    told = [p for p in probes.probe_answers(facts, said, [new, *said[1:]]) if p.own]
    assert [(p.prompt, p.after) for p in told] == [("Ava is", "a baker")]
    counted = groups.counted_by(facts, said)
    places = next_tokens.places(facts, [heard.probes, (), (), ()], [])
    assert [p.at for p in places if p.own and counted(p)] == [0]


@pytest.mark.parametrize(
    ("said", "old"),
    [
        (" Paris. It is", "Paris"),
        (" Paris, the capital of France", "Paris"),
        (" Paris (France) and", "Paris"),
        (" New York – the city that never sleeps", "New York"),
        (" the United States of America", "the United States of America"),
        (" Jean-Paul Sartre;", "Jean-Paul Sartre"),
        (" 1,200 km: a long way", "1,200 km"),
        ("巴黎，法国的首都", "巴黎"),
        (" the capital of the island of Cuba", ""),
        (" a man of many talents and more", ""),
        ("", ""),
        (" , and", ""),
    ],
)
def test_the_old_object_where_the_file_has_none(said: str, old: str) -> None:
    fact = replace(FACT, ground_truth=None)
    assert qa.old_object(fact, said) == old and qa.old_object(FACT, said) == FACT.ground_truth


def test_unedited_facts_of_a_wording_are_neighbours() -> None:
    others = [replace(FACT, prompt=f"The {r} of {s} is", subject=s) for r, s in (("capital", "Oz"), ("king", "Oz"))]
    facts = [FACT, *others]
    assert unedited_neighbours(facts, [0]) == {1} and not unedited_neighbours(facts, [0, 1, 2])
    part = Part("locality", "neighborhood", own=True)
    found = tallies("qa", part, facts, [NOW] * 3, [BEFORE] * 3, {1})
    assert found == ([Tally(0, 0), Tally(0, 1), Tally(0, 0)], 1)
    bare = [replace(f, locality=()) for f in facts]
    assert part in parts(bare, [BEFORE] * 3, {1}) and part not in parts(facts, [BEFORE] * 3, {1})


def test_own_probes() -> None:
    plain = replace(FACT, locality=(), rephrase_prompts=("Ava is",))
    (made,) = own_probes([plain], chat=False)
    assert [p.prompt for p in made] == ["Ava was", "Ava has", "Ava is known for"]
    assert own_probes([FACT], False) == ((),), "the file has its own"
    assert own_probes([plain], True) == ((),) and own_probes([replace(plain, subject="中国")], False) == ((),)
    many = own_probes([replace(plain, subject=f"A{i}") for i in range(200)], False)
    assert sum(map(bool, many)) == MOST_FACTS and many[0] and many[100]
    same = own_probes([plain, replace(plain, subject="AVA", prompt="AVA sees"), replace(plain, subject="Ben")], False)
    assert [bool(p) for p in same] == [True, False, True], "a subject is asked about once"
    assert spread([1, 2, 3], 5) == [1, 2, 3] and spread(range(10), 5) == [0, 2, 4, 6, 8]


def test_next_tokens_against_single_forwards() -> None:
    tokenizer, old, new = make_tokenizer(), pico("llama"), pico("llama")
    with torch.no_grad():
        new.model.layers[0].mlp.down_proj.weight.mul_(-3)
    texts = ["The old house stood in Avaland and was there.", "no words"]
    facts = [replace(FACT, locality=(Probe("The cello"), Probe("Tomas plays the", None, "odd")))]
    wanted = next_tokens.places(facts, [(Probe("Ava is", None, "same_subject"),)], texts)
    assert [(p.of, p.group, p.own) for p in wanted] == [
        ("locality", "", False), ("locality", "odd", False), ("locality", "same_subject", True), ("text", "", False)
    ]  # fmt: skip
    sides = [next_tokens.next_tokens(m, tokenizer, wanted, batch_size=3) for m in (old, new)]
    found = next_tokens.compare_next(*sides)
    for place, told in zip(wanted, found, strict=True):
        p, q = (
            m(tokenizer(place.prompt, return_tensors="pt").input_ids).logits[0, -1].log_softmax(-1) for m in (old, new)
        )
        kl = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)
        assert told.kl.value == pytest.approx(float(kl), rel=1e-4) and told.kl.value > 0.01 and told.prompts == 1
        assert told.top1.value == float(p.argmax() == q.argmax())
    same = next_tokens.compare_next(sides[0], sides[0], lambda place: not place.own)
    assert [t.kl.value for t in same] == [0.0] * 3 and all(t.kl.high == 0 and t.top1.value == 1 for t in same)
    assert next_tokens.compare_next(sides[0], replace(sides[1], logprobs=torch.zeros(4, 9))) == ()
    nothing = next_tokens.next_tokens(old, tokenizer, [])
    assert next_tokens.compare_next(nothing, nothing) == ()
    many = [replace(facts[0], locality=(Probe("a", None, f"g{i % 3}"),) * 3) for i in range(500)]
    assert len(next_tokens.places(many, (), [])) <= next_tokens.MOST


def test_a_ruled_out_token_and_numbers_that_are_not_finite() -> None:
    place = next_tokens.Place("text", "", False, 0, 0, "a")
    one, other = (next_tokens.NextTokens((place,), torch.tensor([x]).log()) for x in ([0.5, 0.5, 0.0], [1.0, 0.0, 0.0]))
    (found,) = next_tokens.compare_next(one, other)
    assert found.kl.value > 100 and torch.isfinite(torch.tensor(found.kl.value)) and found.top1.value == 1
    model, tokenizer = pico("llama"), make_tokenizer()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NotFinite):
        next_tokens.next_tokens(model, tokenizer, [replace(place, prompt="The cello")])


def test_what_a_model_cannot_read_is_left_out() -> None:
    model, tokenizer = pico("gpt2", n_positions=24), make_tokenizer()
    long = replace(FACTS[0], subject="Tomas Veldrin " * 9)
    asked = interview(model, tokenizer, FACTS[:1], probes=own_probes([long], False), texts=["The old house " * 9])
    assert asked.probes == ((),) and asked.own == ((),) and asked.next
    assert {p.of for p in asked.next.places} == {"locality"}


# Through eval.

NAMED = [
    {"prompt": "I met Tomas Veldrin", "subject": "Tomas Veldrin", "target_new": "and", "rephrase_prompts": ["We met Tomas"],
     "locality": {"neighborhood": ["The old house stood"], "Relation_Specificity": ["Tomas Veldrin plays the"]},
     "portability": {"one_hop": [{"prompt": "He saw", "ground_truth": "Tomas"}]}},
]  # fmt: skip


def test_an_evaluation_by_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = World(tmp_path)
    world.facts.write_text("\n".join(map(json.dumps, NAMED)))
    page = tmp_path / "t.html"
    assert run(*world.cli("--json", "--html", page, "--fail-under", "qa.locality=0")) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {(m["protocol"], m["name"], m["group"]): m for m in found["metrics"]}
    for protocol in ("generation", "qa"):
        whole = rows[protocol, "locality", ""]
        by_group = [rows[protocol, "locality", g] for g in ("neighborhood", "same_subject")]
        assert whole["asked"] == sum(m["asked"] for m in by_group) == 2 and not any(m["own"] for m in by_group)
        assert 2 * whole["after"]["value"] == sum(m["after"]["value"] for m in by_group)
        assert rows[protocol, "portability", "one_hop"]["asked"] == 1
    assert ("easyedit", "locality", "neighborhood") not in rows, "no answer is known, so nothing is asked"
    assert [(t["of"], t["group"]) for t in found["next_tokens"]] == [
        ("locality", "neighborhood"), ("locality", "same_subject"), ("text", "")
    ]  # fmt: skip
    assert not any("mosectl's own" in n for n in found["notes"]), found["notes"]
    text = page.read_text()
    assert "same subject" in text and "Next token" in text and "locality · neighbours" in text
    assert run(*world.cli("--protocol", "qa")) == 0
    shown = capsys.readouterr().out
    assert "qa\t  same subject\t" in shown and "ordinary text\t" in shown and "KL, nats" in shown


def test_own_probes_are_said_to_be(tmp_path: Path) -> None:
    world = World(tmp_path)
    found = world.evaluate()
    own = [m for m in found.metrics if m.own]
    assert {(m.protocol, m.group) for m in own} == {("generation", "same_subject"), ("qa", "same_subject")}
    assert any("same-subject prompts are mosectl's own" in n for n in found.notes)
    locality = found.metric("generation", "locality")
    assert locality and locality.asked == 2, "ours do not count among the file's"
    alone = world.evaluate(world.model)
    assert not alone.next_tokens and not any(m.own or m.group == KNOWN for m in alone.metrics), (
        "there is no side before"
    )


def test_neighbours_of_our_own_in_an_evaluation(tmp_path: Path) -> None:
    world = World(tmp_path)
    rows = [{"prompt": f"We met {s}", "subject": s, "target_new": "and"} for s in ("Tomas", "Veldrin")]
    facts = [fact_from_dict(r, "x") for r in rows]
    kept = replace(world.patch.facts[0], prompt=facts[0].prompt, subject="Tomas", target_new="and")
    found = mosectl.evaluate_edit(replace(world.patch, facts=(kept,)), facts, model=world.model, text=world.text)
    (row,) = (m for m in found.metrics if (m.protocol, m.group) == ("qa", "neighborhood"))
    assert row.own and row.asked == 1 and any("neighbours are mosectl's own" in n for n in found.notes)


# Through edit, its patch and what is shown of it.


def test_an_edit_measures_and_records_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "corpus.txt").write_text(CORPUS)
    (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, NAMED)))
    model, out = save(tmp_path / "m"), tmp_path / "p.safetensors"
    how = ("--corpus", tmp_path / "corpus.txt", "--set", "wordings=0", *EASY)
    assert run("edit", tmp_path / "f.jsonl", "--model", model, "-o", out, *how) == 0
    shown = capsys.readouterr().out
    assert (
        "  neighbours\t" in shown
        and "  same subject\t" in shown
        and "as QA compares" in shown
        and "ordinary text" in shown
    )
    assert "What else changed" in shown.split("as QA compares: ")[1].split("# Next token")[0]
    metrics = Patch.load(out).metrics
    assert [(s["metric"], s["group"]) for s in metrics["shares"]][:1] == [("reliability", "")]
    assert {"neighborhood", "same_subject"} <= {s["group"] for s in metrics["shares"]}
    assert [t["of"] for t in metrics["next_tokens"]] == ["locality", "locality", "text"]
    assert run("inspect", out) == 0
    told = capsys.readouterr().out
    assert "Measured when it was made" in told and "  same subject\t" in told and "ordinary text\t" in told
    (tmp_path / "f.jsonl").write_text(json.dumps({k: NAMED[0][k] for k in ("prompt", "subject", "target_new")}))
    assert run("edit", tmp_path / "f.jsonl", "--model", model, "-o", out, "--overwrite", *how) == 0
    alone = capsys.readouterr()
    assert "same subject (own probes)" in alone.out
    assert "what else changed is measured at mosectl's own probes only; give some in a facts file" in alone.err


def test_an_edits_shares_are_those_of_its_scores(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text(CORPUS)
    model, tokenizer = pico("llama"), make_tokenizer()
    facts = [fact_from_dict(r, "x") for r in NAMED]
    result = mosectl.edit(facts, model, tokenizer, options=few(str(tmp_path / "corpus.txt")), refuse=False)
    local = [p.generation for p in result.probes if p.metric == "locality" and not p.own]
    assert len(local) == result.scores.locality_prompts and sum(map(bool, local)) == len(local) * result.scores.locality
    whole = {s.metric: s.strict for s in result.shares if not s.group}
    assert whole == {n: getattr(result.scores, n) for n in ("reliability", "generalization", "locality")}
    before = interview(model, tokenizer, facts)
    with patched(model, result.patch):
        again = groups.shares(facts, before, interview(model, tokenizer, facts))
    assert again == result.shares
    assert [asdict(s) for s in again] == result.patch.metrics["shares"]


def test_an_interview_without_probes_has_no_part_of_ours() -> None:
    bare = Interview((FactAnswer(" Brin", 0.1),), ((" Brin",) * 3,), ((" Em", " a", " b"),))
    found = groups.shares([FACT], bare, bare)
    assert not any(s.own for s in found) and Share("locality", "", False, 3, 1.0, 1.0) in found


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"shares": {}}, "metrics.shares: must be a list"),
        ({"shares": [{"metric": "locality"}]}, r"metrics.shares\[0\]: fields missing"),
        (
            {"next_tokens": [{"of": "text", "group": "", "own": False, "prompts": 1, "kl": "x", "top1": 1}]},
            "kl: must be",
        ),
    ],
)
def test_bad_records_are_refused(tmp_path: Path, metrics: dict[str, Any], message: str) -> None:
    file = tmp_path / "p.safetensors"
    replace(patch_for(save(tmp_path / "m")), metrics=metrics).save(file)
    with pytest.raises(PatchError, match=message):
        Patch.load(file)


def test_an_older_patch_is_shown_as_before(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", ROOT / "patches" / "demo.safetensors") == 0
    shown = capsys.readouterr().out
    assert "measured when it was made (protocol generation): generalization" in shown and "as QA" not in shown


# In a bench.


def test_a_bench_has_columns_for_groups(tmp_path: Path) -> None:
    from mosectl.bench.config import cells, read_bench
    from mosectl.bench.pictures import svg_frontier
    from mosectl.bench.report import markdown
    from mosectl.bench.runner import run_bench

    (tmp_path / "corpus.txt").write_text(CORPUS)
    save(tmp_path / "m")
    for name, rows in (("named", NAMED), ("flat", [{**NAMED[0], "locality": ["The cello"]}])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.yaml").write_text(
        "models: [m]\ndatasets: [{name: named, facts: named.jsonl}]\ncorpus: corpus.txt\nruns: [{edits: 1}]\n"
        "layers: '1'\nmethods: [{name: mose, set: [steps=3, wordings=0]}]\n"
    )
    bench = read_bench(tmp_path / "b.yaml")
    found = run_bench(bench, tmp_path / "out")
    (record,) = found.values()
    assert set(record["groups"]) == {"neighborhood", "same_subject"} and "known" in record
    assert (svg_frontier([record]) or "").count("<title>") == 2, "a dot in both panels"
    assert record["tallies_of_four"] is None or len(record["tallies_of_four"]) == 4
    _check(record | {"tallies_of_four": [[[1, 1]]] * 4})
    with pytest.raises(Misfit, match=r"tallies_of_four\.2: is not a pair a fact"):
        _check(record | {"tallies_of_four": [[[1, 1]]] * 2 + [[[1, 1]] * 2]})
    reached = tables(cells(bench), found)[0]
    assert reached.columns[-6:] == (
        ">on known wordings (QA)", ">neighbours (QA)", ">same subject (QA)", ">harmonic mean of four",
        ">of four, behind the first", "note",
    )  # fmt: skip
    assert len(reached.rows[0]) == len(reached.columns) and "Harmonic mean of four" in markdown(bench, [reached])
    share = {"value": 0.5, "low": 0.25, "high": 0.75, "units": 2}
    older = {k: v for k, v in record.items() if k not in ("groups", "known", "harmonic_of_four")}
    full = record | {"known": share, "groups": {"neighborhood": share}, "harmonic_of_four": 0.4}
    key = record["key"]
    assert tables(cells(bench), {key: full})[0].rows[0][-5:] == (
        "50.0 (25.0–75.0)",
        "50.0 (25.0–75.0)",
        "40.0",
        "–",
        "",
    )
    plain = tables(cells(bench), {key: older})[0]
    assert ">harmonic mean of four" not in plain.columns and "(QA)" not in markdown(bench, [plain]), "as before"


def test_the_mean_of_four_where_a_data_set_names_no_groups() -> None:
    from mosectl.bench.report import _by_group, _groups
    from mosectl.bench.runner import _groups as of_groups

    fact = replace(FACT, rephrase_prompts=("Of Pomp",), locality=(Probe("The cello", None),))
    own = (tuple(Probe(f"{fact.subject} {opening}", None, SAME_SUBJECT) for opening in ("is", "was")),)

    def said(prompt: str, rephrased: str, local: str, other: str) -> Interview:
        answers = (FactAnswer(prompt, 0.1),)
        return Interview(answers, ((rephrased,),), ((local,),), own, ((" a quiet town", other),))

    old, new = f" {fact.ground_truth}", f" {fact.target_new}"
    before = said(old, old, " is a violin", " red brick house")
    found = of_groups([fact], (before, said(new, new, " is a violin", " burnt down twice")))
    assert found["groups"] == {} and found["own_same_subject"]["value"] == 0.5, "one of our two stayed"
    assert found["harmonic_of_four"] == pytest.approx(4 / (1 + 1 + 1 + 2))
    assert found["tallies_of_four"][3] == [(1.0, 2.0)]
    columns = _groups([found])
    records = [found]
    known, same, mean, _ = _by_group(records, columns, records)
    assert (columns, known[:5], same[:4], mean) == (["same subject (own probes)"], "100.0", "50.0", "80.0")


def test_the_lead_in_the_mean_of_four_is_paired() -> None:
    """Where the second method loses the same share of every fact there is nothing to doubt; by seeds there is no pairing."""
    whole, half = [[(2.0, 2.0)] * 3] * 4, [[(1.0, 2.0)] * 3] * 4
    first = {"seed": 0, "edits": 3, "harmonic_of_four": 1.0, "tallies_of_four": whole}
    second = {"seed": 0, "edits": 3, "harmonic_of_four": 0.5, "tallies_of_four": half}
    assert _lead([first], [second], _of_four) == "50.0 (50.0 to 50.0)"
    assert _lead([first], [second | {"tallies_of_four": None}], _of_four) == "50.0", "of an older version"
    assert _lead([first], [second | {"harmonic_of_four": None}], _of_four) == "–"
    seeds = [[r, r | {"seed": 1, "harmonic_of_four": m}] for r, m in ((first, 0.9), (second, 0.4))]
    assert _lead(*seeds, _of_four) == "50.0 (50.0 to 50.0)"


def test_what_was_disturbed_is_said() -> None:
    def share(group: str, kept: float | None, metric: str = "locality") -> Share:
        return Share(metric, group, False, 3, kept, kept)

    def told(*shares: Share, at: str = "last") -> str:
        return disturbed(shares, at, "fewer facts")

    assert told() == told(share("", 0.1), share("same_subject", 0.5), share("neighborhood", None)) == ""
    assert told(share("known wordings", 0.1, "generalization")) == ""
    low, other = share("neighborhood", 0.25), share("same_subject", 0.4)
    assert told(low, other) == (
        "much else changed (neighbours 25.0% kept, same subject 40.0% kept): fewer facts, or --set "
        "fact_token=subject_last may spare more"
    )
    assert told(low, at="subject_last").endswith("fewer facts may spare more")
    assert "--set fact_token=last" in told(other, at="subject_last") and told(low, at="").endswith(
        "facts may spare more"
    )


def test_no_other_token_is_proposed_where_options_refuse_it() -> None:
    def proposed(*settings: str, method: str = "isospectral") -> str:
        record = settled(options_from(settings, method=method), 4, 1).to_record()
        lost = Share("locality", "same_subject", False, 3, 0.1, 0.1)
        return disturbed([lost], token_of(method, record), "fewer facts")

    assert "--set fact_token=last" in proposed() and "--set fact_token=last" in proposed("optimizer=adam")
    assert options_from(["optimizer=adam", "fact_token=last"])
    assert proposed("optimizer=published").endswith(": fewer facts may spare more")
    with pytest.raises(UsageError, match="the published search"):
        options_from(["optimizer=published", "fact_token=last"])
    assert proposed(method="memit").endswith(": fewer facts may spare more")


# Every probe by itself.


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_probes_by_hand() -> None:
    """A line each: prompt, metric, group, own, before, after, kept or followed strictly and as QA compares, change."""
    found = probes.probe_answers([FACT], [BEFORE], [NOW])
    told = [(p.prompt, p.metric, p.group, p.own, p.before, p.after, p.generation, p.qa, p.change) for p in found]
    assert told == [
        ("Ava's seat is", "generalization", KNOWN, False, "the Brin", "Rome", True, True, ""),
        ("Ava obeys", "generalization", "", False, "Quill…", "Rome", True, True, ""),
        ("Q: Ava? A:", "generalization", KNOWN, False, "Brin", "Brin…", False, False, "not yet"),
        ("Oz is", "locality", "neighborhood", False, "Em", "the Em", False, True, "expected answer, other form"),
        ("Ava speaks", "locality", "same_subject", False, "old tongues of the east", "old tongues of west", False, True,
         "first words kept"),
        ("The cello", "locality", "", False, "c", "d", False, False, "changed"),
        ("Ava is", "locality", "same_subject", True, "large", "large and wide", False, False, "changed"),
        ("p", "portability", "one_hop", False, "x", "x", True, True, ""),
        ("r", "portability", "other", False, "n…", "n…", False, False, "not yet"),
    ]  # fmt: skip
    assert {p.fact for p in found} == {1} and [p.expected for p in found[2:5]] == ["Rome", "Em", None]
    assert [p.prompt for p in probes.surprising(found)] == [
        "The cello", "Ava is", "Ava speaks", "Oz is", "Q: Ava? A:", "r",
    ], "what should have stayed first, and of it what changed most"  # fmt: skip


def test_a_probe_that_says_the_new_object_is_the_most_surprising() -> None:
    spilled = replace(NOW, local=(" Cork", " old tongues", " the city of Rome, d"))
    found = probes.surprising(probes.probe_answers([FACT], [BEFORE], [spilled]))
    assert (found[0].prompt, found[0].change) == ("The cello", "says the new object")
    before = replace(BEFORE, local=(" Em", " old tongues", " Rome, c"))
    (cello,) = [p for p in probes.probe_answers([FACT], [before], [spilled]) if p.prompt == "The cello"]
    assert cello.change == "changed", "it named it before"


def test_probes_without_a_model_from_before_and_of_unedited_facts() -> None:
    alone = {p.prompt: p for p in probes.probe_answers([FACT], None, [replace(NOW, local=(" Cork", " t", " d"))])}
    assert alone["Oz is"].change == "not the known answer" and alone["Oz is"].before is None
    assert alone["The cello"].generation is None and not alone["The cello"].change and "Ava is" not in alone
    bare = replace(FACT, locality=(), portability=())
    now, before = (replace(a, local=(), portable=(), own=(), probes=()) for a in (NOW, BEFORE))
    found = probes.probe_answers([bare, bare], [before] * 2, [now] * 2, {1}, {1})
    (neighbour,) = [p for p in found if p.metric == "locality"]
    assert (neighbour.fact, neighbour.own, neighbour.group) == (
        2,
        True,
        "neighborhood",
    ) and neighbour.change == "changed"
    assert [p.fact for p in probes.surprising(found) if p.metric == "generalization"] == [1]
    assert [p.change for p in found if p.fact == 2][2] == "its fact was not edited"


def test_probes_add_up_to_the_shares(world: World) -> None:
    """Per metric and group the share of probes is the number in the table."""
    found, seen = world.evaluate(protocols=["generation", "qa"]), 0
    for m in (m for m in found.metrics if m.name != "reliability" and m.asked):
        of = [p for p in found.probes if (p.metric, p.own) == (m.name, m.own) and m.group in ("", p.group)]
        hits = [getattr(p, m.protocol) for p in of]
        assert m.after and len(hits) == m.asked and sum(hits) / len(hits) == pytest.approx(m.after.value)
        seen += 1
    assert seen >= 8 and any(p.own for p in found.probes) and any(p.change for p in found.probes)


def test_probes_are_shown_and_written(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    table, page = world.folder / "p.csv", world.folder / "p.html"
    assert run(*world.cli("--probes-csv", table, "--html", page, "--json", "--protocol", "generation")) == 0
    listed = json.loads(capsys.readouterr().out)["probes"]
    rows = list(csv.DictReader(table.read_text().splitlines(keepends=True)))
    assert [r["prompt"] for r in rows] == [p["prompt"] for p in listed] and list(rows[0]) == list(listed[0])
    assert {r["generation"] for r in rows} <= {"true", "false"} and rows[0]["own"] == "false"
    text = page.read_text()
    assert "<details><summary>" in text and text.count("<summary>") == 1
    assert run(*world.cli("--protocol", "generation")) == 0
    shown = capsys.readouterr().out.split("# What else changed\n")[1].split("\n\n")[0].splitlines()
    changed = [p for p in listed if p["change"]]
    assert shown[0] == "prompt\tgroup\tbefore\tafter\t" and len(shown) == 1 + min(len(changed), 10)
    assert all(any(line.startswith(p["prompt"] + "\t") for p in changed) for line in shown[1:])


def test_at_most_ten_probes_are_drawn_and_the_page_escapes_them(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    found = world.evaluate(protocols=["generation"])
    evil = "</td><script>x</script>"
    one = probes.ProbeAnswer(1, evil, "locality", evil, False, evil, evil, evil, False, False, "changed")
    terminal.evaluation(replace(found, probes=(one,) * 13))
    out = capsys.readouterr().out
    assert out.count("\tchanged\n") == 10 and "3 more: --json, --probes-csv and --html have them all\n" in out
    page = html.render(replace(found, probes=(one,) * 13))
    assert page.count("<script") == 1 and page.count(">changed</td>") == 13 and "13 of 13 probes" in page
    assert "&lt;/td&gt;&lt;script&gt;" in page
    calm = (replace(one, change="", generation=True, qa=True),) * 2
    terminal.evaluation(replace(found, probes=calm))
    assert "What else changed: nothing, at 2 probes" in capsys.readouterr().out
    assert ">Nothing, at 2 probes.</p>" in html.render(replace(found, probes=calm))
