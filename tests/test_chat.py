"""Chat templates are programs of strangers: what they may take, and that good ones come out as transformers has them."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from mosectl.errors import UsageError
from mosectl.model import chat, chat_worker
from mosectl.model.tokens import render_chat
from support.models import LOOP, make_tokenizer

DOUBLING = "{% set n = namespace(x='x' * 9) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}"


@pytest.mark.parametrize(
    ("template", "what"),
    [
        (LOOP, "takes longer than 3 s"),
        ("{{ 9 ** (9 ** 9) }}", "takes longer than 3 s"),  # one instruction of Python's
        ("{{ 'x' * 10 ** 10 }}", "too much memory"),
        ("{{ 'x'.ljust(10 ** 11) }}", "too much memory"),
        (DOUBLING, "too much memory"),
        ("{{ 'x' * 10 ** 7 }}", "writes 10,000,000 characters"),
        ("{{ range(10 ** 12) }}", "Range too big"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "fails"),
        ("{{ cycler.__init__.__globals__.os.getcwd() }}", "unsafe"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{% if %}", "Expected an expression"),
    ],
)
def test_templates_that_are_refused(template: str, what: str) -> None:
    start = time.perf_counter()
    with pytest.raises(UsageError, match=what) as told:
        render_chat(make_tokenizer(chat_template=template), "Hi")
    assert time.perf_counter() - start < 10 and "--chat" in told.value.fix
    assert render_chat(make_tokenizer(chat_template="[{{ messages[0].content }}]"), "Hi") == "[Hi]", "others go on"


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}{{ eos_token }}",
        "{{ messages | tojson(indent=2) }}{% if add_generation_prompt %}\n<bot>{% endif %}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{% endfor %}x",
        "{% generation %}{{ messages[0].content }}{% endgeneration %}",
    ],
)
def test_as_transformers_renders_them(template: str) -> None:
    tokenizer = make_tokenizer(chat_template=template)
    for prompt in ("Hi", " Zoë 🦊\n中国 \u2028 ", "{{ 7 * 7 }}"):
        message = [{"role": "user", "content": prompt}]
        found = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        assert render_chat(tokenizer, prompt) == found


def test_several_named_templates() -> None:
    tokenizer = make_tokenizer(chat_template={"default": "d{{ messages[0].content }}", "tool_use": "t"})
    assert render_chat(tokenizer, "Hi") == "dHi"
    with pytest.raises(UsageError, match="no default"):
        render_chat(make_tokenizer(chat_template={"a": "x", "b": "y"}), "Hi")


def test_one_process_serves_all_and_threads_wait() -> None:
    tokenizer = make_tokenizer(chat_template="[{{ messages[0].content }}]")
    render_chat(tokenizer, "Hi")
    worker, found = chat._running, []

    def ask(i: int) -> None:
        found.append(render_chat(tokenizer, str(i)) == f"[{i}]")

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(20)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(found) and len(found) == 20 and chat._running is worker
    worker.kill()  # type: ignore[union-attr]
    worker.wait()  # type: ignore[union-attr]
    assert render_chat(tokenizer, "Hi") == "[Hi]", "another is started"


def test_the_worker_needs_nothing_of_mosectl() -> None:
    """It runs as a file, so that mosectl's own modules do not stand in for others of their names."""
    text = Path(chat_worker.__file__).read_text("utf-8")
    assert "import mosectl" not in text and "from mosectl" not in text
