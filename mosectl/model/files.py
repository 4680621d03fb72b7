"""What transformers reads of a model folder besides weights, looked at first: it would wait for a pipe, or be overflown."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from mosectl.errors import ModelError
from mosectl.storage.inputs import parse_json, read_bytes

LIMITS = {"tokenizer.json": 48_000_000, "vocab.json": 48_000_000}  # bytes; the largest known has 33 MB
LIMIT = 10_000_000  # of every other
OBJECTS = (
    "config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "chat_template.json", "processor_config.json", "adapter_config.json",
)  # fmt: skip
TEXTS = (".json", ".txt", ".model", ".tiktoken")  # of a tokenizer: none of them may be a pipe
_FIX = "fetch the model again"


def has_chat_template(folder: Path) -> bool:
    """Does a model folder bring a chat template? Looked up without loading its tokenizer; unreadable files have none."""
    if (folder / "chat_template.jinja").is_file():
        return True
    for name in ("tokenizer_config.json", "chat_template.json"):
        with suppress(ModelError, ValueError, TypeError):
            found = parse_json(read_bytes(folder / name, ModelError, _FIX, LIMIT)) if (folder / name).is_file() else {}
            if "chat_template" in found:
                return True
    return False


def check_model_files(folder: Path) -> None:
    """Are the files that transformers may read there regular, of a size within reason, and JSON that any reader takes?

    Raises:
        ModelError: one is not; the file is named.
    """
    templates = [*folder.glob("*.jinja"), *folder.glob("additional_chat_templates/*.jinja")]
    for file in sorted([*templates, *(f for f in folder.iterdir() if f.suffix in TEXTS)]):
        if not file.is_dir() and file.exists() and (not file.is_file() or file in templates):
            read_bytes(file, ModelError, _FIX, LIMIT)
    for name in OBJECTS:
        file = folder / name
        if file.exists():
            raw = read_bytes(file, ModelError, _FIX, LIMITS.get(name, LIMIT))
            try:
                if not isinstance(parse_json(raw, special=True), dict):
                    raise ValueError("not a JSON object")
            except ValueError as e:
                raise ModelError(f"damaged: {e}", where=str(file), fix=_FIX) from e
