"""Templates of task files rendered where they reach nothing, within bounded time and memory."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import Environment, Template
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mosectl.errors import UsageError

SECONDS = 2.0  # processor time of one template
MEMORY = 500_000_000  # bytes that one template may add
LONGEST = 1_000_000  # characters it may make


class TooCostly(Exception):
    """A bound of :func:`bounded` was reached."""


@contextmanager
def bounded(seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """Processor time and memory (bytes beyond what is taken now) of a block, where the system can bound them.

    Time: in the main thread, on Linux and macOS. Memory: there too, on Linux. Nothing is bounded in other threads, and on
    Windows: a template that never ends must be stopped by hand there, and one that fills memory is ended by the system.
    Raises:
        TooCostly.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise TooCostly(f"takes more than {seconds:g} seconds")

    was = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.5)  # again and again: something may swallow the first
    try:
        with _room(memory):
            yield
    except MemoryError as e:
        raise TooCostly(f"takes more than {memory / 1e6:,.0f} MB") from e
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, was)


@contextmanager
def _room(memory: int) -> Iterator[None]:
    """So many bytes of memory more than is taken now, on Linux."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)
    room = int(statm.read_text().split()[0]) * resource.getpagesize() + memory
    soft = min(x for x in (room, *limit) if x != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, (soft, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)


class _Template(Template):
    def render(self, *args: Any, **values: Any) -> str:
        with bounded():
            text = super().render(*args, **values)
        if len(text) > LONGEST:
            raise TooCostly(f"makes a text of {len(text):,} characters, at most {LONGEST:,} are taken")
        return text


class _Sandbox(ImmutableSandboxedEnvironment):
    template_class = _Template

    def from_string(self, *args: Any, **more: Any) -> Template:
        with bounded():  # constant expressions are computed here
            return super().from_string(*args, **more)


@contextmanager
def sandboxed_harness() -> Iterator[None]:
    """lm-evaluation-harness renders its tasks' templates in a sandbox.

    Raises:
        UsageError: this version of the harness does it in a way that is not known.
    """
    from lm_eval import utils

    found = getattr(utils, "env", None)
    if not isinstance(found, Environment):
        raise _unknown()
    sandbox = _Sandbox(undefined=found.undefined, keep_trailing_newline=found.keep_trailing_newline)
    sandbox.filters.update({k: f for k, f in found.filters.items() if k not in sandbox.filters})
    utils.env = sandbox
    try:
        try:
            utils.apply_template("{{ cycler.__init__.__globals__ }}", {})
        except SecurityError:
            pass
        else:
            raise _unknown()
        yield
    finally:
        utils.env = found


def _unknown() -> UsageError:
    what = "this version of lm-evaluation-harness makes its templates in a way that cannot be kept from running code"
    return UsageError(f"--abilities: {what}", fix="install another (0.4.13 is known), or trust the tasks: --allow-code")
