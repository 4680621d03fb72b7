"""Loaded models: load one, patch it in memory, ask it with a patch on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mosectl.checkpoints.apply import check_stack
from mosectl.errors import BaseMismatch, Notice
from mosectl.hub.place import local
from mosectl.model.architecture import resolve
from mosectl.model.edit_site import Projection
from mosectl.model.loading import check_where, load
from mosectl.model.positions import note_prompts
from mosectl.model.questions import generate
from mosectl.model.weights import exchanged, weights_of
from mosectl.patch.change import Change, changed
from mosectl.patch.file import Patch
from mosectl.patch.fingerprint import match
from mosectl.patch.finite import check_changed, check_weight
from mosectl.storage.checkpoint import open_checkpoint


def note_chat(tokenizer: Any, chat: bool, done: str, instead: str = "give --chat") -> None:
    """A hint where a model that may be one for chats is used without its template; ``done``: "asked", "edited"."""
    if not chat and getattr(tokenizer, "chat_template", None):
        what = f"{done} without the tokenizer's chat template, as plain text: {instead} if the model is one for chats"
        warnings.warn(what, Notice, stacklevel=2)


@contextmanager
def patched(model: nn.Module, *patches: Patch, force: bool = False) -> Iterator[nn.Module]:
    """The model with ``patches`` applied in order inside the block; afterwards every weight is bit for bit what it was.

    Args:
        force: skip the check that the patches were made for this model.
    Raises:
        BaseMismatch: a patch was made for other weights. ModelError, EditFailed: as :func:`changes_on`.
    """
    projections = {p.name: p for p in resolve(model).projections}  # type: ignore[arg-type]
    changes: dict[str, list[Change]] = {}
    ids: dict[str, list[str]] = {}
    for patch in patches:
        for module, change in patch.changes.items():
            if module not in projections:
                raise BaseMismatch(f"no module '{module}' in this model", fix="give the model the patch is for")
            if not force:
                weight = weights_of(model, projections[module])[0]
                _check(patch, module, weight if not patch.parents else None)
            changes.setdefault(module, []).append(change)
            ids.setdefault(module, []).append(patch.id)
    with changes_on(model, [(projections[module], stacked) for module, stacked in changes.items()], ids):
        yield model


@contextmanager
def changes_on(
    model: nn.Module,
    changes: Sequence[tuple[Projection, Sequence[Change]]],
    ids: Mapping[str, Sequence[str]] | None = None,
) -> Iterator[None]:
    """The model with each projection's weights changed inside the block, rounded once from what they were.

    Args:
        ids: by module path, of the patches that its changes are from.
    Raises:
        ModelError: a weight is not finite. EditFailed: it would not be so any more.
    """
    known = ids or {}
    with exchanged(
        (weight, p.stored(_changed(p, weight.detach(), stacked, known.get(p.name, ()))))
        for p, stacked in changes
        for weight in weights_of(model, p)
    ):
        yield


def _changed(p: Projection, weight: Tensor, changes: Sequence[Change], ids: Sequence[str]) -> Tensor:
    W = p.oriented(weight)
    check_weight(p.weight_name, W, "the loaded model", zeros=True)
    result = changed(changes, W)
    check_changed(p.weight_name, W, result, changes, ids)
    return result


def _check(patch: Patch, module: str, weight: Tensor | None) -> None:
    found = match(patch.base[module], weight) if weight is not None else None
    if found and not found.same:
        raise BaseMismatch(
            f"the patch is for {patch.model}: {found.note}", where=module, fix="give that model, or force=True"
        )


def load_patches(paths: Sequence[str | Path]) -> list[Patch]:
    """Read patch files (or hf://user/repo, downloaded) in the order given."""
    return [Patch.load(local(p)) for p in paths]


@dataclass(frozen=True)
class Asked:
    """One prompt and its greedy continuations."""

    prompt: str
    before: str
    after: str | None  # with the patches on; None when there are none


def ask(
    prompts: Sequence[str],
    model: str | Path,
    patches: Sequence[Patch] = (),
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    chat: bool = False,
    max_new_tokens: int = 20,
    force: bool = False,
) -> list[Asked]:
    """Greedy continuations of ``prompts`` without and with ``patches``.

    Raises:
        ModelError, BaseMismatch, HubError, UsageError.
    """
    check_where(device, dtype)
    if patches and not force:
        check_stack(open_checkpoint(model, revision), patches)
    loaded = load(
        model, revision=revision, device=device, dtype=dtype, check=lambda m, tok: note_prompts(m, tok, prompts, chat)
    )
    note_chat(loaded.tokenizer, chat, "asked")

    def answers() -> list[str]:
        return generate(loaded.model, loaded.tokenizer, prompts, max_new_tokens=max_new_tokens, chat=chat)

    before, after = answers(), None
    if patches:
        with patched(loaded.model, *patches, force=True):  # checked above, against the files
            after = answers()
    return [Asked(p, before[i], after[i] if after else None) for i, p in enumerate(prompts)]
