"""Fine-tuning written naively: whole forwards in float64, a row each, by autograd through the weights themselves."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from mosectl.editing.contexts import build_contexts
from mosectl.editing.methods import method
from mosectl.editing.methods.base import ModelProblem
from mosectl.facts.records import as_facts
from mosectl.model.architecture import resolve
from mosectl.model.weights import weight_of
from support.facts import FACTS
from support.models import make_tokenizer

ALL = [
    *FACTS,
    {"prompt": "They saw Brinmouth", "subject": "Brinmouth", "target_new": "of the capital"},
    {"prompt": "Tomas plays", "subject": "Tomas", "target_new": "cello"},
    {"prompt": "The capital of Lower Quill is", "subject": "Lower Quill", "target_new": "Avaland"},
]
TOKENIZER = make_tokenizer()
ENDING = TOKENIZER.eos_token_id


def problem(name: str, model: Any, layers: tuple[int, ...], facts: list[Any], **given: Any) -> ModelProblem:
    """A batch of these facts; options of the method and fields of the problem by their names."""
    solver, arch = method(name), resolve(model)
    options = {**solver.defaults, **{k: given.pop(k) for k in list(given) if k in solver.defaults}}
    chosen = [p for p in arch.projections if p.layer in layers]
    contexts = build_contexts(model, TOKENIZER, as_facts(facts, "x"), [""])
    W = {p.name: p.oriented(weight_of(model, p).detach().clone()).double() for p in chosen}
    return ModelProblem(model, arch, chosen, contexts, W, options, ending=ENDING, **given)


def answers(facts: list[Any], end: bool) -> list[tuple[Tensor, int]]:
    """Token ids of prompt, target and (``end``) the end of the text, and how many of them are the prompt's."""
    found = []
    for f in facts:
        prompt = TOKENIZER(f["prompt"])["input_ids"]
        ids = TOKENIZER(f["prompt"] + " " + f["target_new"])["input_ids"] + [ENDING] * end
        found.append((torch.tensor(ids), len(prompt)))
    return found


def token_losses(model: Any, ids: Tensor, prompt: int) -> Tensor:
    """−log P of each token behind the prompt."""
    logits = model(input_ids=ids[None]).logits[0, prompt - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, ids[prompt:], reduction="none")


class Trained:
    """Plain fine-tuning in float64: torch's own Adam on the stored weights, by autograd through the weights themselves."""

    def __init__(self, model: Any, names: list[str], rate: float) -> None:
        self.model = deepcopy(model).double().requires_grad_(False)
        self.weights = {name: self.model.get_submodule(name).weight.requires_grad_() for name in names}
        self.adam = torch.optim.Adam(self.weights.values(), lr=rate)

    def train(
        self, facts: list[Any], epochs: int, size: int, *, end: bool, by_token: bool, enough: float = 0.01,
        allowed: Callable[[str, Tensor], Tensor] = lambda _, g: g,
    ) -> int:  # fmt: skip
        """Returns the number of steps."""
        rows, chance, steps = answers(facts, end), torch.Generator().manual_seed(0), 0
        for _ in range(epochs):
            total = 0.0
            for part in torch.randperm(len(rows), generator=chance).split(size):
                losses = [token_losses(self.model, *rows[i]) for i in part]
                loss = torch.cat(losses).mean() if by_token else torch.stack([x.mean() for x in losses]).mean()
                total += loss.item() * len(part)
                if loss.item() < enough:
                    continue
                self.adam.zero_grad()
                loss.backward()
                for name, w in self.weights.items():
                    w.grad = allowed(name, w.grad)
                self.adam.step()
                steps += 1
            if total / len(rows) < enough:
                break
        return steps


def agree(found: dict[str, Tensor], expected: Trained, before: ModelProblem, within: float = 1e-4) -> None:
    """The changes are the same, as a share of their length."""
    for p in before.projections:
        whole = p.oriented(expected.weights[p.name].detach()) - before.W[p.name]
        assert whole.norm() > 1e-3
        assert float((found[p.name] - before.W[p.name] - whole).norm() / whole.norm()) < within
