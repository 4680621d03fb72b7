"""CrispEdit: fine-tuning that follows only directions in which ordinary text hardly curves the loss (arXiv 2602.15823).

The curvature of W's loss on ordinary text is taken as G ⊗ C (K-FAC: second_moments.py). Its eigenvalues are the products of
G's and C's, its eigenvectors u zᵀ of G's u and C's z. A gradient loses its part along the largest of them, as many as hold a
share ``energy`` of the sum of all, before Adam's step is made for it; the step itself, made entry by entry, may leave what
is left over again a little. Otherwise the training is that of ft.py.

As in github.com/zarifikram/CrispEdit (crispedit.py, easyeditor/models/crispedit/, hparams/): the loss is a mean over all
target tokens of a mini-batch; Adam goes on from batch to batch, its running mean projected anew; C and G are then those of
ordinary text and of earlier facts together, weighted by their tokens. There labels are the text's own next tokens, here they
are drawn from the model; there ordinary text is read anew with the edited model, or once, as here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mosectl.editing.contexts import first_rows
from mosectl.editing.methods.base import ModelProblem, Option, Published, Work
from mosectl.editing.methods.ft import Adam, Ft
from mosectl.editing.second_moments import moments_of


@dataclass(frozen=True)
class LowCurvature:
    """The projector onto the eigenvectors of G ⊗ C with the smaller eigenvalues; (d, p) matrices go in and come out."""

    outputs: Tensor  # (d, d) float32, G's eigenvectors
    keys: Tensor  # (p, p) float32, C's
    free: Tensor  # (d, p) bool: the pairs that are kept

    @staticmethod
    def of(G: Tensor, C: Tensor, energy: float) -> LowCurvature:
        """From G (d, d) and C (p, p), float64; the largest eigenvalues with a share ``energy`` of the sum are left out.

        The last that it takes to reach that share, and all that equal it, are left out as well.
        """
        (g, outputs), (c, keys) = torch.linalg.eigh(G), torch.linalg.eigh(C)
        products = torch.outer(g, c)
        ordered = products.flatten().sort(descending=True).values
        share = ordered.cumsum(0) / ordered.sum()
        reached = min(int((share < energy).sum()), len(ordered) - 1)
        return LowCurvature(outputs.float(), keys.float(), products < ordered[reached])

    def __call__(self, X: Tensor) -> Tensor:
        """The part of X (d, p) in that space."""
        return self.outputs @ ((self.outputs.T @ X @ self.keys) * self.free) @ self.keys.T


class CrispEdit(Ft):
    """W' = W − rate · Σ over steps of Adam's direction for Π(gradient), Π projecting onto low curvature."""

    name, source = "crispedit", "arXiv 2602.15823"
    published = Published(layers={"qwen2": (15, 19, 28), "": (19, 23, 32)})
    options = {
        **Ft.options,
        "minibatch": Option(32, "prompts a step of Adam is made for; 0: all", whole=True),
        "end": Option(0, "1: the end of the text is asked behind each target; 0: nothing is", whole=True),
        "energy": Option(0.9, "γ, between 0 and 1: the share of all curvature whose directions are left alone"),
        "earlier_facts": Option(
            1000, "earlier facts whose curvature counts along with that of text, at most; 0: none", whole=True
        ),
    }
    remedy = "a larger --set rate=…, a smaller --set energy=… or other --layers"
    gentler = "a larger --set energy=…, a smaller --set rate=…"

    def needs_moments(self, form: str) -> bool:
        """The curvature of ordinary text is what it is about."""
        return True

    def carries(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
        """Adam's state."""
        both = {f"{kind}.{name}": shape for name, shape in shapes.items() for kind in ("mean", "square")}
        return {"steps": (1,), **both}

    def peak_bytes(self, work: Work) -> int:
        return max(work.search_bytes(), work.training_bytes())

    def seconds(self, work: Work) -> dict[str, float]:
        return {**work.training_seconds(), "statistics": work.search_seconds()["statistics"]}

    def shares(self, targets: Tensor) -> Tensor:
        """All target tokens of a mini-batch weigh the same."""
        count = (targets >= 0).sum(1).float()
        return count / count.sum()

    def allowed(self, problem: ModelProblem) -> Callable[[str, Tensor], Tensor]:
        """From a module path and a gradient (d, p) to its part in the space of low curvature, (d, p)."""
        energy = problem.options["energy"]
        projectors = {
            name: LowCurvature.of(G.to(problem.W[name]), C.to(problem.W[name]), energy)
            for name, (G, C) in curvatures(problem).items()
        }
        return lambda name, gradient: projectors[name](gradient)

    def begun(self, problem: ModelProblem, allowed: Callable[[str, Tensor], Tensor]) -> Adam:
        """As the batch before left it, the running mean in the space that is allowed now."""
        kept = problem.carried
        if not kept:
            return Adam.new(problem.W)
        mean = {name: allowed(name, kept[f"mean.{name}"]) for name in problem.W}
        return Adam(int(kept["steps"]), mean, {name: kept[f"square.{name}"] for name in problem.W})

    def ended(self, problem: ModelProblem, adam: Adam) -> None:
        """Adam's state goes to the next batch."""
        problem.carried["steps"] = torch.tensor([adam.steps])
        for name in problem.W:
            problem.carried[f"mean.{name}"], problem.carried[f"square.{name}"] = adam.mean[name], adam.square[name]


def curvatures(problem: ModelProblem) -> dict[str, tuple[Tensor, Tensor]]:
    """G (d, d) and C (p, p) by module path, means over the tokens of ordinary text and of some of the earlier facts."""
    text, earlier, most = problem.moments, problem.earlier, int(problem.options["earlier_facts"])
    assert text is not None  # needs_moments
    found = {p.name: (text.G[p.name], text.C[p.name]) for p in problem.projections}
    if earlier is None or not most:
        return found
    rows = first_rows(earlier.fact)
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(problem.seed))[:most].sort().values
    batch = earlier.batch.rows(rows[chosen.to(rows.device)])
    facts = moments_of(problem.model, problem.projections, batch, problem.seed)
    share = facts.tokens / (facts.tokens + text.tokens)
    return {
        name: (torch.lerp(G, facts.G[name], share), torch.lerp(C, facts.C[name], share))
        for name, (G, C) in found.items()
    }
