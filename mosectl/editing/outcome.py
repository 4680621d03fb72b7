"""What became of an edit: of each fact, and the patch that holds the change and records how it was made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mosectl._version import __version__
from mosectl.checkpoints.journal import read_journal
from mosectl.editing.edited_layers import EditedLayers
from mosectl.facts.corpus import Corpus
from mosectl.facts.records import Fact
from mosectl.linalg.spectrum import Stability
from mosectl.measure.answers import Interview, Scores
from mosectl.model.architecture import Architecture, disk_names
from mosectl.model.edit_site import Projection
from mosectl.model.generation import answer, says
from mosectl.model.loading import Loaded
from mosectl.model.moe import block_name
from mosectl.model.weights import weights_of
from mosectl.patch.change import Change
from mosectl.patch.file import Patch
from mosectl.patch.fingerprint import fingerprint
from mosectl.patch.record import HOLDS, BaseTensor, PatchFact
from mosectl.storage.data_sets import origin


@dataclass(frozen=True)
class FactResult:
    """What became of one fact."""

    fact: Fact
    before: str
    after: str
    probability_before: float
    probability_after: float
    status: str  # "changed", "already known", "not reached", "not finite"; "not edited": the guard had stopped the run
    loss: float  # right after its batch: −log P(target), nats a token, mean over its contexts
    wordings: tuple[str, ...]  # the model's own, edited along with the prompt
    right_after: str | None = None  # the answer right after its batch, where there were several

    @property
    def holds(self) -> bool:
        """Does the model say the new object, after the whole run?"""
        return self.status in HOLDS

    @property
    def held_right_after(self) -> bool | None:
        """Did it right after its batch? None: that was not asked, as one batch is the whole run."""
        return None if self.right_after is None else says(self.right_after, *self.fact.targets)


def fact_results(
    facts: Sequence[Fact],
    before: Interview,
    after: Interview,
    losses: Sequence[float],
    wordings: Sequence[tuple[str, ...]],
    right_after: Sequence[str] = (),
) -> tuple[FactResult, ...]:
    """What became of each fact; there are fewer losses than facts where the guard has stopped the run.

    Args:
        right_after: the answers right after each fact's batch; none where one batch is the whole run.
    """
    out = []
    tried = [*losses, *[None] * (len(facts) - len(losses))]
    then = [*right_after, *[None] * (len(facts) - len(right_after))]
    asked = zip(facts, before.answers, after.answers, tried, wordings, then, strict=True)
    for fact, old, new, loss, own, said in asked:
        if loss is None:
            status, loss = "not edited", math.nan
        elif not math.isfinite(loss):
            status = "not finite"
        elif not says(new.text, *fact.targets):
            status = "not reached"
        else:
            status = "already known" if says(old.text, *fact.targets) else "changed"
        p = old.probability, new.probability
        out.append(FactResult(fact, answer(old.text), answer(new.text), *p, status, loss, own, said))
    return tuple(out)


def metrics_of(
    scores: Scores,
    felt: Mapping[str, Sequence[Mapping[str, Any]]],
    drifts: Sequence[Stability],
    compaction: Mapping[str, float],
) -> dict[str, Any]:
    """What was measured, as a patch records it; ``felt`` by name: shares and next tokens (measure.groups.recorded)."""
    return {
        "scores": _rounded(asdict(scores)),
        "stability": [_rounded(asdict(s)) for s in drifts],
        "compaction": _rounded({block_name(module): e for module, e in compaction.items()}),
        **{name: [_rounded(values) for values in found] for name, found in felt.items()},
    }


def patch_of(
    loaded: Loaded,
    arch: Architecture,
    corpus: Corpus,
    layers: EditedLayers,
    changes: Mapping[str, Change],
    facts: Sequence[FactResult],
    metrics: dict[str, Any],
) -> Patch:
    """The patch of these changes (by module path), with all that its record says about the edit."""
    import transformers

    edited = [p for p in arch.projections if p.name in changes]
    used = [r for r in facts if r.status != "not edited"]
    journal = read_journal(loaded.checkpoint.folder) if loaded.checkpoint else None
    return Patch(
        changes=changes,
        method=layers.solver.name,
        side=layers.side,
        options={**_options(loaded, edited, layers, corpus), **_origins(used)},
        model=loaded.checkpoint.model if loaded.checkpoint else _model_name(loaded.model),
        revision=loaded.checkpoint.revision if loaded.checkpoint else None,
        model_type=arch.model_type,
        base=_bases(loaded, arch, edited),
        facts=tuple(map(_patch_fact, used)),
        metrics=metrics,
        seed=layers.options.seed,
        versions={
            "mosectl": __version__,
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
        },
        parents=tuple(p.id for p in journal.patches) if journal else (),
    )


def _options(loaded: Loaded, edited: Sequence[Projection], layers: EditedLayers, corpus: Corpus) -> dict[str, Any]:
    out = layers.options.to_record()
    out["solver"] = layers.solver_options
    out["layers"] = [p.layer for p in edited]
    out["editor"] = layers.editor.id if layers.editor else None
    out["corpus"] = {"name": corpus.name, "sha256": corpus.sha256}
    out["dtype"] = str(weights_of(loaded.model, edited[0])[0].dtype).removeprefix("torch.")
    for key in ("method", "seed"):  # these stand in the record itself
        del out[key]
    return out


def _origins(facts: Sequence[FactResult]) -> dict[str, Any]:
    """Which files of data sets on the Hub the facts come from, at which commits; nothing of files of this machine."""
    found = dict.fromkeys(origin(r.fact.source) for r in facts)
    named = [place for place in found if place]
    return {"facts": named} if named else {}


def _model_name(model: Any) -> str:
    return Path(str(getattr(model.config, "_name_or_path", "") or "model")).name


def _bases(loaded: Loaded, arch: Architecture, edited: Sequence[Projection]) -> dict[str, BaseTensor]:
    """Fingerprints of the weights as the checkpoint stores them; of the live ones where there is no checkpoint."""
    names = disk_names(arch, loaded.checkpoint.tensors) if loaded.checkpoint else {}
    return {
        p.name: fingerprint(
            p.weight_name,
            loaded.checkpoint.read(names[p.name][0]) if loaded.checkpoint else weights_of(loaded.model, p)[0],
        )
        for p in edited
    }


def _patch_fact(r: FactResult) -> PatchFact:
    return PatchFact(
        prompt=r.fact.prompt,
        subject=r.fact.subject,
        target_new=r.fact.target_new,
        before=r.before,
        after=r.after,
        probability_before=round(r.probability_before, 6),
        probability_after=round(r.probability_after, 6),
        status=r.status,
        wordings=r.wordings,
        space_before_target=r.fact.space_before_target,
        target_aliases=r.fact.target_aliases,
        right_after=r.right_after,
    )


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Six significant digits: more would be noise."""
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
