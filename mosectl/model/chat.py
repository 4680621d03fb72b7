"""Chat templates, rendered in a process of their own: see chat_worker.py for why."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from pathlib import Path
from threading import Event, Lock, Timer
from typing import Any

from mosectl.model import chat_worker

_lock = Lock()
_running: subprocess.Popen[str] | None = None  # serves all prompts: it takes most of a second to start


def rendered(template: str, prompt: str, variables: dict[str, Any]) -> str:
    """The prompt as a user's message in a chat template, ready for the answer.

    Args:
        variables: what the template may use besides, such as bos_token.
    Raises:
        ValueError: what is wrong with the template, in words that follow its name.
    """
    asked = {"template": template, "messages": [{"role": "user", "content": prompt}], "variables": variables}
    with _lock:
        worker = _worker()
        late = Event()

        def end() -> None:
            late.set()
            worker.kill()

        deadline = Timer(chat_worker.SECONDS, end)
        deadline.start()
        try:
            worker.stdin.write(json.dumps(asked, default=str) + "\n")  # type: ignore[union-attr]
            worker.stdin.flush()  # type: ignore[union-attr]
            answer = worker.stdout.readline()  # type: ignore[union-attr]
        except OSError:  # a broken pipe, which Windows calls an invalid argument
            answer = ""
        finally:
            deadline.cancel()
            deadline.join()
        if late.is_set() or not answer.endswith("\n"):
            worker.wait()  # or the next prompt would be given to a dying process
        if not answer.endswith("\n"):
            what = "takes too much memory, or breaks its process"
            raise ValueError(f"takes longer than {chat_worker.SECONDS} s" if late.is_set() else what)
    told = json.loads(answer)
    if "error" in told:
        raise ValueError(told["error"])
    return told["text"]


def _worker() -> subprocess.Popen[str]:
    global _running
    if _running is None or _running.poll() is not None:
        _running = subprocess.Popen(
            [sys.executable, "-P", str(Path(chat_worker.__file__))],  # -P: its folder is not a place to import from
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True, creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )  # fmt: skip  # a group of its own: Ctrl-C is for the one who waits
        atexit.register(_stop, _running)
        _running.stdout.readline()  # type: ignore[union-attr]  # it is ready: its start is not the template's time
    return _running


def _stop(worker: subprocess.Popen[str]) -> None:
    worker.kill()
    worker.communicate()
