"""Before patches are applied: what in them, and in those that are there already, does not simply add up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mosectl.checkpoints.apply import check_stack
from mosectl.checkpoints.base import stored_patches
from mosectl.checkpoints.live import patched
from mosectl.model.generation import answer, says
from mosectl.model.loading import check_where, load
from mosectl.model.questions import generate
from mosectl.patch.compose import Conflict, conflicts
from mosectl.patch.file import Patch
from mosectl.storage.checkpoint import open_checkpoint

OnStep = Callable[[int, int], None]


def before_applying(
    patches: Sequence[Patch],
    model: str | Path,
    *,
    revision: str | None = None,
    ask: bool = False,
    device: str = "auto",
    force: bool = False,
    on_step: OnStep | None = None,
) -> tuple[Conflict, ...]:
    """Conflicts among ``patches`` and those that ``model`` holds; with ``ask`` also facts that would stop holding.

    Raises:
        PatchError, BaseMismatch, ModelError, HubError: as :func:`mosectl.checkpoints.apply.apply`.
    """
    check_where(device)
    checkpoint = open_checkpoint(model, revision)
    there = stored_patches(checkpoint)
    stack = [*there, *patches]
    new = {p.id for p in patches}
    found = tuple(c for c in conflicts(stack) if c.second in new)  # those among the old ones were told before
    if not ask or len(stack) < 2:
        return found
    if not force:
        check_stack(checkpoint, patches)
    return found + _lost(patches, there, model, revision, device, on_step)


def _lost(
    patches: Sequence[Patch],
    there: Sequence[Patch],
    model: str | Path,
    revision: str | None,
    device: str,
    on_step: OnStep | None,
) -> tuple[Conflict, ...]:
    """Facts of earlier patches that hold with one patch less and not with it, and own facts that do not hold here."""
    loaded = load(model, revision=revision, device=device)
    out = []
    earlier = [(p.id, f) for p in there for f in p.facts]
    for n, patch in enumerate(patches):
        prompts = [f.prompt for _, f in earlier]
        with patched(loaded.model, *patches[:n], force=True):
            before = generate(loaded.model, loaded.tokenizer, prompts) if prompts else []
        with patched(loaded.model, *patches[: n + 1], force=True):
            after = generate(loaded.model, loaded.tokenizer, prompts) if prompts else []
            own = [f for f in patch.facts if says(f.after, *f.targets)]  # held when the edit was made
            said = generate(loaded.model, loaded.tokenizer, [f.prompt for f in own]) if own else []
        for fact, new in zip(own, said, strict=True):
            if not says(new, *fact.targets):
                what = f"'{fact.target_new}' of {patch.id[:12]} does not take hold here: '{answer(new)}'"
                out.append(Conflict("lost", patch.id, patch.id, fact.prompt, what, None))
        for (owner, fact), old, new in zip(earlier, before, after, strict=True):
            if says(old, *fact.targets) and not says(new, *fact.targets):
                what = f"'{fact.target_new}' of {owner[:12]} becomes '{answer(new)}' with {patch.id[:12]}"
                out.append(Conflict("lost", owner, patch.id, fact.prompt, what, None))
        earlier += [(patch.id, f) for f in patch.facts]
        if on_step:
            on_step(n + 1, len(patches))
    return tuple(out)
