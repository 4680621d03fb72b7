"""General abilities by lm-evaluation-harness: the small tasks, both sides of an edit, and what cannot work."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mosectl.errors import HubError, UsageError
from mosectl.measure import lm_harness
from mosectl.measure.evaluate import evaluate_edit
from mosectl.measure.lm_harness import FOLDER, LOCAL, load_tasks
from mosectl.model.loading import Loaded
from mosectl.render import html, scores
from support.commands import run
from support.evaluations import FACTS, World, ask
from support.models import make_tokenizer, pico


def rows(stem: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{stem}.jsonl").read_text().splitlines()]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A task of the user's own: how well a text is predicted."""
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": t}) + "\n" for t in ("The cello.", "Tomas plays.", "A capital.")))
    kwargs = {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")}
    metric = {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
    task = {"task": "own_text", "dataset_path": "json", "dataset_kwargs": kwargs, "test_split": "test",
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [metric]}  # fmt: skip
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(task))
    return path


# The data.


def test_the_data_are_balanced_and_name_nothing_twice() -> None:
    sizes = {"rte": 64, "sst2": 64, "nq_open": 64, "samsum": 24}
    for stem, size in sizes.items():
        found = rows(stem)
        first = [next(iter(row.values())) for row in found]
        assert len(found) == size and len(set(first)) == size, stem
        if stem in ("rte", "sst2"):
            assert Counter(row["label"] for row in found) == {0: 32, 1: 32}
    shots = yaml.safe_load((FOLDER / "nq_open.yaml").read_text())["fewshot_config"]["samples"]
    assert len(shots) == 5 and not {s["question"] for s in shots} & {r["question"] for r in rows("nq_open")}


# The tasks.


def test_choices_against_a_naive_reference(harness: Any) -> None:
    model, tokenizer = pico("llama", max_position_embeddings=512), make_tokenizer()
    side = ask(load_tasks(["mosectl_sst2"], 12), Loaded(model, tokenizer, None))
    hits = []
    for row in rows("sst2")[:12]:
        prompt = f"{row['sentence']}\nQuestion: Is this sentence positive or negative?\nAnswer:"
        start, scores = len(tokenizer(prompt).input_ids), []
        for choice in (" negative", " positive"):
            ids = tokenizer(prompt + choice, return_tensors="pt").input_ids
            with torch.no_grad():
                logp = model(ids).logits[0].log_softmax(-1)
            scores.append(sum(float(logp[i - 1, ids[0, i]]) for i in range(start, ids.shape[1])))
        hits.append(float(scores[1] > scores[0]) == row["label"])
    assert side.values["mosectl_sst2", "acc"] == tuple(map(float, hits)) and 0 < sum(hits) < 12
    assert side.scores["mosectl_sst2", "acc"].value == sum(hits) / 12 and side.cut == {"mosectl_sst2": 0}


def test_answers_are_judged_as_usual(harness: Any) -> None:
    tasks = load_tasks(["mosectl_nq_open", "mosectl_samsum"]).loaded["tasks"]
    task = tasks["mosectl_nq_open"]
    doc = next(d for d in task.eval_docs if "ocean" in d["question"])
    for said, hit in (("Pacific", 1), ("the pacific ocean", 1), ("Atlantic", 0), ("", 0)):
        assert task.process_results(doc, [said]) == {"exact_match": hit}, said
    task.set_fewshot_seed(seed=1)
    prompt = task.fewshot_context(doc, task.get_config("num_fewshot"))
    assert prompt.startswith("Answer these questions:\n\nQ: what is the capital of france?\nA: Paris\nQ:")
    assert prompt.count("Q:") == 6 and prompt.endswith(f"Q: {doc['question']}?\nA:")
    found = tasks["mosectl_samsum"].process_results({"summary": "the cat sat"}, ["the cat"])
    assert found == pytest.approx({"rouge1": 0.8, "rougeL": 0.8, "rouge2": 2 / 3})


def test_both_sides_and_the_model_stays_as_it_is(harness: Any, tmp_path: Path) -> None:
    world, loaded = World(tmp_path), Loaded(pico("llama"), make_tokenizer(), None)
    loaded.tokenizer.pad_token = loaded.tokenizer.bos_token = None
    weights = {n: p.clone() for n, p in loaded.model.named_parameters()}
    tasks = load_tasks(["local"], 3)
    options: dict[str, Any] = {"text": world.text, "protocols": ["generation"]}
    found = evaluate_edit(world.patch, FACTS, model=loaded, abilities=tasks, **options)
    assert list(dict.fromkeys(a.task for a in found.abilities)) == list(LOCAL)
    assert {a.metric for a in found.abilities} == {"acc", "exact_match", "rougeL", "rouge1", "rouge2"}
    for a in found.abilities:
        assert a.before and a.change and a.examples == 3 and a.higher_is_better is True
        assert a.change.value == pytest.approx(a.after.value - a.before.value) and a.change.units == 3
    assert all(torch.equal(p, weights[n]) for n, p in loaded.model.named_parameters())
    assert loaded.tokenizer.pad_token is None, "the harness works on a copy"
    assert any("show damage" in n for n in found.notes) and any(
        "mosectl_nq_open: 3 of 3 prompts" in n for n in found.notes
    )
    assert found.settings["lm_eval"] == harness.__version__ and found.settings["abilities_limit"] == 3
    assert "mosectl_samsum" in html.render(found) and "<h2>Abilities</h2>" in html.render(found)
    alone = evaluate_edit(loaded, FACTS, abilities=tasks, **options).abilities
    assert all(a.before is None and a.change is None for a in alone)
    assert [a.after for a in alone] == [a.before for a in found.abilities], "the same model, the same numbers"


def test_a_metric_that_is_no_mean(harness: Any, own: Path) -> None:
    side = ask(load_tasks([str(own)]), Loaded(pico("llama"), make_tokenizer(), None))
    assert side.scores["own_text", "word_perplexity"].value > 1 and side.examples == {"own_text": 3}
    (row,) = lm_harness.compare_abilities(side, side)
    assert (
        row.change is None and row.higher_is_better is False and scores.of_abilities([row])[0][1] == "word_perplexity ↓"
    )


def test_command_line(harness: Any, tmp_path: Path, own: Path, capfd: pytest.CaptureFixture[str]) -> None:
    world = World(tmp_path / "world")
    capfd.readouterr()
    few = ("--protocol", "generation", "--limit", 1, "--abilities-limit", 2, "--abilities", f"mosectl_sst2,{own}")
    assert run(*world.cli(*few, "--json", "--fail-under", "abilities.mosectl_sst2=0")) == 0
    shown = capfd.readouterr()
    assert [a["task"] for a in json.loads(shown.out)["abilities"]] == ["mosectl_sst2", "own_text"]
    assert [line for line in shown.err.splitlines() if not line.endswith(" …")] == [], "no noise of the harness"
    assert "before: abilities, choices …" in shown.err and "after: abilities, texts …" in shown.err
    assert run(*world.cli(*few, "--fail-under", "abilities.mosectl_sst2=1")) == 10
    shown = capfd.readouterr()
    assert "abilities.mosectl_sst2 is 0." in shown.err and "mosectl_sst2\tacc ↑\t" in shown.out
    assert run(*world.cli(*few, "--fail-under", "abilities.rte=1")) == 2
    assert "measured are mosectl_sst2, own_text" in capfd.readouterr().err


def test_the_noise_of_others_is_swallowed_only_for_a_while(capsys: pytest.CaptureFixture[str]) -> None:
    logger, handler = logging.getLogger("noisy"), logging.StreamHandler(sys.stderr)  # has the stream of before
    logger.addHandler(handler)
    try:
        with pytest.raises(ValueError), lm_harness._quiet():
            sys.stderr.write("noise")
            logger.error("noise")
            sys.stdout.write("noise")
            raise ValueError
        logger.error("heard")
    finally:
        logger.removeHandler(handler)
    assert capsys.readouterr() == ("", "heard\n")


# What cannot work.


def test_a_missing_package_is_told_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    facts = tmp_path / "facts.jsonl"
    facts.write_text('{"prompt": "I met Tomas Veldrin", "subject": "Tomas Veldrin", "target_new": "and"}')
    assert run("eval", tmp_path / "no-such-model", facts, "--abilities", "local") == 2
    shown = capsys.readouterr()
    assert "pip install 'mosectl[eval]'" in shown.err and "no such model" not in shown.err and shown.out == ""
    assert run("eval", tmp_path / "no-such-model", facts, "--abilities-limit", 3) == 2
    assert "--abilities-limit is for --abilities" in capsys.readouterr().err
    assert run("eval", tmp_path / "no-such-model", facts, "--abilities", " ,") == 2
    assert "names no task" in capsys.readouterr().err


def test_tasks_that_cannot_be_had(
    harness: Any, own: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import lm_eval.tasks

    class Bare(lm_eval.tasks.TaskManager):
        """Without the harness's own tasks: finding them takes ten seconds."""

        def __init__(self, include_defaults: bool) -> None:
            super().__init__(include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Bare)
    for config in ("datasets.config", "huggingface_hub.constants"):  # read from the environment at import only
        monkeypatch.setattr(f"{config}.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="mosectl_rt: no such task") as e:
        load_tasks(["local", "mosectl_rt"])
    assert "did you mean mosectl_rte" in e.value.fix
    with pytest.raises(UsageError, match="no such file"):
        load_tasks([str(own.with_name("none.yaml"))])
    task = yaml.safe_load(own.read_text())
    bad: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
        "hub": ({"dataset_path": "nobody/nothing", "dataset_kwargs": {}}, HubError, "data cannot be had"),
        "split": ({"test_split": "dev"}, UsageError, "KeyError"),
        "field": ({"speed": 1}, UsageError, "speed"),
        "unsafe": ({"unsafe_code": True}, UsageError, "runs code that a model wrote"),
    }
    for kind, (change, error, message) in bad.items():
        own.write_text(yaml.safe_dump(task | change))
        with pytest.raises(error, match=message) as e:
            load_tasks([str(own)])
        assert e.value.fix, kind
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", object)
    with pytest.raises(UsageError, match=r"needs lm-eval 0\.4\.12"):
        load_tasks(["local"])
    assert capfd.readouterr() == ("", "")


def test_models_that_cannot_do_a_task(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks, tokenizer = load_tasks(["mosectl_samsum"], 2), make_tokenizer()
    with pytest.raises(UsageError, match="answers of up to 48 tokens, but the model reads no more than 40"):
        ask(tasks, Loaded(pico("llama", max_position_embeddings=40), tokenizer, None))
    monkeypatch.setattr(lm_harness, "_cut", lambda task, model: 1 / 0)
    with pytest.raises(UsageError, match="lm-evaluation-harness failed: ZeroDivisionError") as e:
        ask(tasks, Loaded(pico("llama"), tokenizer, None))
    assert "mosectl_samsum" in e.value.where
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="no end-of-sequence token"):
        ask(tasks, Loaded(pico("llama"), tokenizer, None))


def test_chat(harness: Any, tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    tasks = load_tasks(["mosectl_nq_open"], 1)
    ask(tasks, Loaded(pico("gpt2"), make_tokenizer(chat_template=template), None), chat=True)
    (asked,) = tasks.loaded["tasks"]["mosectl_nq_open"].instances
    assert "[user] Q: what is the capital of france?\nA:[assistant] Paris" in asked.args[0]


def test_a_chat_template_that_never_ends_is_stopped(harness: Any) -> None:
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer = make_tokenizer(chat_template=loops)
    start = time.perf_counter()
    with pytest.raises(UsageError, match="takes more than 2 seconds"):
        ask(load_tasks(["mosectl_rte"], limit=1), Loaded(pico("gpt2"), tokenizer, None), chat=True)
    assert time.perf_counter() - start < 10
