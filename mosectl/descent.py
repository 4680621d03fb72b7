"""What each edited layer should write, found where it is realised: gradient descent on the edited weights themselves.

targets.py moves what a layer writes at one token of one prompt, and a solve then looks for weights that do so; that two
facts share a key, or that a lower layer's change moves the keys above it, shows only afterwards. Here every step changes
the weights: g being the gradient of the facts' loss with respect to what a layer writes at a subject's last token, and k
the key there,

    W ← W − Σ_i η_i Σ_j g_ij (A⁻¹ k_ij)ᵀ,  A = λC + P,

the steepest descent in the metric of what must keep still (the A of the closed forms, arXiv 2210.07229, eq. 14). Every fact
i has its own step length and rests once it leads by the margin. The gradient counts at the subject only, so that the
words which all prompts of a relation share stay out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mosectl.arch import Architecture, Projection
from mosectl.forward import Suffix, by_row, frozen, hooked
from mosectl.targets import Contexts, TargetOptions, leads, rows_of, token_nll


@dataclass(frozen=True)
class Descent:
    """How n facts stand at the end."""

    W: dict[str, Tensor]  # (d, p) float64 by module path
    lead: Tensor  # (n,) smallest lead of a target token over its best rival, nats; −inf where a loss was not finite
    steps: Tensor  # (n,) int64, steps each fact took


def descend(
    model: nn.Module,
    arch: Architecture,
    projections: Sequence[Projection],
    contexts: Contexts,
    W: Mapping[str, Tensor],
    roots: Mapping[str, Tensor],
    options: TargetOptions,
    on_step: Callable[[int, int], None] | None = None,
) -> Descent:
    """Descend until every fact leads by ``options.margin``, or for ``options.steps`` steps.

    Args:
        projections: the edited layers, lowest first.
        W: (d, p) float64 by module path, the weights as the model holds them and the descent begins; left as they are.
        roots: (p, p) float64 by module path, the lower Cholesky factor of A.
        on_step: called with (facts done, facts in all) after each step.
    """
    c = rows_of(contexts, contexts.edit_rows)
    with frozen(model):
        suffix = Suffix(model, arch, projections[0].layer, c.batch)
        return _Descender(model, projections, c, suffix, W, roots, options).run(on_step or (lambda *_: None))


@dataclass
class _Descender:
    model: nn.Module
    projections: Sequence[Projection]
    c: Contexts
    suffix: Suffix
    live: Mapping[str, Tensor]
    roots: Mapping[str, Tensor]
    options: TargetOptions

    def __post_init__(self) -> None:
        self.W = dict(self.live)
        self.fact = self.c.fact.cpu()  # (rows,) which fact a row belongs to
        self.n = int(self.fact.max()) + 1
        self.trail: list[tuple[str, Tensor, Tensor, Tensor]] = []  # steps so far: path, fact, what to write less, A⁻¹ k

    def run(self, on_step: Callable[[int, int], None]) -> Descent:
        steps = torch.zeros(self.n, dtype=torch.long)
        lead = torch.zeros(self.n)
        active = torch.ones(self.n, dtype=torch.bool)
        for _ in range(self.options.steps):
            if not active.any():  # facts at rest are moved by the steps of the others
                active = self._behind(lead)
                if not active.any():
                    break
            # All are looked at before any moves: a batch is one step, however many rows fit at once.
            moves = [self._gradients(part, lead) for part in self._parts(active)]
            active &= self._may_go_on(lead)
            for part, keys, gradients in moves:
                self._move(part, active, keys, gradients)
            steps += active
            on_step(int((~active).sum()), self.n)
        else:
            self._behind(lead)
        lost = ~(lead > 0)
        if lost.any():
            self._take_back(lost)
            self._behind(lead)
        return Descent(self.W, lead, steps)

    def _take_back(self, lost: Tensor) -> None:
        """Undo the steps of facts (n,) that were not reached: they would cost the others something for nothing."""
        for name, fact, written, solved in self.trail:
            rows = lost[fact]
            if rows.any():
                self.W[name] = self.W[name] + written[rows].T @ solved[rows]

    def _may_go_on(self, lead: Tensor) -> Tensor:
        """(n,) bool: facts that do not lead by the margin yet; one whose loss is not finite stays where it is."""
        return torch.isfinite(lead) & (lead < self.options.margin)

    def _behind(self, lead: Tensor) -> Tensor:
        """Measure ``lead`` of all facts anew; which of them may go on, (n,) bool."""
        with torch.no_grad():
            for part in self._parts(torch.ones(self.n, dtype=torch.bool)):
                self._forward(part, lead, {}, {})
        return self._may_go_on(lead)

    def _parts(self, wanted: Tensor) -> list[Tensor]:
        """Indices of the wanted facts (n,) in groups that fit into one forward."""
        facts = wanted.nonzero().flatten()
        return list(facts.split(max(1, self.options.max_rows * self.n // len(self.c.fact)))) if len(facts) else []

    def _gradients(self, part: Tensor, lead: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Keys (rows, p) and gradients (rows, d) of some facts' rows at their subjects, float64, by module path."""
        keys: dict[str, Tensor] = {}
        leaves: dict[str, Tensor] = {}
        with torch.enable_grad():
            nll = self._forward(part, lead, keys, leaves)
            found = torch.autograd.grad(nll[torch.isfinite(nll)].sum(), list(leaves.values()))
        place = self.W[self.projections[0].name]
        gradients = {name: g.to(place) for name, g in zip(leaves, found, strict=True)}
        return part, {name: k.to(place) for name, k in keys.items()}, gradients

    def _forward(self, part: Tensor, lead: Tensor, keys: dict[str, Tensor], leaves: dict[str, Tensor]) -> Tensor:
        """NLL (rows,) of the rows of some facts, nats a token; sets their ``lead``, fills in ``keys`` and ``leaves``."""
        c = self.c
        rows = torch.isin(self.fact, part).nonzero().flatten().to(c.fact.device)
        hooks = [
            self.model.get_submodule(p.name).register_forward_hook(self._mover(p, rows, keys, leaves))
            for p in self.projections
        ]
        with hooked(hooks):
            logits = self.suffix.logits(rows, c.positions[rows]).to(c.fact.device)  # (rows, m, V)
        logp = logits.log_softmax(-1)
        row_lead = leads(logp.detach(), c.targets[rows]).cpu()
        lead[part] = torch.inf
        lead.scatter_reduce_(0, self.fact[rows.cpu()], row_lead.nan_to_num(-torch.inf), "amin")
        return token_nll(logp, c.targets[rows])

    def _mover(
        self, p: Projection, rows: Tensor, keys: dict[str, Tensor], leaves: dict[str, Tensor]
    ) -> Callable[..., Tensor]:
        """Make the layer write what it would with the weight as it is by now, and note key and gradient at subjects."""
        shift = (self.W[p.name] - self.live[p.name]).float()

        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            k, y = by_row(args[0], len(rows)), by_row(out, len(rows))
            at = torch.arange(len(rows), device=y.device), self.c.subject[rows].to(y.device)
            keys[p.name] = k.detach()[at]
            leaf = leaves[p.name] = torch.zeros(len(rows), p.d, device=y.device, requires_grad=True)
            y = y + (k.float() @ shift.T.to(k.device)).to(y.dtype)
            return y.index_put(at, y[at] + leaf.to(y.dtype)).view_as(out)

        return hook

    def _move(self, part: Tensor, active: Tensor, keys: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        """One step for those facts of ``part`` that are ``active`` (n,), each of a length of its own."""
        fact = self.fact[torch.isin(self.fact, part)]  # (rows,)
        moved = active[fact]  # the rows of others may hold numbers that are not finite
        fact = fact[moved]
        share = 1.0 / torch.bincount(fact).double()[fact]
        same = (fact[:, None] == fact).double()
        solved: dict[str, Tensor] = {}
        slope, written = torch.zeros(self.n).double(), torch.zeros(self.n).double()
        for name, K in keys.items():
            K, g = K[moved], gradients[name][moved]
            solved[name] = torch.cholesky_solve(K.T, self.roots[name]).T  # (rows, p): A⁻¹ k
            kernel = K @ solved[name].T  # (rows, rows): kᵀA⁻¹k
            slope.index_add_(0, fact, ((g @ g.T * kernel).cpu() * same).sum(1))
            length = (K @ self.W[name].T).square().sum(1) / kernel.diagonal()  # what it costs to write ‖W k‖ more
            written.index_add_(0, fact, share * length.cpu())
        eta = self.options.step_size * (written / slope.clamp_min(1e-30)).sqrt()
        for name, g in gradients.items():
            step = g[moved] * eta[fact].to(g)[:, None]  # (rows, d)
            self.W[name] = self.W[name] - step.T @ solved[name]
            self.trail.append((name, fact, step, solved[name]))
