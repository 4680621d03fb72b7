"""Values as ROME, MEMIT and their kin find them in their own code: what these methods differ in are their solvers.

The hidden state h that a layer hands on at the subject's last token (ROME: the FFN's output there) moves by δ, the same δ
behind each prefix and in "{subject} is a". Adam of a fixed rate minimises

    mean over prompts of −log P(target), a token  +  kl_weight · KL(now ‖ before)  +  decay · ‖δ‖ / ‖h‖²

until the sum is below 0.05 or after ``steps`` forward passes, and ‖δ‖ is cut to ``max_displacement`` · ‖h‖; h is the bare
prompt's. The KL is that of the word after the subject in "{subject} is a". Prefixes are what the model writes behind five
fixed words, each next token one of the five likeliest. The key is a mean, half of it the bare prompt's (ROME: all alike),
the residual the bare prompt's. As in github.com/kmeng01/rome, kmeng01/memit, jianghoucheng/AlphaEdit and
zjunlp/EasyEdit (compute_z, compute_v, compute_ks), whose settings methods/base.py names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mosectl.editing.contexts import Contexts, first_rows
from mosectl.editing.methods.base import FFN
from mosectl.editing.targets import TargetOptions, Targets, in_groups, least_by_fact, mean_by_fact
from mosectl.model.architecture import Architecture
from mosectl.model.edit_site import Projection
from mosectl.model.forward import by_row, hooked, output_at
from mosectl.model.generation import continuations, seeded
from mosectl.model.losses import leads, token_nll
from mosectl.model.partial_forward import Suffix

OPENINGS = ("The", "Therefore", "Because", "I", "You")
LIKELIEST = 5  # tokens that the next one is drawn from
ENOUGH = 0.05  # the loss at which a search ends


def written_prefixes(model: Any, tokenizer: Any, n: int, lengths: Sequence[int], seed: int) -> list[str]:
    """Nothing, and ``n`` beginnings of texts that the model writes behind OPENINGS, in turn of all ``lengths`` (tokens)."""
    wanted = [(OPENINGS[i % len(OPENINGS)], lengths[i * len(lengths) // n]) for i in range(n)]
    found = [""]
    with seeded(model, seed):
        for opening, length in wanted:
            ids = tokenizer(opening)["input_ids"]
            (text,) = continuations(
                model, tokenizer, [ids], max(1, length - len(ids)), sampled=True, likeliest=LIKELIEST
            )
            found.append(" ".join((opening + text).split()) + ". ")
    return found


def averages(fact: Tensor, bare: float) -> Tensor:
    """(n, rows) float64 by which a fact's rows become one, its bare prompt's, the first, with a share of ``bare``.

    Args:
        fact: (rows,) fact of each row, 0 … n − 1, in order. bare: 0: every row has the same share.
    """
    n = int(fact.max()) + 1
    first = first_rows(fact)
    count = torch.bincount(fact).double()
    mean = torch.zeros(n, len(fact), dtype=torch.float64, device=fact.device)
    share = (1 - bare) / (count - 1) if bare else 1 / count
    mean[fact, torch.arange(len(fact), device=fact.device)] = share[fact]
    if bare:
        mean[torch.arange(n, device=fact.device), first] = torch.where(count > 1, bare, 1.0).double()
    return mean


def bare_rows(contexts: Contexts) -> Tensor:
    """Numbers (n,) of the rows that are the facts' bare prompts."""
    edit = contexts.edit_rows
    return edit[first_rows(contexts.fact[edit])]


def published_targets(
    model: nn.Module,
    arch: Architecture,
    top: Projection,
    contexts: Contexts,
    options: TargetOptions,
    site: str,
    on_step: Callable[[int, int], None] | None = None,
) -> Targets:
    """δ (n, d) for all facts of ``contexts``, as ``Targets.V[0]``, at the layer of ``top``.

    Args:
        site: whose output moves: the layer's (BLOCK) or its FFN's (FFN).
    """

    def search(part: Contexts, report: Callable[[int], None]) -> Targets:
        return _Search(model, arch, top, part, options, site).run(report)

    return in_groups(model, arch, top.layer, contexts, options, search, on_step)


class _Search:
    """One group of facts, few enough to run in a single batch."""

    def __init__(
        self, model: nn.Module, arch: Architecture, top: Projection, contexts: Contexts, options: TargetOptions, site: str
    ) -> None:  # fmt: skip
        self.n, device = int(contexts.fact.max()) + 1, contexts.fact.device
        at_subject = torch.where(contexts.is_edit[:, None], contexts.positions, contexts.token[:, None])
        self.c, self.options = replace(contexts, positions=at_subject), options
        self.suffix = Suffix(model, arch, top.layer, contexts.batch, contexts.token, contexts.below)
        name = top.name if site == FFN else f"{arch.layers_path}.{top.layer}"
        self.module = model.get_submodule(name)
        bare = bare_rows(contexts)
        # (n,) ‖h‖ of the bare prompts
        self.length = output_at(model, name, contexts.batch.rows(bare), contexts.token[bare]).norm(dim=-1).to(device)
        # One parameter a fact: Adam skips those whose gradient is None, which is what leaving the batch means.
        self.deltas = [torch.zeros(top.d, device=device, requires_grad=True) for _ in range(self.n)]
        self.adam = torch.optim.Adam(self.deltas, lr=options.step_size)
        self.reference: Tensor | None = None  # (n, V) log-probabilities of each fact's KL row before any step
        first = torch.arange(contexts.targets.shape[1], device=device) == 0
        self.asked = (contexts.targets >= 0) | (~contexts.is_edit[:, None] & first)  # (B, m) where logits are read

    def run(self, report: Callable[[int], None]) -> Targets:
        device = self.c.fact.device
        active = torch.ones(self.n, dtype=torch.bool, device=device)
        loss, margin = torch.full((2, self.n), torch.inf, device=device)
        converged, steps = torch.zeros_like(active), torch.zeros(self.n, dtype=torch.long, device=device)
        for step in range(max(1, self.options.steps)):
            nll, lead, kl = self._forward(active[self.c.fact].nonzero().flatten())
            lengths = torch.stack([d.norm() for d in self.deltas])
            total = nll + self.options.kl_weight * kl + self.options.decay * lengths / self.length.square()
            if step == 0:
                before = nll.detach().cpu(), lead.detach().cpu()
            loss = torch.where(active, nll.detach(), loss)
            margin = torch.where(active, lead.detach(), margin)
            finite = torch.isfinite(total.detach())
            loss[active & ~finite] = torch.inf  # reported, and left out of the solve
            converged |= active & finite & (total.detach() < ENOUGH)
            active = active & finite & ~converged
            report(int((~active).sum()))
            if step >= self.options.steps - 1 or not active.any():
                break
            steps[active] += 1
            self._step(total, active)
        delta = torch.stack([d.detach() for d in self.deltas])
        return Targets([delta], loss.cpu(), margin.cpu(), converged.cpu(), steps.cpu(), *before)

    def _step(self, total: Tensor, active: Tensor) -> None:
        chosen = active.nonzero().flatten().tolist()
        self.adam.zero_grad(set_to_none=True)
        gradients = torch.autograd.grad(total[active].sum(), [self.deltas[i] for i in chosen])
        for i, g in zip(chosen, gradients, strict=True):
            self.deltas[i].grad = g
        self.adam.step()
        with torch.no_grad():
            for i in chosen:
                most = self.options.max_displacement * self.length[i]
                self.deltas[i] *= (most / self.deltas[i].norm().clamp_min(most)).clamp(max=1)

    def _forward(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per fact (n,): target NLL, smallest lead, KL(now ‖ before); infinite for facts without rows."""
        parts = self.suffix.alike(rows)
        rows, c = torch.cat(parts), self.c
        with torch.enable_grad():
            logp = torch.cat([self._part(part) for part in parts])  # (K, V)
        fact, edit, asked = c.fact[rows], c.is_edit[rows], self.asked[rows]
        now = logp[(~edit)[asked.nonzero()[:, 0]]]  # (KL rows, V)
        if self.reference is None:
            self.reference = torch.zeros(self.n, logp.shape[-1], device=logp.device)
            self.reference[fact[~edit]] = now.detach()
        row_kl = (now.exp() * (now - self.reference[fact[~edit]])).sum(-1)
        nll = token_nll(logp, c.targets[rows], asked)
        lead = least_by_fact(leads(logp.detach(), c.targets[rows], asked)[edit], fact[edit], self.n)
        return mean_by_fact(nll[edit], fact[edit], self.n), lead, mean_by_fact(row_kl, fact[~edit], self.n)

    def _part(self, rows: Tensor) -> Tensor:
        """Log-probabilities (K, V) where some rows are asked, with δ at their subjects."""
        c, delta = self.c, torch.stack(self.deltas)[self.c.fact[rows]]  # (rows, d)
        at = c.token[rows] - self.suffix.offset[rows]

        def hook(_: nn.Module, __: Any, out: Any) -> Any:
            whole = out[0] if isinstance(out, tuple | list) else out
            h = by_row(whole, len(rows))
            r, s = torch.arange(len(rows), device=h.device), at.to(h.device)
            moved = h.index_put((r, s), (h[r, s].float() + delta.to(h.device)).to(h.dtype)).view_as(whole)
            return type(out)([moved, *out[1:]]) if isinstance(out, tuple | list) else moved

        with hooked([self.module.register_forward_hook(hook)]):
            logits = self.suffix.logits(rows, c.positions[rows], self.asked[rows]).to(c.fact.device)
        return F.log_softmax(logits, dim=-1)
