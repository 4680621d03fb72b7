"""Every input shape, and every way a line can be wrong: told with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mosectl.errors import FactsError, UsageError
from mosectl.facts import MAX_LINE, Probe, fact_from_dict, join, read_facts

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
    nested = {**GOOD, "locality": {"neighborhood": {"prompt": ["a is", "b is"], "ground_truth": ["x", ["y", "z"]]}}}
    assert one(tmp_path, nested).locality == (Probe("a is", "x"), Probe("b is", "y"))


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
    assert fact.rephrase_prompts == ("Ann speaks",) and fact.locality == (Probe("Bob speaks", "Dutch"),)


def test_zsre_shape(tmp_path: Path) -> None:
    row = {
        "src": "What is Ann's job?", "subject": "Ann", "alt": "cook", "answers": ["smith"], "rephrase": "Ann's job is?",
        "loc": "nq question: who sings", "loc_ans": "Bob",
    }  # fmt: skip
    fact = one(tmp_path, row)
    assert (fact.target_new, fact.ground_truth) == ("cook", "smith")
    assert fact.locality == (Probe("who sings", "Bob"),)


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
    other = {**GOOD, "prompt": "A line\u2028break of Ava is"}
    text = json.dumps(GOOD) + "\r\n\r\n" + json.dumps(other, ensure_ascii=False) + "\r\n"
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    facts = read_facts(file).facts
    assert len(facts) == 2 and facts[1].source.endswith(":3")


BAD_LINES = [
    ("not json", r":2: not JSON.*column 1", "one JSON object"),
    ('{"prompt": "x"', "not JSON", ""),
    ("[1]", "a JSON list, not an object", ""),
    ('{"a":' * 90_000, "a line of", "under"),
    ('{"a":' * 15_000, "nested too deep|not JSON", ""),
    ({k: v for k, v in GOOD.items() if k != "subject"}, "'subject' is missing", 'add "subject"'),
    ({"prompt": "Ava is", "subject": "Ava", "target": "x"}, "'target_new' is missing", "did you mean 'target_new'"),
    ({**GOOD, "target_new": ""}, "'target_new' is empty", "fill"),
    ({**GOOD, "target_new": 7}, "'target_new' is a int", ""),
    ({**GOOD, "target_new": "a\nb"}, "line break", "remove"),
    ({**GOOD, "subject": "ava"}, "subject 'ava' does not stand in prompt", "did you mean 'Ava'"),
    ({**GOOD, "prompt": "The capital of Avva is"}, "does not stand", "did you mean 'Avva'"),
    ({**GOOD, "target_new": "Quill"}, "equals the old answer 'Quill'", "nothing to change"),
    ({**GOOD, "rephrase_prompts": 3}, "'rephrase_prompts' is not", ""),
    ({**GOOD, "prompt": "b of Ava is", "locality": [{"q": 1}]}, "an entry of 'locality' has no prompt", ""),
    (GOOD, "repeats facts.jsonl:1", "remove"),
    ({**GOOD, "target_new": "Else"}, "contradicts facts.jsonl:1.*'Else' here, 'Brin' there", "keep one"),
    ({**GOOD, "prompt": "Ava " + "x" * MAX_LINE}, "a line of", ""),
]


@pytest.mark.parametrize(("row", "what", "fix"), BAD_LINES, ids=[w[:25] for _, w, _ in BAD_LINES])
def test_bad_lines(row: object, what: str, fix: str, tmp_path: Path) -> None:
    file = write(tmp_path, GOOD, row)
    with pytest.raises(FactsError, match=what) as e:
        read_facts(file)
    assert f"{file}:2" in str(e.value) and fix in e.value.fix
    kept = read_facts(file, "skip")
    assert len(kept.facts) == 1 and kept.skipped == 1 and kept.problems[0].where == f"{file}:2"
    assert read_facts(file, limit=1).skipped == 0, "lines behind the limit do not count"


BAD_FILES = [
    (b"", "is empty"),
    (b"  \n\n", "is empty"),
    (b"\xef\xbb\xbf", "is empty"),
    (b"\x89PNG\r\n\x1a\n\0\0", "is not UTF-8 text .byte 0"),
    (b"{}\0\0", "binary"),
    ('{"prompt": "é"}'.encode("utf-16"), "UTF-16"),
    ('{"prompt": "ok"}\n{"prompt": "é"}'.encode("latin-1"), r"f.jsonl:2.*not UTF-8"),
    (b"just some words", "not a|not JSON"),
    (b"[]", "holds no fact"),
    (b"[1, 2", "not JSON"),
]


@pytest.mark.parametrize(("data", "what"), BAD_FILES, ids=[w for _, w in BAD_FILES])
def test_bad_files(data: bytes, what: str, tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    file.write_bytes(data)
    with pytest.raises(FactsError, match=what) as e:
        read_facts(file)
    assert str(file) in str(e.value) and e.value.fix and e.value.exit_code == 3


def test_missing_file_folder_and_policy(tmp_path: Path) -> None:
    with pytest.raises(FactsError, match="no such file"):
        read_facts(tmp_path / "none")
    with pytest.raises(FactsError, match="cannot be read"):
        read_facts(tmp_path)
    with pytest.raises(UsageError, match="--on-error maybe"):
        read_facts(write(tmp_path, GOOD), "maybe")


def test_many_problems_are_listed(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD, *[{"prompt": f"{i}"} for i in range(8)])
    with pytest.raises(FactsError, match=r"(?s)8 of 9 entries.*:2: .*:6: .*and 3 more"):
        read_facts(file)
    assert len(read_facts(file, "report").problems) == 8


def test_join_and_dict() -> None:
    assert (join("a", "b"), join("a ", "b"), join("a", " b"), join("", "b")) == ("a b", "a b", "a b", "b")
    assert fact_from_dict({**GOOD, "prompt": "{} is "}, "here").prompt == "Ava is"
    with pytest.raises(FactsError, match="here: 'prompt' is missing"):
        fact_from_dict({}, "here")


def test_real_files(shared: Path) -> None:
    assert len(read_facts(shared / "data" / "counterfact-factlm.jsonl").facts) == 1500
    found = read_facts(shared / "data" / "zsre-1k.json", "skip")
    assert len(found.facts) > 950 and all(f.locality for f in found.facts)
    with pytest.raises(FactsError, match=r"known_1000.json\[0\]: 'target_new' is missing"):
        read_facts(shared / "data" / "known_1000.json")
