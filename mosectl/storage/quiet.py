"""transformers without its own report and bars: what matters in them is told as an error."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def quiet(*, stderr: bool = False) -> Iterator[None]:
    """No log and no bars of transformers in the block.

    Args:
        stderr: nor anything else on standard error: some of its bars do not ask whether they are wanted.
    """
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(50)  # above its own errors
    logging.disable_progress_bar()
    try:
        if stderr:
            with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
                yield
        else:
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
