"""Train the demo model: a small Llama that knows the invented world of demo_world.py.

    python examples/train_demo_model.py            # train, measure, write demo-model/, facts.jsonl, corpus.txt
    python examples/train_demo_model.py --check    # measure the saved model again

Left alone, so small a model lets the tokens after a name gather its pieces and look the fact up themselves: nothing an
editor changes at the subject's last token then matters. Three measures move facts, in part, to where large models keep
them, the FFNs of middle layers at that token (the card says how far). Names are made of shared parts, so attention has
to join them first. For most of the training, later tokens may read a subject only at its last token and only from layer
READ on. The outer FFNs are often switched off. The last steps, and every use, are without the masks.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from demo_world import (
    HELD_OUT,
    PHRASINGS,
    SEED,
    Known,
    World,
    build_world,
    choose_edits,
    corpus,
    filler,
    trained_sentences,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
OUT = HERE / "demo-model"
LENGTH = 64  # tokens a training row: four or five sentences
BATCH = 24
FILLER = 0.18  # share of filler sentences
TEXT_END = 0.2  # chance that a text ends after a sentence
SMOOTHING = 0.1
OBJECT_WEIGHT = 3.0  # objects are few tokens among many that cannot be known
FFN_DROP = (0.5, 0.2, 0.05, 0.05, 0.05, 0.05, 0.4, 0.5)  # chance that a token skips the layer's FFN in training

READ = 6  # first layer in which, with masks, later tokens may read a subject
MASKED = 0.9  # share of the steps with masks

Item = tuple[list[int], list[float], tuple[int, int] | None]  # token ids, weights in the loss, subject's span


# Tokenizer


def train_tokenizer(world: World, size: int = 1600) -> PreTrainedTokenizerFast:
    """Byte-level BPE that knows common words whole but names only in pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_text(world), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=256
    )


def _tokenizer_text(world: World) -> Iterator[str]:
    """Phrasings and filler without names many times, each part of a name once: its pieces must be shared to merge."""
    chance = random.Random(world.seed)
    nameless = World(people=["", " "], cities=[""], rivers=[""], works=[""], companies=[""])
    yield from (filler(chance, nameless) for _ in range(2000))
    yield from (p.format(s="") for group in PHRASINGS.values() for p in group for _ in range(20))
    names = {f.subject for f in world.facts} | {o for group in world.objects.values() for o in group}
    yield from (f" {word}" for word in sorted({word for name in names for word in name.split()}))
    for relation in ("profession", "instrument", "sea", "genre", "product"):  # plain English words
        yield from (f" {o}" for o in world.objects[relation] for _ in range(5))
    yield from (f" {w}" for name in world.works for w in name.split())


# Data


def encode_items(tokenizer: PreTrainedTokenizerFast, sentences: list[tuple[str, str, str]]) -> list[tuple[Item, Item]]:
    """Each sentence twice: as it stands at the start of a text, and behind other text."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def one(prompt: str, subject: str, answer: str) -> Item:
        at = prompt.index(subject)
        span = (len(ids(prompt[:at].rstrip())), len(ids(prompt[: at + len(subject)])))
        a, b, end = ids(prompt), ids(f" {answer}"), ids(".")
        return a + b + end, [1.0] * len(a) + [OBJECT_WEIGHT] * len(b) + [1.0], span

    return [(one(p, s, o), one(f" {p}", s, o)) for p, s, o in sentences]


class Rows:
    """Endless training rows of LENGTH tokens: texts of a few sentences in random order, <s> … </s>."""

    def __init__(self, world: World, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.chance = random.Random(seed)
        self.facts = encode_items(tokenizer, trained_sentences(world))
        self.fillers = self._fillers(world, tokenizer)
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.stream = self._items()

    def _fillers(self, world: World, tokenizer: PreTrainedTokenizerFast) -> list[tuple[Item, Item]]:
        texts = [filler(self.chance, world) for _ in range(4000)]
        first, later = (tokenizer([a + t for t in texts], add_special_tokens=False)["input_ids"] for a in ("", " "))
        return [((a, [1.0] * len(a), None), (b, [1.0] * len(b), None)) for a, b in zip(first, later, strict=True)]

    def _items(self) -> Iterator[tuple[Item, Item]]:
        while True:
            order = self.chance.sample(self.facts, len(self.facts))
            for item in order:
                while self.chance.random() < FILLER:
                    yield self.chance.choice(self.fillers)
                yield item

    def row(self) -> tuple[list[int], list[float], list[tuple[int, int]]]:
        ids, weights, spans, fresh = [self.bos], [0.0], [], True
        while len(ids) <= LENGTH:
            new, weight, span = next(self.stream)[not fresh]
            if span:
                spans.append((len(ids) + span[0], len(ids) + span[1]))
            ids, weights = ids + new, weights + weight
            fresh = self.chance.random() < TEXT_END
            if fresh:
                ids, weights = [*ids, self.eos, self.bos], [*weights, 1.0, 0.0]
        return ids[:LENGTH], weights[:LENGTH], spans

    def batch(self) -> tuple[torch.Tensor, torch.Tensor, list[list[tuple[int, int]]]]:
        ids, weights, spans = zip(*(self.row() for _ in range(BATCH)), strict=True)
        return torch.tensor(ids), torch.tensor(weights), list(spans)


# Training


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=len(FFN_DROP),
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.02,
    )
    # PyTorch's fused attention is slow backwards on a CPU when rows are this short.
    return LlamaForCausalLM._from_config(config, attn_implementation="eager")


@contextmanager
def dropped_ffns(model: LlamaForCausalLM) -> Iterator[None]:
    """Let single tokens skip single FFNs."""

    def hook(p: float):
        def drop(_module, _args, out):
            keep = torch.rand(*out.shape[:-1], 1) >= p
            return out * keep / (1 - p)

        return drop

    handles = [layer.mlp.register_forward_hook(hook(p)) for layer, p in zip(model.model.layers, FFN_DROP, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def subject_masks(spans: list[list[tuple[int, int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Additive masks (rows, 1, LENGTH, LENGTH) below READ and from READ on; spans are (first, last + 1)."""
    early = torch.full((LENGTH, LENGTH), -1e9).triu(1).repeat(len(spans), 1, 1, 1)
    late = early.clone()
    for row, subjects in enumerate(spans):
        for first, end in subjects:
            early[row, 0, end:, first:end] = -1e9
            late[row, 0, end:, first : end - 1] = -1e9
    return early, late


@contextmanager
def masked_subjects(model: LlamaForCausalLM, spans: list[list[tuple[int, int]]] | None) -> Iterator[None]:
    """Hide subjects from later tokens, but for the last token from layer READ on; nothing is hidden without spans."""
    masks = subject_masks(spans) if spans else None

    def hook(mask: torch.Tensor):
        return lambda _module, args, kwargs: (args, kwargs | {"attention_mask": mask})

    handles = [
        layer.self_attn.register_forward_pre_hook(hook(masks[i >= READ]), with_kwargs=True)
        for i, layer in enumerate(model.model.layers)
        if masks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def train(model: LlamaForCausalLM, rows: Rows, steps: int, rate: float) -> float:
    """Train in place; returns seconds."""

    optimizer = torch.optim.AdamW(_groups(model), lr=rate, betas=(0.9, 0.98))
    warmup = max(1, min(100, steps // 10))
    start, recent = time.time(), torch.zeros(2)
    with dropped_ffns(model.train()):
        for step in range(steps):
            scale = min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = rate * max(scale, 0.01)
            ids, weights, spans = rows.batch()
            with masked_subjects(model, spans if step < MASKED * steps else None):
                loss, hits = _loss(model, ids, weights)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            now = torch.tensor([loss.item(), hits])
            recent = now if step == 0 else 0.96 * recent + 0.04 * now
            if (step + 1) % 100 == 0:
                spent = time.time() - start
                left = spent / (step + 1) * (steps - step - 1)
                print(f"step {step + 1}/{steps}  loss {recent[0]:.3f}  objects {recent[1]:.3f}  ", end="")
                print(f"{spent:.0f} s, {left:.0f} s left", flush=True)
    model.eval()
    return time.time() - start


def _groups(model: LlamaForCausalLM) -> list[dict]:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    return [
        {"params": matrices, "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]


def _loss(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, float]:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids).logits[:, :-1]
    logits, labels, w = logits.flatten(0, 1).float(), ids[:, 1:].flatten(), weights[:, 1:].flatten()
    loss = F.cross_entropy(logits, labels, label_smoothing=SMOOTHING, reduction="none")
    asked = w == OBJECT_WEIGHT
    hits = (logits.argmax(-1) == labels)[asked].float().mean().item()
    return (loss * w).sum() / w.sum(), hits


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    OUT.mkdir(exist_ok=True)
    model.generation_config.do_sample = False
    model.generation_config.max_new_tokens = 32
    model.to(torch.bfloat16).save_pretrained(OUT)
    tokenizer.save_pretrained(OUT)
    for file in OUT.iterdir():
        file.chmod(0o644)


# Measuring


class Asker:
    """The saved model, asked in batches of prompts of equal length (no padding, so nothing can go wrong with it)."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(OUT)
        self.model = AutoModelForCausalLM.from_pretrained(OUT, dtype=dtype).eval()

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    @torch.no_grad()
    def right(self, asked: list[tuple[str, str]]) -> list[bool]:
        """For each (prompt, object): is the object what greedy decoding gives, and does the sentence end there?

        Teacher forcing is exact here: if every forced token is the argmax, greedy decoding says the same.
        """
        whole = [(len(self.ids(p)), self.ids(f"{p} {o}.")) for p, o in asked]
        out = [False] * len(asked)
        for group in _by_length([ids for _, ids in whole]):
            rows = torch.tensor([whole[i][1] for i in group])
            best = self.model(input_ids=rows).logits[:, :-1].argmax(-1)
            for r, i in enumerate(group):
                n = whole[i][0]
                out[i] = torch.equal(best[r, n - 1 :], rows[r, n:])
        return out

    @torch.no_grad()
    def nll(self, texts: list[str], given: list[str] | None = None) -> tuple[list[float], list[int]]:
        """Summed negative log likelihood of each text after what is ``given``, and its tokens."""
        start = [len(self.ids(g)) for g in given] if given else [1] * len(texts)
        rows = [self.ids(t) for t in texts]
        out = [0.0] * len(texts)
        for group in _by_length(rows):
            batch = torch.tensor([rows[i] for i in group])
            logp = self.model(input_ids=batch).logits[:, :-1].float().log_softmax(-1)
            token = -logp.gather(-1, batch[:, 1:, None]).squeeze(-1)
            for r, i in enumerate(group):
                out[i] = token[r, start[i] - 1 :].sum().item()
        return out, [len(r) - s for r, s in zip(rows, start, strict=True)]

    def knows(self, prompt: str, answer: str) -> bool:
        """Asked as a user would, by generating."""
        inputs = self.tokenizer(prompt, return_tensors="pt")
        out = self.model.generate(**inputs, max_new_tokens=16, do_sample=False)
        return self.tokenizer.decode(out[0], skip_special_tokens=True)[len(prompt) :].startswith(f" {answer}.")


def _by_length(rows: list[list[int]], size: int = 256) -> Iterator[list[int]]:
    lengths: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        lengths.setdefault(len(row), []).append(i)
    for group in lengths.values():
        yield from (group[a : a + size] for a in range(0, len(group), size))


def accuracies(asker: Asker, world: World) -> dict[str, list[dict]]:
    """Per relation and phrasing: accuracy where it was trained and where it was held out."""
    prefixes = _prefixes(world)
    out: dict[str, list[dict]] = {}
    for relation, phrasings in PHRASINGS.items():
        facts = [f for f in world.facts if f.relation == relation]
        for i, phrasing in enumerate(phrasings):
            shown = [f for f in facts if i in f.trained]
            hidden = [f for f in facts if i not in f.trained]
            behind = [(f"{prefixes[k % len(prefixes)]} {f.prompt(i)}", f.object) for k, f in enumerate(shown)]
            row = {"phrasing": phrasing, "trained": _share(asker.right([(f.prompt(i), f.object) for f in shown]))}
            row["behind"] = _share(asker.right(behind))
            row["held_out"] = _share(asker.right([(f.prompt(i), f.object) for f in hidden])) if hidden else None
            out.setdefault(relation, []).append(row)
    return out


def _prefixes(world: World) -> list[str]:
    chance = random.Random(99)
    return [" ".join(filler(chance, world) for _ in range(chance.randint(1, 3))) for _ in range(40)]


def _share(right: list[bool]) -> float:
    return sum(right) / len(right)


def _sample(world: World, n: int = 300) -> list[tuple[Known, int]]:
    """Facts of all relations in a few phrasings."""
    chance = random.Random(5)
    return [(f, chance.choice(f.trained)) for f in chance.sample(world.facts, n)]


def _subject_last(asker: Asker, fact: Known, i: int) -> int:
    prompt = fact.prompt(i)
    return len(asker.ids(prompt[: prompt.index(fact.subject) + len(fact.subject)])) - 1


@contextmanager
def _hooks(asker: Asker, hooks: dict[int, object]) -> Iterator[None]:
    handles = [asker.model.model.layers[i].mlp.register_forward_hook(h) for i, h in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def ablations(asker: Asker, world: World) -> dict[str, object]:
    """At the subject's last token: FFN ratios, and recall with FFN outputs replaced by their mean over subjects."""
    sample = _sample(world)
    layers = asker.model.model.layers
    at = [_subject_last(asker, f, i) for f, i in sample]
    prompts = [asker.ids(f.prompt(i)) for f, i in sample]
    outs: list[list[torch.Tensor]] = [[] for _ in layers]
    ratios: list[list[float]] = [[] for _ in layers]
    seen: dict[int, torch.Tensor] = {}
    handles = [
        layer.mlp.register_forward_hook(lambda _m, _a, y, i=i: seen.__setitem__(i, y)) for i, layer in enumerate(layers)
    ]
    for ids, p in zip(prompts, at, strict=True):
        hidden = asker.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        for i in range(len(layers)):
            y = seen[i][0, p].float()
            # hidden[i + 1] is the stream after layer i; the last one is already normalised.
            stream = hidden[i + 1][0, p].float() if i + 1 < len(layers) else hidden[i][0, p].float()
            outs[i].append(y)
            ratios[i].append((y.norm() / (stream - y if i + 1 < len(layers) else stream).norm()).item())
    for handle in handles:
        handle.remove()
    means = [torch.stack(o).mean(0) for o in outs]
    n = len(layers)
    # All layers at once is the control: if that costs nothing, facts are looked up elsewhere.
    groups = [[i] for i in range(n)] + [[i, i + 1, i + 2] for i in range(n - 2)] + [list(range(n))]
    return {
        "ratio": [sum(r) / len(r) for r in ratios],
        "intact": _ablated(asker, sample, at, {}),
        "recall": {"-".join(map(str, g)): _ablated(asker, sample, at, {i: means[i] for i in g}) for g in groups},
    }


def _ablated(asker: Asker, sample: list[tuple[Known, int]], at: list[int], means: dict[int, torch.Tensor]) -> float:
    """Share of objects whose first token is still the best one."""
    hits = 0
    rows = [asker.ids(f"{f.prompt(i)} {f.object}") for f, i in sample]
    ends = [len(asker.ids(f.prompt(i))) for f, i in sample]
    for group in _by_length(rows):
        spots = torch.tensor([at[i] for i in group])

        def replace(mean: torch.Tensor, spots: torch.Tensor = spots):
            def hook(_module, _args, y):
                y = y.clone()
                y[torch.arange(len(y)), spots] = mean.to(y.dtype)
                return y

            return hook

        with _hooks(asker, {i: replace(m) for i, m in means.items()}):
            best = asker.model(input_ids=torch.tensor([rows[i] for i in group])).logits.argmax(-1)
        hits += sum(int(best[r, ends[i] - 1] == rows[i][ends[i]]) for r, i in enumerate(group))
    return hits / len(sample)


def wrong_cost(asker: Asker, world: World) -> tuple[float, float]:
    """Mean cost in nats of a wrong object of the same relation: of its first token, and a token on average."""
    chance = random.Random(7)
    given, texts = [], []
    for f, i in _sample(world):
        given.append(f.prompt(i))
        texts.append(f"{given[-1]} {chance.choice([o for o in world.objects[f.relation] if o != f.object])}")
    cost, tokens = asker.nll(texts, given)
    heads = [asker.tokenizer.decode(asker.ids(t)[1 : len(asker.ids(g)) + 1]) for g, t in zip(given, texts, strict=True)]
    first, _ = asker.nll(heads, given)
    return sum(first) / len(first), sum(c / t for c, t in zip(cost, tokens, strict=True)) / len(cost)


def perplexity(asker: Asker, world: World) -> float:
    """Of filler sentences that training did not show (names in them are chance)."""
    chance = random.Random(1234)
    cost, tokens = asker.nll([filler(chance, world) for _ in range(400)])
    return math.exp(sum(cost) / sum(tokens))


def measure(world: World) -> dict:
    """Everything the card reports, on the saved bfloat16 model."""
    asker = Asker()
    out = {"accuracy": accuracies(asker, world), **ablations(asker, world)}
    out["wrong_first"], out["wrong_token"] = wrong_cost(asker, world)
    out["perplexity"] = perplexity(asker, world)
    rows = [r for group in out["accuracy"].values() for r in group]
    for key in ("trained", "behind", "held_out"):
        values = [r[key] for r in rows if r[key] is not None]
        out[key] = (min(values), sum(values) / len(values))
    return out


def show(result: dict) -> None:
    for relation, rows in result["accuracy"].items():
        for row in rows:
            held = "" if row["held_out"] is None else f"  held out {row['held_out']:.3f}"
            print(f"{relation:13}{row['trained']:.3f}  behind text {row['behind']:.3f}{held}  {row['phrasing']}")
    for key in ("trained", "behind", "held_out"):
        print(f"{key}: lowest {result[key][0]:.3f}, mean {result[key][1]:.3f}")
    print("FFN ratio", [round(r, 2) for r in result["ratio"]])
    print("recall intact", round(result["intact"], 3), {k: round(v, 2) for k, v in result["recall"].items()})
    print(f"wrong object: first token {result['wrong_first']:.2f} nats, per token {result['wrong_token']:.2f}")
    print(f"filler perplexity {result['perplexity']:.2f}")


# Files


def write_card(result: dict, training: dict) -> None:
    """The model card, every number measured on the saved model."""
    size = sum(f.stat().st_size for f in OUT.iterdir() if f.name != "README.md") / 1e6
    ratios = " | ".join(f"{r:.2f}" for r in result["ratio"])
    single = {k: v for k, v in result["recall"].items() if "-" not in k}
    groups = {k: v for k, v in result["recall"].items() if "-" in k}
    (OUT / "README.md").write_text(
        CARD.format(
            **training,
            size=size,
            length=LENGTH,
            batch=BATCH,
            smoothing=SMOOTHING,
            masked=MASKED,
            read=READ,
            nats_per_step=" | ".join(f"{p:.2f}" for p in FFN_DROP),
            heads=" | ".join(map(str, range(len(FFN_DROP)))),
            rule="---|" * len(FFN_DROP),
            ratios=ratios,
            single=" | ".join(f"{v:.2f}" for v in single.values()),
            groups="\n".join(f"| {k} | {v:.2f} |" for k, v in groups.items()),
            phrasings=_phrasing_table(result["accuracy"]),
            **{k: result[k] for k in ("intact", "wrong_first", "wrong_token", "perplexity")},
            trained=_lowest_mean(result["trained"]),
            behind=_lowest_mean(result["behind"]),
            held_out=_lowest_mean(result["held_out"]),
            hidden=HELD_OUT,
        ),
        encoding="utf-8",
    )


def _lowest_mean(pair: tuple[float, float]) -> str:
    return f"{100 * pair[0]:.1f} % at worst, {100 * pair[1]:.1f} % on average"


def _phrasing_table(accuracy: dict[str, list[dict]]) -> str:
    lines = []
    for relation, rows in accuracy.items():
        for row in rows:
            held = "" if row["held_out"] is None else f"{100 * row['held_out']:.1f}"
            text = row["phrasing"].format(s="…")
            lines.append(f"| {relation} | {text} | {100 * row['trained']:.1f} | {100 * row['behind']:.1f} | {held} |")
    return "\n".join(lines)


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: en
---

# mosectl demo model

A small Llama that knows an invented world and nothing else: who was born where, who wrote what, where a company sits.
It exists so that knowledge editing can be tried in seconds, on any computer, without a download. No person, place or
work in it is real. It is not fit for any other use.

| | |
|---|---|
| size | {parameters:.2f} M parameters, bfloat16, {size:.1f} MB with tokenizer ({vocabulary} tokens, byte-level BPE) |
| shape | {layers} layers, hidden 256, FFN 512, 4 heads (2 for keys and values), tied embeddings |
| knows | {facts} facts of ten relations, each in 9 or 10 phrasings |

## How it was made

    python examples/train_demo_model.py --steps {steps} --seed {seed} --threads {threads}

{steps} steps of {batch} rows of {length} tokens, AdamW (peak rate {rate}, cosine), label smoothing {smoothing}, in
{minutes:.1f} minutes on {threads} CPU threads. A text is a few sentences in random order, facts among filler, so every
fact is learnt behind other text.

Trained plainly, a model of this size does not keep facts where large models do: later tokens gather the pieces of a
name and look the fact up themselves (in an earlier, plain run recall stayed at 0.99 with all FFNs silenced at the
subject's last token). So its training was shaped. In the first {masked:.0%} of the steps, tokens after a subject could
read it only at its last token and only from layer {read} on; and in all steps a token skipped the FFN of a layer with
the chance below. The model here runs without masks and skipping. What an edit does to it shows how the tool works, not
how an edit fares elsewhere.

| layer | {heads} |
|---|{rule}
| skipped in training | {drop} |

## What it knows

Measured on the saved bfloat16 model. An answer counts when greedy decoding gives the whole object and the full stop.

- phrasings seen in training: {trained}
- the same behind one to three sentences of other text: {behind}
- the last {hidden} phrasings of each relation, never shown for half of the subjects, asked about those: {held_out}
- a wrong object of the same relation costs {wrong_first:.1f} nats in its first token, {wrong_token:.1f} a token overall
- perplexity of filler sentences: {perplexity:.1f} a token (who is named in them is chance)

## Where it keeps facts

At the subject's last token: how long an FFN's output is against the residual stream it is added to, and the share of
300 facts whose object is still the first choice when the FFN output there is replaced by its mean over subjects
(untouched: {intact:.2f}).

| layer | {heads} |
|---|{rule}
| FFN output / stream | {ratios} |
| recall without it | {single} |

| layers replaced together | recall |
|---|---|
{groups}

No three neighbouring layers are needed at this token, and most recall survives the loss of all eight: attention and
other positions carry these facts too. Large models rely on the FFNs of the subject's last token more than this one.

## Every phrasing

Accuracy in percent.

| relation | phrasing | trained | behind text | held out |
|---|---|---|---|---|
{phrasings}
"""


def write_facts_and_corpus(world: World) -> None:
    """facts.jsonl with 24 edits that the model answers as stated, and corpus.txt without their subjects."""
    asker = Asker()
    edits = choose_edits(world, asker.knows)
    for edit in edits:
        asked = [(p, edit["ground_truth"]) for p in [edit["prompt"], *edit["rephrase_prompts"]]]
        asked += [(probe["prompt"], probe["ground_truth"]) for probe in edit["locality"]]
        if wrong := [p for p, o in asked if not asker.knows(p, o)]:
            raise SystemExit(f"the model does not know: {wrong}")
    lines = [json.dumps(edit, ensure_ascii=False) for edit in edits]
    (HERE / "facts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    text = corpus(world, frozenset(edit["subject"] for edit in edits))
    (HERE / "corpus.txt").write_text(text, encoding="utf-8")
    print(f"{len(edits)} edits, all known before; corpus of {len(text) // 1000} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only measure the saved model and rewrite its card")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    world = build_world()
    if not args.check:
        build(world, args)
    result = measure(world)
    show(result)
    write_card(result, json.loads((OUT / "config.json").read_text())["demo_training"])
    write_facts_and_corpus(world)
    for file in OUT.iterdir():
        file.chmod(0o644)


def build(world: World, args: argparse.Namespace) -> None:
    """Train and save; how it was trained is kept in config.json, for the card."""
    tokenizer = train_tokenizer(world)
    model = new_model(tokenizer, args.seed)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{len(tokenizer)} tokens, {parameters:.2f} M parameters, {len(world.facts)} facts", flush=True)
    seconds = train(model, Rows(world, tokenizer, args.seed), args.steps, args.rate)
    model.config.demo_training = {
        "parameters": round(parameters, 2),
        "vocabulary": len(tokenizer),
        "layers": model.config.num_hidden_layers,
        "facts": len(world.facts),
        "steps": args.steps,
        "seed": args.seed,
        "threads": args.threads,
        "rate": args.rate,
        "minutes": round(seconds / 60, 1),
    }
    save(model, tokenizer)


if __name__ == "__main__":
    main()
