"""The facts a run has edited so far: what must keep still of them, and which have slipped.

What a batch takes here does not grow with the number of facts before it. Their keys and values are sums, to which those of
a batch are added. Layers below go on moving, and keys with them, though little: a few facts' keys are asked of the model
anew with every batch, in turn, and so is whether they hold. For that, columns of some facts are kept beside the sums, to be
taken out of them again; beyond some hundred facts those that lead by most are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mosectl.editing.contexts import Contexts, first_rows, rows_of
from mosectl.model.edit_site import Projection
from mosectl.model.losses import leads
from mosectl.model.scoring import Rows, log_probabilities

REHEARSED = 20  # earlier facts edited again with one batch, at most
GIVEN_UP = 2  # failures after which a fact is not tried again
LEAST = 32  # of the facts asked with one batch whether they hold, those that led by least when asked last,
IN_TURN = 32  # and those whose turn it is
RENEWED = 16  # facts whose keys are asked anew with one batch, in turn
STORED = 256  # facts whose columns are kept beside the sums, at most
ROWS = 256  # sequences run at once
NOWHERE = 100.0  # nats by which a fact is behind whose loss is not finite


@dataclass(frozen=True)
class Kept:
    """What an interrupted run needs of its earlier facts; names as in :class:`Earlier`."""

    contexts: Contexts
    column: Tensor
    keys: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    sums: Mapping[str, tuple[Tensor, Tensor]]
    failures: Sequence[int]
    leads: Sequence[float]
    summed: int
    turn: int


class Earlier:
    """Facts edited so far, their contexts (prompt rows only), and what each layer wrote there when they were edited.

    Args:
        mean: from the rows' facts (rows,) to (n, rows): a fact's column is its rows' mean by it; without it each row is
            one, and those of a fact share its weight.
    """

    def __init__(
        self, model: nn.Module, projections: Sequence[Projection], mean: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.model, self.projections, self.mean = model, projections, mean
        self.failures: list[int] = []  # of each fact: how often it did not hold after being edited
        self.leads: list[float] = []  # of each fact, nats, when it was asked last
        self.contexts: Contexts | None = None
        self.column = torch.empty(0, dtype=torch.long)  # (columns,) which fact a stored column belongs to, on the host
        self.keys: dict[str, Tensor] = {}  # (p, columns) by module path, in the model's type, when they were asked last
        self.values: dict[str, Tensor] = {}  # (d, columns) float64
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}  # Σ w k kᵀ (p, p) and Σ w v kᵀ (d, p), float64 on the host,
        self.summed = 0  # over so many facts
        self.turn = 0  # batches taken in

    def add(self, contexts: Contexts, lead: Sequence[float], W: Mapping[str, Tensor]) -> None:
        """Take the first facts of ``contexts`` in, as many as there are leads (nats); what W (d, p) writes for them now is
        what shall stay.
        """
        n = len(lead)
        new = rows_of(contexts, (contexts.is_edit & (contexts.fact < n)).nonzero().flatten())
        columns = self._asked(new, W)
        old, new = self.contexts, replace(new, below=None, least=None)
        self._store(new.fact.cpu() + len(self.failures), *columns)
        self.contexts = new if old is None else old.followed_by(new)
        self.failures += [0] * n
        self.leads += _finite(lead)
        self.turn += 1
        if len(self._stored()) > STORED:
            self._forget()

    def kept(self) -> Kept:
        """To go on from."""
        assert self.contexts is not None
        lists = list(self.failures), list(self.leads)
        columns = self.column, dict(self.keys), dict(self.values)
        return Kept(self.contexts, *columns, dict(self.sums), *lists, self.summed, self.turn)

    def take(self, kept: Kept, device: torch.device, like: Mapping[str, Tensor]) -> None:
        """Go on from what an interrupted run had; rows on the model's ``device``, columns as the weights ``like``."""
        self.contexts, self.column, self.sums = kept.contexts.to(device), kept.column, dict(kept.sums)
        self.summed, self.turn = kept.summed, kept.turn
        self.keys = {name: K.to(like[name].device) for name, K in kept.keys.items()}
        self.values = {name: V.to(like[name]) for name, V in kept.values.items()}
        self.failures, self.leads = list(kept.failures), list(kept.leads)

    def edited_again(self, facts: Sequence[int], lead: Sequence[float], W: Mapping[str, Tensor]) -> None:
        """Facts of these indices are as W (d, p) makes them now; ``lead`` tells whether they hold."""
        for i, value in zip(facts, _finite(lead), strict=True):
            self.failures[i] += not value > 0
            self.leads[i] = value
        self._renew(facts, W)

    def slipped(self, below: float) -> list[int]:
        """Indices of facts whose bare prompt leads by less than ``below`` nats, worst first, not more than REHEARSED: of
        those that are asked with one batch.
        """
        if below <= 0:
            return []
        n, hopeful = len(self.failures), self._hopeful()
        asked = sorted(hopeful, key=self.leads.__getitem__)[:LEAST]
        rest = sorted({*hopeful}.difference(asked), key=lambda i: (i - self.turn * IN_TURN) % n)
        asked = sorted([*asked, *rest[:IN_TURN]])
        self._ask(asked)
        return self._below(below, asked)[:REHEARSED]

    def slipped_of_all(self, below: float) -> list[int]:
        """As :meth:`slipped`, however many, of all facts as :meth:`leading` has found them; none is asked."""
        return self._below(below, self._hopeful())

    def leading(self) -> int:
        """How many facts' bare prompts the model answers with the new object now; every fact is asked."""
        self._ask(range(len(self.failures)))
        return sum(lead > 0 for lead in self.leads)

    def _hopeful(self) -> list[int]:
        """Facts that are worth another attempt."""
        return [i for i, failed in enumerate(self.failures) if failed < GIVEN_UP]

    def _below(self, below: float, among: Sequence[int]) -> list[int]:
        return [i for i in sorted(among, key=self.leads.__getitem__) if self.leads[i] < below]

    def _ask(self, facts: Sequence[int]) -> None:
        """How far the bare prompts of these facts lead now."""
        if not facts:
            return
        assert self.contexts is not None
        for i, lead in zip(facts, _finite(self._leads(first_rows(self.contexts.fact)[[*facts]]).tolist()), strict=True):
            self.leads[i] = lead

    def held(self) -> int:
        """How many of all contexts the model answers with the new object now."""
        return 0 if self.contexts is None else int((self._leads(torch.arange(len(self.contexts.fact))) > 0).sum())

    def moments(self, weight: float) -> dict[str, tuple[Tensor, Tensor]]:
        """P = Σ w k kᵀ (p, p) and Q = Σ w v kᵀ (d, p) over all facts by module path, float64 on the host; a fact's w sum to
        ``weight``.
        """
        n = len(self.failures)
        if not n:
            return {}
        if self.summed and self.mean is None:  # published code keeps the keys of an edit as they were then
            first, stored = self.turn * RENEWED, [i for i in self._stored() if i < self.summed]
            self._renew(sorted({stored[i % len(stored)] for i in range(first, first + min(RENEWED, len(stored)))}))
        self._sum_up()
        return {name: (weight * P, weight * Q) for name, (P, Q) in self.sums.items()}

    def seen(self) -> dict[str, Tensor]:
        """Σ w k kᵀ (p, p) float64 over all facts by module path; a fact's w sum to 1."""
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

    def _stored(self) -> list[int]:
        """Facts whose columns are kept."""
        return self.column.unique().tolist()

    def _store(self, column: Tensor, keys: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        """Keep these columns beside those that are there; ``column``: their facts."""
        self.column = torch.cat([self.column, column])
        for kept, new in ((self.keys, keys), (self.values, values)):
            for name, x in new.items():
                kept[name] = torch.cat([kept[name], x], 1) if name in kept else x

    def _forget(self) -> None:
        """No more columns than those of STORED facts: those that lead by most stay in the sums as they are."""
        self._sum_up()
        by_lead = sorted(self._stored(), key=self.leads.__getitem__)
        rest = torch.isin(self.column, torch.tensor(by_lead[:STORED])).nonzero().flatten()
        self.column = self.column[rest]
        for kept in (self.keys, self.values):
            for name, x in kept.items():
                kept[name] = x[:, rest.to(x.device)]

    def _renew(self, facts: Sequence[int], W: Mapping[str, Tensor] | None = None) -> None:
        """Ask the keys of these facts anew, and with W (d, p) their values, where none are kept too; the sums follow."""
        if not facts:
            return
        assert self.contexts is not None
        counted = [i for i in facts if i < self.summed]
        self._count(counted, -1)
        of = self.contexts.fact
        rows = torch.isin(of, torch.tensor([*facts], device=of.device)).nonzero().flatten()
        keys, values = self._asked(rows_of(self.contexts, rows), W or {})
        fact = of[rows].cpu()
        there = torch.isin(fact, self.column)
        at = torch.isin(self.column, fact).nonzero().flatten()
        at = at[self.column[at].argsort(stable=True)]  # in the order of ``rows``: by fact, then as they were asked
        for kept, new in ((self.keys, keys), (self.values, values)):
            for name, x in new.items():
                kept[name][:, at.to(x.device)] = x[:, there.to(x.device)]
        if not bool(there.all()):
            found = ({name: x[:, ~there.to(x.device)] for name, x in new.items()} for new in (keys, values))
            self._store(fact[~there], *found)
        self._count(counted, 1)

    def _sum_up(self) -> None:
        """Every fact is in the sums."""
        n = len(self.failures)
        self._count(range(self.summed, n), 1)
        self.summed = n

    def _count(self, facts: Sequence[int] | range, sign: int) -> None:
        """Add the kept columns of these facts to the sums, or with ``sign`` −1 take them out."""
        rows = torch.isin(self.column, torch.tensor([*facts], dtype=torch.long)).nonzero().flatten()
        if not len(rows):
            return
        fact = self.column[rows].unique(return_inverse=True)[1]
        share = sign / torch.bincount(fact)[fact].double()
        average = self.mean(fact).T if self.mean else None  # (rows, n)
        for name, V in self.values.items():
            V, K, w = V[:, rows.to(V.device)], self.keys[name][:, rows.to(V.device)].to(V), share.to(V)
            if average is not None:
                K, V = K @ average.to(V), V @ average.to(V)
                w = torch.full_like(V[0], sign)
            weighted = (K * w).T
            found = (K @ weighted).cpu(), (V @ weighted).cpu()  # one layer's go back for its solve
            old = self.sums.get(name)
            self.sums[name] = found if old is None else (old[0].add_(found[0]), old[1].add_(found[1]))

    def _asked(self, contexts: Contexts, W: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Keys (p, rows) at the tokens that are edited, by module path, as the model is now, and what W writes for them."""
        parts = [
            contexts.keys(self.model, self.projections, rows)
            for rows in torch.arange(len(contexts.fact), device=contexts.fact.device).split(ROWS)
        ]
        kind = next(self.model.parameters()).dtype  # as the model has them: nothing is lost
        found = zip(self.projections, zip(*parts, strict=True), strict=True)
        keys = {p.name: torch.cat(of).T.to(kind) for p, of in found}
        return keys, {name: W[name] @ K.to(W[name]) for name, K in keys.items() if name in W}


def _finite(lead: Sequence[float]) -> list[float]:
    return torch.tensor(lead).nan_to_num(-NOWHERE, NOWHERE, -NOWHERE).tolist()
