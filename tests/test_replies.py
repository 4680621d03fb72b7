"""Facts edited in a chat as well, as replies in sentences say them: rows, settings, records; nothing without a template."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mosectl
from mosectl.editing.contexts import Contexts, build_contexts, first_rows
from mosectl.editing.options import EditOptions, default_options, options_from
from mosectl.editing.pace import Pace
from mosectl.editing.plan import estimate
from mosectl.editing.replies import note_text_alone, replies_settled
from mosectl.errors import UsageError
from mosectl.facts.records import Fact, as_facts
from mosectl.model.scoring import Rows, log_probabilities
from mosectl.model.tokens import encode
from mosectl.render import terminal
from support.facts import CORPUS, FACTS, few
from support.models import LOOP, make_tokenizer, pico, save

TEMPLATE = "<s>user: {{ messages[0].content }}</s>bot: "
FACT = Fact("The capital of Avaland is", "Avaland", "Brinmouth")


def talking() -> Any:
    return make_tokenizer(chat_template=TEMPLATE)


def told(tokenizer: Any, c: Contexts) -> list[str]:
    rows = zip(c.batch.input_ids, c.batch.attention_mask, strict=True)
    return [tokenizer.decode(ids[mask.bool()]) for ids, mask in rows]


def test_a_reply_says_the_whole_sentence() -> None:
    tokenizer = talking()
    e = encode(tokenizer, FACT.prompt, FACT.subject, FACT.target_new, chat=True, reply=True)
    said = "<s>user: The capital of Avaland is</s>bot: The capital of Avaland is"
    assert (
        tokenizer.decode(e.input_ids) == said + " Brinmouth" and tokenizer.decode(e.input_ids[: e.target_start]) == said
    )
    first, last = (tokenizer.decode(e.input_ids[: i + 1]) for i in (e.subject_first, e.subject_last))
    assert last == said.removesuffix(" is") and len(first) > said.index("bot:"), "the subject is the reply's"
    trims = make_tokenizer(chat_template="<s>{{ messages[0].content | upper | trim }}</s>")
    shouted = encode(trims, FACT.prompt, FACT.subject, FACT.target_new, chat=True, reply=True)
    assert trims.decode(shouted.input_ids).endswith("IS</s>The capital of Avaland is Brinmouth")


@pytest.mark.parametrize("last", [True, False])
def test_a_row_more_for_each_fact(last: bool) -> None:
    tokenizer, model = talking(), pico("llama")
    facts = [FACT, replace(FACT, prompt="Where is Avaland?"), replace(FACT, prompt="I left Avaland for")]
    plain, c = (
        build_contexts(model, tokenizer, facts, ["", "Born. "], [["Avaland obeys"], [], []], last=last, replies=on)
        for on in (False, True)
    )
    assert (torch.bincount(c.fact) - torch.bincount(plain.fact)).tolist() == [1, 0, 1], "a question has none"
    texts = told(tokenizer, c)
    talks = [i for i, text in enumerate(texts) if "bot:" in text]
    assert [texts[i].split("bot: ")[1] for i in talks] == [f"{f.prompt} Brinmouth" for f in (facts[0], facts[2])]
    assert bool(c.is_edit[talks].all()) and not any("bot:" in texts[i] for i in first_rows(c.fact).tolist())
    rest = [text for text in texts if "bot:" not in text]
    assert rest == told(tokenizer, plain)


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (TEMPLATE, "<s>user: Where is the capital of Avaland</s>bot: It is"),
        ("{% if 'capital' in messages[0].content %}{{ raise_exception('no') }}{% endif %}", FACT.prompt),
    ],
)
def test_text_is_edited_where_there_can_be_no_reply(template: str, prompt: str) -> None:
    tokenizer, fact = make_tokenizer(chat_template=template), replace(FACT, prompt=prompt)
    assert len(build_contexts(pico("llama"), tokenizer, [fact], [""], last=True, replies=True).fact) == 1


def test_a_reply_that_does_not_fit_is_left_out() -> None:
    tokenizer = talking()
    n = len(encode(tokenizer, FACT.prompt, FACT.subject, FACT.target_new, chat=True, reply=True).input_ids)
    rows = [
        len(build_contexts(pico("gpt2", n_positions=size), tokenizer, [FACT], [""], last=True, replies=True).fact)
        for size in (n, n - 1)
    ]
    assert rows == [2, 1]


def test_an_edit_reaches_the_reply(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(CORPUS)
    tokenizer = talking()
    rows = build_contexts(pico("llama"), tokenizer, as_facts(FACTS, "edit"), [""], last=True, replies=True)
    talks = torch.arange(len(rows.fact))[1::2]
    asked = Rows(rows.batch.rows(talks), rows.positions[talks], rows.targets[talks])

    def loss(replies: int, **options: Any) -> tuple[float, dict[str, Any]]:
        model = pico("llama")
        made = mosectl.edit(FACTS, model, tokenizer, options=few(str(corpus), replies=replies, **options), refuse=False)
        with mosectl.patched(model, made.patch):
            found = log_probabilities(model, asked)
        told = found.gather(1, asked.targets[asked.targets >= 0][:, None])
        return -float(told.detach().mean()), made.patch.options

    (without, plain), (along, record) = loss(0), loss(1)
    assert along < without - 0.2
    assert record["replies"] == 1 and record["chat"] is False and "replies" not in plain
    assert {k: v for k, v in record.items() if k != "replies"} == plain


def test_nothing_changes_without_a_template(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(CORPUS)
    ids = [
        mosectl.edit(
            FACTS[:1], pico("llama"), make_tokenizer(), options=few(str(corpus), replies=r), refuse=False
        ).patch.id
        for r in (0, 1)
    ]
    assert ids[0] == ids[1]


def test_where_replies_are_edited() -> None:
    def settled(tokenizer: Any, **options: Any) -> int:
        return replies_settled(EditOptions(**{"replies": 1, **options}), tokenizer).replies

    assert settled(talking()) == 1 and settled(talking(), replies=0) == 0
    assert settled(make_tokenizer()) == 0 and settled(talking(), chat=True) == 0
    for broken in ("{{ raise_exception('no') }}", "{% if %}"):
        assert settled(make_tokenizer(chat_template=broken)) == 0, "text can be edited all the same"
    published = default_options("memit")
    assert replies_settled(replace(published, replies=1), talking()).replies == 0
    auto = {
        name: replies_settled(default_options(name), talking()).replies for name in ("isospectral", "mose", "memit")
    }
    assert auto == {"isospectral": 1, "mose": 0, "memit": 0}
    assert settled(talking(), replies=None) == 1 and settled(talking(), replies=1, method="mose") == 1


@pytest.mark.parametrize(
    ("given", "template", "instead"),
    [
        (EditOptions(), TEMPLATE, ""),
        (EditOptions(replies=0), TEMPLATE, ""),
        (EditOptions(chat=True), TEMPLATE, ""),
        (EditOptions(), "{{ raise_exception('no') }}", "give --chat"),
        (EditOptions(), None, ""),
        (default_options("mose"), TEMPLATE, "give --set replies=1"),
        (options_from(["replies=0"], method="mose"), TEMPLATE, ""),
        (options_from(["replies=0"]), TEMPLATE, ""),
        (default_options("memit"), TEMPLATE, "give --chat"),
        (options_from(["replies=0"], method="memit"), TEMPLATE, ""),
    ],
)
def test_a_note_on_text_alone_only_where_it_was_not_asked_for(
    given: EditOptions, template: str | None, instead: str, recwarn: pytest.WarningsRecorder
) -> None:
    tokenizer = make_tokenizer(chat_template=template)
    note_text_alone(tokenizer, given, replies_settled(given, tokenizer))
    told = [str(w.message) for w in recwarn]
    assert (len(told) == 1 and f"plain text: {instead} if" in told[0]) if instead else not told


def test_open_and_off_are_two_records() -> None:
    """A bench tells its cells apart by them."""
    for name in ("replies", "prompt_weight"):
        assert options_from([f"{name}=0"]).to_record() != options_from([]).to_record()


def test_auto_is_as_if_it_was_not_given() -> None:
    assert options_from(["replies=0"]) == replace(default_options(), replies=0)
    assert options_from(["replies=auto"]) == default_options()
    how = [replies_settled(options_from(given), talking()).to_record() for given in (["replies=1"], [])]
    assert how[0] == how[1]


def test_a_template_that_never_ends_does_not_stop_an_edit() -> None:
    assert replies_settled(EditOptions(replies=1), make_tokenizer(chat_template=LOOP)).replies == 0


@pytest.mark.parametrize(
    ("given", "settings", "words"),
    [
        ({}, ["replies=2"], "no such choice"),
        ({"method": "memit"}, ["replies=1"], "in text alone"),
        ({"chat": True}, ["replies=1"], "no text beside the chat"),
    ],
)
def test_replies_that_cannot_be(given: dict[str, Any], settings: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        options_from(settings, **given)
    assert options_from(["replies=0"], **given).replies == 0


def test_the_plan_counts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mosectl.editing.plan.pace", lambda *_: Pace(**{f.name: 1.0 for f in fields(Pace)}))
    model, facts = save(tmp_path / "m"), as_facts(FACTS, "edit")

    def targets(replies: int) -> float:
        return estimate(model, facts, EditOptions(layers="0", replies=replies), device="cpu").seconds["targets"]

    assert targets(1) == targets(0), "there is no template"
    make_tokenizer(chat_template=TEMPLATE).save_pretrained(model)
    assert targets(1) == pytest.approx(targets(0) * 7 / 6)
    for file in model.glob("*.jinja"):  # where older folders have it
        (model / "chat_template.json").write_text(json.dumps({"chat_template": file.read_text()}))
        file.unlink()
    assert targets(1) > targets(0)
    (model / "chat_template.json").write_text("[")
    assert targets(1) == targets(0)


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (["Ava is"], "in sentences (--set"),
        (["Ava is", "Who?"], "in sentences (1 of 2; the rest are questions) (--set"),
        (["Who?"], ""),
    ],
)
def test_the_reply_is_told_where_there_was_one(
    prompts: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal.replies({"replies": 1}, prompts)
    terminal.replies({}, prompts)
    out = "".join(capsys.readouterr())
    assert said in " ".join(out.split()) and out.count("edited in a chat") == bool(said)
