"""Isospectral editing: W' = L W R with rotations on both sides, the best weight of W's own singular values (ours).

Everything arXiv 2601.07873 proves for R W holds for L W R: these are exactly the matrices with W's singular values. Left
alone, a rotation cannot tell two keys apart for which the layer writes the same; both together can. The matrices of one
spectrum have only d dimensions less than all (d, p) matrices, so little is lost against an additive update, provided
the nearest one is sought in the metric of the keys and not entry by entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mosectl.editing.low_rank import GAIN, Wanted, nearest_turns
from mosectl.editing.methods.base import LayerProblem, Option, Turner, TurnProblem
from mosectl.linalg.metric import Metric
from mosectl.linalg.rotation import Compact, nearest_rotation, thin_svd

LEAST_RANK = 24  # to which a compact rotation may grow, however few contexts its facts have


class Isospectral(Turner):
    """W' = argmin over the singular values of W₀ of λ‖(W' − W₀)C½‖² + Σ‖W'k_j − v_j‖² + ‖(W'K − V)w½‖².

    The objective is tr((W' − T) A (W' − T)ᵀ) + const with A = λC + P + K w Kᵀ and T = (λW₀C + Q + V w Kᵀ) A⁻¹, the
    additive optimum: what must keep still is measured from W₀, so that nothing adds up over many edits. On the matrices
    U Σ Zᵀ with fixed Σ the tangent directions D are those with u_jᵀ D z_j = 0 (j = 1 … d). Newton's step T − W' meets
    these d conditions at least cost in the metric of A by D = T − W' − Σ_j μ_j u_j z_jᵀ A⁻¹, μ_j = u_jᵀ(T − W')z_j /
    z_jᵀA⁻¹z_j, which decouple because the u_j are orthonormal. After each step the nearest matrix of that spectrum is
    taken (Mirsky) and turned from the left by the best rotation, which has a closed form as in MOSE; steps are halved
    until the objective falls. That is ``update``, the dense form. ``turns`` seeks compact rotations for the same objective.
    """

    name, side, source = "isospectral", "both", "mosectl"
    options = {
        "preserve": Option(
            10.0,
            "λ, how many edits one unit of C weighs; 100 at the subject's last token of a model of ten layers or more that"
            " is not given layers",
        ),
        "damping": Option(1e-4, "added to C as a share of its mean diagonal"),
        "iterations": Option(5, "Newton steps of the dense form, at most", whole=True),
        "tolerance": Option(1e-3, "relative gain of a Newton step below which they end"),
        "rank": Option(
            0,
            "largest rank of a batch's compact rotations; 0 = as it pays, as many as its facts have contexts at most",
            whole=True,
        ),
        "rank_gain": Option(GAIN, "the share of all gained so far below which a larger rank does not pay"),
    }

    def turns(self, problem: TurnProblem) -> tuple[Compact, Compact]:
        """With what must keep still as ‖(W' − T₀)B½‖², N = K w½ and F = (V − T₀K)w½: T − W = F (A⁻¹N)ᵀ + (T₀ − W)."""
        o, keep, still, facts = problem.options, problem.keep, problem.still, problem.facts
        root = facts.weight.sqrt()
        N, F = facts.K * root, (facts.V - still.T @ facts.K) * root
        A = Metric.of(still.S, still.scale * keep, N)
        M, AM = still.missing, None
        if M is not None and still.weighed is not None:
            AM = torch.addmm(still.weighed, N, (M @ N).T, beta=keep)
        most = o["rank"] or max(LEAST_RANK, facts.K.shape[1])
        wanted = Wanted(F, A.solve(N), M, AM)
        L, R, _ = nearest_turns(problem.W, wanted, A, problem.gram, gain=o["rank_gain"], most=most)
        return L, R

    def update(self, problem: LayerProblem) -> Tensor:
        o = problem.options
        A = problem.kept(o["preserve"])
        A.diagonal().add_(o["damping"] * A.diagonal().mean())
        weighted = problem.K * problem.weight
        B = problem.W0 @ A + problem.Q + problem.V @ weighted.T
        A.add_(problem.P).addmm_(weighted, problem.K.T)
        root = torch.linalg.cholesky(A)
        del A
        T = torch.cholesky_solve(B.T, root).T
        sigma = torch.linalg.svdvals(problem.W0)

        def objective(X: Tensor) -> float:
            return float(torch.linalg.norm((X - T) @ root)) ** 2

        def of_spectrum(X: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
            """U, Zᵀ, U Σ Zᵀ and its objective for the matrix nearest to X, turned by argmax over L of tr(L W' Bᵀ)."""
            U, _, Zh = thin_svd(X)
            del X  # a (d, p) in float64 is half a gigabyte in a large model
            U = nearest_rotation(B @ ((U * sigma) @ Zh).T) @ U
            W = (U * sigma) @ Zh
            return U, Zh, W, objective(W)

        U, Zh, W, cost = of_spectrum(problem.W)
        for _ in range(int(o["iterations"])):
            D = T - W
            ZA = torch.cholesky_solve(Zh.T, root).T  # Zᵀ A⁻¹
            D = D - (U * (((U.T @ D) * Zh).sum(1) / (ZA * Zh).sum(1))) @ ZA  # mu (d,)
            del ZA
            for halvings in range(8):
                step = of_spectrum(W + 0.5**halvings * D)
                if step[-1] < cost:
                    break
            else:
                break
            gain = 1 - step[-1] / cost
            U, Zh, W, cost = step
            if gain < o["tolerance"]:
                break
        return W
