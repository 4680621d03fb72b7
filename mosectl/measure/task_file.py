"""A task for lm-evaluation-harness from a YAML file that may come from a stranger: values and templates, no code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mosectl.errors import UsageError
from mosectl.storage.inputs import opened
from mosectl.storage.safe_yaml import read_yaml

FIX = "a task's file holds values and templates; let one that you trust run Python code by --allow-code"
PLAIN_DATA = {"json", "csv", "text", "parquet", "arrow"}  # of the readers that come with the library datasets
OTHER_DATA = {"pandas", "generator", "spark", "sql", "cache"}  # unpickle, or take what is no data
INCLUDED = 20  # files


def read_task(path: Path) -> dict[str, Any]:
    """The configuration of one task, with what it includes.

    Raises:
        UsageError: no such file, not plain YAML, or a way to run code that is known.
    """
    config = _merged(path, [])
    if "group" in config or not isinstance(config.get("task"), str):
        raise UsageError(
            "is not one task with a name", where=str(path), fix="write 'task: NAME'; a group cannot be given"
        )
    if "class" in config:
        raise _code("'class' names Python code", path)
    prompt, data = config.get("use_prompt"), config.get("dataset_path")
    if prompt is not None and not str(prompt).startswith("qa-basic:"):
        raise _code("'use_prompt' reads templates that were not checked", path)
    if data in _readers() - PLAIN_DATA:
        raise _code(f"'dataset_path: {data}' reads more than plain data", path)
    for file in _texts(config.get("dataset_kwargs")):
        if Path(file).exists() and not Path(file).is_dir():
            with opened(file, UsageError, "give a file of the task's data"):
                pass
    return config


def _merged(path: Path, seen: list[Path]) -> dict[str, Any]:
    """As the harness does it: what is included first, overwritten by the file's own."""
    if path.resolve() in seen or len(seen) == INCLUDED:
        what = "includes itself" if len(seen) < INCLUDED else f"more than {INCLUDED} files are included"
        raise UsageError(what, where=str(path), fix="mend 'include'")
    seen.append(path.resolve())
    own = read_yaml(path, UsageError, FIX)
    if not isinstance(own, dict) or not all(isinstance(k, str) for k in own):
        raise UsageError("is not a mapping of names to values", where=str(path), fix="write 'task: NAME' and so on")
    includes, out = own.pop("include", []), dict[str, Any]()
    for name in includes if isinstance(includes, list) else [includes]:
        if not isinstance(name, str):
            raise UsageError("'include' is not the name of a file", where=str(path), fix="mend 'include'")
        out |= {k: v for k, v in _merged(path.parent / name, seen).items() if k != "task_list"}
    return out | own


def _code(what: str, path: Path) -> UsageError:
    return UsageError(f"{what}: refused", where=str(path), fix=FIX)


def _readers() -> set[str]:
    from datasets import packaged_modules

    return OTHER_DATA | set(getattr(packaged_modules, "_PACKAGED_DATASETS_MODULES", ()))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | Mapping):
        for v in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(v)


@contextmanager
def no_metric_scripts(where: str) -> Iterator[None]:
    """Metrics that the harness does not know are scripts of the library `evaluate`, also such as lie beside the file.

    Raises:
        UsageError: one of them is asked for.
    """
    import evaluate

    asked: list[str] = []

    def refuse(name: str, *_: Any, **__: Any) -> None:
        asked.append(name)
        raise ImportError(name)

    was, evaluate.load = evaluate.load, refuse
    try:
        yield
    except Exception:
        if not asked:
            raise
    finally:
        evaluate.load = was
    if asked:
        raise _code(f"the metric '{asked[0]}' is a script that the library evaluate would run", Path(where))
