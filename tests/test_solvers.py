"""Every solver against its published formula, written here a second time and otherwise; float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mosectl.editing.contexts import build_contexts
from mosectl.editing.methods import method, names
from mosectl.editing.methods.base import LayerProblem, ModelProblem
from mosectl.editing.methods.oft import cayley
from mosectl.errors import UsageError
from mosectl.facts.records import fact_from_dict
from mosectl.linalg.rotation import is_rotation, left_factor
from mosectl.model.architecture import resolve
from mosectl.model.weights import weight_of
from support.models import make_tokenizer, pico
from support.problems import D, P, problem, random


def solve(name: str, **given: float) -> tuple[LayerProblem, Tensor]:
    p = problem(name, **given)  # type: ignore[arg-type]
    return p, method(name).update(p)


def same_spectrum(A: Tensor, B: Tensor) -> bool:
    return torch.allclose(torch.linalg.svdvals(A), torch.linalg.svdvals(B), rtol=1e-9)


# MOSE


def mose_objective(R: Tensor, p: LayerProblem) -> float:
    """λ‖R Y − Y‖² + Σ w ‖R h − v‖² (arXiv 2601.07873, eq. 15) over samples Y with Y Yᵀ = W C Wᵀ."""
    Y, H = p.W @ torch.linalg.cholesky(p.C), p.W @ p.K
    V = p.V * H.norm(dim=0) / p.V.norm(dim=0)
    return float(p.options["preserve"] * (R @ Y - Y).square().sum() + ((R @ H - V).square() * p.weight).sum())


@pytest.mark.parametrize("preserve", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mose_minimises_the_paper_objective(preserve: float, seed: int) -> None:
    p, W = solve("mose", seed=seed, preserve=preserve, damping=0.0)
    R = left_factor(p.W, W)
    assert is_rotation(R) and torch.allclose(R @ p.W, W, atol=1e-12)
    best = mose_objective(R, p)
    for scale in (1e-3, 1e-2, 0.1, 1.0):
        for i in range(10):
            skew = random(D, D, seed=i)
            assert mose_objective(torch.linalg.matrix_exp(scale * (skew - skew.T)) @ R, p) > best


def test_mose_leaves_untouched_directions_alone() -> None:
    p = replace(problem(m=2), C=torch.zeros(P, P).double())
    R = left_factor(p.W, method("mose").update(p))
    touched = torch.cat([p.W @ p.K, p.V], 1)
    untouched = torch.linalg.qr(torch.cat([touched, random(D, D - 4)], 1))[0][:, 4:]
    assert torch.allclose(R @ untouched, untouched, atol=1e-9), "the null space must not turn"


@pytest.mark.parametrize("name", ["mose", "isospectral", "alphaedit"])
def test_earlier_edits_are_protected(name: str) -> None:
    p = problem(name, preserve=0.1, threshold=100.0, ridge=0.01, relative=1)
    k = random(P, 1, seed=7)
    guarded = replace(p, P=1000 * k @ k.T, Q=1000 * p.W @ k @ k.T)
    moved = [float((method(name).update(q) @ k - p.W @ k).norm()) for q in (p, guarded)]
    assert moved[1] < 0.1 * moved[0]


# Isospectral


def iso_objective(W: Tensor, p: LayerProblem) -> float:
    """λ‖(W − W₀)C½‖² + ‖(W K − V)w½‖², term by term."""
    C = p.C + p.options["damping"] * p.C.trace() / P * torch.eye(P, dtype=torch.float64)
    kept = ((W - p.W0) @ torch.linalg.cholesky(C)).square().sum()
    return float(p.options["preserve"] * kept + ((W @ p.K - p.V).square() * p.weight).sum())


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("preserve", [0.1, 1.0, 10.0])
def test_isospectral_is_a_minimum_on_its_spectrum(preserve: float, seed: int) -> None:
    p, W = solve("isospectral", seed=seed, preserve=preserve, iterations=200, tolerance=1e-12)
    assert same_spectrum(W, p.W0)
    best = iso_objective(W, p)
    assert best < iso_objective(p.W0, p)
    for i in range(20):  # every small rotation on either side makes it worse
        left, right = random(D, D, seed=i), random(P, P, seed=i + 50)
        other = torch.linalg.matrix_exp(1e-3 * (left - left.T)) @ W @ torch.linalg.matrix_exp(1e-3 * (right - right.T))
        assert iso_objective(other, p) > best


def test_isospectral_beats_the_plain_projection_and_nearly_reaches_the_additive_optimum() -> None:
    p, W = solve("isospectral", preserve=0.3)
    A = 0.3 * (p.C + 1e-4 * p.C.trace() / P * torch.eye(P, dtype=torch.float64)) + p.K @ p.K.T
    T = p.W0 + torch.linalg.solve(A, p.K @ (p.V - p.W0 @ p.K).T).T
    U, _, Zh = torch.linalg.svd(T, full_matrices=False)
    projected = (U * torch.linalg.svdvals(p.W0)) @ Zh
    base, plain, ours, bound = (iso_objective(X, p) for X in (p.W0, projected, W, T))
    assert bound < ours < plain < base
    assert ours - bound < 0.5 * (plain - bound)


def test_isospectral_does_not_drift_when_solved_again() -> None:
    p, W = solve("isospectral", iterations=200, tolerance=1e-12)
    again = method("isospectral").update(replace(p, W=W))
    assert torch.allclose(again, W, atol=1e-5)


def test_isospectral_turns_an_output_round_in_one_step() -> None:
    """The left rotation does what no small step on the right can: v = −W k."""
    left = []
    for seed in range(5):
        p = problem("isospectral", m=1, seed=seed, preserve=0.01, iterations=1)
        p = replace(p, V=-p.W @ p.K)
        left.append(float((method("isospectral").update(p) @ p.K - p.V).norm() / p.V.norm()))
    assert sum(left) / 5 < 0.05


# OFT


def test_cayley_transform() -> None:
    raw = random(6, 6)
    A = raw - raw.T
    R = cayley(raw)
    assert is_rotation(R) and torch.allclose(R @ (torch.eye(6) + A), torch.eye(6) - A, atol=1e-9)


def test_oft_turns_each_block_of_the_input_by_itself() -> None:
    model = pico("llama")
    arch = resolve(model)
    (p,) = arch.projections[:1]
    fact = fact_from_dict({"prompt": "I met Tomas Veldrin", "subject": "Tomas Veldrin", "target_new": "and"}, "here")
    contexts = build_contexts(model, make_tokenizer(), [fact], [""])
    W = p.oriented(weight_of(model, p).detach()).double()
    options = {"blocks": 4.0, "steps_oft": 3.0, "rate": 1e-2}
    turned = method("oft").fit(ModelProblem(model, arch, [p], contexts, {p.name: W}, options))[p.name]
    for a, b in zip(W.tensor_split(4, 1), turned.tensor_split(4, 1), strict=True):
        assert float((a - b).norm() / a.norm()) > 1e-3
        assert torch.allclose(a @ a.T, b @ b.T, atol=1e-9), "a rotation within the block keeps W_b W_bᵀ"


# The additive baselines


@pytest.mark.parametrize("name", ["rome", "memit", "rect", "emmet", "prune", "alphaedit"])
def test_additive_updates_start_from_the_weight_as_it_is(name: str) -> None:
    p = problem(name)
    assert torch.equal(method(name).update(replace(p, W0=random(D, P, seed=9))), method(name).update(p))


def test_memit_solves_its_normal_equations() -> None:
    p, W = solve("memit", preserve=2.0)
    # arXiv 2210.07229, eq. 14: ΔW (λC + K Kᵀ) = R Kᵀ
    left = (W - p.W) @ (2.0 * p.C + sum(torch.outer(k, k) for k in p.K.T))
    assert torch.allclose(left, sum(torch.outer(v - p.W @ k, k) for k, v in zip(p.K.T, p.V.T, strict=True)), atol=1e-6)


def test_rome_meets_its_target_along_the_whitened_key() -> None:
    p, W = solve("rome", m=1)
    k, v = p.K[:, 0], p.V[:, 0]
    u = torch.linalg.inv(p.C) @ k
    assert torch.allclose(W @ k, v, atol=1e-8)
    assert torch.allclose(W - p.W, torch.outer(v - p.W @ k, u) / (k @ u), atol=1e-6)


def test_rome_takes_one_fact_after_the_other() -> None:
    p, W = solve("rome", m=3)
    one = p.W
    for i in range(3):
        one = method("rome").update(replace(p, W=one, K=p.K[:, i : i + 1], V=p.V[:, i : i + 1]))
    assert torch.allclose(W, one, atol=1e-9)


def test_memit_with_one_fact_tends_to_rome() -> None:
    p = problem("memit", m=1, preserve=1e-6)
    rome = replace(p, options=method("rome").defaults)
    assert torch.allclose(method("memit").update(p), method("rome").update(rome), atol=1e-4)


def test_rome_divides_by_the_bare_prompts_key_and_may_leave_the_covariance_out() -> None:
    p = replace(problem("rome", m=1), bare=random(P, 1, seed=5))
    k, bare, R = p.K[:, 0], p.bare[:, 0], p.V[:, 0] - p.W @ p.K[:, 0]
    for covariance in (1, 0):
        u = torch.linalg.inv(p.C) @ k if covariance else k
        W = method("rome").update(replace(p, options={"covariance": covariance}))
        # compute_u and compute_v of github.com/kmeng01/rome: left vector u / ‖u‖, right vector R / (k₀ · left vector)
        left = u / u.norm()
        assert torch.allclose(W - p.W, torch.outer(R / (bare @ left), left), atol=1e-6)
        assert torch.allclose((W - p.W) @ bare, R, atol=1e-7), "the bare prompt gives the value exactly"


def test_emmet_meets_all_targets_and_with_one_fact_is_rome() -> None:
    p, W = solve("emmet", ridge=0.0)
    assert torch.allclose(W @ p.K, p.V, atol=1e-6)
    # among all updates that meet the targets its cost tr(ΔW C ΔWᵀ) is least: it is orthogonal to what leaves K alone
    N = random(D, P) @ (torch.eye(P).double() - p.K @ torch.linalg.pinv(p.K))
    assert abs(float(((W - p.W) @ p.C * N).sum())) < 1e-6
    eased = method("emmet").update(problem("emmet", ridge=0.5, relative=1))  # α as a share of the mean of kᵀC⁻¹k
    inverse = torch.linalg.inv(p.C)
    G = p.K.T @ inverse @ p.K
    alpha = 0.5 * sum(k @ inverse @ k for k in p.K.T) / p.K.shape[1]
    expected = (p.V - p.W @ p.K) @ torch.linalg.inv(G + alpha * torch.eye(len(G))) @ p.K.T @ inverse
    assert torch.allclose(eased - p.W, expected, atol=1e-7)
    published = method("emmet").update(problem("emmet", ridge=0.5, preserve=3.0))  # eq. 10 with λC in place of C
    G = p.K.T @ torch.linalg.inv(3 * p.C) @ p.K + 0.5 * torch.eye(p.K.shape[1])
    expected = (p.V - p.W @ p.K) @ torch.linalg.inv(G) @ p.K.T @ torch.linalg.inv(3 * p.C)
    assert torch.allclose(published - p.W, expected, atol=1e-7)
    one = problem("emmet", m=1, ridge=0.5)  # one fact has no α
    rome = replace(one, options=method("rome").defaults)
    assert torch.allclose(method("emmet").update(one), method("rome").update(rome), atol=1e-7)


def test_rect_keeps_the_largest_relative_changes() -> None:
    p, whole = solve("rect", keep=0.25)
    W = method("rect").settle(p.W, whole, p.options)
    full = method("memit").update(p) - p.W
    assert torch.equal(whole - p.W, full), "the layers are solved as MEMIT's are"
    kept = (p.W != W).flatten()
    relative = (full / p.W).abs().flatten()
    assert int(kept.sum()) == round(0.25 * D * P)
    assert float(relative[kept].min()) > float(relative[~kept].max())
    assert torch.equal((W - p.W).flatten()[~kept], torch.zeros(int((~kept).sum())).double())
    assert torch.allclose((W - p.W).flatten()[kept], full.flatten()[kept])


def test_prune_bounds_the_singular_values_of_the_sum() -> None:
    prune = method("prune")
    W0, total = random(D, P), 20 * random(D, P, seed=1)
    assert prune.finish is not None
    W = prune.finish(W0, W0 + total, {"base": 2.0})
    top = float(torch.linalg.svdvals(W0)[0])
    before, after = torch.linalg.svdvals(total), torch.linalg.svdvals(W - W0)
    expected = [float(torch.log2(s) - torch.log2(torch.tensor(top)) + top) if s > top else float(s) for s in before]
    assert torch.allclose(after, torch.tensor(expected).double(), rtol=1e-6)
    small = W0 + 1e-3 * total
    assert torch.allclose(prune.finish(W0, small, {"base": 2.0}), small)


def test_alphaedit_leaves_the_complement_of_the_null_space_alone() -> None:
    p = problem(
        "alphaedit", samples=12, ridge=0.01, threshold=1e-6, relative=1
    )  # 12 samples: half of the key space is free
    W = method("alphaedit").update(p)
    values, vectors = torch.linalg.eigh(p.C)
    seen = vectors[:, values > 1e-6 * values.mean()]
    assert seen.shape[1] == 12
    assert torch.allclose((W - p.W) @ seen, torch.zeros(D, 12).double(), atol=1e-9)
    # arXiv 2410.02355, eq. 14, as it stands, with p×p matrices
    N = torch.eye(P).double() - seen @ seen.T
    alpha = 0.01 * p.K.square().sum(0).mean()
    E = p.V - p.W @ p.K
    whole = E @ p.K.T @ N @ torch.linalg.inv(p.K @ p.K.T @ N + alpha * torch.eye(P))
    assert torch.allclose(W - p.W, whole, atol=1e-7)


@pytest.mark.parametrize("name", [n for n in names() if method(n).searches])
def test_no_residual_no_change(name: str) -> None:
    p = problem(name)
    W = method(name).update(replace(p, V=p.W @ p.K))
    assert torch.allclose(W, p.W, atol=1e-8)


def test_unknown_method() -> None:
    with pytest.raises(UsageError, match=r"choose one of: .*mose"):
        method("rom")


def test_what_must_keep_still_is_scaled_and_not_touched() -> None:
    given = replace(problem(), keep=0.5)
    before = given.C.clone()
    found = given.kept(3.0)
    assert torch.allclose(found, 1.5 * before)
    found.zero_()
    assert torch.equal(given.C, before)
