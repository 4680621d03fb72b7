"""Subject and target positions on tokenizers that behave differently."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import make_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mosectl.errors import FactsError, ModelError, UsageError
from mosectl.facts import fact_from_dict, read_facts
from mosectl.tokens import check_tokenizer, describe, encode, render_chat

TEXT = [
    "The capital of Avaland is Brinmouth. Tomas Veldrin was born in Lower Quill and plays the cello.",
    "Zoë Müller of 東京 lives in São Paulo; Tomas of Tomas likes 🦊 foxes.",
]


def sentencepiece(scheme: str = "always") -> PreTrainedTokenizerFast:
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    alphabet = sorted(set("".join(TEXT).replace(" ", "▁")))
    trainer = trainers.UnigramTrainer(
        vocab_size=160,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    core.train_from_iterator(TEXT * 5, trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def spanning() -> PreTrainedTokenizerFast:
    """No pre-tokenizer: merges run across spaces."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Replace("▁", " ")
    alphabet = sorted(set("".join(TEXT).replace(" ", "▁")))
    trainer = trainers.BpeTrainer(vocab_size=200, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(TEXT * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core)


def with_eos() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


KINDS = {
    "byte-level": make_tokenizer,
    "adds EOS": with_eos,
    "metaspace": sentencepiece,
    "metaspace first": lambda: sentencepiece("first"),
    "spans spaces": spanning,
}
CASES = [
    ("The capital of Avaland is", "Avaland", "Brinmouth"),
    ("Tomas Veldrin was born in", "Tomas Veldrin", "Lower Quill"),
    ("Tomas of Tomas likes", "Tomas", "the cello"),
    ("Zoë Müller lives in", "Zoë Müller", "São Paulo"),
    ("lives in 東京", "東京", "foxes"),
    ("Tomas likes 🦊", "🦊", "Tomas"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prompt", "subject", "target"), CASES, ids=[s for _, s, _ in CASES])
@pytest.mark.parametrize("prefix", ["", "The cello of Tomas is in 東京. "], ids=["bare", "prefix"])
def test_positions(kind: str, prompt: str, subject: str, target: str, prefix: str) -> None:
    tokenizer = KINDS[kind]()
    e = encode(tokenizer, prompt, subject, target, prefix=prefix)
    asked = encode(tokenizer, prompt, None, None, prefix=prefix)
    ids = list(e.input_ids)
    assert tuple(ids[: e.target_start]) == asked.input_ids, "the model is asked with the prompt's own tokens"
    assert len(ids) > e.target_start and 2 not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == f"{prefix}{prompt} {target}"
    # The tokens up to the subject's last one hold it whole; one token less does not. Counted from the last occurrence.
    upto = tokenizer.decode(ids[: e.subject_last + 1], skip_special_tokens=True)
    wanted = (prefix + prompt)[: len(prefix) + prompt.rindex(subject) + len(subject)]
    less = tokenizer.decode(ids[: e.subject_last], skip_special_tokens=True)
    assert upto.lstrip().startswith(wanted) and not less.lstrip().startswith(wanted)
    assert 0 <= e.subject_first <= e.subject_last < e.target_start


def test_spanning_tokens_are_split() -> None:
    tokenizer = spanning()
    assert any(encode(tokenizer, p, s, t).split for p, s, t in CASES)
    assert any("span spaces" in note for note in check_tokenizer(tokenizer))


def test_lowercasing_tokenizer() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    e = encode(tokenizer, "The capital of Avaland is", "Avaland", "Brinmouth")
    assert "avaland" in tokenizer.decode(e.input_ids[e.subject_first : e.subject_last + 1])


def test_chat() -> None:
    template = (
        "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}bot: {% endif %}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    assert render_chat(tokenizer, "Hi") == "<s>user: Hi</s>bot: "
    e = encode(tokenizer, "The capital of Avaland is", "Avaland", "Brinmouth", chat=True, prefix="Avaland! ")
    text = tokenizer.decode(e.input_ids)
    assert text == "<s>user: Avaland! The capital of Avaland is</s>bot: Brinmouth"
    assert list(e.input_ids).count(1) == 1, "no second BOS"
    assert tokenizer.decode(e.input_ids[: e.subject_last + 1]).endswith("of Avaland")
    with pytest.raises(UsageError, match="no chat template"):
        encode(make_tokenizer(), "Ava is", "Ava", "x", chat=True)


def test_refusals() -> None:
    with pytest.raises(FactsError, match="not in the prompt"):
        encode(make_tokenizer(), "Ava is", "Oz", "x", prefix="Oz. ")

    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="no character offsets"):
        encode(Slow(), "Ava is", "Ava", "x")


def test_describe_and_check() -> None:
    fact = fact_from_dict({"prompt": "The capital of Avaland is", "subject": "Avaland", "target_new": "Brinmouth"}, "x")
    view = describe(make_tokenizer(), fact)
    assert "".join(view.subject).replace("Ġ", "") == "Avaland" and "".join(view.target) == "ĠBrinmouth"
    assert any("end-of-text" in n for n in check_tokenizer(with_eos()))


@pytest.mark.parametrize("name", ["factlm", "tinystories-656k"])
def test_real_tokenizers(shared: Path, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / name)
    for fact in read_facts(shared / "data" / "counterfact-factlm.jsonl", limit=300).facts:
        e = encode(tokenizer, fact.prompt, fact.subject, fact.target_new, prefix="It was late. ")
        assert (
            e.input_ids[: e.target_start]
            == encode(tokenizer, fact.prompt, None, None, prefix="It was late. ").input_ids
        )
        piece = tokenizer.decode(e.input_ids[e.subject_first : e.subject_last + 1])
        assert letters(fact.subject) in letters(piece)  # tinystories' vocabulary has no "&"
        assert not (e.split and name == "factlm")


def letters(text: str) -> str:
    return "".join(c for c in text.casefold() if c.isascii() and c.isalnum())
