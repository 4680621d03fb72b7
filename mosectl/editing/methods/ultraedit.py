"""UltraEdit: one ridge solve on keys and gradients that are normalised by those of all edits so far (arXiv 2505.14679).

No search, no subject, no statistics of text. At each token that predicts one of the target's, k (p,) is what the projection
reads and g (d,) the gradient of the loss by what it writes. The features (k ‖ g) are centred and scaled by their mean and
standard deviation over all tokens of all batches so far, this one's among them ("lifelong normalisation"), to (k̂ ‖ ĝ), and
the output shall change by v = −rate · ‖k̂‖² · ĝ.

As in github.com/XiaojieGu/UltraEdit (editor/ultraedit.py, nets.py, config/): the ridge is 1 and the keys of the solve are
not normalised; mean and deviation are shared by edited weights of one shape; the loss is the mean over the target tokens of
``minibatch`` facts, longest first. There 100 facts are a batch. What is not as published: FFN output projections are edited
where there gate and up projections are, for Llama and Qwen (Mistral's layers stand for them); a lone token, which has no
variance, counts as 0 instead of NaN. It is a method for many facts: of the first two tokens ever seen one is pushed the
wrong way, as the mean is taken out of their gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mosectl.editing.methods.base import TRAINED, ModelProblem, Option, Published, Trainer, Work
from mosectl.facts.records import Fact
from mosectl.hypernetwork.network import keys_and_gradients, ridge
from mosectl.model.memory import fitting, halving
from mosectl.model.scoring import Rows

EPSILON = torch.finfo(torch.float32).eps  # added to n − 1 and to deviations there


@dataclass(frozen=True)
class Running:
    """Mean and spread of all features so far."""

    count: Tensor  # (1,)
    mean: Tensor  # (n,) float64
    spread: Tensor  # (n,) sum of squared distances from the mean, nearly: as published a group counts one token more

    @staticmethod
    def new(n: int, like: Tensor) -> Running:
        """Of no features yet, on the device of ``like``."""
        return Running(like.new_zeros(1), like.new_zeros(n), like.new_zeros(n))

    def after(self, x: Tensor) -> Running:
        """With a group of features x (m, n) taken in."""
        m, count = len(x), self.count + len(x)
        shift = x.mean(0) - self.mean
        own = x.var(0) if m > 1 else torch.zeros_like(shift)
        return Running(
            count, self.mean + m * shift / count, self.spread + m * own + self.count * m * shift.square() / count
        )

    def normalised(self, x: Tensor) -> Tensor:
        """x (m, n), centred and scaled."""
        deviation = (self.spread / (self.count - 1 + EPSILON)).sqrt()
        return (x - self.mean) / (deviation + EPSILON)


class UltraEdit(Trainer):
    """W' = W + ΔW by module path for one batch of facts, ΔWᵀ = (KᵀK + ridge·I)⁻¹ Kᵀ V, rows of K and V a token each."""

    name, side, source = "ultraedit", "additive", "arXiv 2505.14679"
    published = Published(layers={"gptj": (18, 26, 28), "phi3": (30, 38, 40), "": (29, 30, 32)}, batch=100)
    settings = TRAINED
    options = {
        "rate": Option(1e-6, "scales what the outputs change by, which grows with p: ‖k̂‖² is about p"),
        "ridge": Option(1.0, "damping of the solve, on the scale of k kᵀ"),
        "minibatch": Option(10, "facts whose loss is one mean; 0: all", whole=True),
    }
    remedy = "a larger --set rate=… or other --layers"
    gentler = "a smaller --set rate=…"

    def columns(self, facts: Sequence[Fact]) -> int:
        """It writes at each of a target's tokens; English has about 1.4 tokens a word."""
        return round(sum(1 + 1.4 * len(f.target_new.split()) for f in facts))

    def carries(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
        """The running statistics of each shape of weight."""
        sizes = {_shape_of(d, p): d + p for d, p in shapes.values()}
        parts = {"count": lambda n: 1, "mean": lambda n: n, "spread": lambda n: n}
        return {f"{part}.{shape}": (size(n),) for shape, n in sizes.items() for part, size in parts.items()}

    def peak_bytes(self, work: Work) -> int:
        return work.one_pass_bytes()

    def seconds(self, work: Work) -> dict[str, float]:
        return work.one_pass_seconds()

    def fit(self, problem: ModelProblem) -> dict[str, Tensor]:
        o, W = problem.options, problem.W
        rows = problem.contexts.edit_rows
        rows = rows[problem.contexts.batch.attention_mask[rows].sum(1).argsort(descending=True, stable=True)]
        targets = problem.contexts.targets[rows]
        own = Rows(problem.contexts.batch.rows(rows), problem.contexts.positions[rows], targets)
        group = torch.arange(len(rows), device=rows.device) // (int(o["minibatch"]) or len(rows))
        K, G = _features(problem, own, token_means(targets, group))
        of_token = group[(targets >= 0).nonzero()[:, 0]]  # (tokens,) the group of facts that each belongs to
        running = _running(problem)
        for i in range(int(group[-1]) + 1):
            for p in problem.projections:
                k, g = (x[p.name][(of_token == i).to(x[p.name].device)] for x in (K, G))
                running[_shape_of(p.d, p.p)] = running[_shape_of(p.d, p.p)].after(torch.cat([k, g], 1))
        out = {}
        for p in problem.projections:
            k, g = K[p.name], G[p.name]
            keys, gradients = running[_shape_of(p.d, p.p)].normalised(torch.cat([k, g], 1)).split([p.p, p.d], 1)
            V = -o["rate"] * keys.square().sum(1, keepdim=True) * gradients
            out[p.name] = W[p.name] + ridge(k, V, torch.as_tensor(o["ridge"]).to(k)).T
        for shape, r in running.items():
            problem.carried.update({f"count.{shape}": r.count, f"mean.{shape}": r.mean, f"spread.{shape}": r.spread})
        return out


def token_means(targets: Tensor, group: Tensor) -> Tensor:
    """Weights (B,) of the rows' mean losses a token, so that their sum is the sum over groups of the mean over all tokens.

    Args:
        targets: (B, m), negative = none. group: (B,) to which a row belongs, 0, 1, ….
    """
    count = (targets >= 0).sum(1).float()
    return count / count.new_zeros(int(group.max()) + 1).index_add(0, group, count)[group]


def _features(problem: ModelProblem, rows: Rows, weights: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """k (tokens, p) and g (tokens, d), float64, at each token that predicts a target's, by module path."""
    model, projections = problem.model, problem.projections

    def work(start: int, end: int) -> tuple[list[Tensor], list[Tensor]]:
        K, G, _ = keys_and_gradients(model, projections, rows.part(start, end), weights[start:end])
        return K, G

    size = fitting(model, problem.arch, projections[0].layer, rows.batch.input_ids.shape[1], rows.targets.shape[1])
    parts = [part for _, part in halving(len(rows.targets), size, work)]
    K, G = (
        {p.name: torch.cat([part[kind][i] for part in parts]).to(problem.W[p.name]) for i, p in enumerate(projections)}
        for kind in (0, 1)
    )
    return K, G


def _running(problem: ModelProblem) -> dict[str, Running]:
    """The statistics that the batch before left, by shape of weight, or new ones."""
    found, kept = {}, problem.carried
    for p in problem.projections:
        shape = _shape_of(p.d, p.p)
        found[shape] = (
            Running(kept[f"count.{shape}"], kept[f"mean.{shape}"], kept[f"spread.{shape}"])
            if kept
            else Running.new(p.p + p.d, problem.W[p.name])
        )
    return found


def _shape_of(d: int, p: int) -> str:
    return f"{d}x{p}"
