"""Facts files spoilt at any depth, in every shape: documented errors only, and the promised types in what is taken."""

from __future__ import annotations

import csv
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosectl.errors import FactsError, UsageError
from mosectl.facts.records import Fact, Probe, read_facts
from support.field_files import ROWS as FIELD
from support.json_mutations import fuzzing
from support.spoiling import spoil

ROWS: tuple[dict[str, Any], ...] = (
    {
        "prompt": "The capital of Ava is", "subject": "Ava", "target_new": "Brin", "ground_truth": "Quill",
        "rephrase_prompts": ["Ava's capital is"], "locality": [{"prompt": "Oz is in", "ground_truth": "Em"}],
        "portability": {"one_hop": [{"prompt": "Ava's mayor is", "answer": "Bo"}]}, "space_before_target": True,
    },
    {
        "prompt": "Ava is in", "subject": "Ava", "target_new": "Oz", "rephrase_prompt": "Ava lies in", "target_old": "Em",
        "locality_prompt": ["Em is"], "locality_ground_truth": ["red"],
        "locality_inputs": {"neighborhood": {"prompt": "Bo is", "ground_truth": "old"}},
    },
    {
        "case_id": 1, "requested_rewrite": {
            "prompt": "{} speaks", "subject": "Bob", "target_new": {"str": "French"}, "target_true": {"str": "Dutch"},
        }, "paraphrase_prompts": ["Bob talks"], "neighborhood_prompts": ["Eve speaks"],
    },
    {
        "src": "Where is Ava?", "subject": "Ava", "alt": "Oz", "answers": ["Em"], "rephrase": "Ava is where?",
        "loc": "nq question: who is Bo", "loc_ans": "a cat", "portability": {"New Question": "Whose?", "New Answer": "Bo"},
    },
    *(row for rows in FIELD.values() for row in rows),
)  # fmt: skip


def written(rows: list[Any], suffix: str, chance: random.Random) -> bytes:
    """The rows as a file of one kind; sometimes a few of its bytes are others."""
    if suffix == ".csv":
        out = io.StringIO()
        names = sorted({str(k) for r in rows if isinstance(r, dict) for k in r})
        table = csv.writer(out)
        table.writerow(names)
        for row in rows:
            cells = row if isinstance(row, dict) else {}
            table.writerow([v if isinstance(v := cells.get(n, ""), str) else json.dumps(v) for n in names])
        text = out.getvalue()
    elif suffix == ".json":
        text = json.dumps(rows if chance.random() < 0.5 else {chance.choice(["facts", "data", "x"]): rows})
    else:
        text = "\n".join(json.dumps(row, ensure_ascii=chance.random() < 0.5) for row in rows)
    if chance.random() < 0.05:
        text = text.replace("{", '{"prompt": "x is", "prompt": "y is", ', 1)
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    for _ in range(chance.choice([0, 0, 0, 1, 3]) if data else 0):
        data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data)


def check_types(fact: Fact) -> None:
    assert all(isinstance(x, str) and x.strip() for x in (fact.prompt, fact.subject, fact.target_new))
    assert fact.subject in fact.prompt and fact.space_before_target in (None, True, False)
    assert fact.ground_truth is None or isinstance(fact.ground_truth, str)
    assert all(isinstance(p, str) and p.strip() for p in fact.rephrase_prompts)
    for probe in (*fact.locality, *fact.portability):
        assert isinstance(probe, Probe) and isinstance(probe.prompt, str) and isinstance(probe.answer, str | None)
        assert all(isinstance(a, str) and a.strip() for a in probe.aliases)
    assert all(isinstance(a, str) and a.strip() for a in fact.target_aliases)
    for text in (fact.prompt, fact.subject, fact.target_new, *fact.rephrase_prompts):
        text.encode()


@pytest.mark.slow
@fuzzing
@given(seed=st.integers(0, 2**32))
def test_any_facts(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    chance = random.Random(seed)
    suffix = chance.choice([".jsonl", ".json", ".csv"])
    rows = [spoil(chance.choice(ROWS), chance) for _ in range(chance.choice([1, 1, 3]))]
    file: Path = tmp_path_factory.getbasetemp() / f"fuzzed{suffix}"
    file.write_bytes(written(rows, suffix, chance))
    chosen = chance.choice(
        [{}, {}, {"subject": ("subject", "prompt")}, {"target_new": ("answers",)}, {"prompt": ("x",)}]
    )
    for policy in ("report", "skip", "fail"):
        try:
            report = read_facts(file, policy, read=chosen)
        except (FactsError, UsageError) as e:
            assert e.what and e.fix
            continue
        for fact in report.facts:
            check_types(fact)
