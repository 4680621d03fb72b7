"""A process of its own that renders chat templates: a template is a stranger's program, which may never end or fill memory.

Run by chat.py as a file, not as a module of mosectl: it needs transformers' renderer and nothing else. Reads one JSON
request a line, {"template", "messages", "variables"}, and answers with one, {"text"} or {"error"}; an empty line first says
that it is ready. At the deadline chat.py ends it, whatever the template is doing; if chat.py is gone, it ends itself.
"""

from __future__ import annotations

import faulthandler
import json
import sys
from contextlib import suppress
from typing import Any

SECONDS = 3  # for one prompt
MEMORY = 1_000_000_000  # bytes beside what the process has from the start
LENGTH = 1_000_000  # characters of a rendered prompt


def main() -> None:
    """Render what comes line by line on standard input, within bounds of memory and time."""
    from transformers.utils.chat_template_utils import render_jinja_template

    with suppress(ImportError, OSError, ValueError):  # Windows and macOS know no such limit
        import resource

        import psutil

        limit = psutil.Process().memory_info().vms + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sys.stdout.write("\n")
    sys.stdout.flush()
    for line in sys.stdin:
        asked = json.loads(line)
        faulthandler.dump_traceback_later(2 * SECONDS, exit=True)  # by a thread that needs no instruction of Python's
        try:
            found: Any = render_jinja_template(
                [asked["messages"]], chat_template=asked["template"], add_generation_prompt=True, **asked["variables"]
            )
            told = {"text": found[0][0]}
            if len(found[0][0]) > LENGTH:
                told = {"error": f"writes {len(found[0][0]):,} characters"}
        except MemoryError:
            told = {"error": "takes too much memory"}
        except Exception as e:  # a template may raise anything
            told = {"error": f"fails: {str(e)[:500]}"}
        faulthandler.cancel_dump_traceback_later()
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
