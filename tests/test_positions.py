"""What is longer than a model can read: told per line, refused before the work, left out on request, never a crash."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mosectl
from mosectl.editing.contexts import build_contexts
from mosectl.editing.paraphrases import own_wordings
from mosectl.errors import FactsError, Notice, UsageError
from mosectl.facts.records import Fact, Probe
from mosectl.model.architecture import MIXTURES, TABLE
from mosectl.model.generation import continuations, own_text
from mosectl.model.positions import Window, fit, fitted, window
from mosectl.model.questions import generate
from support.commands import EASY, run
from support.models import make_tokenizer, pico, save

SHORT = {"n_positions": 24}  # pico GPT-2's
FACT = Fact("I met Tomas Veldrin", "Tomas Veldrin", "and", source="facts.jsonl:1")
LONG = "We know that the old house of Lower Quill stood on a hill and that it was sold and burnt down"


def ids(text: str) -> tuple[int, ...]:
    return tuple(make_tokenizer()(text)["input_ids"])


def beyond(model: Any, n: int) -> bool:
    """Does the model read n tokens, and go on?"""
    tokens = torch.randint(5, 300, (2, n))
    try:
        with torch.no_grad():
            return bool(torch.isfinite(model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits).all())
    except (IndexError, RuntimeError):
        return False


@pytest.mark.parametrize("model_type", [*TABLE, *sorted(MIXTURES)])
def test_which_models_fail_beyond_their_positions(model_type: str) -> None:
    model = pico(model_type)
    seen = window(model)
    assert beyond(model, min(seen.limit, 200))
    if seen.limit < 1000:
        assert beyond(model, seen.limit + 1) != seen.hard


def test_a_fact_without_what_cannot_be_read() -> None:
    long = Probe(LONG, "burnt")
    fact = replace(FACT, rephrase_prompts=("We met Tomas Veldrin", LONG), locality=(long, Probe("He saw")),
                   portability=(Probe(LONG), long))  # fmt: skip
    n = len(ids(LONG + " and"))
    kept, problems = fit([fact], make_tokenizer(), Window(30, True, 320))
    (left,) = kept
    assert left.rephrase_prompts == ("We met Tomas Veldrin",) and left.locality == (Probe("He saw"),)
    assert not left.portability and {p.where for p in problems} == {"facts.jsonl:1"}
    names = [next(k for k in ("rephrasing", "locality", "portability") if k in p.what) for p in problems]
    assert names == ["rephrasing", "locality", "portability", "portability"]
    assert f"has {n} tokens, the model reads 30" in problems[0].what and problems[0].severity == "error"
    whole, told = fit([fact], make_tokenizer(), Window(30, False, 320))
    assert whole == (fact,) and {p.severity for p in told} == {"warning"} and "was made for 30" in told[0].what
    none, _ = fit([replace(FACT, prompt=LONG, subject="Lower Quill")], make_tokenizer(), Window(30, True, 320))
    assert none == ()
    assert fit([fact], make_tokenizer(), Window(200, True, 320)) == ((fact,), ())


def test_the_last_position_counts() -> None:
    n = len(ids("I met Tomas Veldrin and"))
    assert fit([FACT], make_tokenizer(), Window(n, True, 320))[1] == ()
    assert len(fit([FACT], make_tokenizer(), Window(n - 1, True, 320))[1]) == 1


@pytest.mark.parametrize("text", ["ﷺ" * 3, "日本語のとても長い文", "🦊🦊"])
def test_letters_that_take_many_tokens_are_counted(text: str) -> None:
    fact = replace(FACT, locality=(Probe(text),))
    n = len(ids(text))
    assert not fit([fact], make_tokenizer(), Window(max(n, 20), True, 320))[1]
    assert n < 20 or fit([fact], make_tokenizer(), Window(n - 1, True, 320))[1]


def test_a_token_without_an_embedding_is_no_crash() -> None:
    model, tokenizer = pico("llama"), make_tokenizer()
    tokenizer.add_tokens([f"<x{i}>" for i in range(30)])
    with pytest.raises(UsageError, match="no embedding for"):
        generate(model, tokenizer, ["He saw <x29>"])
    (problem,) = fit([replace(FACT, locality=(Probe("He saw <x29>"),))], tokenizer, window(model))[1]
    assert "has a token, 329" in problem.what and problem.severity == "error"
    tokenizer.pad_token = "<x29>"  # as fine-tuned models have it: only the mask says what is padding
    assert len(generate(model, tokenizer, ["I met", "The old house of"], max_new_tokens=2)) == 2


def test_fitted_fails_or_skips() -> None:
    facts = [FACT, replace(FACT, prompt=LONG, subject="Lower Quill", source="facts.jsonl:2")]
    with pytest.raises(
        FactsError, match=r"facts.jsonl:2: the prompt 'We know.*has \d+ tokens, the model reads 30"
    ) as e:
        fitted(facts, make_tokenizer(), Window(30, True, 320))
    assert "--on-error skip" in e.value.fix
    with pytest.warns(Notice, match="facts.jsonl:2: .*left out"):
        assert fitted(facts, make_tokenizer(), Window(30, True, 320), on_error="skip") == [FACT]
    with pytest.raises(FactsError):
        fitted(facts[1:], make_tokenizer(), Window(30, True, 320), on_error="skip")
    with pytest.warns(Notice, match="made for 30"):
        assert fitted(facts, make_tokenizer(), Window(30, False, 320)) == facts


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "gptj", "mpt"])
def test_text_ends_where_positions_end(model_type: str) -> None:
    small = {"n_positions": 24, "max_position_embeddings": 24, "max_seq_len": 24}
    own = {"gpt2": "n_positions", "gptj": "n_positions", "opt": "max_position_embeddings", "mpt": "max_seq_len"}
    model, tokenizer = pico(model_type, **{own[model_type]: small[own[model_type]]}), make_tokenizer()
    model.generation_config.eos_token_id = None
    full, few = [5, *[9] * 23], [5, 9, 9]
    texts = continuations(model, tokenizer, [few, full, few], 10)
    assert texts[0] == texts[2] == continuations(model, tokenizer, [few], 10)[0], "a long neighbour cuts nobody short"
    assert texts[1] == continuations(model, tokenizer, [full], 1)[0]
    assert own_text(model, tokenizer, 2, tokens=60)
    with pytest.raises(UsageError, match="tokens, the model reads 24"):
        generate(model, tokenizer, [LONG])


def test_prefixes_are_shortened_and_wordings_left_out(tokenizer: Any) -> None:
    model = pico("gpt2", **SHORT)
    prefix = "The old house stood on a hill. "
    wordings = [
        ("Tomas Veldrin, who was born in Lower Quill and plays the cello there and sings, likes", "Tomas Veldrin eats")
    ]
    c = build_contexts(model, tokenizer, [FACT], ["", prefix], wordings)
    lengths = c.batch.attention_mask.sum(1)
    texts = [tokenizer.decode(row[1:n]) for row, n in zip(c.batch.input_ids.tolist(), lengths.tolist(), strict=True)]
    assert int(lengths.max()) <= 24 and texts[0] == "I met Tomas Veldrin and"
    assert texts[1].endswith("a hill. I met Tomas Veldrin and") and not texts[1].startswith("The old")
    assert texts[2:] == ["Tomas Veldrin eats and", "Tomas Veldrin is a"]
    with torch.no_grad():
        model(**c.batch.kwargs())
    n = len(ids("I met Tomas Veldrin and"))
    tight = build_contexts(pico("gpt2", n_positions=n), tokenizer, [FACT], ["", prefix])
    assert len(tight.fact) == 2, "a prefix of which nothing is left is no second prompt"
    with pytest.raises(FactsError, match=r"facts\.jsonl:1"):
        build_contexts(pico("gpt2", n_positions=n - 1), tokenizer, [FACT], [""])
    plenty = build_contexts(pico("gpt2"), tokenizer, [FACT], ["", prefix], wordings)
    assert len(plenty.fact) == 5


def test_wordings_too_long_to_score_are_none(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    long = " of the old house" * 8 + " and"
    monkeypatch.setattr("mosectl.editing.paraphrases.continuations", lambda m, t, asked, *_, **__: [long] * len(asked))
    assert own_wordings(pico("gpt2", **SHORT), tokenizer, [FACT], ["and"], 2) == [()]


# The command line, on a model of 24 positions.


class World:
    def __init__(self, folder: Path) -> None:
        self.folder, self.model, self.facts = folder, save(folder / "model", "gpt2", **SHORT), folder / "facts.jsonl"
        self.text = folder / "text.txt"
        self.text.write_text("The capital of Avaland is Brinmouth.\n" + LONG + "\n")
        self.write(
            {}, {"rephrase_prompts": [LONG], "locality": [{"prompt": LONG, "ground_truth": "so"}, {"prompt": "He"}]}
        )

    def write(self, *more: dict[str, Any]) -> None:
        rows = [{"prompt": p, "subject": s, "target_new": t} for p, s, t in
                (("I met Tomas Veldrin", "Tomas Veldrin", "and"), ("We went to Avaland", "Avaland", "in"))]  # fmt: skip
        self.facts.write_text("\n".join(json.dumps({**r, **m}) for r, m in zip(rows, more, strict=True)))

    def edit(self, *args: object) -> tuple[object, ...]:
        return (
            "edit",
            self.facts,
            "-m",
            self.model,
            "-o",
            self.folder / "p.safetensors",
            "--corpus",
            self.text,
            *EASY,
            *args,
        )


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_check_tells_them_by_line(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", world.facts, "-m", world.model, "--json") == 3
    out, err = capsys.readouterr()
    problems = json.loads(out)["problems"]
    assert [p["where"].rsplit("/", 1)[-1] for p in problems] == ["facts.jsonl:2"] * 2
    assert f"the rephrasing '{LONG[:20]}" in problems[0]["what"] and "tokens, the model reads 24" in problems[0]["what"]
    assert "locality prompt" in problems[1]["what"] and "2 prompts cannot be read" in err
    assert run("check", world.facts) == 0, "without a model nothing is known of positions"


def test_a_chat_template_counts(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.write({}, {})
    assert run("check", world.facts, "-m", world.model) == 0
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ 'a cello of the capital ' * 3 }}{{ messages[0]['content'] }} "
    tokenizer.save_pretrained(world.model)
    assert run("check", world.facts, "-m", world.model) == 0
    assert run("check", world.facts, "-m", world.model, "--chat") == 3
    assert "the model reads 24" in capsys.readouterr().out
    assert run("ask", "I met Tomas Veldrin and went to Avaland", "-m", world.model, "--chat") == 2


def test_edit_refuses_before_the_work(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mosectl.editing.edit.second_moments", lambda *_, **__: pytest.fail("the work began"))
    for more in ((), ("--dry-run",)):
        assert run(*world.edit(*more)) == 3
        err = " ".join(capsys.readouterr().err.split())
        assert "facts.jsonl:2: the rephrasing" in err and "--on-error skip" in err and "and 1 more" in err
    assert not (world.folder / "p.safetensors").exists()


def test_edit_and_eval_leave_out_on_request(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    prefixes = ("--set", "prefixes=3")  # the corpus's openings do not all fit before the prompts
    assert run(*world.edit("--on-error", "skip", "--json", *prefixes)) == 0
    out, err = capsys.readouterr()
    made = json.loads(out)
    assert made["scores"]["rephrasings"] == 0 and made["scores"]["locality_prompts"] == 1 and err.count("left out") == 2
    asked = ("eval", world.folder / "p.safetensors", world.facts, "-m", world.model, "--text", world.text, "--json")
    assert run(*asked) == 3 and "facts.jsonl:2" in capsys.readouterr().err
    assert run(*asked, "--on-error", "skip") == 0
    assert len(json.loads(capsys.readouterr().out)["facts"]) == 2


def test_ask_and_blame_refuse(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("ask", LONG, "-m", world.model) == 2
    assert "tokens, the model reads 24" in capsys.readouterr().err
    nearly = "I met Tomas Veldrin and"
    assert run("ask", nearly, "-m", world.model, "--tokens", 50, "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["before"]


def test_beyond_what_a_rotary_model_was_made_for_is_only_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save(tmp_path / "model", max_position_embeddings=24)
    assert run("ask", LONG, "-m", model, "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out) and "the model was made for 24" in " ".join(err.split())


def test_an_empty_prompt_is_no_bug(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.save_pretrained(model)
    assert run("ask", "", "-m", model) == 2
    told = capsys.readouterr().err
    assert "no token to begin with" in told and "at least one word" in told and "shorten" not in told


def test_a_bench_tells_before_its_first_cell(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mosectl.bench.runner.load", lambda *_, **__: pytest.fail("the work began"))
    config = world.folder / "bench.yaml"
    config.write_text(
        "models: [model]\ndatasets: [{facts: facts.jsonl}]\nruns: [{edits: 2}]\nmethods: [{name: isospectral}]\n"
    )
    code = run("bench", config, "-o", world.folder / "out")
    assert code == 3 and "facts.jsonl:2" in capsys.readouterr().err


def test_training_tells_too(world: World) -> None:
    from mosectl.facts.corpus import read_corpus
    from mosectl.hypernetwork.beforehand import TrainOptions
    from mosectl.hypernetwork.train import train
    from mosectl.model.loading import load

    facts = [replace(FACT, prompt=f"I met Tomas Veldrin {i}", source=f"f:{i}") for i in range(4)]
    facts[2] = replace(facts[2], rephrase_prompts=(LONG,))
    options = TrainOptions(steps=1, rank=4, batch_size=2, layers="1")
    long = read_corpus(world.text)  # its second text does not fit
    with pytest.raises(FactsError, match="f:2: the rephrasing"):
        train(load(world.model), facts, options, long)
    probes = [replace(f, locality=(Probe("He saw", "it"),)) for f in facts]
    with pytest.warns(Notice, match="left out"):
        train(load(world.model), probes, options, long, on_error="skip")


def test_edit_in_memory_on_a_model_of_few_positions(world: World) -> None:
    with pytest.raises(FactsError, match=r"facts\.jsonl:2"):
        mosectl.edit(world.facts, pico("gpt2", **SHORT), make_tokenizer())
