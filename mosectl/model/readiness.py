"""Can a model be edited? Judged from its config, its tensors' names and shapes and its small files, without any weight.

`doctor` tells all that stands in the way; what loads or edits a model asks the same functions first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mosectl.errors import ModelError
from mosectl.model.architecture import skeleton
from mosectl.model.files import check_model_files
from mosectl.model.positions import window
from mosectl.model.quantised import FIX, quantised
from mosectl.storage.checkpoint import DTYPES, Checkpoint, read_config
from mosectl.storage.inputs import read_json
from mosectl.storage.quiet import quiet

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]  # tensor name → dtype and shape
# Parts that a wrapper puts before or into every tensor's name → who saved it, what to do.
_WRAPPERS = {
    "_orig_mod.": (
        "a compiled model was saved with its wrapper",
        "save model._orig_mod instead, or rename the tensors",
    ),
    "base_model.model.": ("a PEFT model was saved with its wrapper", "save model.merge_and_unload() instead"),
    "module.": ("a parallel model was saved with its wrapper", "save model.module instead, or rename the tensors"),
}
_OTHER_HEAD = re.compile(r"For(Sequence|Token)Classification|ForQuestionAnswering|ForMultipleChoice|ForSequenceReward")
_HEADS = ("score.weight", "classifier.weight", "qa_outputs.weight")
_TOKENIZERS = ("tokenizer.json", "*.model", "*.model.v*", "vocab*", "*.tiktoken", "tekken*.json", "merges.txt")


@dataclass(frozen=True)
class Problem:
    """What stands in the way, and what to do about it."""

    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what}: {self.fix}"


def check_weights(checkpoint: Checkpoint) -> None:
    """Raises ModelError: the weights are not those of a causal language model as its config.json has it."""
    meta_model = skeleton(checkpoint.config)
    _refuse(weight_problems(meta_model, checkpoint.folder, shapes_of(checkpoint)), checkpoint)


def check_ready(checkpoint: Checkpoint) -> Any:
    """The tokenizer of a model that can be loaded and asked.

    Raises:
        ModelError: the first thing that stands in the way.
    """
    meta_model = skeleton(checkpoint.config)
    _refuse(weight_problems(meta_model, checkpoint.folder, shapes_of(checkpoint)), checkpoint)
    tokenizer = load_tokenizer(checkpoint.folder)
    _refuse(reading_problems(meta_model, checkpoint.folder, tokenizer), checkpoint)
    return tokenizer


def _refuse(problems: Sequence[Problem], checkpoint: Checkpoint) -> None:
    if problems:
        raise ModelError(problems[0].what, where=str(checkpoint.folder), fix=problems[0].fix)


def shapes_of(checkpoint: Checkpoint) -> Shapes:
    """Type and shape of each tensor, by name."""
    return {name: (e.dtype, e.shape) for name, e in checkpoint.tensors.items()}


# Weights.


def weight_problems(meta_model: nn.Module, folder: Path, tensors: Shapes) -> list[Problem]:
    """What is wrong with a checkpoint's tensors for a model of its config, by names and shapes."""
    if (folder / "adapter_config.json").exists():  # transformers would put it on without a word
        fix = "merge it into the model first, or remove adapter_config.json"
        return [Problem("an adapter lies in the folder beside the model (adapter_config.json)", fix)]
    config = read_config(folder)
    if how := quantised(config):  # transformers would want the package that it was made with to say what fits
        return [Problem(f"its weights are quantised ({how})", FIX)]
    architectures = [str(a) for a in config.get("architectures") or ()]
    named = next((a for a in architectures if _OTHER_HEAD.search(a)), "")
    if named or (other := next((n for n in _HEADS if n in tensors), "")):
        what = f"it is no language model: it has another head ({named or other})"
        return [Problem(what, "give the causal language model it was made from")]
    if problem := unmet(loading_report(meta_model, tensors)):
        for part, (who, fix) in _WRAPPERS.items():
            if sum(part in name for name in tensors) > len(tensors) / 2:
                return [Problem(f"{who}: its tensors are named '{_first(tensors, part)}'", fix)]
        return [problem]
    return []


def _first(tensors: Shapes, part: str) -> str:
    return min(name for name in tensors if part in name)


def loading_report(meta_model: nn.Module, tensors: Shapes) -> Mapping[str, Any]:
    """What transformers would say on loading such tensors: it matches names and shapes, with its own renamings and ties,
    and finds no weight to read.
    """
    # Each name costs transformers a search; experts lie one by one on disk, and other parts of a model may be there too.
    known = [w.shape for w in meta_model.state_dict().values()]
    most = 1000 + 10 * sum(2 * shape[0] if len(shape) == 3 else 1 for shape in known)
    if len(tensors) > most:
        return {"error_msgs": [f"{len(tensors):,} tensors, of which such a model has no use"]}
    empty = {
        name: torch.empty(tuple(shape), dtype=DTYPES.get(dtype, torch.float32), device="meta")
        for name, (dtype, shape) in tensors.items()
    }
    load: Any = type(meta_model).from_pretrained  # type: ignore[attr-defined]
    how = {"device_map": {"": "meta"}, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with quiet():
        try:
            _, report = load(None, config=meta_model.config, state_dict=empty, **how)
        except (RuntimeError, ValueError, KeyError, TypeError, IndexError, AttributeError) as e:
            first = (str(e).strip() or type(e).__name__).splitlines()[0]
            return {"error_msgs": [first]}
    return report


def unmet(report: Mapping[str, Any]) -> Problem | None:
    """The problem in transformers' report on loading, if any: it would make missing weights up."""
    if errors := report.get("error_msgs"):
        return Problem(f"its tensors cannot be read as its config.json says: {errors[0]}", "fetch the model again")
    missing = sorted(report["missing_keys"])
    other = sorted((str(name), tuple(found), tuple(wanted)) for name, found, wanted in report["mismatched_keys"])
    if missing == ["lm_head.weight"]:
        fix = "give the causal language model; or, where embeddings serve as its head, set tie_word_embeddings to true"
        return Problem("has no head (lm_head.weight), and its config.json does not tie it to the embeddings", fix)
    if not missing and not other:
        return None
    told = [f"{name} is {list(found)}, not {list(wanted)}" for name, found, wanted in other] + missing
    what = f"{len(told)} weights are missing or of another shape than its config.json says: {', '.join(told[:3])}"
    return Problem(what, "fetch the model again: transformers would make such weights up")


# What reads and writes text.


def load_tokenizer(folder: Path) -> Any:
    """A model folder's tokenizer.

    Raises:
        ModelError: there is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    if not any(True for pattern in _TOKENIZERS for _ in folder.glob(pattern)):  # transformers would make an empty one
        what = "its tokenizer cannot be loaded: there is none in the folder (tokenizer.json, tokenizer.model, vocab…)"
        raise ModelError(
            what, where=str(folder), fix="copy the tokenizer's files there from the model it was made from"
        )
    check_model_files(folder)
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as e:  # a damaged tokenizer can fail anywhere
        first = (str(e).strip() or type(e).__name__).splitlines()[0]
        fix = "fetch its tokenizer files again"
        raise ModelError(f"its tokenizer cannot be loaded: {first}", where=str(folder), fix=fix) from e


def reading_problems(meta_model: nn.Module, folder: Path, tokenizer: Any) -> list[Problem]:
    """What is wrong with generation_config.json, or between tokenizer and model."""
    out = []
    try:
        _check_generation(folder / "generation_config.json")
    except ModelError as e:
        out.append(Problem(f"{Path(e.where).name}: {e.what}", e.fix))
    rows = window(meta_model).rows
    if len(tokenizer) > rows and (highest := _highest(tokenizer)) >= rows:
        what = f"its tokenizer has tokens up to {highest}, the model embeddings for {rows}"
        out.append(Problem(what, "give the tokenizer that belongs to these weights"))
    return out


def _highest(tokenizer: Any) -> int:
    """The highest id that ordinary text, or the token that begins it, can have."""
    added = {int(i) for i in tokenizer.added_tokens_decoder}
    ordinary = max((i for i in tokenizer.get_vocab().values() if i not in added), default=0)
    return max(ordinary, tokenizer.bos_token_id or 0)


def _check_generation(file: Path) -> None:
    from transformers import GenerationConfig

    if not file.exists():
        return
    fix = "mend it, or remove the file"
    content = read_json(file, ModelError, fix, special=True)
    try:
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        with quiet():
            GenerationConfig.from_pretrained(file.parent)
    except Exception as e:  # its checks compare whatever the file holds
        first = (str(e).strip() or type(e).__name__).splitlines()[0].rstrip(".")
        what = first if isinstance(e, ValueError) else f"a field is of the wrong kind ({first})"
        raise ModelError(what, where=str(file), fix=fix) from e
