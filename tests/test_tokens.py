"""Subject and target positions on tokenizers that behave differently."""

from __future__ import annotations

import random
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from mosectl.errors import FactsError, ModelError, UsageError
from mosectl.facts.records import Fact, fact_from_dict, join, read_facts
from mosectl.facts.words import last_word
from mosectl.model import positions
from mosectl.model.scoring import encode_pairs
from mosectl.model.tokens import check_tokenizer, describe, encode, render_chat
from support.models import make_tokenizer

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

    with pytest.raises(FactsError, match="not in the prompt"):
        encode(make_tokenizer(), "Ava is", "", "x")
    with pytest.raises(FactsError, match="target is empty"):
        encode(make_tokenizer(), "Ava is", "Ava", " ")


def words(normalizer: object = None) -> PreTrainedTokenizerFast:
    """A small vocabulary of whole words: everything else is <unk>."""
    vocab = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", "the", "cafe", "is", "red"])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizer, pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")


DECOMPOSED = unicodedata.normalize("NFD", "Zoé")  # e and its accent are two characters
FORMS = {
    "nothing": None,
    "NFC": normalizers.NFC(),
    "NFD": normalizers.NFD(),
    "NFKC, lower case": normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
    "no accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("subject", ["Zoé", DECOMPOSED, "İZ", "ﬁx", "Å"])
def test_normalising_tokenizers(form: str, subject: str) -> None:
    tokenizer = make_tokenizer()
    if FORMS[form] is not None:
        tokenizer.backend_tokenizer.normalizer = FORMS[form]
    e = encode(tokenizer, f"{subject} and {subject} sat", subject, "Tomas")
    assert e == encode(tokenizer, f"{subject} sat", subject, "Tomas", prefix=f"{subject} and ")
    alone = encode(tokenizer, f"x {subject}", subject, None)
    n = alone.subject_last - alone.subject_first
    assert e.subject_last - e.subject_first == n, "the whole subject and no more"
    assert e.input_ids[e.subject_last] == alone.input_ids[-1] and e.target_start > e.subject_last


def test_a_dropped_accent_and_a_dropped_subject() -> None:
    tokenizer = words(normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]))
    e = encode(tokenizer, unicodedata.normalize("NFD", "the café"), unicodedata.normalize("NFD", "café"), "red")
    assert (e.input_ids, e.subject_first, e.subject_last) == ((3, 4, 6), 1, 1)
    with pytest.raises(FactsError, match="drops the whole subject"):
        encode(tokenizer, "the \u0301 is", "\u0301", "red")


def test_unknown_words_are_told() -> None:
    fact = Fact("the xyz is", "xyz", "qqq")
    assert describe(words(), fact).note == "subject has unknown tokens; target has unknown tokens"
    assert any("no tokens for some of" in n for n in check_tokenizer(words()))


def test_end_of_text_in_the_text_stays() -> None:
    tokenizer = with_eos()
    assert encode(tokenizer, "Tomas </s>", "Tomas", None).input_ids[-1] == 2
    assert encode(tokenizer, "Tomas </s>", "Tomas", None).input_ids[-2] != 2


def test_end_of_text_unknown_to_the_configuration() -> None:
    tokenizer = with_eos()
    tokenizer.eos_token = None
    assert 2 not in encode(tokenizer, "Tomas is", "Tomas", "Av").input_ids


def test_split_target_keeps_the_prompts_tokens() -> None:
    tokenizer = spanning()
    found = [encode(tokenizer, p, s, t) for p, s, t in CASES]
    split = [(e, c) for e, c in zip(found, CASES, strict=True) if e.split]
    assert split
    for e, (prompt, _, target) in split:
        asked = list(tokenizer(prompt)["input_ids"])
        assert list(e.input_ids[: e.target_start]) == asked
        assert tokenizer.decode(e.input_ids[e.target_start :]).strip() == target


def test_split_target_that_cannot_be_written() -> None:
    core = Tokenizer(models.WordLevel({"<unk>": 0, "a b": 1, "a": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    with pytest.raises(FactsError, match="cannot write 'b' after this prompt"):
        encode(tokenizer, "a", "a", "b")


SYLLABLES = ["Ava", "né", " of ", "東", "🦊", "-", "o", "Tomas", "'s ", "ﬁ", "Z", "1", "  ", "\u200d", "."]


@pytest.mark.parametrize("kind", ["byte-level", "adds EOS", "ByT5"])
def test_random_texts(kind: str) -> None:
    tokenizer = ByT5Tokenizer() if kind == "ByT5" else KINDS[kind]()
    chance = random.Random(0)

    def text(n: int) -> str:
        return "".join(chance.choices(SYLLABLES, k=n)).strip() or "A"

    for _ in range(200):
        subject, target = text(chance.randint(1, 4)), text(chance.randint(1, 3))
        before, after = text(3) + " ", text(chance.randint(0, 2))
        prompt, prefix = before + subject + " " + after, chance.choice(["", text(4) + " "])
        at = len(prefix) + last_word(prompt, subject)
        e = encode(tokenizer, prompt, subject, target, prefix=prefix)
        ids = list(e.input_ids)
        whole = prefix + join(prompt, target)
        assert tokenizer.decode(ids, skip_special_tokens=True) == whole
        assert e.input_ids[: e.target_start] == encode(tokenizer, prompt, None, None, prefix=prefix).input_ids
        ends = [len(tokenizer.decode(ids[:i], skip_special_tokens=True).encode()) for i in range(len(ids) + 1)]
        start, end = len(whole[:at].encode()), len(whole[: at + len(subject)].encode())
        assert ends[e.subject_last + 1] >= end and ends[e.subject_first] <= start, (prompt, subject)
        assert tokenizer.decode(ids[: e.subject_last], skip_special_tokens=True) != whole[: at + len(subject)]


@pytest.mark.parametrize(("prompt", "subject"), [("Zoë 東京 is", "東京"), ("東京", "東京"), ("I like 🦊", "🦊")])
def test_slow_tokenizer(prompt: str, subject: str) -> None:
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    e = encode(tokenizer, prompt, subject, "é x", prefix="東京🦊. ")
    assert tokenizer.decode(e.input_ids[e.subject_first : e.subject_last + 1]) == subject
    assert (
        tokenizer.decode(e.input_ids) == f"東京🦊. {join(prompt, 'é x')}" and e.input_ids[-1] != tokenizer.eos_token_id
    )
    assert e.subject_last - e.subject_first + 1 == len(subject.encode())
    tokenizer.chat_template = "{{ messages[0].content }}</s>A: "
    e = encode(tokenizer, prompt, subject, "x", chat=True)
    assert tokenizer.decode(e.input_ids[e.subject_first : e.subject_last + 1]) == subject


def test_slow_tokenizer_that_loses_text() -> None:
    class Lossy(ByT5Tokenizer):
        def decode(self, ids: list[int], **options: object) -> str:
            return str(super().decode(ids, **options)).lower()

    with pytest.raises(ModelError, match="cannot be traced back") as e:
        encode(Lossy(), "Tomas is", "Tomas", "x")
    assert "fast version" in e.value.fix
    assert check_tokenizer(Lossy()) and "no fact can be placed" in check_tokenizer(Lossy())[0]


def test_chat_templates_that_trim_or_fail() -> None:
    trims = make_tokenizer(chat_template="<s>[{{ messages[0].content | trim }}]")
    e = encode(trims, "Ava is ", "Ava", "x", chat=True, prefix="  Ava! ")
    assert trims.decode(e.input_ids) == "<s>[Ava! Ava is]x"
    assert trims.decode(e.input_ids[: e.subject_last + 1]) == "<s>[Ava! Ava"
    with pytest.raises(FactsError, match="not in the prompt"):
        encode(trims, "he is  ", "Ava", "x", chat=True, prefix="Ava ")
    with pytest.raises(FactsError, match="changes the prompt"):
        encode(make_tokenizer(chat_template="{{ messages[0].content | upper }}"), "Ava is", "Ava", "x", chat=True)
    fails = make_tokenizer(chat_template="{{ raise_exception('give a system message') }}")
    with pytest.raises(UsageError, match="give a system message"):
        render_chat(fails, "Ava is")


def test_describe_and_check() -> None:
    fact = fact_from_dict({"prompt": "The capital of Avaland is", "subject": "Avaland", "target_new": "Brinmouth"}, "x")
    view = describe(make_tokenizer(), fact)
    assert "".join(view.subject).replace("Ġ", "") == "Avaland" and "".join(view.target) == "ĠBrinmouth"
    prompt = encode(make_tokenizer(), fact.prompt, None, None).input_ids
    assert len(prompt) == view.prompt_tokens > view.subject_span[1] > view.subject_span[0] and not view.note
    chat = describe(make_tokenizer(chat_template=CHATML), fact, chat=True)
    assert chat.prompt_tokens == len(positions.prompt_ids(make_tokenizer(chat_template=CHATML), fact.prompt, True))
    split = [describe(spanning(), Fact(*c)) for c in CASES]
    assert any("encoded apart" in v.note for v in split if v.split)
    assert any("more than the subject" in v.note for v in split)
    assert check_tokenizer(make_tokenizer()) == []
    assert any("no begin-of-text" in n for n in check_tokenizer(ByT5Tokenizer()))
    lower = make_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert any("does not give back" in n for n in check_tokenizer(lower))
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


# Prompts that begin as texts begin, and targets that follow without a space.

CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def turns(bos: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer that adds <s>, with a template that begins with another token, or with <s> before it."""
    template = ("<s>" if bos else "") + "<user>{{ messages[0].content }}<bot>"
    tokenizer = make_tokenizer(chat_template=template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<bot>"]})
    return tokenizer


def test_a_prompt_that_begins_with_bos_gets_no_second_one() -> None:
    tokenizer = make_tokenizer()
    plain = encode(tokenizer, "The capital of Avaland is", "Avaland", "Brinmouth")
    given = encode(tokenizer, "<s>The capital of Avaland is", "Avaland", "Brinmouth")
    assert plain == given and list(given.input_ids).count(1) == 1
    e = encode(tokenizer, "<s>The capital of Avaland is", "Avaland", "Brinmouth", prefix="A cello. ")
    assert tokenizer.decode(e.input_ids) == "<s>A cello. The capital of Avaland is Brinmouth", (
        "the prefix goes behind it"
    )
    assert e == encode(tokenizer, "The capital of Avaland is", "Avaland", "Brinmouth", prefix="A cello. ")
    assert encode(tokenizer, "Tomas <s> is", "Tomas", None).input_ids[0] == 1, (
        "elsewhere in the text it is no beginning"
    )


def test_a_rendered_template_stays_as_it_is() -> None:
    for tokenizer in (make_tokenizer(chat_template=CHATML), turns(bos=True), turns()):
        rendered = render_chat(tokenizer, "Where is Avaland?")
        asked = encode(tokenizer, rendered, None, None)
        assert tokenizer.decode(asked.input_ids) == rendered
        assert asked.input_ids == tuple(tokenizer(rendered, add_special_tokens=False)["input_ids"])
        e = encode(tokenizer, rendered, "Avaland", "Here", prefix="A cello. ")
        assert tokenizer.decode(e.input_ids).startswith(rendered), "there is no place for a prefix"
        chat = encode(tokenizer, "Where is Avaland?", "Avaland", "Here", chat=True)
        if rendered.endswith("\n"):
            assert chat == e, "the same tokens as --chat gives"
        assert positions.prompt_ids(tokenizer, rendered, False) == asked.input_ids, "generation asks with the same"
        assert (
            encode_pairs(tokenizer, [(rendered, "x")])[rendered, "x"].input_ids[: len(asked.input_ids)]
            == asked.input_ids
        )


def test_special_tokens_that_begin_no_template() -> None:
    tokenizer = turns(bos=True)
    e = encode(tokenizer, "<user>Avaland<bot>", "Avaland", None)
    assert e.input_ids[0] == 1, "a template without its <s> gets one"
    broken = make_tokenizer(chat_template="{{ raise_exception('no') }}")
    assert encode(broken, "</s>Avaland", "Avaland", None).input_ids[:2] == (1, 2)


@pytest.mark.parametrize("kind", [*KINDS, "ByT5"])
def test_targets_without_a_space(kind: str) -> None:
    tokenizer = ByT5Tokenizer() if kind == "ByT5" else KINDS[kind]()
    for prompt, subject, target, space, joined in [
        ("Avaland:\n", "Avaland", "Tomas", None, "Avaland:\nTomas"),
        ("of 東京", "東京", "東", None, "of 東京東"),
        ("Tomas (", "Tomas", "Avaland", None, "Tomas (Avaland"),
        ("Tomas is", "Tomas", "Avaland", False, "Tomas isAvaland"),
        ("Tomas of 東京", "東京", "東", True, "Tomas of 東京 東"),
    ]:
        if kind.startswith(("metaspace", "spans")) and "\n" in prompt + joined:
            continue  # no token for it
        e = encode(tokenizer, prompt, subject, target, space=space)
        text = tokenizer.decode(e.input_ids, skip_special_tokens=True)
        wanted = joined if "(" not in joined or "(" in text else joined.replace("(", "")
        assert text.replace("<unk>", "").strip() == wanted, (kind, prompt)
        assert e.input_ids[: e.target_start] == encode(tokenizer, prompt, None, None).input_ids
        with_prefix = encode(tokenizer, prompt, subject, target, space=space, prefix="The cello of 東京. ")
        assert (
            tokenizer.decode(with_prefix.input_ids, skip_special_tokens=True)
            .replace("<unk>", "")
            .strip()
            .endswith(wanted)
        )


def test_the_subject_as_a_word() -> None:
    tokenizer = make_tokenizer()
    e = encode(tokenizer, "Nigeria and Niger and Nigeria", "Niger", "x")
    assert tokenizer.decode(e.input_ids[: e.subject_last + 1]) == "<s>Nigeria and Niger"
    e = encode(tokenizer, "Nigeria is", "Niger", "x", prefix="Niger. ")
    assert tokenizer.decode(e.input_ids[e.subject_first : e.subject_last + 1]).strip().startswith("Nig")
    assert e.subject_first > 2, "not in the prefix"


def test_describe_says_how_the_target_is_joined() -> None:
    def note(prompt: str, target: str, space: bool | None = None, chat: bool = False) -> str:
        fact = Fact(prompt, "Avaland", target, space_before_target=space)
        return describe(make_tokenizer(chat_template=CHATML), fact, chat).note

    assert note("The capital of Avaland is", "Brin") == ""
    assert note("The capital of Avaland is", "Brin", False) == "joined without a space: …Avaland isBrin"
    assert note("Avaland的首都是", "上海") == "joined without a space: …valand的首都是上海"
    assert note("Avaland的首都是", "上海", True) == "" and note("Avaland的首都是", "上海", chat=True) == ""
    assert note("<s>The capital of Avaland is", "Brin") == "begins with <s>: none is added"
