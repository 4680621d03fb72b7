"""General abilities before and after an edit, by lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness).

`local` names four small tasks that come with mosectl and need no network, in the form of RTE, SST-2, NQ-open and SAMSum
(data/abilities/). Their 24 to 64 examples show damage; they cannot rank models, and their numbers are not those of the
data sets they look like. For these, name the harness's own tasks (`rte`, `sst2`, `nq_open`), which are downloaded.
"""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from mosectl.errors import HubError, MosectlError, UsageError
from mosectl.measure.bootstrap import Measure, Tally, measure
from mosectl.measure.task_file import no_metric_scripts, read_task
from mosectl.model.loading import Loaded
from mosectl.model.positions import context_length
from mosectl.text.shown import word

FOLDER = Path(__file__).parents[1] / "data" / "abilities"
LOCAL = {"mosectl_rte": "rte", "mosectl_sst2": "sst2", "mosectl_nq_open": "nq_open", "mosectl_samsum": "samsum"}
SEED = 1234  # the harness's own, of the examples shown before a question
Step = Callable[[str], Callable[[int, int], None]]  # name → called with (done, total)
Key = tuple[str, str]  # task, metric


@dataclass(frozen=True)
class Score:
    """A metric as the harness gives it."""

    value: float
    stderr: float | None  # None where it gives none


@dataclass(frozen=True)
class Ability:
    """One metric of one task (or group of tasks) on both sides of the edit."""

    task: str
    metric: str
    higher_is_better: bool | None  # None: the harness does not say
    before: Score | None
    after: Score
    change: Measure | None  # after − before, over the same examples; None where the metric is not a mean over them
    examples: int


@dataclass(frozen=True)
class Side:
    """All that the harness found about one model."""

    scores: Mapping[Key, Score]
    values: Mapping[Key, tuple[float, ...]]  # one an example, for metrics that are their mean
    higher_is_better: Mapping[Key, bool]
    examples: Mapping[str, int]
    cut: Mapping[str, int]  # prompts too long for the model, by task


@dataclass(frozen=True)
class AbilityTasks:
    """Tasks with their data, loaded before the model is."""

    names: tuple[str, ...]  # of tasks and groups, as the results will have them
    loaded: Any  # the harness's TaskDict
    limit: int | None
    version: str  # of the harness
    allow_code: bool = False


def load_tasks(names: Sequence[str], limit: int | None = None, *, allow_code: bool = False) -> AbilityTasks:
    """Find tasks and load their data; what cannot work is told here, before a model is loaded.

    Args:
        names: "local" (all of :data:`LOCAL`), names of tasks or groups, paths of YAML files.
        limit: examples a task; default: all.
        allow_code: let YAML files name Python code, which then runs, and let templates reach anything.
    Raises:
        UsageError: the harness is not installed, there is no such task, it cannot be loaded, or its file asks for code.
        HubError: its data cannot be downloaded.
    """
    lm_eval = _check_harness()
    wanted = list(dict.fromkeys(n for name in names for n in (LOCAL if name == "local" else [name])))
    with _quiet():
        from lm_eval.tasks import TaskManager

        if not hasattr(TaskManager, "load"):
            what = f"--abilities needs lm-eval 0.4.12 or newer, here is {lm_eval.__version__}"
            raise UsageError(what, fix="run: pip install -U 'mosectl[eval]'")
        known = set(LOCAL) | {n for n in wanted if _is_path(n)}
        manager = TaskManager(include_defaults=not known.issuperset(wanted))  # finding 14,000 tasks takes seconds
    found: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    _check_names(wanted, known, manager.all_tasks)
    for name in wanted:
        own = _is_path(name) and not allow_code
        task = read_task(Path(name)) if own else _local(LOCAL[name]) if name in LOCAL else name
        scripts = no_metric_scripts(name) if own else _no_code_from_hub()
        with scripts, _load_errors(name), _templates(allow_code), _quiet():
            loaded = manager.load([task])
        for kind, entries in found.items():
            entries.update(loaded.get(kind, {}))
    for name, task in found["tasks"].items():
        _check_task(name, task)
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
    groups = [name for name, group in found["groups"].items() if group.has_aggregation]  # the others have no number
    return AbilityTasks((*groups, *found["tasks"]), found, limit, lm_eval.__version__, allow_code)


def _check_harness() -> Any:
    try:
        import datasets
        import lm_eval
        import rouge_score  # noqa: F401
    except ImportError as e:
        fix = "run: pip install 'mosectl[eval]'"
        raise UsageError("--abilities needs lm-evaluation-harness, which is not installed", fix=fix) from e
    if int(datasets.__version__.split(".")[0]) < 4:  # older ones run scripts that lie with the data
        what = f"--abilities needs datasets 4 or newer, here is {datasets.__version__}"
        raise UsageError(what, fix="run: pip install -U 'mosectl[eval]'")
    return lm_eval


def _is_path(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _check_names(wanted: Sequence[str], known: set[str], of_harness: Sequence[str]) -> None:
    for name in wanted:
        if _is_path(name) and not Path(name).is_file():
            raise UsageError(f"--abilities {name}: no such file", fix="give the path of a task's YAML file")
        if name not in known and name not in of_harness:
            close = get_close_matches(name, [*LOCAL, *of_harness], n=3)
            like = f"did you mean {' or '.join(close)}? " if close else ""
            fix = f"{like}'local' needs no network; the harness's own are listed by: lm-eval ls tasks"
            raise UsageError(f"--abilities {name}: no such task", fix=fix)


def _local(stem: str) -> dict[str, Any]:
    """One of our tasks as the harness takes it, with its data in memory: nothing is left in a cache."""
    import datasets
    import yaml

    config: dict[str, Any] = yaml.safe_load((FOLDER / f"{stem}.yaml").read_text(encoding="utf-8"))
    file = FOLDER / config.pop("dataset_kwargs")["data_files"]["test"]
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    config |= {"dataset_path": None, "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)}}
    return config | ({"process_results": rouge} if stem == "samsum" else {})


def rouge(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """F1 of common words (1), pairs of words (2) and longest common subsequence (L) of a summary and its reference.

    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", with stemming, as is usual for SAMSum.
    """
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ["rougeL", "rouge1", "rouge2"]
    scores = RougeScorer(kinds, use_stemmer=True).score(doc["summary"], results[0])
    return {kind: float(scores[kind].fmeasure) for kind in kinds}


def _check_task(name: str, task: Any) -> None:
    for flag, what in (("UNSAFE_CODE", "runs code that a model wrote"), ("MULTIMODAL", "asks about pictures or sound")):
        if getattr(task, flag, False):
            raise UsageError(f"--abilities {name}: it {what}, which is not supported here", fix="leave it out")


@contextmanager
def _load_errors(name: str) -> Iterator[None]:
    """The many exceptions of tasks and data sets as one clear error."""
    try:
        yield
    except MosectlError:
        raise
    except Exception as e:
        first = (str(e).strip() or type(e).__name__).splitlines()[0]
        if isinstance(e, ImportError):
            fix = f"install what the task needs: pip install {word(e.name or '…')}"
            raise UsageError(f"the task cannot be loaded: {first}", where=f"--abilities {name}", fix=fix) from e
        if isinstance(e, OSError) or type(e).__module__.startswith(("httpx", "requests", "huggingface_hub")):
            fix = "check its name, connect, unset HF_HUB_OFFLINE and HF_DATASETS_OFFLINE; --abilities local needs no network"
            raise HubError(f"the task's data cannot be had: {first}", where=f"--abilities {name}", fix=fix) from e
        fix = (
            "mend its YAML file: one task, not a group"
            if _is_path(name)
            else "leave it out, or look for a newer lm-eval"
        )
        what = f"the task cannot be loaded: {type(e).__name__}: {first}"
        raise UsageError(what, where=f"--abilities {name}", fix=fix) from e


@contextmanager
def _no_code_from_hub() -> Iterator[None]:
    """Metrics of the library `evaluate` are scripts that it downloads and runs; only those already fetched may serve."""
    from evaluate import config

    was, config.HF_EVALUATE_OFFLINE = config.HF_EVALUATE_OFFLINE, True
    try:
        yield
    finally:
        config.HF_EVALUATE_OFFLINE = was


def _templates(allow_code: bool) -> AbstractContextManager[None]:
    """How the harness renders its tasks' templates."""
    from mosectl.measure.sandbox import sandboxed_harness

    return nullcontext() if allow_code else sandboxed_harness()


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness prints, logs and draws bars of its own: none of it belongs on our stdout or stderr."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with Path(os.devnull).open("w") as hole, redirect_stdout(hole), redirect_stderr(hole):
            yield
    finally:
        logging.disable(level)


# Asking one model.


def ask_tasks(tasks: AbilityTasks, loaded: Loaded, *, chat: bool, batch_size: int, step: Step) -> Side:
    """Run every task on a model in memory, which stays as it is.

    Raises:
        UsageError: the model cannot do a task, or the harness fails.
    """
    if loaded.tokenizer.eos_token_id is None:
        fix = "set eos_token in the model's tokenizer_config.json, or leave --abilities out"
        raise UsageError("the tokenizer has no end-of-sequence token: the harness needs one", fix=fix)
    context = context_length(loaded.model)
    for name, task in tasks.loaded["tasks"].items():
        if (longest := _longest_answer(task)) >= context:
            fix = "leave the task out, or give a YAML file of it with fewer max_gen_toks in generation_kwargs"
            what = f"writes answers of up to {longest} tokens, but the model reads no more than {context} in all"
            raise UsageError(what, where=f"--abilities {name}", fix=fix)
        task.set_fewshot_seed(seed=SEED)
    try:
        with _templates(tasks.allow_code), _quiet(), torch.random.fork_rng(), torch.no_grad():
            from lm_eval.evaluator import evaluate

            torch.manual_seed(SEED)  # for tasks that sample: both sides alike
            model = _model(loaded, context, batch_size, step)
            talk = {"apply_chat_template": chat, "fewshot_as_multiturn": chat}
            found = evaluate(model, tasks.loaded, limit=tasks.limit, bootstrap_iters=1000, **talk)
            cut = {name: _cut(task, model) for name, task in tasks.loaded["tasks"].items()}
    except (MosectlError, torch.OutOfMemoryError):
        raise
    except Exception as e:  # whatever a task of other people may raise
        first = (str(e).strip() or "no reason given").splitlines()[0]
        fix = "ask the tasks one by one to see which it is; MOSECTL_DEBUG=1 shows where"
        what = f"lm-evaluation-harness failed: {type(e).__name__}: {first}"
        raise UsageError(what, where=f"--abilities {','.join(tasks.names)}", fix=fix) from e
    return _side(found, cut)


def _longest_answer(task: Any) -> int:
    if task.OUTPUT_TYPE != "generate_until":
        return 0
    options = task.get_config("generation_kwargs") or {}
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    return next((int(options[n]) for n in names if options.get(n) is not None), 256)  # the harness's default


def _model(loaded: Loaded, context: int, batch_size: int, step: Step) -> Any:
    """The model as the harness wants it, telling how far it is."""
    from lm_eval.models.huggingface import HFLM

    from mosectl.measure.sandbox import bounded

    class Told(HFLM):
        def apply_chat_template(self, *args: Any, **more: Any) -> str:
            with bounded():  # a template is a stranger's program
                return super().apply_chat_template(*args, **more)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[Any]:
            return _in_batches(super().loglikelihood, requests, batch_size, step("abilities, choices"))

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[Any]:
            return _in_batches(super().loglikelihood_rolling, requests, batch_size, step("abilities, texts"))

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[Any]:
            return _in_batches(super().generate_until, requests, batch_size, step("abilities, answers"))

    tokenizer = copy.deepcopy(loaded.tokenizer)  # the harness gives it a padding token
    return Told(pretrained=loaded.model, tokenizer=tokenizer, batch_size=batch_size, max_length=context)


def _in_batches(
    ask: Callable[[list[Any]], list[Any]], requests: list[Any], size: int, on_step: Callable[[int, int], None]
) -> list[Any]:
    """Longest first, as the harness has it: memory that is too small shows at once, and little is padding."""
    order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].args[0]), requests[i].args[0]))
    out: list[Any] = [None] * len(requests)
    for at in range(0, len(order), size):
        part = order[at : at + size]
        for i, answer in zip(part, ask([requests[i] for i in part]), strict=True):
            out[i] = answer
        on_step(at + len(part), len(order))
    return out


def _cut(task: Any, model: Any) -> int:
    """Examples whose prompt the harness had to cut from the left."""
    room = model.max_length - _longest_answer(task)
    kinds = {"loglikelihood": lambda args: "".join(args), "generate_until": lambda args: args[0]}
    asked = [(i.doc_id, kinds[i.request_type](i.args)) for i in task.instances if i.request_type in kinds]
    return len({doc for doc, text in asked if len(model.tok_encode(text)) > room})


def _side(found: Mapping[str, Any], cut: Mapping[str, int]) -> Side:
    scores: dict[Key, Score] = {}
    values: dict[Key, tuple[float, ...]] = {}
    better: dict[Key, bool] = {}
    for task, results in found["results"].items():
        for name, value in results.items():
            metric, _, kind = name.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            key = (task, metric if kind == "none" else f"{metric} ({kind})")
            stderr = results.get(f"{metric}_stderr,{kind}")
            scores[key] = Score(float(value), float(stderr) if isinstance(stderr, int | float) else None)
            if (up := found["higher_is_better"].get(task, {}).get(metric)) is not None:
                better[key] = up
            each = [s.get(metric) for s in found["samples"].get(task, ()) if s["filter"] == kind]
            if each and all(isinstance(v, int | float) for v in each) and _same(sum(each) / len(each), value):
                values[key] = tuple(map(float, each))
    examples = {task: int(results.get("sample_len", 0)) for task, results in found["results"].items()}
    return Side(scores, values, better, examples, cut)


def _same(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-9 * max(1.0, abs(a))


# Both sides.


def compare_abilities(before: Side | None, after: Side) -> tuple[Ability, ...]:
    """Every metric on both sides, in the harness's order."""
    return tuple(
        Ability(
            task=key[0],
            metric=key[1],
            higher_is_better=after.higher_is_better.get(key),
            before=before.scores.get(key) if before else None,
            after=score,
            change=_change(before.values.get(key), after.values.get(key)) if before else None,
            examples=after.examples[key[0]],
        )
        for key, score in after.scores.items()
    )


def _change(before: Sequence[float] | None, after: Sequence[float] | None) -> Measure | None:
    if before is None or after is None:
        return None
    return measure([Tally(b - a, 1.0) for a, b in zip(before, after, strict=True)])


def ability_notes(tasks: AbilityTasks, after: Side) -> list[str]:
    """What a reader must know to read the numbers right."""
    out = []
    if own := [name for name in tasks.names if name in LOCAL]:
        out.append(
            f"{', '.join(own)}: small stand-ins in the form of the known tasks; they show damage, not rank, and none in a "
            "model that only guesses (acc 0.5, else 0)"
        )
    for task, n in after.cut.items():
        if n:
            out.append(
                f"{task}: {n} of {after.examples[task]} prompts are longer than the model reads: cut from the left"
            )
    return out
