"""Before any weight is loaded: what would be edited in a model, and whether anything stands in the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mosectl.errors import ModelError
from mosectl.model.architecture import Architecture, disk_names, resolve, skeleton
from mosectl.model.loading import DTYPES
from mosectl.model.positions import Window, window
from mosectl.model.readiness import Problem, load_tokenizer, reading_problems, weight_problems
from mosectl.model.tokens import check_tokenizer
from mosectl.storage.checkpoint import Checkpoint, index_tensors, locate, open_checkpoint, read_config, twins
from mosectl.storage.gguf import origin as gguf_origin
from mosectl.storage.hub import remote_tensors


@dataclass(frozen=True)
class Diagnosis:
    """What `mosectl doctor` found."""

    model: str
    revision: str | None
    architecture: Architecture
    parameters: int
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]  # (name on disk, dtype, shape), a mixture's first expert's
    memory: dict[str, int]  # bytes to load the model, by dtype
    problems: tuple[str, ...]  # what stands in the way of editing
    notes: tuple[str, ...]


def diagnose(model: str | Path, revision: str | None = None) -> Diagnosis:
    """Look at config and tensor names (for a hub model that is not in the cache by range requests: no weight is loaded).

    Raises:
        ModelError: unknown or quantised model, or no safetensors. HubError.
    """
    folder, name, commit = locate(model, revision, weights=False)
    checkpoint = _on_disk(model, folder, commit)
    found = {n: (e.dtype, e.shape) for n, e in checkpoint.tensors.items()} if checkpoint else None
    found = found or remote_tensors(str(model), commit or revision)
    config = read_config(folder)
    meta_model = skeleton(config, len(found))
    arch = resolve(meta_model, name)
    on_disk = disk_names(arch, found)
    edited = {p.name: [(n, *found[n]) for n in on_disk[p.name]] for p in arch.projections}
    parameters = sum(p.numel() for p in meta_model.parameters())
    problems, notes = (
        weight_problems(meta_model, folder, found),
        _notes(arch, folder, twins(checkpoint) if checkpoint else []),
    )
    quantised = (t for every in edited.values() for t in every if t[1] not in ("F32", "F16", "BF16"))
    if odd := next(quantised, None):
        problems.append(Problem(f"{odd[0]} is stored as {odd[1]}", "use an unquantised checkpoint"))
    try:
        tokenizer = load_tokenizer(folder)
    except ModelError as e:
        at = f"{Path(e.where).name}: " if Path(e.where).is_file() else ""
        problems.append(Problem(at + e.what, e.fix))
    else:
        problems += reading_problems(meta_model, folder, tokenizer)
        notes += check_tokenizer(tokenizer)
        if (rows := window(meta_model).rows) < len(tokenizer):
            notes.append(
                f"{len(tokenizer) - rows} tokens of its tokenizer have no embedding: prompts with them are refused"
            )
    return Diagnosis(
        model=name,
        revision=commit,
        architecture=arch,
        parameters=parameters,
        tensors=tuple(every[0] for every in edited.values()),
        memory={kind: parameters * d.itemsize for kind, d in DTYPES.items()},
        problems=tuple(map(str, problems)),
        notes=tuple(notes),
    )


def _on_disk(model: str | Path, folder: Path, commit: str | None) -> Checkpoint | None:
    """The checkpoint; None for a hub model of which the cache has not all."""
    if Path(model).exists():
        return open_checkpoint(model)
    try:
        return Checkpoint(folder, str(model), commit, index_tensors(folder))
    except ModelError:
        return None


def _notes(arch: Architecture, folder: Path, others: Sequence[str]) -> list[str]:
    from mosectl.checkpoints.journal import read_journal

    out = []
    if not arch.listed:
        out.append(f"'{arch.model_type}' is not in mosectl's table; its layers were found by their structure")
    if arch.post_norm:
        out.append(f"a norm follows the FFN ({arch.post_norm}): it sees the turned output at its old length")
    if mixed := [p for p in arch.projections if not p.single_matrix]:
        out.append(
            f"{len(mixed)} layers are mixtures of {mixed[0].experts} experts: one rotation turns all of a layer's"
        )
    if len(arch.projections) < 4:
        out.append(f"only {len(arch.projections)} layers: an edit has little room here and may not reach its targets")
    if arch.tied_embeddings:
        out.append("input and output embeddings are tied (they are not edited)")
    if others:
        some = ", ".join(others)
        out.append(f"holds the weights once more for other programs, not edited and not copied by apply: {some}")
    if file := gguf_origin(folder):
        out += file.notes()
    if journal := read_journal(folder):
        out.append(f"already edited: {len(journal.patches)} patches are applied (mosectl.json)")
    return out


def reader(model: str | Path, revision: str | None = None) -> tuple[Any, Window]:
    """The model's tokenizer, and what the model can read, without its weights.

    Raises:
        ModelError: there is no tokenizer that can be loaded, no such model, or none that can be edited. HubError.
    """
    tokenizer, seen, refused = read_through(model, revision)
    if refused:
        raise refused
    return tokenizer, seen


def read_through(model: str | Path, revision: str | None = None) -> tuple[Any, Window, ModelError | None]:
    """As :func:`reader`, for whoever only reads: beside it what an edit would say that refuses such a model, if it would.

    Raises:
        ModelError: there is no tokenizer that can be loaded, or no such model. HubError.
    """
    folder, name, _ = locate(model, revision, weights=False)
    # First: transformers reads the config for a tokenizer too, whatever it claims.
    meta_model = skeleton(read_config(folder))
    tokenizer, seen = load_tokenizer(folder), window(meta_model)
    try:
        resolve(meta_model, name)
    except ModelError as e:
        return tokenizer, seen, e
    return tokenizer, seen, None
