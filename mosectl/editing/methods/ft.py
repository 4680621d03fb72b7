"""FT: plain fine-tuning of one FFN output projection, breadth first: LocFT-BF (arXiv 2509.22072, "Fine-tuning Done Right").

All facts are passed in mini-batches, shuffled anew each epoch, instead of one fact after the other until each holds. The
loss is the target's mean negative log-likelihood a token, an end-of-text token behind it counting as one, mean over the
mini-batch; a step is Adam's at a fixed rate. A mini-batch whose loss is below ENOUGH makes no step, and an epoch whose mean
loss is ends the training. Layers and settings as in github.com/ICT-STAR/LocFT (fine-tune.py, hparams/).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mosectl.editing.contexts import Contexts, rows_of
from mosectl.editing.methods.base import TRAINED, ModelProblem, Option, Published, Trainer, Work
from mosectl.facts.records import Fact
from mosectl.model.forward import by_row, finite, frozen, open_outputs
from mosectl.model.losses import NOTHING, token_nll
from mosectl.model.memory import fitting, halving
from mosectl.model.partial_forward import Suffix
from mosectl.model.weights import set_weight

ENOUGH = 0.01  # nats a token
FULL_RANK = 1 << 30  # more columns than any weight has


@dataclass(frozen=True)
class Adam:
    """Adam between two steps (Kingma & Ba 2015, arXiv 1412.6980, algorithm 1); its rate is the caller's."""

    steps: int
    mean: Mapping[str, Tensor]  # (d, p) float32 by module path, the running mean of the gradients
    square: Mapping[str, Tensor]  # (d, p), and of their squares

    BETAS, EPSILON = (0.9, 0.999), 1e-8

    @staticmethod
    def new(shapes: Mapping[str, Tensor]) -> Adam:
        """Before the first step, for weights of the shapes of these, on their devices."""
        zeros = {name: torch.zeros_like(W, dtype=torch.float32) for name, W in shapes.items()}
        return Adam(0, zeros, zeros)

    def after(self, gradients: Mapping[str, Tensor]) -> Adam:
        """With one step's gradients (d, p) taken in."""
        a, b = self.BETAS
        mean = {name: torch.lerp(m, gradients[name], 1 - a) for name, m in self.mean.items()}
        square = {name: torch.lerp(v, gradients[name].square(), 1 - b) for name, v in self.square.items()}
        return Adam(self.steps + 1, mean, square)

    def direction(self, name: str) -> Tensor:
        """What is taken from the weight (d, p), in units of the rate."""
        a, b = (1 - beta**self.steps for beta in self.BETAS)
        return self.mean[name] / a / ((self.square[name] / b).sqrt() + self.EPSILON)


class Ft(Trainer):
    """W' = W − rate · Σ over steps of Adam's direction for the loss of one mini-batch, by module path."""

    name, side, source = "ft", "additive", "arXiv 2509.22072"
    published = Published(layers={"qwen2": (6, 6, 28), "mistral": (23, 23, 32), "": (22, 22, 32)})
    settings = TRAINED
    options = {
        "rate": Option(5e-4, "Adam's learning rate"),
        "epochs": Option(25, "passes over all facts of a batch, at most", whole=True),
        "minibatch": Option(100, "prompts a step of Adam is made for; 0: all", whole=True),
        "end": Option(1, "1: the end of the text is asked behind each target; 0: nothing is", whole=True),
    }
    remedy = "a larger --set rate=…, more --set epochs=… or other --layers"
    gentler = "a smaller --set rate=…, or fewer --set epochs=…"

    def columns(self, facts: Sequence[Fact]) -> int:
        """Adam's steps, taken entry by entry, are of full rank."""
        return FULL_RANK

    def peak_bytes(self, work: Work) -> int:
        return work.training_bytes()

    def seconds(self, work: Work) -> dict[str, float]:
        return work.training_seconds()

    def shares(self, targets: Tensor) -> Tensor:
        """What each row's mean loss a token weighs in a mini-batch's loss, (B,), sum 1; targets (B, m)."""
        return torch.full((len(targets),), 1 / len(targets), device=targets.device)

    def allowed(self, problem: ModelProblem) -> Callable[[str, Tensor], Tensor]:
        """From a module path and a gradient (d, p) to the part of it that may be followed: all of it."""
        return lambda _, gradient: gradient

    def begun(self, problem: ModelProblem, allowed: Callable[[str, Tensor], Tensor]) -> Adam:
        """Adam's state before the first step."""
        return Adam.new(problem.W)

    def ended(self, problem: ModelProblem, adam: Adam) -> None:
        """The last step is made: what the next batch goes on with can be left in ``problem.carried``; nothing."""

    def fit(self, problem: ModelProblem) -> dict[str, Tensor]:
        o, W = problem.options, dict(problem.W)
        rows = problem.contexts.edit_rows
        c = rows_of(problem.contexts, rows)
        if o["end"] and problem.ending is not None:
            c = with_end(c, problem.ending)
        allowed = self.allowed(problem)
        adam = self.begun(problem, allowed)
        chance, size, epochs = torch.Generator().manual_seed(problem.seed), int(o["minibatch"]), int(o["epochs"])
        for epoch in range(epochs):
            total = 0.0  # of the rows' losses, nats a token
            for part in torch.randperm(len(rows), generator=chance).split(size or len(rows)):
                batch = rows_of(c, part.to(rows.device))
                loss, gradients = loss_and_gradients(problem, batch, self.shares(batch.targets))
                total += loss * len(part)
                if loss < ENOUGH:
                    continue
                adam = adam.after({name: allowed(name, g) for name, g in gradients.items()})
                for p in problem.projections:
                    W[p.name] = W[p.name] - o["rate"] * adam.direction(p.name)
                    set_weight(problem.model, p, W[p.name])
            if problem.on_step:
                problem.on_step(epoch + 1, epochs)
            if total < ENOUGH * len(rows):
                break
        self.ended(problem, adam)
        return W


def with_end(c: Contexts, ending: int) -> Contexts:
    """Contexts of prompts (no KL rows) that also ask the token ``ending`` behind each target."""
    count = (c.targets >= 0).sum(1, keepdim=True)  # (B, 1)
    last = c.positions.gather(1, count - 1)
    targets = torch.cat([c.targets, torch.full_like(count, NOTHING)], 1)
    positions = torch.cat([c.positions, torch.zeros_like(count)], 1)
    return replace(c, targets=targets.scatter(1, count, ending), positions=positions.scatter(1, count, last + 1))


def loss_and_gradients(problem: ModelProblem, c: Contexts, shares: Tensor) -> tuple[float, dict[str, Tensor]]:
    """The mini-batch's loss, nats a token, as the live model stands, and its gradients by the edited weights.

    W's gradient is Σ g kᵀ over all tokens, k what the projection reads and g the gradient of the loss by what it writes: the
    weights themselves need no gradient, whatever way they are stored.

    Args:
        c: of prompts (no KL rows). shares: (B,) weight of each row's mean loss a token.
    Returns:
        the loss, and (d, p) float32 by module path, on the device of ``problem.W``.
    Raises:
        NotFinite: the model's logits are not.
    """
    model, projections = problem.model, problem.projections
    first = projections[0].layer

    def work(start: int, end: int) -> tuple[float, dict[str, Tensor]]:
        rows = torch.arange(start, end, device=c.fact.device)
        suffix = Suffix(model, problem.arch, first, c.batch.rows(rows), below=c.below and c.below.rows(rows))
        targets, every = c.targets[rows], torch.arange(len(rows), device=rows.device)
        with open_outputs(model, projections, lambda k: k) as (keys, leaves), torch.enable_grad():
            logits = finite(suffix.logits(every, c.positions[rows], targets >= 0), model)
            loss = (token_nll(logits.log_softmax(-1), targets, targets >= 0) * shares[rows].to(logits)).sum()
            by_output = torch.autograd.grad(loss, list(leaves.values()))
        found = {}
        for (name, k), g in zip(keys.items(), by_output, strict=True):
            k, g = (by_row(x, len(rows)).flatten(0, 1).to(problem.W[name].device, torch.float32) for x in (k, g))
            found[name] = g.T @ k
        return float(loss.detach()), found

    size = fitting(model, problem.arch, first, c.batch.input_ids.shape[1], c.targets.shape[1])
    with frozen(model):
        losses, found = zip(*(part for _, part in halving(len(c.fact), size, work)), strict=True)
    return sum(losses), {p.name: sum(part[p.name] for part in found) for p in projections}
