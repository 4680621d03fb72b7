"""Where an edit turns FFN output projections: layers (arXiv 2601.07873, eqs. 21-22), and the token whose keys it works on.

A fact can be edited low, where its subject is read, or high, where its prompt's last token is about to say the object. At
the subject every relation shares one key, and all of them move with the one that is edited; the key of the prompt's last
token knows which was asked. There the nearest are prompts with the same object (docs/explanation/methods.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mosectl.editing.methods import DEFAULT, method
from mosectl.editing.options import EditOptions
from mosectl.editing.second_moments import ALL, HIGH, LOW
from mosectl.model.architecture import Architecture, parse_layers
from mosectl.model.edit_site import Projection
from mosectl.model.forward import Batch, ffn_output, run_until_stopped


@dataclass(frozen=True)
class LayerScore:
    """How strongly one layer answers to the facts' subjects."""

    layer: int
    activation: float  # mean root mean square of the inner activation k = σ(x W_fc)
    residual: float  # mean ‖W k‖ / ‖h‖, h the hidden state the layer hands on
    score: float  # product of the two, each divided by its largest value over the layers


def score_layers(model: nn.Module, arch: Architecture, batch: Batch, subject: Tensor) -> list[LayerScore]:
    """Score every layer at the facts' last subject token.

    The paper picks l* by the strength of the inner activation ‖σ(x W_fc)‖ and by the normalised residual; it leaves open
    how the two are joined. Here each is scaled to its largest layer and they are multiplied: an edit can only use a layer
    that answers to the subject *and* whose output is not dwarfed by the residual stream it is added to.

    Args:
        subject: (B,) position of each row's last subject token.
    """
    rows = torch.arange(len(subject))
    inner: dict[int, float] = {}
    written: dict[int, Tensor] = {}
    hidden: dict[int, Tensor] = {}

    def at(x: Tensor) -> Tensor:
        x = x if x.dim() == 3 else x.view(len(subject), -1, x.shape[-1])
        return x[rows.to(x.device), subject.to(x.device)].float()

    def projection_hook(p: Projection) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            inner[p.layer] = float(at(args[0]).square().mean(-1).sqrt().mean())
            written[p.layer] = at(ffn_output(out, module, len(subject))).norm(dim=-1)

        return hook

    def layer_hook(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            hidden[layer] = at(out[0] if isinstance(out, tuple | list) else out).norm(dim=-1)

        return hook

    hooks = [(p.name, projection_hook(p)) for p in arch.projections]
    hooks += [(f"{arch.layers_path}.{p.layer}", layer_hook(p.layer)) for p in arch.projections]
    run_until_stopped(model, batch, hooks)
    residual = {i: float((written[i] / hidden[i].to(written[i].device)).mean()) for i in inner}
    top_inner, top_residual = max(inner.values()), max(residual.values())
    return [
        LayerScore(i, inner[i], residual[i], inner[i] / top_inner * residual[i] / top_residual) for i in sorted(inner)
    ]


SUBJECT, LAST = "subject_last", "last"
DEEP = 10  # layers from which a model has a place for either
MARGINS = {SUBJECT: 6.0, LAST: 3.0}  # nats: less is asked of a key that is the prompt's own
TOP = 4  # layers edited at the prompt's last token
FEW = 50  # facts that these have room for: each disturbs prompts with its old object
WIDE = 8  # layers edited at the subject's last token, at most: the more there are, the less each has to turn
STILL, LIGHT = 100.0, 1.0  # λ there, and the weight of earlier facts: with more there is no room for new ones
HEAVY = 50.0  # that weight elsewhere
NAMES = 1.0  # prompt_weight there, but of more than MANY facts in batches smaller than LARGE: these lose facts by it
MANY, LARGE = 300, 100


def settled(options: EditOptions, n: int, facts: int) -> EditOptions:
    """The options for a model of n layers and so many facts: fact token, margin and the weights of earlier facts and
    of prompts are no longer left open, nor are the layers at the subject's token of a deep model.

    Raises:
        UsageError: layers are asked for that it does not have.
    """
    layers = parse_layers(options.layers, n)
    token, ours = options.fact_token, n >= DEEP and not options.published
    if token == "auto":
        high = ours and (facts <= FEW if layers is None else min(layers) >= n / 2)
        token = LAST if high else SUBJECT
    weight, names = HEAVY, 0.0
    if ours and options.method == DEFAULT and token == SUBJECT and layers is None:
        first, width = max(1, n // 15), min(WIDE, round(n / 4))
        solver = {"preserve": STILL, **options.solver}
        options = replace(options, layers=f"{first}-{first + width - 1}", solver=solver)
        crowded = facts > MANY and 0 < options.batch_size < LARGE
        weight, names = LIGHT, NAMES if facts > FEW and not crowded else 0.0
    weight = weight if options.previous_edit_weight is None else options.previous_edit_weight
    names = names if options.prompt_weight is None else options.prompt_weight
    margin = MARGINS[token] if options.targets.margin is None else options.targets.margin
    targets = replace(options.targets, margin=margin)
    return replace(options, fact_token=token, previous_edit_weight=weight, prompt_weight=names, targets=targets)


def enough(options: EditOptions) -> float:
    """The relative error of the second moments C that an edit with settled options can live with; a published method is
    given all of the text, as its own code is.
    """
    return ALL if options.published else HIGH if options.fact_token == LAST else LOW


def named_layers(options: EditOptions, arch: Architecture) -> tuple[int, ...] | None:
    """The layers that settled options ask for, by number, by the method's publication or by the fact token.

    Returns:
        None where the layers' scores will decide.
    Raises:
        UsageError: layers are asked for that the model does not have.
    """
    n = len(arch.projections)
    chosen = parse_layers(options.layers, n)
    if chosen is None and options.published:
        return method(options.method).published.edited(arch.model_type, n)
    return top_layers(n) if chosen is None and options.fact_token == LAST else chosen


def top_layers(n: int) -> tuple[int, ...]:
    """Edited at the prompt's last token: those up to nine tenths of the depth."""
    end = max(1, n * 9 // 10 + 1)
    return tuple(range(max(0, end - TOP), min(n, end)))


def choose_layers(scores: Sequence[LayerScore], width: int = 3) -> tuple[int, ...]:
    """l* and its neighbours, lowest first: ``width`` layers around the best score.

    A layer near the top is never chosen: what it writes at the subject must still be read by attention above it. In a model
    of ten layers or more l* lies between a tenth and a fifth of the depth: the keys of the lowest layers know little but the
    subject's last token, and edits further up change more of what else is said (docs/LOG.md).
    """
    n = len(scores)
    lowest, end = (n // 10, max(n // 10 + 1, n // 5)) if n >= DEEP else (0, max(1, (2 * n) // 3))
    usable = scores[lowest:end]
    best = max(usable, key=lambda s: s.score).layer
    width = min(width, max(1, n - 1))
    first = min(max(best - width // 2, lowest), n - width)
    return tuple(range(first, first + width))


def likely_layers(n: int, width: int = 3) -> tuple[int, ...]:
    """Where :func:`choose_layers` would go in a model of n layers, as far as one can tell without running it."""
    first = n // 10 if n >= DEEP else max(0, n // 2 - 1)
    return tuple(range(first, min(n, first + width)))
