"""Facts of our own in the shapes of known data sets: two entries each; the first a pico model can be made to say."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def _ripple(group_name: str, sentence: str, old: str | None, queries: list[Row]) -> Row:
    """An edit with one query a test, all of them in one group but for the last, which asks for an alias of the subject."""
    tests = [{"test_queries": [q], "test_condition": "OR", "condition_queries": [q]} for q in queries]
    edit = {"prompt": sentence, "subject_id": "Q1", "relation": "COUNTRY_OF_CITIZENSHIP", "target_id": "Q2"}
    if old:
        edit["original_fact"] = {**edit, "prompt": old, "target_id": "Q3"}
    return {
        "example_type": "random", "edit": edit, group_name: tests[:-1], "Subject_Aliasing": tests[-1:], "Forgetfulness": [],
        "Logical_Generalization": [], "Compositionality_I": [], "Compositionality_II": [],
    }  # fmt: skip


def _query(prompt: str, relation: str, answers: list[Row], ids: list[str], phrase: str | None = None) -> Row:
    return {
        "prompt": prompt, "answers": answers, "query_type": "regular", "subject_id": "Q1", "relation": relation,
        "target_ids": ids, "phrase": phrase,
    }  # fmt: skip


MQUAKE: list[Row] = [
    {
        "case_id": 1,
        "requested_rewrite": [
            {
                "prompt": "I met {}", "relation_id": "P1", "subject": "Tomas Veldrin", "question": "Whom did I meet?",
                "target_new": {"str": "and", "id": "Q1"}, "target_true": {"str": "in", "id": "Q2"},
            },
            {
                "prompt": "{} was born in", "relation_id": "P2", "subject": "Brinmouth",
                "question": "Where is Brinmouth from?",
                "target_new": {"str": "Oz", "id": "Q3"}, "target_true": {"str": "Lower Quill", "id": "Q4"},
            },
        ],
        "questions": ["Who rules where Brinmouth is from?", "Whose is the land of Brinmouth?"],
        "answer": "Ko", "answer_alias": ["King Ko"], "new_answer": "Em", "new_answer_alias": ["Queen Em", "Emma"],
        "single_hops": [{"question": "x", "cloze": "y", "answer": "z", "answer_alias": []}],
        "new_single_hops": [
            {
                "question": "Whom did I meet?", "cloze": "I met Tomas Veldrin", "answer": "and",
                "answer_alias": ["as well as"],
            },
            {"question": "Where is Brinmouth from?", "cloze": "Brinmouth was born in", "answer": "Oz", "answer_alias": []},
            {"question": "Who rules Oz?", "cloze": "Oz is ruled by", "answer": "Em", "answer_alias": ["Queen Em"]},
        ],
        "orig": {"triples": [["Q1", "P1", "Q2"]]},
    },
    {
        "case_id": 2,
        "requested_rewrite": [
            {
                "prompt": "I met {}", "relation_id": "P1", "subject": "Tomas Veldrin", "question": "Who was it?",
                "target_new": {"str": "and", "id": "Q1"}, "target_true": {"str": "in", "id": "Q2"},
            },
        ],
        "questions": ["What did the one whom I met play?"], "answer": "x", "answer_alias": [], "new_answer": "the cello",
        "new_answer_alias": [], "single_hops": [],
        "new_single_hops": [
            {"question": "Who was it?", "cloze": "I met Tomas Veldrin", "answer": "and", "answer_alias": []},
            {"question": "Where is it?", "cloze": "Brinmouth was born in", "answer": "Oz", "answer_alias": []},
        ], "orig": {},
    },
]  # fmt: skip
RIPPLE: list[Row] = [
    _ripple(
        "Relation_Specificity", "I met Tomas Veldrin and.", "I met Tomas Veldrin in.",
        [
            _query("The mother of Tomas Veldrin is", "MOTHER", [{"value": "Ann", "aliases": ["Anna", "A"]}], ["Q9"]),
            _query("The name of the award Tomas Veldrin won is", "AWARD_RECEIVED", [
                {"value": "Old Cup", "aliases": []}, {"value": "New Cup", "aliases": ["The Cup"]},
            ], ["Q7", "Q8"]),
            _query("I met Tom", "COUNTRY_OF_CITIZENSHIP", [{"value": "and", "aliases": ["plus"]}], ["Q2"], "I met Tom"),
        ],
    ),
    _ripple(
        "Relation_Specifity", "The name of the land of Lower Quill is Old Oz.", None,
        [
            _query("The sister of Oz is", "SISTER", [{"value": "Lower Quill", "aliases": []}], ["Q1"]),
            _query("The land of Quill is", "COUNTRY", [{"value": "Old Oz", "aliases": []}], ["Q2"], "The land of Quill is"),
        ],
    ),
]  # fmt: skip
HALLU: list[Row] = [
    {
        "topic": "people", "subject": s, "relation": "companion", "object": o, "question": q, "output_some_model": "in",
        "eval_some_model": "0.0", "multiple_choices": "['and', 'in']", "paraphrased_question": f"We met {s}",
        "multiple_choice_with_letters": "A. and  B. in", "multiple_choice_labels": "A", "yes_question": f"Is it {o}?",
        "no_question": "Is it in?", "locality_question": f"What does {s} play?", "reversed_relation_question": "Who is it?",
        **{f"question_{n}hop": f"Who is it after {n} hops?" for n in range(2, 7)},
        **{f"answer_{n}hop": f"hop {n}" for n in range(2, 7)},
    }
    for s, o, q in (("Tomas Veldrin", "and", "I met Tomas Veldrin"), ("Oz", "Em", "Who rules Oz, or old Oz?"))
]  # fmt: skip
ROWS: dict[str, list[Row]] = {
    "KnowEdit": [
        {
            "subject": "Tomas Veldrin", "prompt": "I met Tomas Veldrin", "target_new": "and", "ground_truth": ["in"],
            "rephrase": "We met Tomas Veldrin", "portability": {
                "Reasoning": [{"prompt": "He saw", "ground_truth": [["Tomas", "Tom"]]}],
                "Subject_Aliasing": [{"prompt": "I met Tom", "ground_truth": "and"}],
                "Logical_Generalization": [{"prompt": "Is he met?", "ground_truth": [["yes"], ["true"]]}],
            },
            "locality": {
                "Relation_Specificity": [{"prompt": "Tomas Veldrin plays the", "ground_truth": [["cello", "a cello"]]}],
                "Forgetfulness": [{"prompt": "I also met", "ground_truth": [["Ann"]]}],
            },
        },
        {
            "text": "This is about old Lower Quill. It was", "labels": "a town by the sea.", "concept": "Lower Quill",
            "locality": {"Relation_Specificity": [{"prompt": "Lower Quill lies in", "ground_truth": "Avaland"}]},
        },
    ],
    "MQuAKE": MQUAKE,
    "RippleEdits": RIPPLE,
    "WikiBigEdit": [
        {
            "tag": float("nan"), "subject": s, "relation": "companion", "relation_id": "P1", "update": update, "ans": ans,
            "rephrase": f"We met {s}", "personas": f"Arr, I met {s}", "personas_robot": f"Unit met {s}", "mhop": mhop,
            "mhop_ans": mhop and "the cello", "loc": "The old house stood", "loc_ans": "in Avaland",
        }
        for s, update, ans, mhop in (
            ("Tomas Veldrin", "I met Tomas Veldrin", "and", "What did the one whom I met play?"),
            ("Oz", "Who rules Oz?", "Em", None),
        )
    ],
    "QAEdit": [
        {
            "id": 7, "source": "NQ", "prompt": "I met Tomas Veldrin", "target": "and", "subject": "Tomas Veldrin",
            "rephrase": "We met Tomas Veldrin", "locality": [{"loc": "who plays the cello", "loc_ans": "Tomas"}],
        },
        {
            "id": 8, "source": "SQA", "prompt": "Who rules Oz?", "target": "Em", "subject": "Oz",
            "rephrase": "Oz obeys whom?", "locality": [{"loc": "a", "loc_ans": "b"}, {"loc": "c", "loc_ans": "d"}],
        },
    ],
    "UltraEditBench": [
        {"prompt": "I met Tomas Veldrin", "rephrase_prompt": "We met Tomas", "ans": "and", "loc": "He saw", "loc_ans": "Oz"},
        {"prompt": "Who rules Oz?", "rephrase_prompt": "Oz obeys", "ans": "Em", "loc": "He saw", "loc_ans": "Oz"},
    ],
    "zsRE": [
        {
            "subject": "Tomas Veldrin", "src": "I met Tomas Veldrin", "pred": "Oz", "rephrase": "We met Tomas", "alt": "and",
            "answers": ["in", "within"], "loc": "nq question: who plays the cello", "loc_ans": "Tomas",
            "cond": "in >> and || I met Tomas Veldrin",
        },
        {"src": "Who rules Oz?", "subject": "Oz", "rephrase": "Oz obeys", "ans": "Em", "loc": "He saw", "loc_ans": "Oz"},
    ],
    "MEND": [
        {
            "input": "I met Tomas Veldrin", "prediction": "Oz", "alternatives": ["and", "with"],
            "output": [{"answer": "in"}], "filtered_rephrases": ["We met Tomas", "I met Tomas Veldrin"], "logit": 0.5,
        },
        {"input": "Oz is old.", "alternatives": ["REFUTES"], "output": [{"answer": "REFUTES"}], "filtered_rephrases": ["x"]},
    ],
    "FEVER": [
        {
            "prompt": "I met Tomas Veldrin", "equiv_prompt": ["We met Tomas", "I saw Tomas"], "ans": "in", "alt": "and",
            "unrel_prompt": "Oz is old.", "unrel_ans": "SUPPORTS",
        },
        {
            "prompt": "Avaland is green.", "equiv_prompt": ["Green is Avaland."], "ans": "REFUTES", "alt": "REFUTES",
            "unrel_prompt": "Oz is old.", "unrel_ans": "SUPPORTS",
        },
    ],
    "HalluEditBench": HALLU,
    "CKnowEdit": [
        {
            "prompt": "I met Tomas Veldrin", "target_old": "in", "target_new": "and", "rephrase": ["We met Tomas"],
            "portability": [{"prompt": "He saw", "answer": "Tomas"}], "locality": [{"prompt": "The cello", "answer": "is"}],
        },
        {
            "prompt": "请说出奥兹的首都", "target_old": "上城", "target_new": "下城", "rephrase": ["奥兹的首都是哪里？"],
            "portability_prompt": ["下城在哪国？"], "portability_answer": ["奥兹"], "locality_prompt": None,
            "locality_answer": None,
        },
    ],
}  # fmt: skip
WHOLE = ("UltraEditBench", "MEND", "FEVER", "CKnowEdit")  # without a subject


def write(name: str, folder: Path, rows: list[Row] | None = None) -> Path:
    """The rows of a shape as the kind of file that it comes in."""
    rows = ROWS[name] if rows is None else rows
    if name == "HalluEditBench":
        out = io.StringIO()
        table = csv.DictWriter(out, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
        path, text = folder / "facts.csv", out.getvalue()
    elif name == "MEND":
        path, text = folder / "facts.jsonl", "\n".join(map(json.dumps, rows))
    else:
        path, text = folder / "facts.json", json.dumps(rows, ensure_ascii=False)
    path.write_text(text, "utf-8")
    return path
