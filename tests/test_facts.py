"""Every input shape, and every way a line can be wrong: told with file and line."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mosectl.errors import FactsError, UsageError
from mosectl.facts.records import MAX_LINE, Probe, fact_from_dict, join, read_facts

GOOD = {"prompt": "The capital of Ava is", "subject": "Ava", "target_new": "Brin", "ground_truth": "Quill"}


def write(folder: Path, *rows: object, name: str = "facts.jsonl") -> Path:
    text = "\n".join(r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows)
    (folder / name).write_text(text, "utf-8")
    return folder / name


def one(folder: Path, row: dict):
    (fact,) = read_facts(write(folder, row)).facts
    return fact


def test_own_shape(tmp_path: Path) -> None:
    row = {
        **GOOD,
        "rephrase_prompts": ["Ava's capital is", "The seat of Ava is "],
        "locality": [{"prompt": "The capital of Oz is", "ground_truth": "Em"}],
    }
    fact = one(tmp_path, row)
    assert fact.rephrase_prompts == ("Ava's capital is", "The seat of Ava is")
    assert fact.locality == (Probe("The capital of Oz is", "Em"),)
    assert fact.source == f"{tmp_path / 'facts.jsonl'}:1"


def test_easyedit_shape(tmp_path: Path) -> None:
    flat = {**GOOD, "rephrase_prompt": "Ava's capital is", "locality_prompt": "Oz is", "locality_ground_truth": "far"}
    fact = one(tmp_path, flat)
    assert fact.rephrase_prompts == ("Ava's capital is",) and fact.locality == (Probe("Oz is", "far"),)
    lists = {
        "locality_prompt": ["a", "b"], "locality_ground_truth": ["x", "y"], "portability_prompt": ["p", "q"],
        "portability_ground_truth": "z", "rephrase_prompt": ["r", "s"],
    }  # fmt: skip
    fact = one(tmp_path, {**GOOD, **lists})
    assert fact.locality == (Probe("a", "x"), Probe("b", "y")) and fact.rephrase_prompts == ("r", "s")
    assert fact.portability == (Probe("p", "z"), Probe("q", "z"))
    grouped = {
        **GOOD,
        "portability": {"Reasoning": [{"prompt": "a is", "ground_truth": [["x"], ["y"]]}], "Other": None},
    }
    assert one(tmp_path, grouped).portability == (Probe("a is", "x", "Reasoning", ("y",)),)
    alternatives = {**GOOD, "locality_prompt": "a", "locality_ground_truth": ["x", "y"], "ground_truth": ["Quill", "Q"]}
    fact = one(tmp_path, alternatives)
    assert fact.locality == (Probe("a", "x", "", ("y",)),) and fact.ground_truth == "Quill"
    nested = {**GOOD, "locality": {"neighborhood": {"prompt": ["a is", "b is"], "ground_truth": ["x", ["y", "z"]]}}}
    assert one(tmp_path, nested).locality == (
        Probe("a is", "x", "neighborhood"),
        Probe("b is", "y", "neighborhood", ("z",)),
    )


def test_probes_keep_their_groups(tmp_path: Path) -> None:
    ripple = {
        "Relation_Specificity": [{"prompt": "Ava speaks", "ground_truth": [["Av"]]}], "Forgetfulness": ["Ava has also"],
        "distracting": [{"prompt": ["a", "b"], "ground_truth": ["x", "y"]}],
    }  # fmt: skip
    fact = one(tmp_path, {**GOOD, "locality": ripple, "portability": {"Subject_Aliasing": [{"prompt": "p"}]}})
    assert [(p.prompt, p.group) for p in fact.locality] == [
        ("Ava speaks", "same_subject"), ("Ava has also", "forgetfulness"), ("a", "distracting"), ("b", "distracting")
    ]  # fmt: skip
    assert fact.portability == (Probe("p", None, "Subject_Aliasing"),)
    for name in ("neighborhood", "Neighbourhood", "neighbors", "neighborhood_prompts"):
        assert one(tmp_path, {**GOOD, "locality": {name: ["Oz is"]}}).locality == (
            Probe("Oz is", None, "neighborhood"),
        )
    for name in ("same-subject", "Same Subject", "Relation_Specificity", "relation specificity"):
        assert one(tmp_path, {**GOOD, "locality": {name: ["Ava is"]}}).locality[0].group == "same_subject"
    own = [{"prompt": "Oz is", "group": "neighbours"}, {"prompt": "x is", "group": "Odd one"}, {"prompt": "y is"}]
    assert [p.group for p in one(tmp_path, {**GOOD, "locality": own}).locality] == ["neighborhood", "Odd one", ""]
    again = one(tmp_path, {**GOOD, "locality": [asdict(p) for p in fact.locality]})
    assert again.locality == fact.locality, "what Python writes of a probe is read as it was"
    both = {"locality": {"same_subject": ["Ava is"]}, "locality_prompt": ["Ava is"]}
    assert one(tmp_path, {**GOOD, **both}).locality == (Probe("Ava is", None, "same_subject"),), "once, with its group"
    plain, grouped = (replace(fact, locality=(Probe("x", None, g),), portability=()) for g in ("", "odd"))
    assert plain.fields()["locality"] == ({"prompt": "x", "answer": None},), "hashes of files without groups stay"
    assert grouped.fields() != plain.fields()


def test_counterfact_shape(tmp_path: Path) -> None:
    row = {
        "requested_rewrite": {
            "prompt": "The mother tongue of {} is", "subject": "Ann", "target_new": {"str": "French"},
            "target_true": {"str": "Dutch"},
        },
        "paraphrase_prompts": ["Ann speaks"], "neighborhood_prompts": ["Bob speaks"],
    }  # fmt: skip
    fact = one(tmp_path, row)
    assert (fact.prompt, fact.target_new, fact.ground_truth) == ("The mother tongue of Ann is", "French", "Dutch")
    assert fact.rephrase_prompts == ("Ann speaks",) and fact.locality == (Probe("Bob speaks", "Dutch", "neighborhood"),)
    fact = one(tmp_path, CF)  # ROME's and MEMIT's requests: the inner part alone
    assert (fact.prompt, fact.target_new, fact.ground_truth) == ("Ann speaks", "French", "Dutch")


def test_zsre_shape(tmp_path: Path) -> None:
    fact = one(tmp_path, ZSRE)
    assert (fact.prompt, fact.target_new, fact.ground_truth) == ("What is Ann's job?", "cook", "smith")
    assert fact.rephrase_prompts == ("Ann's job is?",) and fact.locality == (Probe("who sings", "Bob"),)
    hop = {"Recalled Relation": "(a, b)", "New Question": "Where do cooks work?", "New Answer": "kitchen"}
    fact = one(tmp_path, {**ZSRE, "answers": [], "pred": "baker", "portability": hop})
    assert fact.ground_truth == "baker" and fact.portability == (Probe("Where do cooks work?", "kitchen"),)


def test_csv_and_json_list(tmp_path: Path) -> None:
    file = write(
        tmp_path, "prompt,subject,target_new,rephrase_prompts", '"Ava, or A, is",Ava,Brin,a is|b is', name="f.csv"
    )
    (fact,) = read_facts(file).facts
    assert (
        fact.prompt == "Ava, or A, is" and fact.rephrase_prompts == ("a is", "b is") and fact.source.endswith("f.csv:2")
    )
    file = write(tmp_path, json.dumps([GOOD], indent=1), name="f.json")
    assert read_facts(file).facts[0].source == f"{file}[0]"


def test_bom_windows_line_ends_blank_lines_and_separators(tmp_path: Path) -> None:
    file = tmp_path / "w.jsonl"
    row = {**GOOD, "prompt": "A line\u2028break of Ava is"}
    text = json.dumps(GOOD) + "\r\n\r\n" + json.dumps(row, ensure_ascii=False) + "\r\n"
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    facts = read_facts(file).facts
    assert len(facts) == 2 and facts[1].source.endswith(":3")


def without(name: str) -> dict:
    return {k: v for k, v in GOOD.items() if k != name}


def other(**changes: object) -> dict:
    """A second good fact, changed."""
    return {"prompt": "The capital of Oz is", "subject": "Oz", "target_new": "Em", **changes}


CF = {"prompt": "{} speaks", "subject": "Ann", "target_new": {"str": "French"}, "target_true": {"str": "Dutch"}}
ZSRE = {
    "src": "What is Ann's job?", "subject": "Ann", "alt": "cook", "answers": ["smith"], "rephrase": "Ann's job is?",
    "loc": "nq question: who sings", "loc_ans": "Bob",
}  # fmt: skip
UNEVEN = {"locality_prompt": ["a", "b", "c"], "locality_ground_truth": ["x", "y"]}
BAD_LINES = {
    "words": ("not json", "not JSON: Expecting value .column 1", "one JSON object"),
    "cut off": ('{"prompt": "x"', "not JSON", "seems cut off in its last line"),
    "cut off in a text": ('{"prompt": "x y', "not JSON: Unterminated", "seems cut off"),
    "cut off in an escape": (r'{"prompt": "\u00', "not JSON: Invalid", "seems cut off"),
    "cut off after a colon": ('{"prompt":', "not JSON: Expecting value", "seems cut off"),
    "cut off in a word": ('{"locality": tru', "not JSON: Expecting value", "seems cut off"),
    "cut off in a list": ('{"locality": [{"prompt": "x"}', "not JSON: Expecting ','", "seems cut off"),
    "no comma": ('{"prompt": "x" "subject": "y"', "not JSON: Expecting ',' ", "one JSON object"),
    "a quote missing": ('{"prompt": "x}', "not JSON: Unterminated", "one JSON object"),
    "two objects": ('{"prompt": "x"} {}', "not JSON: Extra data .column 17", "one JSON object"),
    "list": ("[1]", "is a list, not an object", "give entries like"),
    "number": ("7", "is a number, not an object", "give entries like"),
    "null line": ("null", "is null, not an object", "give entries like"),
    "huge number": ('{"prompt": ' + "1" * 5000 + "}", "not JSON: an integer of 5000 digits", "one JSON object"),
    "deep, long": ('{"a":' * 90_000, "a line of 450,000 characters", "keep it under 100,000"),
    "deep": ('{"a":' * 15_000, "nested too deep|not JSON", "one"),
    "long": (other(prompt="Oz " + "x" * MAX_LINE), "a line of 100,", "keep it under"),
    "no prompt": (without("prompt"), "'prompt' is missing", 'add "prompt": "…"'),
    "no subject": (without("subject"), "'subject' is missing", 'add "subject": "…"'),
    "no target": (without("target_new"), "'target_new' is missing", 'add "target_new": "…"'),
    "target": ({**without("target_new"), "target": "x"}, "'target_new' is missing", "where it says 'target'"),
    "misspelt": ({**without("subject"), "Subjekt": "x"}, "'subject' is missing", "where it says 'Subjekt'"),
    "upper case": ({**without("prompt"), "PROMPT": "x"}, "'prompt' is missing", "where it says 'PROMPT'"),
    "rephrasing only": ({**without("prompt"), "rephrase_prompt": "x"}, "'prompt' is missing", 'add "prompt"'),
    "known facts": ({**without("target_new"), "attribute": "x"}, "'target_new' is missing", "known ('attribute')"),
    "empty": (other(target_new=""), "'target_new' is empty", "fill"),
    "blank": (other(subject=" \u00a0\u200b"), "'subject' is empty", "fill"),
    "blank prompt": (other(prompt=" \n"), "'prompt' is empty", "fill"),
    "number target": (other(target_new=7), "'target_new' is a number, not text", 'write it as "7"'),
    "list target": (other(target_new=["x"]), "'target_new' is a list, not text", 'write it as "…"'),
    "null target": (other(target_new=None), "'target_new' is null, not text", 'write it as "…"'),
    "bool subject": (other(subject=True), "'subject' is true or false, not text", 'write it as "…"'),
    "line break": (other(target_new="a\nb"), "'target_new' holds a line break", "on one line"),
    "last line break": (other(target_new="a\n"), "'target_new' holds a line break", "on one line"),
    "separator": (other(target_new="a\u2028b"), "'target_new' holds a line break", "on one line"),
    "control": (other(target_new="a\x1bb"), r"'target_new' holds the control character U\+001B at 1", "remove"),
    "control in prompt": (other(prompt="a\x00 Oz"), r"'prompt' holds the control character U\+0000", "remove"),
    "half a character": (
        '{"prompt": "Oz", "subject": "Oz", "target_new": "\\ud83e"}',
        r"a character, U\+D83E",
        "write",
    ),
    "name twice": (
        '{"prompt": "Oz", "subject": "Oz", "subject": "Ava"}',
        "'subject' stands twice in one object",
        "one",
    ),
    "nested": (other(locality=eval("[" * 65 + "]" * 65)), "nested deeper than 64", "one JSON object"),
    "brackets": ("[" * 99_000, "nested deeper than 64", "one JSON object"),
    "flag": (other(space_before_target="no"), "'space_before_target' is text, not true or false", "leave it out"),
    "subject a book": (other(prompt="Oz " * 2000, subject="Oz " * 1999), "'subject' has 5,997 characters", "5,000"),
    "bomb": (other(prompt="Oz {} " * 9000, subject="Oz " * 9), "too long with the subject", "keep a prompt under"),
    "bombs": (
        other(prompt="{}" * 99, subject="Oz " * 200, rephrase=["{}" * 99 + "a" * i for i in range(40)]),
        "too",
        "pr",
    ),
    "case": (other(subject="oz"), "subject 'oz' is not in prompt 'The capital of Oz is'", "did you mean 'Oz'"),
    "spelling": (other(prompt="I met Tomas Veldrin in", subject="Thomas Veldrin"), "is not", "mean 'Tomas Veldrin'"),
    "no likeness": (other(subject="Mars"), "subject 'Mars' is not in prompt", "as the prompt spells it"),
    "form": (other(prompt="Zoe\u0301 is", subject="Zoé"), "is not in prompt", "another Unicode form"),
    "same as old": (other(ground_truth="Em "), "'target_new' equals the old answer 'Em'", "change or remove"),
    "among the old": (other(ground_truth=["X", "Em"]), "'target_new' equals the old answer 'Em'", "change or remove"),
    "old is a number": (other(ground_truth=5), "'ground_truth' is a number", 'write it as "5"'),
    "rephrasings": (other(rephrase_prompts=3), "'rephrase_prompts' is not text or a list of texts", '["…", "…"]'),
    "rephrasing": (other(rephrase_prompt=[3]), "'rephrase_prompt' is not text or a list", '["…", "…"]'),
    "locality number": (other(locality=5), "an entry of 'locality' has no prompt", '{"prompt": "…", "ground_truth"'),
    "locality numbers": (other(locality=[5]), "an entry of 'locality' has no prompt", '{"prompt"'),
    "locality fields": (other(locality=[{"q": "x"}]), "an entry of 'locality' has no prompt", '{"prompt"'),
    "group number": (
        other(locality=[{"prompt": "a", "group": 5}]),
        "name of a group of 'locality' is a number",
        "write",
    ),
    "group lines": (other(locality={"a\nb": ["x is"]}), "name of a group of 'locality' holds a line break", "one line"),
    "group blank": (other(locality={" ": ["x is"]}), "name of a group of 'locality' is empty", "fill it in"),
    "locality group": (other(locality={"promt": "x"}), "an entry of 'locality' has no prompt", '{"prompt"'),
    "locality prompt": (other(locality=[{"prompt": 5}]), "'locality' is a number, not text", "write it"),
    "locality answer": (other(locality=[{"prompt": "a", "ground_truth": 5}]), "'locality' is a number", "write it"),
    "old answers": (
        other(portability=[{"prompt": "a", "answer": [[1918]]}]),
        "an answer of 'portability' is a",
        '"1918"',
    ),
    "portability": (other(portability=[{"prompt": ["a", 1]}]), "'portability' is a number", "write it"),
    "uneven": (other(**UNEVEN), "'locality_prompt' has 3 prompts and 2 answers", "one answer"),
    "repeats": (GOOD, "stands already in facts.jsonl:1", "remove"),
    "repeats, spaced": ({**GOOD, "prompt": " The  capital of Ava is ", "target_new": " Brin"}, "already", "remove"),
    "contradicts": ({**GOOD, "target_new": "Else"}, "contradicts facts.jsonl:1.*'Else' here, 'Brin' there", "keep one"),
    "rewrite": ({"requested_rewrite": 5}, "'requested_rewrite' is a number, not an object", "CounterFact"),
    "rewrite target": ({"requested_rewrite": {**CF, "target_new": {}}}, "'requested_rewrite.target_new.str' is", "add"),
    "rewrite subject": ({"requested_rewrite": {**CF, "prompt": "speaks"}}, "subject 'Ann' is not in prompt", "spells"),
    "neighbours": ({"requested_rewrite": CF, "neighborhood_prompts": 5}, "'neighborhood_prompts' is a number", "write"),
    "paraphrases": ({"requested_rewrite": CF, "paraphrase_prompts": 5}, "'paraphrase_prompts' is not text", "write"),
    "zsRE target": ({**ZSRE, "alt": ""}, "'alt' is empty", "fill"),
    "zsRE no target": ({k: v for k, v in ZSRE.items() if k != "alt"}, "'alt' is missing", "add"),
    "zsRE same": ({**ZSRE, "alt": "smith"}, "'alt' equals the old answer 'smith'", "change"),
    "zsRE loc": ({**ZSRE, "loc": 5}, "'loc' is a number", "write"),
}


@pytest.mark.parametrize(("row", "what", "fix"), BAD_LINES.values(), ids=BAD_LINES)
def test_bad_lines(row: object, what: str, fix: str, tmp_path: Path) -> None:
    file = write(tmp_path, GOOD, row)
    with pytest.raises(FactsError, match=what) as e:
        read_facts(file)
    assert str(e.value).startswith(f"{file}:2: ") and fix in e.value.fix and "--on-error skip" in e.value.fix
    kept = read_facts(file, "skip")
    assert len(kept.facts) == 1 and kept.skipped == 1 and kept.problems[0].where == f"{file}:2"
    assert read_facts(file, limit=1).skipped == 0, "lines behind the limit do not count"


def test_optional_fields_may_be_null_or_empty(tmp_path: Path) -> None:
    empty = {"ground_truth": "", "rephrase_prompts": None, "rephrase_prompt": "", "locality": {}, "portability": []}
    assert one(tmp_path, {**GOOD, **empty}) == one(tmp_path, without("ground_truth"))
    fact = one(tmp_path, {**GOOD, "locality": ["a is", {"prompt": "b is", "ground_truth": None}], "note": 1})
    assert fact.locality == (Probe("a is"), Probe("b is"))


def test_prompts_are_cleaned_at_their_end_and_may_have_lines(tmp_path: Path) -> None:
    fact = one(tmp_path, {**GOOD, "prompt": "Q: capital of {}?\n\tA: ", "rephrase_prompt": "{} has the capital\n"})
    assert fact.prompt == "Q: capital of Ava?\n\tA:" and fact.rephrase_prompts == ("Ava has the capital\n",)
    probes = {"prompt": ["x \t ", "y\n\n"], "ground_truth": ["1", "2"]}
    fact = one(tmp_path, {**GOOD, "prompt": "<user> Ava?\n<bot>\n  ", "locality": probes})
    assert fact.prompt == "<user> Ava?\n<bot>\n" and [p.prompt for p in fact.locality] == ["x \t", "y\n\n"]


def test_repeated_rephrasings_are_dropped_with_a_warning(tmp_path: Path) -> None:
    file = write(tmp_path, {**GOOD, "rephrase_prompts": ["The capital of Ava is ", "Ava's is", "Ava's is"]})
    report = read_facts(file)
    assert report.facts[0].rephrase_prompts == ("Ava's is",) and report.skipped == 0
    (problem,) = report.problems
    assert (problem.where, problem.severity) == (f"{file}:1", "warning")


def test_the_facts_own_prompt_is_no_locality_prompt(tmp_path: Path) -> None:
    file = write(tmp_path, {**GOOD, "rephrasings": ["Ava's is"], "locality": [GOOD["prompt"], "The capital of Bea is"]})
    report = read_facts(file)
    assert [p.prompt for p in report.facts[0].locality] == ["The capital of Bea is"]
    assert report.facts[0].rephrase_prompts == ("Ava's is",)
    (problem,) = report.problems
    assert problem.severity == "warning" and "own prompt" in problem.what


@pytest.mark.parametrize("name", ["f.json", "f.jsonl", "f.txt"])
def test_json_documents(tmp_path: Path, name: str) -> None:
    file = write(tmp_path, json.dumps({"facts": [GOOD, other()]}, indent=1), name=name)
    assert [f.source for f in read_facts(file).facts] == [f"{file}[0]", f"{file}[1]"]
    assert len(read_facts(write(tmp_path, json.dumps([GOOD, other()]), name=name)).facts) == 2
    assert read_facts(write(tmp_path, json.dumps(GOOD, indent=1), name=name)).facts[0].source == f"{file}:1"
    assert len(read_facts(write(tmp_path, GOOD, other(), name=name)).facts) == 2
    bad = write(tmp_path, json.dumps([GOOD, 7, {**GOOD, "target_new": "X"}]), name=name)
    with pytest.raises(FactsError, match=rf"2 of 3.*\n.*{name}\[1\]: is a number.*\n.*\[2\]: contradicts {name}\[0\]"):
        read_facts(bad)


def test_a_list_among_lines_is_one_bad_line(tmp_path: Path) -> None:
    file = write(tmp_path, "[1]", GOOD)
    assert read_facts(file, "skip").skipped == 1 and len(read_facts(file, "skip").facts) == 1


CSV = {
    "comma": ('prompt,subject,target_new\nAva is,Ava,"a, b"\n', "a, b"),
    "semicolon": ("prompt;subject;target_new\r\nAva is;Ava;a, b\r\n", "a, b"),
    "tab": ("subject\ttarget_new\tprompt\nAva\ta, b\tAva is", "a, b"),
    "blank lines, BOM": ("\ufeff prompt , subject,target_new, ground_truth\n\nAva is,Ava,b,\n,,,\n", "b"),
    "zsRE": ("src,subject,alt,loc,loc_ans\nWho is Ava?,Ava,b,nq question: x,y\n", "b"),
}


@pytest.mark.parametrize("kind", CSV)
def test_csv(kind: str, tmp_path: Path) -> None:
    text, target = CSV[kind]
    (fact,) = read_facts(write(tmp_path, text, name="f.csv")).facts
    assert (fact.subject, fact.target_new, fact.ground_truth) == ("Ava", target, None)


def test_csv_probes(tmp_path: Path) -> None:
    head = "prompt,subject,target_new,locality_prompt,locality_ground_truth,rephrase_prompt"
    (fact,) = read_facts(write(tmp_path, head, "Ava is,Ava,x,a | b|,1|2|,r|s|", name="f.csv")).facts
    assert fact.locality == (Probe("a", "1"), Probe("b", "2")) and fact.rephrase_prompts == ("r", "s")


HEAD = "prompt,subject,target_new\n"
BAD_CSV = {
    "no header": ("Ava is,Ava,b\n", ":1: the first line is not a header", "prompt,subject,target_new"),
    "column": ("prompt,subject,target\nAva is,Ava,b", ":1: column 'target_new' is missing", "where it says 'target'"),
    "no column": ("prompt,subject\nAva is,Ava", ":1: column 'target_new' is missing", "add it: target_new"),
    "twice": ("prompt,prompt,subject,target_new\n", ":1: column 'prompt' stands there twice", "rename"),
    "no rows": (HEAD, "f.csv: holds no fact", "give lines"),
    "cells": (HEAD + "Ava, or A, is,Ava,b", ":2: more cells than the header has", "quote"),
    "fewer": (HEAD + "Ava is,Ava", ":2: 'target_new' is missing", "add"),
    "empty cell": (HEAD + "Ava is,,b", ":2: 'subject' is empty", "fill"),
    "open quote": (HEAD + 'Ava is,Ava,x\n"Oz is,Oz,b\nx,y,z\n', ":3: not CSV: unexpected end of data", "close every"),
    "two lines": (HEAD + '\n"Ava is",Ava,"b\nc"\n', ":3: 'target_new' holds a line break", "on one line"),
    "long": (HEAD + "Ava " + "x" * MAX_LINE + ",Ava,b", ":2: a line of 100,", "keep it under"),
    "longer": (HEAD + "Ava " + "x" * 200_000 + ",Ava,b", ":2: not CSV: field larger", "close every quote"),
    "contradiction": (HEAD + "Ava is,Ava,b\n\nAva is,Ava,c", ":4: contradicts f.csv:2", "keep one"),
}


@pytest.mark.parametrize("kind", BAD_CSV)
def test_bad_csv(kind: str, tmp_path: Path) -> None:
    text, what, fix = BAD_CSV[kind]
    with pytest.raises(FactsError) as e:
        read_facts(write(tmp_path, text, name="f.csv"))
    assert what in str(e.value) and fix in e.value.fix


def test_a_broken_csv_row_leaves_the_others(tmp_path: Path) -> None:
    file = write(tmp_path, HEAD + 'Ava is,"Ava"x,b\nOz is,Oz,c\n', name="f.csv")
    report = read_facts(file, "skip")
    assert [f.subject for f in report.facts] == ["Oz"] and report.problems[0].where == f"{file}:2"


BAD_FILES = [
    (b"", "is empty"),
    (b"  \n\n", "is empty"),
    (b"\xef\xbb\xbf", "is empty"),
    (b"\x89PNG\r\n\x1a\n\0\0", "binary file, not UTF-8 text .byte 8"),
    (b"{}\n{}\0\0", "f.jsonl:2: is a binary"),
    (b'{"a": 1}\n' * 10_000 + b"\0", "f.jsonl:10001: is a binary"),
    ('{"prompt": "é"}'.encode("utf-16"), "UTF-16"),
    ('{"prompt": "é"}'.encode("utf-16-le"), "UTF-16"),
    ('{"prompt": "é"}'.encode("utf-16-be"), "UTF-16"),
    ('{"prompt": "ok"}\n{"prompt": "é"}'.encode("latin-1"), r"f.jsonl:2: is not UTF-8 text .byte 29"),
    (b"\xef\xbb\xbf{}\n" + b"\xe9", r"f.jsonl:2: is not UTF-8 text .byte 6"),
    (b"just some words", "f.jsonl:1: not JSON"),
    (b"[]", "holds no fact"),
    (b'{"facts": []}', "holds no fact"),
    (b"[1,\n 2", "f.jsonl:2: not JSON: Expecting ',' delimiter .column 3"),
    (b"[" * 100_000, "nested too deep"),
    (b"[" + b"1" * 5000 + b"]", r"\[0\]: not JSON: an integer of 5000 digits"),
    (b"[1] 2 ", "f.jsonl:1: not JSON: Extra data .column 5"),
    (b'{"facts": [], "facts": [1]}', "f.jsonl:1: not JSON: the name 'facts' stands twice"),
]


@pytest.mark.parametrize(("data", "what"), BAD_FILES, ids=[w for _, w in BAD_FILES])
def test_bad_files(data: bytes, what: str, tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    file.write_bytes(data)
    with pytest.raises(FactsError, match=what) as e:
        read_facts(file)
    assert str(file) in str(e.value) and e.value.fix and e.value.exit_code == 3


def test_files_out_of_all_proportion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "f.json"
    file.write_bytes(b"[" + b"[]," * 2_500_001 + b"1]")
    with pytest.raises(FactsError, match="JSON of more than 5,000,000 values"):
        read_facts(file)
    monkeypatch.setattr("mosectl.facts.records.MAX_WRONG", 500)
    (tmp_path / "f.jsonl").write_text("1\n" * 501)
    with pytest.raises(FactsError, match=r"more than 500 entries are wrong: the last, .*f.jsonl:501: is a number"):
        read_facts(tmp_path / "f.jsonl", "skip")
    monkeypatch.setattr("mosectl.facts.records.MAX_WRONG", 5000)
    monkeypatch.setattr("mosectl.facts.readers.MAX_ENTRIES", 1000)
    for name, text in (("f.jsonl", "1\n" * 1001), ("f.json", "[1" + ",1" * 1000 + "]"), ("f.csv", HEAD + "a\n" * 1001)):
        (tmp_path / name).write_text(text)
        with pytest.raises(FactsError, match="more than 1,000 entries"):
            read_facts(tmp_path / name, "report")
    (tmp_path / "f.csv").write_text(HEAD + "\n" * 2001)
    with pytest.raises(FactsError, match="more than 2,000 lines"):
        read_facts(tmp_path / "f.csv")
    (tmp_path / "f.csv").write_text(HEAD + "," * 1_000_001)
    with pytest.raises(FactsError, match=r"f.csv:2: a line of 1,000,001 characters"):
        read_facts(tmp_path / "f.csv")
    (tmp_path / "f.csv").write_text(HEAD.strip() + ",a" * 50_000)
    with pytest.raises(FactsError, match=r"f.csv:1: column 'a' stands there twice"):
        read_facts(tmp_path / "f.csv")
    (tmp_path / "f.csv").write_text(HEAD.strip() + ",ab" * 50_000)
    with pytest.raises(FactsError, match=r"f.csv:1: a header of more than"):
        read_facts(tmp_path / "f.csv")


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    if not hasattr(os, "mkfifo") or not Path("/dev/zero").exists():
        pytest.skip("no pipes or devices on this system")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with (tmp_path / "sparse.jsonl").open("wb") as file:
        file.truncate(20 * 10**9)
    started = time.perf_counter()
    for path, what in (
        ("pipe.jsonl", "not a regular"),
        ("/dev/zero", "not a regular"),
        ("sparse.jsonl", "20,000,000,000"),
    ):
        with pytest.raises(FactsError, match=what) as e:
            read_facts(tmp_path / path)
        assert e.value.exit_code == 3 and e.value.fix
    assert time.perf_counter() - started < 2


def test_missing_file_folder_and_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, GOOD)
    for path, what in ((tmp_path / "none", "no such file"), (tmp_path, "is a folder"), (file / "x", "Not a directory")):
        with pytest.raises(FactsError, match=what):
            read_facts(path)
    with pytest.raises(FactsError, match="cannot be read: embedded null"):
        read_facts("a\0b")
    with pytest.raises(FactsError, match="not a facts file"):
        read_facts(write(tmp_path, "just some words", name="f.txt"))
    with pytest.raises(UsageError, match="--on-error maybe"):
        read_facts(file, "maybe")
    with pytest.raises(UsageError, match="--limit 0"):
        read_facts(file, limit=0)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("mosectl.storage.inputs.os.open", refuse)
    with pytest.raises(FactsError, match="may not be read"):
        read_facts(file)


def test_no_usable_fact(tmp_path: Path) -> None:
    file = write(tmp_path, {}, {})
    with pytest.raises(FactsError, match="none of the 2 entries is usable") as e:
        read_facts(file, "skip")
    assert e.value.fix == f"run: mosectl check {file}"
    report = read_facts(file, "report")
    assert (report.facts, report.skipped, len(report.problems)) == ((), 2, 2)


def test_report_collects_everything_in_order(tmp_path: Path) -> None:
    rows = [GOOD, other(rephrase_prompt="The capital of Oz is"), {}, GOOD]
    report = read_facts(write(tmp_path, *rows), "report")
    found = [(p.where.rsplit(":", 1)[1], p.severity) for p in report.problems]
    assert found == [("2", "warning"), ("3", "error"), ("4", "error")]
    assert len(report.facts) == 2 and report.skipped == 2


def test_many_facts_are_read_in_no_time(tmp_path: Path) -> None:
    file = write(tmp_path, *[other(prompt=f"Number {i} of Oz is") for i in range(20_000)])
    started = time.perf_counter()
    assert len(read_facts(file).facts) == 20_000
    assert time.perf_counter() - started < 10, "duplicates are found in linear time"


def test_many_problems_are_listed(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD, *[{"prompt": f"{i}"} for i in range(8)])
    with pytest.raises(FactsError, match=r"(?s)8 of 9 entries.*:2: .*:6: .*and 3 more") as e:
        read_facts(file)
    assert f"mosectl check {file}" in e.value.fix and "--on-error skip" in e.value.fix
    assert f"{file}:7" not in str(e.value)
    assert len(read_facts(file, "report").problems) == 8


def test_join_and_dict() -> None:
    assert (join("a", "b"), join("a ", "b"), join("a", " b"), join("", "b")) == ("a b", "a b", "a b", "b")
    assert fact_from_dict({**GOOD, "prompt": "{} is "}, "here").prompt == "Ava is"
    with pytest.raises(FactsError, match="here: 'prompt' is missing"):
        fact_from_dict({}, "here")
    with pytest.raises(FactsError, match="here: is a list, not an object"):
        fact_from_dict([], "here")  # type: ignore[arg-type]
    assert (join("a\n", "b"), join("a", "\nb"), join("a:", "b"), join("東京", "b")) == (
        "a\nb",
        "a\nb",
        "a: b",
        "東京b",
    )


def test_real_files(shared: Path) -> None:
    assert len(read_facts(shared / "data" / "counterfact-factlm.jsonl").facts) == 1500
    large = read_facts(shared / "data" / "counterfact-2k.jsonl", "skip")  # it contradicts itself here and there
    assert len(large.facts) + large.skipped == 2000 and 0 < large.skipped < 50
    found = read_facts(shared / "data" / "zsre-1k.json", "skip")
    assert len(found.facts) > 950 and all(f.locality for f in found.facts)
    with pytest.raises(FactsError, match=r"known_1000.json\[0\]: 'target_new' is missing"):
        read_facts(shared / "data" / "known_1000.json")


def test_a_misspelt_optional_field_is_told(tmp_path: Path) -> None:
    found = read_facts(write(tmp_path, {**GOOD, "loclity": ["Oz is"], "case_id": 3, "rephrase": []}))
    told = [(p.severity, p.what, p.fix) for p in found.problems]
    assert told == [("warning", "field 'loclity' is not used", "did you mean 'locality'?")]


# What fields are called, and what is said of those that are not used.


def test_a_name_of_each_field_in_the_data_sets(tmp_path: Path) -> None:
    for name in ("rephrase_prompts", "rephrase_prompt", "rephrase", "rephrases", "paraphrase_prompts", "paraphrases"):
        assert one(tmp_path, {**GOOD, name: ["Ava's is"]}).rephrase_prompts == ("Ava's is",), name
    for name in ("target_old", "target_true", "ground_truth"):
        assert one(tmp_path, {**without("ground_truth"), name: "Quill"}).ground_truth == "Quill", name
    assert one(tmp_path, {**CF, "target_true": None, "target_old": {"str": "Dutch"}}).ground_truth == "Dutch"
    for name in ("ground_truth", "answer", "answers", "target"):
        fact = one(tmp_path, {**GOOD, "locality": [{"prompt": "Oz is", name: "far"}], "portability": {"question": "x"}})
        assert fact.locality == (Probe("Oz is", "far"),) and fact.portability == (Probe("x"),), name
    inputs = {"locality_inputs": {"neighborhood": {"prompt": ["a", "b"], "ground_truth": ["x", "y"]}}}
    fact = one(tmp_path, {**GOOD, **inputs, "portability_inputs": {"one_hop": {"prompt": "p", "ground_truth": "q"}}})
    assert fact.locality == (Probe("a", "x", "neighborhood"), Probe("b", "y", "neighborhood"))
    assert fact.portability == (Probe("p", "q", "one_hop"),)
    fact = one(tmp_path, {**GOOD, "neighborhood_prompts": ["Oz is"], "loc": "nq question: who", "loc_ans": "she"})
    assert fact.locality == (Probe("Oz is", "Quill", "neighborhood"), Probe("who", "she"))
    fact = one(tmp_path, {**GOOD, "neighborhood_prompts": [{"prompt": "Oz is", "target": "Em"}]})
    assert fact.locality == (Probe("Oz is", "Em", "neighborhood"),)


def test_probes_and_rephrasings_of_several_fields_are_all_used(tmp_path: Path) -> None:
    file = write(tmp_path, {
        **GOOD, "rephrase_prompts": ["Ava's is"], "rephrase": ["Ava's is", "Of Ava it is"],
        "locality": [{"prompt": "a", "ground_truth": "x"}], "locality_prompt": ["a", "b"],
        "locality_ground_truth": ["x", "y"],
    })  # fmt: skip
    report = read_facts(file)
    (fact,) = report.facts
    assert fact.rephrase_prompts == ("Ava's is", "Of Ava it is") and fact.locality == (Probe("a", "x"), Probe("b", "y"))
    (told,) = report.problems
    assert told.what == "'rephrase_prompts' and 'rephrase' differ" and told.fix == "all of it is used"


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"target_old": "Else"}, "'ground_truth' and 'target_old' differ"),
        ({"target_true": {"str": "Else"}}, "'ground_truth' and 'target_true' differ"),
        ({"locality": {"prompt": "a", "ground_truth": "x", "answer": "y"}}, "'ground_truth' and 'answer' of 'locality' dif"),
    ],
)  # fmt: skip
def test_two_names_of_one_field_that_differ_are_said(row: dict, what: str, tmp_path: Path) -> None:
    report = read_facts(write(tmp_path, {**GOOD, **row}))
    (told,) = report.problems
    assert told.severity == "warning" and told.what.startswith(what) and told.fix == "'ground_truth' is used"
    assert report.facts[0].ground_truth == "Quill"
    same = json.loads(json.dumps(row).replace("Else", "Quill ").replace('"y"', '["x"]'))
    assert not read_facts(write(tmp_path, {**GOOD, **same})).problems


def test_unknown_fields_are_told_once_with_counts(tmp_path: Path) -> None:
    rows = [other(prompt=f"{i} of Oz", note="x", locality=[{"prompt": "a", "reply": "b"}]) for i in range(50)]
    rows[7]["loclity"] = ["b"]
    rows[8] |= {"colour": None, "": "1"}  # a field without a value, and a table's unnamed column, are nobody's loss
    file = write(tmp_path, *rows)
    (told,) = read_facts(file).problems
    assert (told.where, told.severity) == (str(file), "warning")
    assert told.what == "fields 'note' (50 times), 'locality.reply' (50 times), 'loclity' are not used"
    assert told.fix == "did you mean 'locality' for 'loclity'?"
    (told,) = read_facts(write(tmp_path, {**GOOD, "note": 1})).problems
    assert told.what == "field 'note' is not used" and "read are: prompt, subject, target_new, ground_truth" in told.fix
    (told,) = read_facts(write(tmp_path, {"requested_rewrite": {**CF, "hue": 1}})).problems
    assert told.what == "field 'requested_rewrite.hue' is not used"
    many = {f"x{i}": 1 for i in range(5000)}
    (told,) = read_facts(write(tmp_path, {**GOOD, **many}, other(**{f"y{i}": 1 for i in range(5000)}))).problems
    assert told.what.endswith("'x9' and 90 more are not used"), "a file of nothing but names is not remembered whole"


def test_what_data_sets_carry_besides_is_no_news(tmp_path: Path) -> None:
    counterfact = {
        "case_id": 1, "pararel_idx": 2,
        "requested_rewrite": {**CF, "relation_id": "P1", "target_new": {"str": "French", "id": "Q1"}},
        "paraphrase_prompts": [], "neighborhood_prompts": ["Bob speaks"], "attribute_prompts": ["x"],
        "generation_prompts": ["y"],
    }  # fmt: skip
    zsre = {**ZSRE, "pred": "baker", "cond": "smith >> cook || What is Ann's job?"}
    known = {
        **GOOD,
        "known_id": 0,
        "attribute": "x",
        "template": "{} is",
        "prediction": "x",
        "relation_id": "P1",
        "id": 4,
    }
    for row in (counterfact, zsre, known):
        assert read_facts(write(tmp_path, row)).problems == ()


def test_real_data_sets_have_no_unknown_fields(shared: Path) -> None:
    for name in ("counterfact-2k.jsonl", "zsre-1k.json", "real-facts-smollm2.jsonl", "counterfact-smollm2.jsonl"):
        problems = read_facts(shared / "data" / name, "skip").problems
        assert not [p for p in problems if "not used" in p.what or "differ" in p.what], name


# Documents.


@pytest.mark.parametrize("wrapper", ["facts", "data"])
def test_a_list_in_an_object(wrapper: str, tmp_path: Path) -> None:
    file = write(tmp_path, {"version": [1, {"x": 2}], wrapper: [GOOD, other()]}, name="f.json")
    assert [f.source for f in read_facts(file).facts] == [f"{file}[0]", f"{file}[1]"]
    file = write(tmp_path, json.dumps({wrapper: [GOOD, 7]}, indent=1), name="f.jsonl")
    with pytest.raises(FactsError, match=r"f.jsonl\[1\]: is a number"):
        read_facts(file)
    with pytest.raises(FactsError, match="holds no fact"):
        read_facts(write(tmp_path, {wrapper: []}))
    assert len(read_facts(write(tmp_path, {**GOOD, wrapper: []})).facts) == 1, "a fact with a field of that name"


def test_a_bad_entry_of_a_list_leaves_the_others(tmp_path: Path) -> None:
    twice = '{"prompt": "Oz is", "subject": "Oz", "target_new": "a",\n "target_new": "b"}'
    for text in (f"[{json.dumps(GOOD)},\n\n{twice} , {{}}]", f'{{"data": [{json.dumps(GOOD)},\n\n{twice}, {{}} ]}}'):
        (tmp_path / "f.json").write_text(text)
        report = read_facts(tmp_path / "f.json", "skip")
        assert len(report.facts) == 1 and report.skipped == 2
        assert report.problems[0].where == f"{tmp_path / 'f.json'}[1]"
        assert "the name 'target_new' stands twice in one object" in report.problems[0].what
        assert "line 3" in report.problems[0].fix
    (tmp_path / "f.json").write_text(f'{{"prompt": "Ava is",\n{json.dumps(GOOD)[1:]}')
    with pytest.raises(FactsError, match=r"f.json:1: not JSON: the name 'prompt' stands twice"):
        read_facts(tmp_path / "f.json")


# Subjects within words, and how the target is joined.


def test_a_subject_within_a_word_is_said(tmp_path: Path) -> None:
    def told(prompt: str, subject: str) -> list[str]:
        row = {"prompt": prompt, "subject": subject, "target_new": "x"}
        report = read_facts(write(tmp_path, row))
        assert len(report.facts) == 1 and all(p.severity == "warning" for p in report.problems)
        return [p.what for p in report.problems]

    assert told("JavaScript was made by", "Java") == ["subject 'Java' stands only inside a longer word, 'JavaScript'"]
    assert told("The capital of Nigeria is", "Niger") == ["subject 'Niger' stands only inside a longer word, 'Nigeria'"]
    assert told("Nigeria lies beside Niger. Nigeria's capital is", "Niger") == []
    assert told("中国人的首都是", "中国") == [] and told("서울은", "서울") == [] and told("Ava's is", "Ava") == []
    assert told("JavaScript or {}, is by", "Java") == []


def test_space_before_target(tmp_path: Path) -> None:
    assert one(tmp_path, GOOD).space_before_target is None
    for value in (True, False):
        assert one(tmp_path, {**GOOD, "space_before_target": value}).space_before_target is value
        assert one(tmp_path, {"requested_rewrite": CF, "space_before_target": value}).space_before_target is value
        text = f"prompt,subject,target_new,space_before_target\nAva is,Ava,b,{value}\nOz is,Oz,b,\n"
        facts = read_facts(write(tmp_path, text, name="f.csv")).facts
        assert [f.space_before_target for f in facts] == [value, None]
    assert "space_before_target" not in one(tmp_path, GOOD).fields(), "hashes of facts without it stay what they were"
    assert one(tmp_path, {**GOOD, "space_before_target": False}).fields()["space_before_target"] is False


def test_a_line_break_at_a_prompts_end_is_said(tmp_path: Path) -> None:
    ends = (
        {"prompt": "The capital of Ava is\n"},
        {"rephrase_prompts": ["Ava's capital is\n"]},
        {"locality": ["Oz is\n"]},
    )
    for change in ends:
        (told,) = read_facts(write(tmp_path, {**GOOD, **change})).problems
        assert told.severity == "warning" and "ends with a line break" in told.what and "remove" in told.fix
    rendered = {**GOOD, "prompt": "user\nWhere is Ava?\nassistant\n"}
    report = read_facts(write(tmp_path, rendered))
    assert not report.problems and report.facts[0].prompt.endswith("assistant\n")
