"""What each edited layer should write at a fact's subject so that the model says the new object.

ROME/MEMIT find a displacement of the hidden state by gradient descent (Meng et al. 2022, arXiv 2202.05262 §3.1, and
arXiv 2210.07229). A rotation cannot change a length, so here the FFN outputs W k of all edited layers move on their own
spheres, v = ‖W k‖·(u + δ)/‖u + δ‖ with u = W k/‖W k‖: every target found is one a norm-preserving update can reach.
Additive methods may leave the sphere (v = W k + ‖W k‖ δ), and those that spread one residual use the topmost layer alone.
δ is in units of the output's own length, so one step size fits models whose activations differ a hundredfold.
What a target costs the rest of the model grows with δ and with how much the model's predictions hang on its direction. The
steps are therefore those of steepest descent in the metric G = E[g gᵀ] of the layer's output (stats.py), which find the
new object at least cost; Adam, as the additive methods were published with, moves every coordinate alike.
All facts of a batch are optimised together; facts are independent, and one that has converged leaves the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mosectl.editing.contexts import Contexts, rows_of
from mosectl.editing.settings import recorded, taking_old_names
from mosectl.model.architecture import Architecture
from mosectl.model.edit_site import Projection
from mosectl.model.forward import ffn_output, frozen, hooked
from mosectl.model.losses import NOTHING, leads, token_nll
from mosectl.model.memory import fitting, halving
from mosectl.model.partial_forward import Suffix

RISE = 0.01  # nats a token by which a loss may rise before the step counts as too long: 16 bits round it by as much
FURTHEST = 2.0  # times the shortest step before it that a fact's step is long, at most


@taking_old_names
@dataclass(frozen=True)
class TargetOptions:
    """Settings of the target optimiser; lengths are relative to ‖W k‖."""

    steps: int = 20  # optimiser steps of a target, at most (published: forward passes, the last of which only looks)
    # "natural-gradient": steepest descent in the metric of the Fisher information; "adam"; "published": ROME's and MEMIT's
    # own search (published.py), in which rates are absolute and lengths relative to the hidden state's
    optimizer: str = "natural-gradient"
    nats_per_step: float = 2.0  # nats a token by which a step in that metric shall lower the loss, to first order
    step_size: float = 0.25  # Adam's, in units of the output's root mean square (published: as it is)
    # Nats by which every target token must lead before a fact counts as converged; "auto": 6 at the subject's last token,
    # 3 at the prompt's.
    margin: float | None = None
    kl_weight: float = 0.0625  # keeps what the model says after "{subject} is a" (ROME's factor)
    decay: float = 0.02  # on ‖δ‖² (published: on ‖δ‖ / ‖h‖²)
    max_displacement: float = 4.0  # largest ‖δ‖ per layer (published: as a share of ‖h‖, the hidden state's)
    preserve_norm: int = 1  # 1: targets keep the output's length, as a rotation does; 0: v = W k + ‖W k‖ δ
    max_rows: int = 256  # sequences run at once, at most: fewer where memory asks for it

    @property
    def least_lead(self) -> float:
        """The margin, nats, of options in which it is no longer left open (layers.settled)."""
        assert self.margin is not None, "which margin it is depends on the token that is edited: see layers.settled"
        return self.margin

    def to_record(self) -> dict[str, Any]:
        """As a patch's record has it."""
        return recorded(vars(self))


@dataclass(frozen=True)
class Targets:
    """Result of the optimisation for n facts on L layers; rows are the edit rows of the contexts, in order."""

    V: list[Tensor]  # per layer (rows, d) float32: what the layer should write
    loss: Tensor  # (n,) negative log likelihood of the target, nats per token, mean over prefixes
    margin: Tensor  # (n,) smallest lead of a target token over its best rival, nats
    converged: Tensor  # (n,) bool
    steps: Tensor  # (n,) optimiser steps used
    loss_before: Tensor  # (n,) the loss as the model stands, before any step
    margin_before: Tensor  # (n,)


def displaced(h: Tensor, delta: Tensor, preserve_norm: bool = True) -> Tensor:
    """‖h‖·(u + δ)/‖u + δ‖ with u = h/‖h‖, or h + ‖h‖ δ, row by row; h and delta (rows, d)."""
    length = h.norm(dim=-1, keepdim=True)
    if not preserve_norm:
        return h + length * delta
    return length * F.normalize(h / length.clamp_min(torch.finfo(h.dtype).tiny) + delta, dim=-1)


def optimise_targets(
    model: nn.Module,
    arch: Architecture,
    projections: Sequence[Projection],
    contexts: Contexts,
    options: TargetOptions,
    on_step: Callable[[int, int], None] | None = None,
    metric: Mapping[str, Tensor] | None = None,
    going_on: Tensor | None = None,
) -> Targets:
    """Find reachable targets for all facts of ``contexts`` at once, or in groups of as many as fit in memory.

    Args:
        projections: the edited layers, lowest first.
        metric: G⁻¹ (d, d) float32 by module path, where ``options.optimizer``; without it steps are Adam's.
        on_step: called with (facts done, facts in all) after each step.
        going_on: (vocabulary,) bool, tokens that go on with a word, where the contexts ask for its end.
    Returns:
        Targets; a fact that already leads by the margin converges at step 0 and keeps v = W k.
    """

    def search(part: Contexts, report: Callable[[int], None]) -> Targets:
        return _Optimiser(model, arch, projections, part, options, metric, going_on).run(report)

    return in_groups(model, arch, projections[0].layer, contexts, options, search, on_step)


def in_groups(
    model: nn.Module,
    arch: Architecture,
    layer: int,
    contexts: Contexts,
    options: TargetOptions,
    search: Callable[[Contexts, Callable[[int], None]], Targets],
    on_step: Callable[[int, int], None] | None = None,
) -> Targets:
    """What ``search`` finds for groups of as many facts as fit in memory, from ``layer`` upward; it reports facts done."""
    n = int(contexts.fact.max()) + 1
    tokens = float((contexts.batch.attention_mask.sum(1) - contexts.token).float().mean())
    rows = min(options.max_rows, fitting(model, arch, layer, tokens, contexts.targets.shape[1]))

    def work(start: int, end: int) -> Targets:
        def report(finished: int) -> None:
            if on_step:
                on_step(start + finished, n)

        chosen = ((contexts.fact >= start) & (contexts.fact < end)).nonzero().flatten()
        return search(rows_of(contexts, chosen, start), report)

    with frozen(model):
        parts = [part for _, part in halving(n, max(1, rows * n // len(contexts.fact)), work)]
    if len(parts) == 1:
        return parts[0]
    rest = ("loss", "margin", "converged", "steps", "loss_before", "margin_before")
    V = [torch.cat(layer_V) for layer_V in zip(*(p.V for p in parts), strict=True)]
    return Targets(V, **{name: torch.cat([getattr(p, name) for p in parts]) for name in rest})


class _Optimiser:
    """One group of facts, few enough to run in a single batch."""

    def __init__(
        self,
        model: nn.Module,
        arch: Architecture,
        projections: Sequence[Projection],
        contexts: Contexts,
        options: TargetOptions,
        metric: Mapping[str, Tensor] | None,
        going_on: Tensor | None = None,
    ) -> None:
        self.model, self.projections, self.c, self.options = model, projections, contexts, options
        self.going_on = None if going_on is None else going_on.to(contexts.fact.device)
        self.n = int(contexts.fact.max()) + 1
        self.suffix = Suffix(model, arch, projections[0].layer, contexts.batch, contexts.token, contexts.below)
        # One parameter a fact: Adam skips those whose gradient is None, which is what leaving the batch means.
        self.deltas = [
            torch.zeros(len(projections), p.d, device=contexts.fact.device, requires_grad=True)
            for p in projections[:1]
            for _ in range(self.n)
        ]
        self.adam = torch.optim.Adam(self.deltas, lr=options.step_size / projections[0].d ** 0.5)
        self.metric = metric and [metric[p.name].to(contexts.fact.device) for p in projections]
        self.lengths: list[Tensor] = []  # (n,) a layer: ‖W k‖ of each fact, mean over its rows, before any step
        self.reached = torch.full((self.n,), torch.inf, device=contexts.fact.device)  # loss at the last step taken
        self.pace = torch.ones_like(self.reached)  # share of ``nats_per_step`` that a fact's steps are for
        self.before = [d.detach() for d in self.deltas]  # each fact's δ before its last step
        self.longest = torch.full_like(self.reached, torch.inf)  # ‖step‖ that a fact may take
        # Of each row: loss and lead when it was last run, whether this step has run it, what each layer then wrote, and what
        # it wrote when its fact last had finite numbers.
        self.nll = torch.full((len(contexts.fact),), torch.inf, device=contexts.fact.device)
        self.lead, self.seen = -self.nll, torch.zeros_like(self.nll, dtype=torch.bool)
        self.written = [torch.zeros(len(contexts.fact), p.d, device=contexts.fact.device) for p in projections]
        self.V = [torch.zeros_like(x) for x in self.written]
        self.least = torch.full_like(self.nll, options.least_lead) if contexts.least is None else contexts.least  # (B,)
        self.reference: Tensor | None = None  # (n, V) log-probabilities of each fact's KL row before any step
        first = torch.arange(contexts.targets.shape[1], device=contexts.fact.device) == 0
        self.asked = (contexts.targets != NOTHING) | (
            ~contexts.is_edit[:, None] & first
        )  # (B, m) where logits are read

    def run(self, report: Callable[[int], None]) -> Targets:
        c, o, device = self.c, self.options, self.c.fact.device
        active = torch.ones(self.n, dtype=torch.bool, device=device)
        loss = torch.full((self.n,), torch.inf, device=device)
        margin = torch.full((self.n,), -torch.inf, device=device)
        converged, steps = torch.zeros_like(active), torch.zeros(self.n, dtype=torch.long, device=device)
        for step in range(o.steps + 1):
            self.seen.zero_()
            objective, behind, kl = self._forward(self._wanted(active))
            self._look(active & (self._leading() | (step == o.steps)))
            nll = mean_by_fact(self.nll[c.is_edit], c.fact[c.is_edit], self.n)
            lead = least_by_fact(self.lead[c.is_edit], c.fact[c.is_edit], self.n)
            finite = torch.isfinite(nll) & torch.isfinite(kl.detach())
            # Facts with a non-finite loss keep the last finite target and are reported by their infinite loss.
            usable = active & finite
            loss, margin = torch.where(usable, nll, loss), torch.where(usable, lead, margin)
            rows = usable[c.fact] & self.seen
            for v, now in zip(self.V, self.written, strict=True):
                v[rows] = now[rows]
            loss[active & ~finite] = torch.inf
            if step == 0:
                first = loss.cpu(), margin.cpu()
            converged |= usable & self._leading()
            active = usable & ~converged
            report(int((~active).sum()))
            if step == o.steps or not active.any():
                break
            steps[active] += 1
            if self.metric:
                self._descend(nll, behind, kl, active)
            else:
                self._step(objective + o.kl_weight * kl, active)
        edit = c.edit_rows
        return Targets([v[edit] for v in self.V], loss.cpu(), margin.cpu(), converged.cpu(), steps.cpu(), *first)

    def _wanted(self, active: Tensor) -> Tensor:
        """Rows whose gradient a step needs: with Fisher steps only those that do not lead yet, and those for the KL."""
        rows = active[self.c.fact]
        if self.metric:
            rows = rows & (~self.c.is_edit | (self.lead < self.least))
        return rows.nonzero().flatten()

    def _look(self, facts: Tensor) -> None:
        """Ask the rows of ``facts`` (n,) bool that this step has not asked."""
        rows = (facts[self.c.fact] & ~self.seen).nonzero().flatten()
        if len(rows):
            with torch.no_grad():
                self._forward(rows, gradients=False)

    def _leading(self) -> Tensor:
        """Facts of which every row that asks for the new object leads by as much as it shall, (n,) bool."""
        edit = self.c.is_edit
        return least_by_fact((self.lead - self.least)[edit], self.c.fact[edit], self.n) >= 0

    def _step(self, objective: Tensor, active: Tensor) -> None:
        chosen = active.nonzero().flatten().tolist()
        total = objective[active].sum() + self.options.decay * sum(self.deltas[i].square().sum() for i in chosen)
        self.adam.zero_grad(set_to_none=True)
        gradients = torch.autograd.grad(total, [self.deltas[i] for i in chosen])
        for i, g in zip(chosen, gradients, strict=True):
            self.deltas[i].grad = g
        self.adam.step()
        self._within_reach(chosen)

    @torch.no_grad()
    def _descend(self, nll: Tensor, behind: Tensor, kl: Tensor, active: Tensor) -> None:
        """δ ← δ − η G⁻¹ g, g the gradient of the rows that do not lead yet, η for ``nats_per_step`` less to first order.

        A fact whose loss rose goes half of its last step back, and on in shorter steps. Where little is left to gain, 16
        bits round the loss by a share of itself and the gradient to almost nothing: neither may decide a step's length.
        """
        assert self.metric
        rose = nll.detach() > self.reached + RISE
        for i in (active & rose).nonzero().flatten().tolist():
            self.pace[i] /= 2
            self.deltas[i] += (self.before[i] - self.deltas[i]) / 2
        active = active & ~rose
        if not active.any():
            return
        self.reached = torch.where(active, nll.detach(), self.reached)
        self.pace = torch.where(active, 1.5 * self.pace, self.pace).clamp(max=1)
        chosen = active.nonzero().flatten()
        deltas = [self.deltas[i] for i in chosen]
        with torch.enable_grad():
            total = (behind + self.options.kl_weight * kl)[chosen].sum()
            g = torch.stack(torch.autograd.grad(total, deltas))  # (m, L, d), by δ
        length = torch.stack(self.lengths, 1)[chosen, :, None]  # (m, L, 1): an output moves by ‖W k‖ δ
        s = torch.stack([(g[:, i] / length[:, i]) @ M for i, M in enumerate(self.metric)], 1) / length
        slope = (g * s).sum((1, 2)).clamp_min(torch.finfo(g.dtype).tiny)
        eta = self.pace[chosen] * behind.detach()[chosen].clamp(max=self.options.nats_per_step) / slope
        steps = eta[:, None, None] * s
        size = steps.square().sum((1, 2)).sqrt()
        steps *= (self.longest[chosen] / size).clamp(max=1)[:, None, None]
        self.longest[chosen] = self.longest[chosen].minimum(FURTHEST * torch.where(size > 0, size, torch.inf))
        for i, delta, step in zip(chosen.tolist(), deltas, steps, strict=True):
            self.before[i] = delta.clone()
            delta -= step
        self._within_reach(chosen.tolist())

    @torch.no_grad()
    def _within_reach(self, chosen: Sequence[int]) -> None:
        for i in chosen:
            length = self.deltas[i].norm(dim=-1, keepdim=True)
            self.deltas[i] *= (self.options.max_displacement / length.clamp_min(self.options.max_displacement)).clamp(
                max=1
            )

    def _forward(self, rows: Tensor, *, gradients: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Run some rows: what is written there, their losses and leads are kept. Then per fact (n,), of these rows: target
        NLL, that of rows that do not lead by the margin, KL to the unedited model; infinite for facts without rows.
        """
        c, parts = self.c, self.suffix.alike(rows)
        rows = torch.cat(parts)
        with torch.set_grad_enabled(gradients):
            found = [self._part(part) for part in parts]
            logp = torch.cat([part for part, _, _ in found])  # (K, V)
        written, lengths = (
            [torch.cat(layer) for layer in zip(*kind, strict=True)] for kind in list(zip(*found, strict=True))[1:]
        )
        if not self.lengths:
            self.lengths = [mean_by_fact(x, c.fact[rows], self.n).clamp_min(1e-30) for x in lengths]
        targets, edit, fact, asked = c.targets[rows], c.is_edit[rows], c.fact[rows], self.asked[rows]
        row_nll = token_nll(logp, targets, asked, self.going_on)
        self.lead[rows[edit]] = leads(logp.detach(), targets, asked, self.going_on)[edit]
        self.nll[rows[edit]] = row_nll.detach()[edit]
        self.seen[rows] = True
        nll = mean_by_fact(row_nll[edit], fact[edit], self.n)
        kl = torch.zeros_like(nll)
        if not bool(c.is_edit.all()):
            kl = self._divergence(logp[(~edit)[asked.nonzero()[:, 0]]], fact[~edit])
        for now, new in zip(self.written, written, strict=True):
            now[rows] = new
        late = edit & (self.lead[rows] < self.least[rows])
        return nll, mean_by_fact(row_nll[late], fact[late], self.n), kl

    def _divergence(self, logp: Tensor, fact: Tensor) -> Tensor:
        """KL (n,) of what is said about the subjects, log-probabilities (rows, V), from what was said before any step."""
        if self.reference is None:
            self.reference = torch.zeros(self.n, logp.shape[-1], device=logp.device)
            self.reference[fact] = logp.detach()
        before = self.reference[fact]
        return mean_by_fact((before.exp() * (before - logp)).sum(-1), fact, self.n)

    def _part(self, rows: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Log-probabilities (K, V) where rows are asked; by layer what is written (rows, d), and ‖W k‖ (rows,)."""
        c, deltas = self.c, torch.stack(self.deltas)[self.c.fact[rows]]  # (rows, L, d)
        written: list[Tensor] = []
        lengths: list[Tensor] = []
        at = c.token[rows] - self.suffix.offset[rows]
        handles = [
            self.model.get_submodule(p.name).register_forward_hook(self._mover(at, deltas[:, i], written, lengths))
            for i, p in enumerate(self.projections)
        ]
        with hooked(handles):
            logits = self.suffix.logits(rows, c.positions[rows], self.asked[rows]).to(c.fact.device)
        return F.log_softmax(logits, dim=-1), written, lengths

    def _mover(self, at: Tensor, delta: Tensor, written: list[Tensor], lengths: list[Tensor]) -> Callable[..., Tensor]:
        def hook(module: nn.Module, _: Any, out: Tensor) -> Tensor:
            y = ffn_output(out, module, len(at))
            r, s = torch.arange(len(at), device=y.device), at.to(y.device)
            lengths.append(y[r, s].detach().float().norm(dim=-1).to(at.device))
            moved = displaced(y[r, s].float(), delta.to(y.device), bool(self.options.preserve_norm))
            written.append(moved.detach().to(at.device))
            y = y.index_put((r, s), moved.to(y.dtype))
            bias = module.bias
            return (y + bias if isinstance(bias, Tensor) else y).view_as(out)

        return hook


def mean_by_fact(values: Tensor, fact: Tensor, n: int) -> Tensor:
    """Mean of row values (rows,) over each fact's rows, (n,); infinite where a fact has none."""
    total = torch.zeros(n, device=values.device).index_add(0, fact, values)
    count = torch.zeros(n, device=values.device).index_add(0, fact, torch.ones_like(values))
    return torch.where(count > 0, total / count.clamp_min(1), torch.inf)


def least_by_fact(values: Tensor, fact: Tensor, n: int) -> Tensor:
    """Least of row values (rows,) over each fact's rows, (n,); infinite where a fact has none."""
    return torch.full((n,), torch.inf, device=values.device).scatter_reduce(0, fact, values, "amin")
