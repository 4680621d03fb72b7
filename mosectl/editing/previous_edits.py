"""The facts a run has edited so far: what must keep still of them, and which have slipped.

Layers below go on moving with every batch, so an earlier fact's keys are asked of the model anew each time; keys remembered
from when it was edited would protect what is no longer asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from mosectl.editing.contexts import Contexts, first_rows, rows_of
from mosectl.editing.methods.base import Columns
from mosectl.model.edit_site import Projection
from mosectl.model.losses import leads
from mosectl.model.scoring import Rows, log_probabilities

REHEARSED = 20  # earlier facts edited again with one batch, at most
GIVEN_UP = 2  # failures after which a fact is not tried again
ROWS = 256  # sequences run at once


class Earlier:
    """Facts edited so far, their contexts (prompt rows only), and what each layer wrote there when they were edited."""

    def __init__(self, model: nn.Module, projections: Sequence[Projection]) -> None:
        self.model, self.projections = model, projections
        self.failures: list[int] = []  # of each fact: how often it did not hold after being edited
        self.contexts: Contexts | None = None
        self.values: dict[str, Tensor] = {}  # (d, rows) float64 by module path

    def add(self, n: int, contexts: Contexts, W: Mapping[str, Tensor]) -> None:
        """Take the first ``n`` facts of ``contexts`` in; what W (d, p) writes for them now is what shall stay."""
        new = rows_of(contexts, (contexts.is_edit & (contexts.fact < n)).nonzero().flatten())
        written = self._written(new, W)
        old, new = self.contexts, replace(new, below=None)
        self.contexts = new if old is None else old.followed_by(new)
        self.values = {n: v if old is None else torch.cat([self.values[n], v], 1) for n, v in written.items()}
        self.failures += [0] * n

    def take(self, contexts: Contexts, values: Mapping[str, Tensor], failures: Sequence[int]) -> None:
        """Go on from what an interrupted run had; arguments as the attributes."""
        self.contexts, self.values, self.failures = contexts, dict(values), list(failures)

    def edited_again(self, facts: Sequence[int], lead: Sequence[float], W: Mapping[str, Tensor]) -> None:
        """Facts of these indices are as W (d, p) makes them now; ``lead`` tells whether they hold."""
        for i, value in zip(facts, lead, strict=True):
            self.failures[i] += not value > 0
        if not facts:
            return
        assert self.contexts is not None
        rows = torch.isin(self.contexts.fact.cpu(), torch.tensor(facts)).nonzero().flatten()
        for name, written in self._written(rows_of(self.contexts, rows.to(self.contexts.fact.device)), W).items():
            self.values[name][:, rows.to(written.device)] = written

    def slipped(self, below: float) -> list[int]:
        """Indices of facts whose bare prompt leads by less than ``below`` nats, worst first, not more than REHEARSED."""
        c = self.contexts
        if c is None or below <= 0:
            return []
        found = self._leads(first_rows(c.fact))
        order = found.argsort().tolist()
        return [i for i in order if found[i] < below and self.failures[i] < GIVEN_UP][:REHEARSED]

    def held(self) -> int:
        """How many of all contexts the model answers with the new object now."""
        return 0 if self.contexts is None else int((self._leads(torch.arange(len(self.contexts.fact))) > 0).sum())

    def seen(self) -> dict[str, Tensor]:
        """Σ w k kᵀ (p, p) float64 over all contexts by module path, as the model is now; a fact's w sum to 1."""
        return {name: P for name, (P, _) in self.moments(1.0).items()}

    @torch.no_grad()
    def _leads(self, rows: Tensor) -> Tensor:
        """Lead of the new object, (rows,) nats on the CPU, in these rows of the contexts."""
        assert self.contexts is not None
        c, found = self.contexts, []
        for part in rows.to(c.fact.device).split(ROWS):
            own = Rows(c.batch.rows(part), c.positions[part], c.targets[part])
            found.append(leads(log_probabilities(self.model, own), own.targets, own.targets >= 0).cpu())
        return torch.cat(found)

    def moments(
        self, weight: float, mean: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """P = Σ w k kᵀ (p, p) and Q = Σ w v kᵀ (d, p) over all contexts by module path, float64 on the host; a fact's w sum
        to ``weight``.

        Args:
            mean: from the rows' facts (rows,) to (n, rows): k and v are a fact's means by it, and its w is ``weight``.
        """
        if self.contexts is None:
            return {}
        share = weight / torch.bincount(self.contexts.fact)[self.contexts.fact]
        average = mean(self.contexts.fact).T if mean else None  # (rows, n)
        out = {}
        for name, K in self._keys(self.contexts).items():
            V = self.values[name]
            if average is not None:
                K, V = K.to(V) @ average.to(V), V @ average.to(V)
                share = torch.full_like(V[0], weight)
            weighted = (K.to(V) * share.to(V)).T
            out[name] = (K.to(V) @ weighted).cpu(), (V @ weighted).cpu()  # one layer's go back for its solve
        return out

    def columns(self, weight: float) -> dict[str, Columns]:
        """Keys, values and weights over all contexts by module path, float64; a fact's weights sum to ``weight``."""
        if self.contexts is None:
            return {}
        share = weight / torch.bincount(self.contexts.fact)[self.contexts.fact].double()
        return {
            name: Columns(K.to(self.values[name]), self.values[name], share.to(self.values[name].device))
            for name, K in self._keys(self.contexts).items()
        }

    def _written(self, contexts: Contexts, W: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: W[name] @ K.to(W[name]) for name, K in self._keys(contexts).items()}

    def _keys(self, contexts: Contexts) -> dict[str, Tensor]:
        """Keys (p, rows) float32 at the subjects, by module path, as the model is now."""
        parts = [
            contexts.keys(self.model, self.projections, rows)
            for rows in torch.arange(len(contexts.fact), device=contexts.fact.device).split(ROWS)
        ]
        return {p.name: torch.cat(found).T for p, found in zip(self.projections, zip(*parts, strict=True), strict=True)}
