"""HORSE: a trained network gives the values, the ridge solution the weight (arXiv 2601.11441; MALMEN, arXiv 2311.04661)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mosectl.editing.methods.base import ModelProblem, Option, Trainer, Work
from mosectl.facts.records import Fact
from mosectl.hypernetwork.network import keys_and_gradients
from mosectl.model.memory import fitting, halving
from mosectl.model.scoring import Rows


class Horse(Trainer):
    """W' = W + ΔW by module path for one batch of facts, ΔWᵀ = (KᵀK + e^λ I)⁻¹ KᵀD.

    Facts stream through in parts that fit in memory: KᵀK (p, p) and KᵀD (p, d) are sums. One pass, no care for earlier
    edits, no other wordings: as published.
    """

    name, side, source, editor = "horse", "additive", "arXiv 2601.11441", "horse"
    settings = {
        "rounds": 1, "previous_edit_weight": 0.0, "prefixes": 0, "wordings": 0, "replay_margin": 0.0,
    }  # fmt: skip
    options = {"strength": Option(1.0, "scales D")}
    remedy = "an editor trained longer, or on more facts,"
    gentler = "a smaller --set strength=…"

    def form(self, asked: str) -> str:
        """Dense: the network's update is of high rank, looking for a low one by itself would take minutes and find none."""
        return "dense" if asked == "auto" else asked

    def columns(self, facts: Sequence[Fact]) -> int:
        """It writes at each of an answer's tokens; English has about 1.4 tokens a word."""
        return round(sum(1 + 1.4 * len(f.target_new.split()) for f in facts))

    def peak_bytes(self, work: Work) -> int:
        return work.one_pass_bytes()

    def seconds(self, work: Work) -> dict[str, float]:
        return work.one_pass_seconds()

    def fit(self, problem: ModelProblem) -> dict[str, Tensor]:
        model, projections, contexts, W = problem.model, problem.projections, problem.contexts, problem.W
        assert problem.editor is not None  # options.trained_editor has seen to it
        rows = contexts.edit_rows
        own = Rows(contexts.batch.rows(rows), contexts.positions[rows], contexts.targets[rows])
        net = problem.editor.net.to(own.targets.device)
        like = [W[p.name] for p in projections]
        squares = [x.new_zeros(x.shape[1], x.shape[1]) for x in like]  # KᵀK
        products = [x.new_zeros(x.shape[1], x.shape[0]) for x in like]  # KᵀD

        def add(start: int, end: int) -> None:
            K, G, _ = keys_and_gradients(model, projections, own.part(start, end))
            with torch.no_grad():
                D = net(K, G)
            for i, (k, x) in enumerate(zip(K, D, strict=True)):
                k, x = k.to(like[i]), x.to(like[i])
                squares[i].addmm_(k.T, k)
                products[i].addmm_(k.T, x, alpha=problem.options["strength"])

        size = fitting(model, problem.arch, projections[0].layer, own.batch.input_ids.shape[1], own.targets.shape[1])
        for _ in halving(len(rows), size, add):
            pass
        out = {}
        for i, p in enumerate(projections):
            squares[i].diagonal().add_(net.ridge[i].exp().to(like[i]))
            out[p.name] = like[i] + torch.linalg.solve(squares[i], products[i]).T
        return out
