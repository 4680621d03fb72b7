"""`mosectl stats` and `mosectl sample`: what edits take their statistics from. Imported by cli.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mosectl.cli.params import FILE, Corpus, Device, Dtype, Json, Model, Revision
from mosectl.text.shown import word


def stats(
    model: Model,
    layers: Annotated[str, typer.Option(help="all, or layers such as 19,20,21.")] = "all",
    corpus: Corpus = None,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Compute a model's statistics ahead of edits. Several GPUs: `accelerate launch -m mosectl stats …`."""
    from mosectl.editing.second_moments import prepare
    from mosectl.model import distributed
    from mosectl.render import console, terminal

    with console.progress(quiet=not distributed.first()) as on_step:
        found = prepare(model, layers, corpus, revision=revision, device=device, dtype=dtype, on_step=on_step)
    if distributed.first():
        console.data(
            {"layers": sorted(found.C), "tokens": found.tokens, "error": found.error, "cached": found.cached}
        ) if as_json else terminal.statistics(found)


def sample(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Text file to write, one sample a line.", **FILE)],
    samples: Annotated[int, typer.Option(min=1, help="How many.")] = 1536,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens each, at most.")] = 64,
    seed: Annotated[int, typer.Option(help="Another seed, other text.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Let a model write text of its own, for --corpus: what it says unasked is what an edit should leave alone."""
    from mosectl.render import console
    from mosectl.storage.atomic import write_bytes
    from mosectl.storage.places import new_file

    with new_file(out, overwrite=overwrite, reads=(model,)) as place, console.progress() as on_step:
        from mosectl.model.generation import own_text
        from mosectl.model.loading import load
        from mosectl.storage.progress import Clock

        place.reserve(8 * samples * tokens)  # bytes: a token has four or five
        clock = Clock(on_step)
        with clock("load"):
            loaded = load(model, revision=revision, device=device, dtype=dtype)
        with clock("sample") as step:
            texts = own_text(loaded.model, loaded.tokenizer, samples, tokens=tokens, seed=seed, on_step=step)
        write_bytes(place.ready(), "".join(f"{text}\n" for text in texts).encode())
    console.hint(f"{len(texts)} samples in {out}; use them with: mosectl edit … --corpus {word(out)}")
