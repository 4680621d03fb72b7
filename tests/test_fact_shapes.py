"""Files of known data sets, as they are: what is read of each, checked and edited; and what is said where it cannot be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mosectl
from mosectl.errors import FactsError, UsageError
from mosectl.facts.choices import choices
from mosectl.facts.records import Fact, FactsReport, Probe, fact_from_dict, read_facts
from mosectl.facts.shapes import SHAPES
from support.commands import run
from support.facts import CORPUS, few
from support.field_files import HALLU, MQUAKE, RIPPLE, ROWS, WHOLE, write
from support.models import make_tokenizer, pico

MET, TOMAS = "I met Tomas Veldrin", "Tomas Veldrin"
SAME, MULTI = "same_subject", "multi_hop"


def fact(row: Mapping[str, Any], **changes: Any) -> Fact:
    """The first fact of a shape, but for its source."""
    return replace(Fact(MET, TOMAS, "and", **row), **changes)


def needing_itself(probe: Probe) -> Probe:
    """A probe that is its own condition."""
    return replace(probe, needs=(replace(probe, group=""),))


WHOLE_FACT = {"subject": MET}
EXPECTED: dict[str, list[Fact]] = {
    "KnowEdit": [
        fact({
            "ground_truth": "in", "rephrase_prompts": ("We met Tomas Veldrin",), "locality": (
                Probe("Tomas Veldrin plays the", "cello", SAME, ("a cello",)), Probe("I also met", "Ann", "forgetfulness"),
            ),
            "portability": (
                Probe("He saw", "Tomas", "Reasoning", ("Tom",)), Probe("I met Tom", "and", "Subject_Aliasing"),
                Probe("Is he met?", "yes", "Logical_Generalization", ("true",)),
            ),
        }),
        Fact("This is about old Lower Quill. It was", "Lower Quill", "a town by the sea.",
             locality=(Probe("Lower Quill lies in", "Avaland", SAME),)),
    ],
    "MQuAKE": [
        fact({
            "ground_truth": "in", "rephrase_prompts": ("Whom did I meet?", "Who was it?"), "target_aliases": ("as well as",),
            "portability": (Probe("What did the one whom I met play?", "the cello", MULTI),),
        }),
        Fact("Brinmouth was born in", "Brinmouth", "Oz", "Lower Quill", ("Where is Brinmouth from?",),
             (Probe("Oz is ruled by", "Em", "single_hop", ("Queen Em",)),),
             tuple(Probe(q, "Em", MULTI, ("Queen Em", "Emma")) for q in MQUAKE[0]["questions"])),
    ],
    "RippleEdits": [
        fact({
            "ground_truth": "in", "target_aliases": ("plus",), "locality": (
                needing_itself(Probe("The mother of Tomas Veldrin is", "Ann", SAME, ("Anna",))),
                needing_itself(
                    Probe("The name of the award Tomas Veldrin won is", "Old Cup", SAME, ("New Cup", "The Cup"))
                ),
            ),
            "portability": (needing_itself(Probe("I met Tom", "and", "Subject_Aliasing", ("plus",))),),
        }),
        Fact("The name of the land of Lower Quill is", "Lower Quill", "Old Oz",
             locality=(needing_itself(Probe("The sister of Oz is", "Lower Quill", SAME)),),
             portability=(needing_itself(Probe("The land of Quill is", "Old Oz", "Subject_Aliasing")),)),
    ],
    "WikiBigEdit": [
        fact({
            "rephrase_prompts": ("We met Tomas Veldrin",), "locality": (Probe("The old house stood", "in Avaland"),),
            "portability": (
                Probe("Arr, I met Tomas Veldrin", "and", "personas"), Probe("Unit met Tomas Veldrin", "and", "personas"),
                Probe("What did the one whom I met play?", "the cello", MULTI),
            ),
        }),
        Fact("Who rules Oz?", "Oz", "Em", None, ("We met Oz",), (Probe("The old house stood", "in Avaland"),),
             (Probe("Arr, I met Oz", "Em", "personas"), Probe("Unit met Oz", "Em", "personas"))),
    ],
    "QAEdit": [
        fact({"rephrase_prompts": ("We met Tomas Veldrin",), "locality": (Probe("who plays the cello", "Tomas"),)}),
        Fact("Who rules Oz?", "Oz", "Em", None, ("Oz obeys whom?",), (Probe("a", "b"), Probe("c", "d"))),
    ],
    "UltraEditBench": [
        fact({"rephrase_prompts": ("We met Tomas",), "locality": (Probe("He saw", "Oz"),)}, **WHOLE_FACT),
        Fact("Who rules Oz?", "Who rules Oz?", "Em", None, ("Oz obeys",), (Probe("He saw", "Oz"),)),
    ],
    "zsRE": [
        fact({"ground_truth": "in", "rephrase_prompts": ("We met Tomas",), "locality": (
            Probe("who plays the cello", "Tomas"),
        )}),
        Fact("Who rules Oz?", "Oz", "Em", None, ("Oz obeys",), (Probe("He saw", "Oz"),)),
    ],
    "MEND": [
        fact({"ground_truth": "in", "rephrase_prompts": ("We met Tomas",)}, **WHOLE_FACT),
        Fact("Oz is old.", "Oz is old.", "REFUTES", None, ("x",)),
    ],
    "FEVER": [
        fact({"rephrase_prompts": ("We met Tomas", "I saw Tomas"), "locality": (Probe("Oz is old.", "SUPPORTS"),)},
             **WHOLE_FACT),
        Fact("Avaland is green.", "Avaland is green.", "REFUTES", None, ("Green is Avaland.",),
             (Probe("Oz is old.", "SUPPORTS"),)),
    ],
    "HalluEditBench": [
        fact({
            "rephrase_prompts": ("We met Tomas Veldrin",), "locality": (Probe("What does Tomas Veldrin play?", None, SAME),),
            "portability": (
                Probe("Is it and?", "Yes", "yes"), Probe("Is it in?", "No", "no"),
                Probe("Who is it?", TOMAS, "reversed_relation"), Probe(f"{MET} A. and  B. in", "A", "multiple_choice"),
                *(Probe(f"Who is it after {n} hops?", f"hop {n}", f"{n}hop") for n in range(2, 7)),
            ),
        }),
    ],
    "CKnowEdit": [
        fact({"ground_truth": "in", "rephrase_prompts": ("We met Tomas",), "locality": (Probe("The cello", "is"),),
              "portability": (Probe("He saw", "Tomas"),)}, **WHOLE_FACT),
        Fact("请说出奥兹的首都", "请说出奥兹的首都", "下城", "上城", ("奥兹的首都是哪里？",), (),
             (Probe("下城在哪国？", "奥兹"),)),
    ],
}  # fmt: skip
FACTS = sorted(ROWS)


def read(
    name: str, folder: Path, rows: list[dict[str, Any]] | None = None, *said: str, how: str = "fail"
) -> FactsReport:
    """A file of a shape."""
    return read_facts(write(name, folder, rows), how, read=choices(said))


def told(report: FactsReport) -> list[tuple[str, str]]:
    return [(p.severity, p.what) for p in report.problems]


@pytest.fixture(scope="module")
def edited() -> tuple[Any, Any]:
    return pico("llama"), make_tokenizer()


# Each shape.


@pytest.mark.parametrize("name", FACTS)
def test_what_is_read(name: str, tmp_path: Path) -> None:
    found = read(name, tmp_path)
    assert [replace(f, source="") for f in found.facts[: len(EXPECTED[name])]] == EXPECTED[name]
    assert found.skipped == 0 and len(found.facts) == 2
    assert any(f"read as {name}" in shape for shape in found.shapes) and not any(
        "not used" in w for _, w in told(found)
    )


@pytest.mark.parametrize("name", FACTS)
def test_a_fact_is_checked_and_edited(
    name: str, tmp_path: Path, edited: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("check", write(name, tmp_path)) == 0
    assert f"read as {name}" in capsys.readouterr().out
    (tmp_path / "corpus.txt").write_text(CORPUS)
    first = read(name, tmp_path).facts[:1]
    result = mosectl.edit(first, *edited, options=few(str(tmp_path / "corpus.txt"), wordings=0))
    (made,) = result.patch.facts
    assert (made.status, made.prompt, made.target_new) == ("changed", MET, "and")
    assert made.target_aliases == first[0].target_aliases and made.subject == first[0].subject


def test_check_counts_probes_by_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", write("KnowEdit", tmp_path)) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "1 rephrasing, 3 locality prompts (2 same subject, 1 forgetfulness), 3 portability prompts (1 Reasoning, "
        in out
    )
    assert run("check", write("zsRE", tmp_path)) == 0
    assert " ".join(capsys.readouterr().out.split()).endswith("; 2 rephrasings, 2 locality prompts"), "no more"


def test_every_shape_has_a_file_here() -> None:
    elsewhere = {"mosectl", "CounterFact"}  # test_facts.py
    assert {s.name for s in SHAPES} == {*ROWS, *elsewhere}
    assert all(s.source for s in SHAPES)


@pytest.mark.parametrize("name", FACTS)
def test_fields_that_are_not_used_are_told(name: str, tmp_path: Path) -> None:
    rows = [{**row, "loclity": "x"} for row in ROWS[name]]
    assert ("warning", "field 'loclity' is not used") in {
        (s, w.replace(" (2 times)", "")) for s, w in told(read(name, tmp_path, rows))
    }


# A subject that is not there, and what else a shape lacks.

NO_SUBJECT = "an entry names no subject: its whole prompt is read as the subject, and edited at its last token"


@pytest.mark.parametrize("name", [*WHOLE, "zsRE"])
def test_a_data_set_without_subjects_is_read_and_that_is_told(name: str, tmp_path: Path) -> None:
    def about(found: FactsReport) -> list[str]:
        return [w for s, w in told(found) if s == "warning" and "names no subject" in w]

    rows = [{k: v for k, v in row.items() if k != "subject"} for row in ROWS[name]]
    found = read(name, tmp_path, rows)
    assert [f.subject for f in found.facts] == [f.prompt for f in found.facts]
    assert about(found) == [f"{NO_SUBJECT} (2 times)"], "once a file"
    mixed = read(name, tmp_path, [{**rows[0], "subject": TOMAS}, rows[1]])
    assert [f.subject for f in mixed.facts] == [TOMAS, mixed.facts[1].prompt], "a subject that is given counts"
    assert about(mixed) == [f"{NO_SUBJECT} (1 time)"]
    assert not about(read(name, tmp_path, rows, "subject=prompt", "subject=src", "subject=input")), "it was asked for"
    with pytest.raises(FactsError, match="subject 'Ozland' is not in prompt"):
        read(name, tmp_path, [{**rows[0], "subject": "Ozland"}])


@pytest.mark.parametrize("name", ["KnowEdit", "QAEdit", "WikiBigEdit", "HalluEditBench"])
def test_a_subject_is_asked_for_where_a_data_set_has_them(name: str, tmp_path: Path) -> None:
    row = {k: v for k, v in ROWS[name][0].items() if k != "subject"}
    with pytest.raises(FactsError, match="subject' is missing") as e:
        read(name, tmp_path, [row])
    assert "--read subject=prompt" in e.value.fix


def test_wises_other_rephrasings(tmp_path: Path) -> None:
    """EasyEdit's examples/run_wise_editing.py asks them as rephrasings."""
    row = {
        "prompt": MET, "subject": TOMAS, "target_new": "and", "ood_rephrase": "So I met Tomas",
        "locality_prompt": "He saw", "locality_ground_truth": "Oz",
    }  # fmt: skip
    found = read("QAEdit", tmp_path, [row])
    assert found.facts[0].rephrase_prompts == ("So I met Tomas",) and not told(found)


def test_a_subject_that_is_not_in_the_question(tmp_path: Path) -> None:
    rows = deepcopy(ROWS["WikiBigEdit"])
    rows[1]["subject"] = "Ozland"
    with pytest.raises(FactsError, match=r"\[1\]: subject 'Ozland' is not in prompt 'Who rules Oz\?'"):
        read("WikiBigEdit", tmp_path, rows)
    found = read("WikiBigEdit", tmp_path, rows, "subject=subject", "subject=update")
    assert [f.subject for f in found.facts] == [TOMAS, "Who rules Oz?"], "the first that is in the prompt"
    assert ("warning", "subject 'Ozland' is not in the prompt") in told(found)


def test_which_of_zsres_answers_is_taken(tmp_path: Path) -> None:
    row = ROWS["zsRE"][:1]
    found = read("zsRE", tmp_path, row, "target_new=answers")
    (memit,) = found.facts
    assert (memit.target_new, memit.target_aliases, memit.ground_truth) == ("in", ("within",), None)
    assert found.shapes[0].startswith("1 entry read as zsRE: prompt from 'src', target_new from 'answers'")
    assert read("zsRE", tmp_path, row, "ground_truth=pred").facts[0].ground_truth == "Oz"
    both = read("zsRE", tmp_path, [{**row[0], "ans": "with"}])
    assert both.facts[0].target_new == "and" and ("warning", "'alt' and 'ans' differ") in told(both)
    with pytest.raises(FactsError, match="'answers' is empty"):
        read("zsRE", tmp_path, [{**row[0], "answers": []}], "target_new=answers")
    table = tmp_path / "z.csv"
    table.write_text(f"src,ans\n{MET},and\n")
    assert read_facts(table).facts[0].subject == MET, "as UltraEdit has it"
    table.write_text(f"prompt,target_new\n{MET},and\n")
    with pytest.raises(FactsError, match="column 'subject' is missing") as e:
        read_facts(table)
    assert "--read subject=prompt" in e.value.fix
    assert read_facts(table, read=choices(["subject=prompt"])).facts[0].subject == MET


def test_an_unknown_shape(tmp_path: Path) -> None:
    def wrong(row: dict[str, Any], *said: str) -> FactsError:
        with pytest.raises(FactsError) as e:
            read_facts(write("QAEdit", tmp_path, [row]), read=choices(said))
        return e.value

    near = wrong({"update": MET, "rephrase": "x"})
    assert near.what == "of no known shape: the nearest, WikiBigEdit, has 'ans' and 'subject' besides"
    assert near.fix.startswith("add 'ans' and 'subject', or say what the fields are called: --read prompt=…")
    own = {"question": MET, "answer": "and", "entity": TOMAS}
    assert "--read prompt=question --read subject=entity --read target_new=answer" in wrong(own).fix
    said = ["prompt=question", "target_new=answer", "subject=entity"]
    (found,) = read_facts(write("QAEdit", tmp_path, [own]), read=choices(said)).facts
    assert (found.prompt, found.subject, found.target_new) == (MET, TOMAS, "and")
    assert "'prompt' is missing" in wrong({"x": 1}).what
    assert "MQuAKE's shape has 'questions' and 'new_answer'" in wrong({"requested_rewrite": [{}]}).fix


@pytest.mark.parametrize("text", ["target_new", "=x", "target_new=", "target=x", "space_before_target=x"])
def test_bad_choices(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError) as e:
        choices([text])
    assert e.value.fix and f"--read {text}" in e.value.what
    assert run("check", "none.json", "--read", text) == 2 and text in capsys.readouterr().err


# Values of the wrong kind are told by the name that the file has for them.

BAD: dict[str, tuple[str, tuple[Any, ...], Any, str]] = {
    "KnowEdit": ("KnowEdit", (1, "labels"), 7, r"\[1\]: 'labels' is a number"),
    "MQuAKE list": ("MQuAKE", (0, "requested_rewrite"), 7, "'requested_rewrite' is a number, not a list"),
    "MQuAKE none": ("MQuAKE", (0, "requested_rewrite"), [], "'requested_rewrite' is empty"),
    "MQuAKE edit": ("MQuAKE", (0, "requested_rewrite", 1), 7, r"'requested_rewrite\[1\]' is a number, not an object"),
    "MQuAKE prompt": (
        "MQuAKE", (0, "requested_rewrite", 1, "prompt"), 7, r"\[0\] edit 2: 'requested_rewrite\[1\].prompt' is a number"
    ),
    "MQuAKE question": ("MQuAKE", (0, "questions"), [7], r"edit 2: a prompt of 'questions' is a number"),
    "MQuAKE answer": ("MQuAKE", (0, "new_answer"), 7, r"edit 2: an answer of 'questions' is a number"),
    "MQuAKE hops": ("MQuAKE", (0, "new_single_hops"), {"a": 1}, "'new_single_hops' is an object, not a list"),
    "RippleEdits edit": ("RippleEdits", (0, "edit"), 7, "'edit' is a number, not an object"),
    "RippleEdits prompt": ("RippleEdits", (0, "edit", "prompt"), None, r"'edit.prompt' is missing"),
    "RippleEdits group": ("RippleEdits", (0, "Subject_Aliasing"), 7, "'Subject_Aliasing' is a number, not a list"),
    "RippleEdits query": (
        "RippleEdits", (0, "Subject_Aliasing", 0, "test_queries", 0), 7, r"'Subject_Aliasing\[0\].test_queries\[0\]' is a nu"
    ),
    "RippleEdits answer": (
        "RippleEdits", (0, "Subject_Aliasing", 0, "test_queries", 0, "answers", 0, "value"), 7,
        r"an answer of 'Subject_Aliasing\[0\].test_queries\[0\].prompt' is a number",
    ),
    "WikiBigEdit": ("WikiBigEdit", (0, "mhop_ans"), 7, "an answer of 'mhop' is a number"),
    "WikiBigEdit voice": ("WikiBigEdit", (0, "personas_robot"), 7, "a prompt of 'personas_robot' is a number"),
    "QAEdit": ("QAEdit", (0, "target"), 7, "'target' is a number"),
    "QAEdit locality": ("QAEdit", (1, "locality", 0), {"lok": "x"}, "an entry of 'locality' has no prompt"),
    "UltraEditBench": ("UltraEditBench", (0, "ans"), "", "'ans' is empty"),
    "zsRE": ("zsRE", (0, "rephrase"), 7, "'rephrase' is not text"),
    "MEND": ("MEND", (0, "alternatives"), [7], "'alternatives' is a number"),
    "MEND output": ("MEND", (0, "output"), 7, "'output' is a number, not a list"),
    "FEVER": ("FEVER", (0, "unrel_prompt"), 7, "a prompt of 'unrel_prompt' is a number"),
    "HalluEditBench": ("HalluEditBench", (0, "object"), "", "'object' is empty"),
    "CKnowEdit": ("CKnowEdit", (1, "target_old"), "下城", "'target_new' equals the old answer"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_values(case: str, tmp_path: Path) -> None:
    name, place, value, what = BAD[case]
    rows = deepcopy(ROWS[name])
    inner: Any = rows
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(FactsError, match=what) as e:
        read(name, tmp_path, rows)
    assert e.value.fix and str(tmp_path) in e.value.where
    kept = read(name, tmp_path, rows, how="skip")
    assert kept.skipped == 1 and kept.facts, "the other entry is used"


# Cases of several edits.


def test_cases_share_edits(tmp_path: Path) -> None:
    found = read("MQuAKE", tmp_path)
    assert found.facts[0].source.endswith("[0] edit 1") and found.facts[1].source.endswith("[0] edit 2")
    assert [w for _, w in told(found)] == [
        "an edit stands in a case before (1 time)", "a single hop of a case is edited in another (1 time)"
    ]  # fmt: skip
    alone = read_facts(write("MQuAKE", tmp_path), limit=1)
    assert len(alone.facts) == 2 and not alone.problems, "a limit counts cases, which stay whole"
    other = deepcopy(MQUAKE)
    other[1]["requested_rewrite"][0]["target_new"]["str"] = "with"
    with pytest.raises(FactsError, match=r"facts.json\[1\]: contradicts facts.json\[0\] edit 1"):
        read("MQuAKE", tmp_path, other)
    broken = deepcopy(MQUAKE)
    broken[0]["requested_rewrite"][1]["prompt"] = "It was born in"
    found = read("MQuAKE", tmp_path, broken, how="skip")
    assert [f.source[-3:] for f in found.facts] == ["[1]"], "no half of a case"
    assert found.facts[0].rephrase_prompts == ("Who was it?",) and found.skipped == 1
    with pytest.raises(FactsError, match="is a case of 2 facts, not one"):
        fact_from_dict(MQUAKE[0], "here")
    assert fact_from_dict(MQUAKE[1], "here").target_new == "and"


def test_an_alias_that_is_the_old_object_is_no_right_answer(tmp_path: Path) -> None:
    rows = deepcopy(MQUAKE[:1])
    rows[0]["new_single_hops"][0]["answer_alias"] = ["in", "as well as"]
    found = read("MQuAKE", tmp_path, rows)
    assert found.facts[0].target_aliases == ("as well as",)
    assert ("warning", "'in' is an alias of the new object and the old one") in told(found)


# RippleEdits names neither subject nor object.


def ripple(**edit: Any) -> list[dict[str, Any]]:
    row = deepcopy(RIPPLE[1])
    row["edit"] |= edit
    return [row]


def test_ripple_edits_read_off_what_is_not_told(tmp_path: Path) -> None:
    def first(rows: list[dict[str, Any]]) -> Fact:
        return read("RippleEdits", tmp_path, rows).facts[0]

    told_once = [w for s, w in told(read("RippleEdits", tmp_path)) if "read off its prompt" in w]
    assert told_once == [
        "an edit's subject is read off its prompt: the words that it shares with the queries about the subject (1 time)"
    ]
    added = first(ripple(subject="Quill", target_new="Oz", target_id=None))
    assert (added.subject, added.target_new, added.prompt) == (
        "Quill",
        "Oz",
        "The name of the land of Lower Quill is Old",
    )
    sentence = "The land of Life is Lower Quill is Old Oz."
    old = {"prompt": "The land of Life is Lower Quill is Old Em."}
    diff = first(ripple(prompt=sentence, original_fact=old, target_id="Q99"))
    assert (diff.prompt, diff.target_new, diff.ground_truth) == (
        "The land of Life is Lower Quill is",
        "Old Oz",
        "Old Em",
    )
    only = first(ripple(target_id="Q99"))
    assert (only.prompt, only.target_new) == ("The name of the land of Lower Quill is", "Old Oz")
    with pytest.raises(
        FactsError, match=r"the new object in 'edit.prompt' is not told: 'The land of Life is Lower"
    ) as e:
        first(ripple(prompt=sentence, target_id="Q99"))
    assert 'add "target_new": "…" to \'edit\'' in e.value.fix
    birth = ripple()
    query = {"prompt": "The place of birth of Lower Quill is", "relation": "PLACE_OF_BIRTH", "subject_id": "Q1"}
    birth[0]["Relation_Specifity"][0]["test_queries"] = [query]
    assert first(birth).subject == "Lower Quill", "of the words that both share, without 'of' and 'is'"
    for subject, prompt in (
        ("Old Life is New", "The name of the country which Old Life is New is associated with is"),
        ("Lower Quill", "The name of the brother of Lower Quill is"),
        ("Lower Quill", "Is Lower Quill still alive?"),
        ("The Quill", "The number of children The Quill has is"),
        ("University of Oz", "The name of the mother of University of Oz is"),
    ):
        birth[0]["edit"] |= {"prompt": f"The name of the land of {subject} is Old Oz."}
        query["prompt"] = prompt
        assert first(birth).subject == subject
    nameless = [{**ripple()[0], "Relation_Specifity": [], "Subject_Aliasing": []}]
    birth[0]["edit"]["prompt"], query["prompt"] = "The name of the land of  is Old Oz.", "The name of the award  won is"
    with pytest.raises(FactsError, match=r"'edit.subject' is missing"):
        first(birth)  # as there are some: the subject has no name
    with pytest.raises(FactsError, match=r"'edit.subject' is missing") as e:
        first(nameless)
    assert "--read subject=prompt" in e.value.fix
    (whole,) = read("RippleEdits", tmp_path, nameless, "subject=prompt").facts
    assert whole.subject == whole.prompt == "The name of the land of Lower Quill is"
    same = ripple(original_fact={"prompt": RIPPLE[1]["edit"]["prompt"]})
    with pytest.raises(FactsError, match="equals the old answer 'Old Oz'"):
        first(same)


def test_ripple_edits_queries_without_an_answer(tmp_path: Path) -> None:
    """Wikidata says nothing of it: its random edits have many such."""
    rows = deepcopy(RIPPLE[:1])
    bare = {
        **rows[0]["Subject_Aliasing"][0]["test_queries"][0],
        "prompt": "The coin of Tomas Veldrin is",
        "answers": [],
    }
    bare |= {"target_ids": [], "phrase": None, "relation": "CURRENCY"}
    # Generated queries name their subject in a list.
    rows[0]["Logical_Generalization"] = [{"test_queries": [bare | {"subject_id": ["Q1"]}], "condition_queries": [bare]}]
    found = read("RippleEdits", tmp_path, rows)
    assert Probe("The coin of Tomas Veldrin is", None, "Logical_Generalization") in found.facts[0].portability
    assert ("warning", "a portability prompt has no answer in the file (1 time)") in told(found)
    assert found.facts[0].subject == TOMAS


def test_a_subject_of_one_sign(tmp_path: Path) -> None:
    row = ripple(prompt="꼼 follows Old Oz.", original_fact={"prompt": "꼼 follows 꼻."}, relation="FOLLOWS")[0]
    query = {"prompt": "꼼 is followed by", "relation": "FOLLOWED_BY", "subject_id": "Q1", "answers": [{"value": "꽃"}]}
    row["Relation_Specifity"] = [{"test_queries": [query], "condition_queries": []}]
    row["Subject_Aliasing"][0]["test_queries"][0] |= {"prompt": "U+AF3C follows", "phrase": "U+AF3C follows"}
    (found,) = read("RippleEdits", tmp_path, [row]).facts
    assert (found.prompt, found.subject, found.target_new, found.ground_truth) == ("꼼 follows", "꼼", "Old Oz", "꼻")


def test_both_spellings_of_ripple_edits_group(tmp_path: Path) -> None:
    for spelling in ("Relation_Specificity", "Relation_Specifity"):
        row = deepcopy(RIPPLE[0])
        row[spelling] = row.pop("Relation_Specificity")
        assert {p.group for p in read("RippleEdits", tmp_path, [row]).facts[0].locality} == {SAME}


# The others' own ways.


def test_halluedit_takes_what_a_model_said_where_asked(tmp_path: Path) -> None:
    assert read("HalluEditBench", tmp_path).facts[0].ground_truth is None
    found = read("HalluEditBench", tmp_path, None, "ground_truth=output_some_model")
    assert [f.ground_truth for f in found.facts] == ["in", "in"]
    rows = deepcopy(HALLU)
    rows[0]["locality_question"] = "Is it | or not?"
    assert read("HalluEditBench", tmp_path, rows).facts[0].locality == (Probe("Is it | or not?"),), (
        "not about the subject"
    )


def test_not_a_number_is_nothing(tmp_path: Path) -> None:
    text = json.dumps([{**ROWS["WikiBigEdit"][0], "mhop": float("nan"), "loc_ans": float("nan")}])
    assert "NaN" in text
    (tmp_path / "f.json").write_text(text)
    (found,) = read_facts(tmp_path / "f.json").facts
    assert MULTI not in {p.group for p in found.portability} and found.locality == (Probe("The old house stood"),)
    (tmp_path / "f.json").write_text(text.replace("NaN", "Infinity"))
    with pytest.raises(FactsError, match="Infinity is not a number"):
        read_facts(tmp_path / "f.json")


def test_own_aliases(tmp_path: Path) -> None:
    row = {
        "prompt": MET, "subject": TOMAS, "target_new": "and", "target_aliases": ["plus", "and", "plus"],
        "locality": [{"prompt": "a", "ground_truth": "b", "aliases": ["c", "b"]}],
        "portability": [{"prompt": "p", "answer": ["q", "r"]}],
    }  # fmt: skip
    (found,) = read_facts(write("QAEdit", tmp_path, [row])).facts
    assert found.targets == ("and", "plus")
    assert found.locality[0].answers == ("b", "c") and found.portability[0].answers == ("q", "r")
    assert found.fields()["target_aliases"] == ("plus",) and found.fields()["locality"][0]["aliases"] == ("c",)
    bare = replace(found, target_aliases=(), locality=(Probe("a", "b"),), portability=())
    assert "target_aliases" not in bare.fields() and bare.fields()["locality"] == ({"prompt": "a", "answer": "b"},)


def test_a_data_set_is_read_in_a_bench(tmp_path: Path) -> None:
    from mosectl.bench.config import cells, read_bench

    write("zsRE", tmp_path)
    (tmp_path / "corpus.txt").write_text(CORPUS)
    text = (
        "models: [m]\ndatasets: [{facts: facts.json, read: [target_new=answers]}]\ncorpus: corpus.txt\n"
        "runs: [{edits: 1}]\nmethods: [{name: mose}]\n"
    )
    (tmp_path / "b.yaml").write_text(text)
    bench = read_bench(tmp_path / "b.yaml", "skip")
    assert [f.target_new for f in bench.datasets[0].facts] == ["in"]
    keys = {cells(bench)[0].key}
    (tmp_path / "b.yaml").write_text(text.replace(", read: [target_new=answers]", ""))
    assert not keys & {c.key for c in cells(read_bench(tmp_path / "b.yaml", "skip"))}, "another reading, other numbers"
    (tmp_path / "b.yaml").write_text(text.replace("target_new=answers", "target=answers"))
    with pytest.raises(UsageError, match="no such field 'target'"):
        read_bench(tmp_path / "b.yaml")
