"""What train_factlm.py trains on: true statements of facts, ordinary text, their tokenizer, and rows of tokens."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mosectl.errors import FactsError, UsageError
from mosectl.facts.corpus import read_corpus
from mosectl.facts.readers import read_rows
from mosectl.facts.records import Fact, join, read_facts
from mosectl.model.scoring import Pair
from mosectl.model.tokens import Encoded

DOCUMENT_END = 0.5  # chance that a document ends after a statement, so that half of them stand behind other text
IGNORED = -100  # label of a token that is not learnt


@dataclass(frozen=True)
class KnownFacts:
    """The facts whose true answer is given, each with its row as the file has it, and all that was left out."""

    facts: tuple[Fact, ...]
    rows: tuple[dict[str, Any], ...]
    left_out: int  # unusable, repeated, or without a true answer


def read_known(paths: Sequence[Path]) -> KnownFacts:
    """The facts of all files that say what is true now; the first of those with the same prompt counts.

    Raises:
        FactsError: a file cannot be read, or no fact has a true answer.
    """
    found: dict[str, tuple[Fact, dict[str, Any]]] = {}
    given = 0
    for path in paths:
        rows = dict(read_rows(path, {})[1])
        given += len(rows)
        for fact in read_facts(path, on_error="skip").facts:
            if fact.ground_truth:
                found.setdefault(fact.prompt, (fact, rows[fact.source]))
    if not found:
        what = "no fact says what is true now"
        raise FactsError(what, where=", ".join(map(str, paths)), fix="add 'ground_truth' to the facts")
    facts, kept = zip(*found.values(), strict=True)
    return KnownFacts(facts, kept, given - len(facts))


def statements(facts: Iterable[Fact]) -> list[Pair]:
    """Every prompt with its true answer, never with the new one; a prompt has one answer, edit prompts come first."""
    facts = list(facts)
    pairs = [(f.prompt, f.ground_truth) for f in facts]
    pairs += [(p.prompt, p.answer) for f in facts for p in f.locality]
    pairs += [(p, f.ground_truth) for f in facts for p in f.rephrase_prompts]
    answers: dict[str, str] = {}
    for prompt, answer in pairs:
        if answer:
            answers.setdefault(prompt, answer)
    return list(answers.items())


def sentence(prompt: str, answer: str) -> str:
    """A statement as it is trained: the full stop tells where the answer ends."""
    return join(prompt, answer if answer.endswith(".") else f"{answer}.")


def read_text(paths: Sequence[Path], hub: str | None, megabytes: float) -> list[str]:
    """Texts of files (one text a line) and of the column "text" of a hub data set, at most so many MB in all.

    Raises:
        UsageError: a file or the data set cannot be read, or there is no text.
    """
    sources: list[Iterable[str]] = [read_corpus(path).texts for path in paths]
    if hub:
        sources.append(_hub_texts(hub))
    texts, left = [], megabytes * 1e6
    for text in (text for source in sources for text in source):
        if left <= 0:
            break
        if text.strip():
            texts.append(text.strip())
            left -= len(text)
    if not texts:
        raise UsageError("there is no text to train on", fix="give --text FILE or --hub-dataset NAME")
    return texts


def _hub_texts(name: str) -> Iterator[str]:
    """The training split, streamed: much less than the whole is needed."""
    try:
        from datasets import load_dataset
    except ImportError as e:
        fix = "run: pip install datasets, or give --text FILE"
        raise UsageError("--hub-dataset needs the package 'datasets'", fix=fix) from e
    path, _, config = name.partition(":")
    try:
        for row in load_dataset(path, config or None, split="train", streaming=True):
            yield row["text"]
    except Exception as e:  # the libraries below raise many kinds, all of them mean: not to be had
        reason = str(e).strip().split("\n")[0] or type(e).__name__
        fix = "give name[:config] of a data set with a column 'text' and a split 'train'"
        raise UsageError(f"--hub-dataset {name}: {reason}", fix=fix) from e


def train_tokenizer(texts: Iterable[str], size: int, length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most ``size`` tokens that puts <s> before a text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=length
    )


def encode_all(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text without special tokens, many at once."""
    parts = (texts[at : at + 10_000] for at in range(0, len(texts), 10_000))  # an encoding is larger than its ids
    core = tokenizer.backend_tokenizer  # many times faster than through transformers, and much is to be encoded
    return [e.ids for part in parts for e in core.encode_batch_fast(list(part), add_special_tokens=False)]


def questions(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerFast) -> dict[Pair, Encoded]:
    """Each statement as :func:`mosectl.model.scoring.score` takes it: its answer, full stop included, behind the prompt."""
    prompts = encode_all(tokenizer, [prompt for prompt, _ in pairs])
    # The pre-tokenizer cuts before a space: prompt and answer may be encoded apart.
    answers = encode_all(tokenizer, [sentence(p, a)[len(p) :] for p, a in pairs])
    rows = zip(pairs, prompts, answers, strict=True)
    return {pair: Encoded((tokenizer.bos_token_id, *p, *a), -1, -1, len(p) + 1, False) for pair, p, a in rows}


class Statements:
    """All statements as tokens, as they stand at the start of a text and behind another one."""

    def __init__(self, pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerFast) -> None:
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        asked = questions(pairs, tokenizer).values()
        self.first = [list(e.input_ids[1 : e.target_start]) for e in asked]
        self.later = encode_all(tokenizer, [f" {prompt}" for prompt, _ in pairs])
        self.answers = [list(e.input_ids[e.target_start :]) for e in asked]

    def frequencies(self, vocabulary: int) -> Tensor:
        """How often each token stands in an answer, (V,) float32, summing to 1."""
        counts = torch.bincount(torch.tensor([t for a in self.answers for t in a]), minlength=vocabulary).float()
        return counts / counts.sum()

    def documents(self, chance: random.Random) -> Iterator[tuple[list[int], list[bool]]]:
        """Endless documents of one or more statements, with which of their tokens belong to an answer."""
        while True:
            ids, asked = [self.bos], [False]
            for i in chance.sample(range(len(self.first)), len(self.first)):
                prompt, answer = (self.first if len(ids) == 1 else self.later)[i], self.answers[i]
                ids += prompt + answer
                asked += [False] * len(prompt) + [True] * len(answer)
                if chance.random() < DOCUMENT_END:
                    yield [*ids, self.eos], [*asked, False]
                    ids, asked = [self.bos], [False]


@dataclass(frozen=True)
class Rows:
    """A batch: tokens and labels (B, T) int64, and which labels belong to an answer, as indices into the flat labels."""

    tokens: Tensor
    labels: Tensor  # already shifted: label i is token i + 1
    answers: Tensor

    def to(self, device: str) -> Rows:
        tensors = (self.tokens, self.labels, self.answers)
        if device.startswith("cuda"):
            return Rows(*(t.pin_memory().to(device, non_blocking=True) for t in tensors))
        return Rows(*(t.to(device) for t in tensors))


class Packer:
    """Endless batches of rows of ``length`` tokens: ``share`` of them statements, the others text.

    A row begins with <s>. Statements are not cut: the end of a row that no document fits is padding. Text is.
    """

    def __init__(
        self, facts: Statements, texts: Sequence[Sequence[int]], pad: int, *, length: int, share: float, seed: int
    ) -> None:
        self.length, self.share, self.pad = length, share, pad
        self.chance = random.Random(seed)
        self.facts = self._fact_rows(facts)
        stream = torch.tensor([t for ids in texts for t in (facts.bos, *ids, facts.eos)])
        n = max(1, -(-len(stream) // length))
        filled = torch.nn.functional.pad(stream, (0, n * length - len(stream)), value=pad).view(n, length)
        self.text = torch.cat([torch.full((n, 1), facts.bos), filled], 1)
        self.order = self._text_order()

    def _fact_rows(self, facts: Statements) -> Iterator[tuple[list[int], list[bool]]]:
        """Rows of length + 1: the last token is a label only."""
        width = self.length + 1
        row: list[int] = []
        asked: list[bool] = []
        for ids, answers in facts.documents(self.chance):
            if row and len(row) + len(ids) > width:
                yield row + [self.pad] * (width - len(row)), asked + [False] * (width - len(row))
                row, asked = [], []
            row, asked = (row + ids)[:width], (asked + answers)[:width]

    def _text_order(self) -> Iterator[int]:
        while True:
            yield from self.chance.sample(range(len(self.text)), len(self.text))

    def batch(self, size: int) -> Rows:
        """``size`` rows, at least one of statements."""
        of_facts = max(1, round(size * self.share))
        ids, asked = zip(*islice(self.facts, of_facts), strict=True)
        text = self.text[list(islice(self.order, size - of_facts))]
        tokens = torch.cat([torch.tensor(ids), text])
        labels = tokens[:, 1:].masked_fill(tokens[:, 1:] == self.pad, IGNORED)
        answers = torch.tensor(asked)[:, 1:].flatten().nonzero()[:, 0]  # the rows of statements come first
        return Rows(tokens[:, :-1], labels, answers)
