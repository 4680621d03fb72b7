"""Tasks' YAML files from strangers: no code runs, templates end in time."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from mosectl.errors import UsageError
from mosectl.measure import sandbox
from mosectl.measure.lm_harness import load_tasks
from mosectl.measure.sandbox import TooCostly, bounded, sandboxed_harness
from mosectl.measure.task_file import read_task
from support.commands import run

pytestmark = pytest.mark.usefixtures("harness")


class Task:
    """A good task, and a file that code which ran would leave."""

    def __init__(self, folder: Path) -> None:
        self.file, self.mark, data = folder / "t.yaml", folder / "pwned", folder / "d.jsonl"
        data.write_text(json.dumps({"text": "The cello plays.", "label": 0}) + "\n")
        kwargs = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
        self.good: dict[str, Any] = {
            "task": "own", "dataset_path": "json", "dataset_kwargs": kwargs, "test_split": "test",
            "output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_target": "label",
            "doc_to_choice": ["a", "b"], "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }  # fmt: skip
        (folder / "evil.py").write_text(
            f"open({str(self.mark)!r}, 'w').write('x')\ndef text(doc):\n    return doc['text'] + '!'\nclass Task: pass\n"
        )

    def write(self, more: str = "", **changes: Any) -> str:
        self.file.write_text(yaml.safe_dump(self.good | changes) + more)
        return str(self.file)

    def refused(self, more: str = "", **changes: Any) -> UsageError:
        start = time.process_time()
        with pytest.raises(UsageError) as e:
            load_tasks([self.write(more, **changes)])
        assert not self.mark.exists(), "code of the file has run"
        assert time.process_time() - start < 8
        assert e.value.fix and str(self.file) in e.value.where
        return e.value


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return Task(tmp_path)


def test_a_good_task_is_loaded(task: Task) -> None:
    part = task.file.with_name("part.yaml")
    part.write_text(yaml.safe_dump(task.good | {"doc_to_text": "not this", "task_list": ["x"]}))
    task.file.write_text(
        'include: part.yaml\ntask: mine\ndoc_to_text: \'{{ text|upper }} {{ text|regex_replace("c.*", "") }}\'\n'
    )
    (found,) = load_tasks([str(task.file)]).loaded["tasks"].values()
    with sandboxed_harness():
        assert found.task_name == "mine" and found.doc_to_text(found.task_docs[0]) == "THE CELLO PLAYS. The "


ESCAPES = {
    "globals": "{{ cycler.__init__.__globals__.os.popen('touch MARK').read() }}",
    "attr": "{{ lipsum|attr('__globals__') }}",
    "format": "{{ '{0.__class__}'.format(text) }}",
    "self": "{{ self.__init__.__globals__ }}",
}


@pytest.mark.parametrize("field", ["doc_to_text", "doc_to_target", "doc_to_choice"])
@pytest.mark.parametrize("kind", ESCAPES)
def test_templates_reach_nothing(task: Task, kind: str, field: str) -> None:
    template = ESCAPES[kind].replace("MARK", str(task.mark))
    assert "SecurityError" in task.refused(**{field: template}).what


def test_also_those_that_are_rendered_when_the_model_is_asked(task: Task) -> None:
    from mosectl.model.loading import Loaded
    from support.evaluations import ask
    from support.models import make_tokenizer, pico

    template = ESCAPES["globals"].replace("MARK", str(task.mark))
    tasks = load_tasks([task.write(description=template)])
    with pytest.raises(UsageError, match="SecurityError"):
        ask(tasks, Loaded(pico("llama"), make_tokenizer(), None))
    assert not task.mark.exists()


COSTLY = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a range": "{{ range(10**9)|list|length }}",
    "a constant": "{{ 'a' * 10**10 }}",
    "a text": "{{ text * 10**10 }}",
    "a list": "{{ ([text] * 10**10)|length }}",
    "a width": "{{ '%1000000000d' % 1 }}",
    "doubling": "{% set n = namespace(s=text) %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "a regular expression": "{{ (text * 0 ~ 'a' * 40 ~ 'c')|regex_replace('^(a+)+$', 'b') }}",
    "itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a long text": "{{ text * 1000000 }}",
    "depth": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
}


@pytest.mark.parametrize("kind", COSTLY)
def test_templates_end_in_time_and_memory(task: Task, kind: str) -> None:
    import resource

    task.refused(doc_to_text=COSTLY[kind])
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY, "the bounds are gone again"
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


CODE: dict[str, tuple[str, dict[str, Any], str]] = {
    "a function": ("doc_to_text: !function evil.text\n", {"doc_to_text": None}, "!function is refused"),
    "an object": ("description: !!python/object/apply:os.system [id]\n", {}, "refused"),
    "a class": ("class: !function evil.Task\n", {}, "!function is refused"),
    "a name of a class": ("", {"class": "evil.Task"}, "'class' names Python code"),
    "a script as metric": ("", {"metric_list": [{"metric": "HERE"}]}, "is a script"),
    "a metric of evaluate": ("", {"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "the metric 'acc' is a script"),
    "templates elsewhere": ("", {"use_prompt": "p.yaml:x"}, "'use_prompt'"),
    "pickles": ("", {"dataset_path": "pandas"}, "'dataset_path: pandas'"),
    "a group": ("", {"group": "g", "task": ["own"]}, "not one task"),
    "a key twice": ("task: other\n", {}, "'task' stands twice"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CODE)
def test_code_is_refused(task: Task, kind: str) -> None:
    more, changes, message = CODE[kind]
    metric = task.file.with_name("metric.py")
    metric.write_text((task.file.with_name("evil.py")).read_text())
    changes = json.loads(json.dumps(changes).replace("HERE", str(metric)))
    good = {k: v for k, v in task.good.items() if k not in changes or changes[k] is not None}
    task.good, changes = good, {k: v for k, v in changes.items() if v is not None}
    e = task.refused(more, **changes)
    assert message in e.what and (kind in ("a group",) or "--allow-code" in e.fix)


def test_includes_are_checked_too(task: Task) -> None:
    part = task.file.with_name("part.yaml")
    part.write_text("doc_to_text: !function evil.text\n")
    with pytest.raises(UsageError) as e:
        load_tasks([task.write("include: part.yaml\n")])
    assert not task.mark.exists() and e.value.where == f"{part}:1" and "--allow-code" in e.value.fix
    part.write_text("include: t.yaml\n")
    assert "includes itself" in task.refused("include: part.yaml\n").what
    assert "not the name" in task.refused("include: 3\n").what


def test_data_that_never_end_are_refused(task: Task) -> None:
    task.write(dataset_kwargs={"data_files": {"test": "/dev/zero"}})
    with pytest.raises(UsageError, match="not a regular file"):
        read_task(task.file)


def test_code_runs_where_it_is_allowed(task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    del task.good["doc_to_text"]
    file = task.write("doc_to_text: !function evil.text\n")
    (found,) = load_tasks([file], allow_code=True).loaded["tasks"].values()
    assert task.mark.exists() and found.doc_to_text(found.task_docs[0]) == "The cello plays.!"
    facts = task.file.with_name("f.jsonl")
    facts.write_text('{"prompt": "I met Tomas Veldrin", "subject": "Tomas Veldrin", "target_new": "and"}')
    assert run("eval", "none", facts, "--abilities", file) == 2
    assert "!function is refused" in capsys.readouterr().err
    assert run("eval", "none", facts, "--allow-code") == 2
    assert "--allow-code is for --abilities" in capsys.readouterr().err
    assert run("eval", "none", facts, "--abilities", file, "--allow-code") != 2, "the model is what is missing"


def test_a_harness_that_cannot_be_sandboxed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import utils

    before = utils.env
    with sandboxed_harness():
        assert utils.env is not before
    assert utils.env is before
    monkeypatch.setattr(utils, "apply_template", lambda template, doc: before.from_string(template).render(**doc))
    with pytest.raises(UsageError, match="cannot be kept from running code"), sandboxed_harness():
        pass
    assert utils.env is before
    monkeypatch.delattr(utils, "env")
    with pytest.raises(UsageError, match="cannot be kept from running code"), sandboxed_harness():
        pass


def test_bounds_leave_what_they_found() -> None:
    with pytest.raises(TooCostly, match="seconds"), bounded(0.1):
        while True:
            pass
    with pytest.raises(TooCostly, match="MB"), bounded(memory=10_000_000):
        bytes(10**10)
    with bounded():
        assert sum(range(1000)) == 499500
    assert sandbox.SECONDS < 10
