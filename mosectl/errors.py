"""Every error a user can meet: what is wrong, where, what to do next, and a documented exit code."""

from __future__ import annotations

import os

# By code: in a word or two for the help page, and in full.
EXIT_CODES = {
    0: ("done", "done"),
    1: ("bug", "a bug in mosectl; MOSECTL_DEBUG=1 shows the traceback"),
    2: ("usage", "wrong command line"),
    3: ("facts file", "the facts file cannot be read or a fact is wrong"),
    4: ("model", "model missing, unsupported or not readable"),
    5: ("patch", "the patch file is damaged or invalid, or its patch is applied already, or is not"),
    6: ("wrong base", "the patch was made for another base model"),
    7: ("output", "the output exists, cannot be written, or the disk is full"),
    8: (
        "nothing changed, or harm refused",
        "the edit changed nothing, diverged, or its first batch would have harmed the model",
    ),
    9: ("Hub", "the Hugging Face Hub cannot be reached or refuses"),
    10: ("below --fail-under", "a number is below its --fail-under"),
    11: ("stopped early", "the guard ended an edit; its patch holds the facts before"),
    12: ("patches conflict", "patches contradict each other; nothing was written"),
    130: ("Ctrl-C", "interrupted; nothing half-written is left behind, and what is kept to go on with is said"),
    141: ("closed pipe", "whoever read the output stopped reading"),
}


class MosectlError(Exception):
    """One clear message: ``what`` happened, ``where`` (file:line, layer, tensor), ``fix`` = the next step."""

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(": ".join(part for part in (where, what) if part) + (f"\n  → {fix}" if fix else ""))


class UsageError(MosectlError):
    """The command line, or what was asked for, is wrong."""

    exit_code = 2


class FactsError(MosectlError):
    """The facts file cannot be read or a fact is wrong."""

    exit_code = 3


class ModelError(MosectlError):
    """The model is missing, unsupported or not readable."""

    exit_code = 4


class NotFinite(ModelError):
    """A model gives NaN or infinite numbers."""


class PatchError(MosectlError):
    """The patch file is damaged or invalid, or its patch is applied already, or is not."""

    exit_code = 5


class BaseMismatch(PatchError):
    """The patch was made for another base model."""

    exit_code = 6


class OutputError(MosectlError):
    """The output exists, cannot be written, or the disk is full."""

    exit_code = 7


class EditFailed(MosectlError):
    """The edit changed nothing, diverged, or its first batch would have harmed the model."""

    exit_code = 8


class HubError(MosectlError):
    """The Hugging Face Hub cannot be reached or refuses."""

    exit_code = 9


class BelowThreshold(MosectlError):
    """A number is below what was asked for."""

    exit_code = 10


class StoppedEarly(MosectlError):
    """The guard ended an edit; its patch holds the facts before."""

    exit_code = 11


class ConflictError(MosectlError):
    """Patches contradict each other; nothing was written."""

    exit_code = 12


def debugging() -> bool:
    """Did the user ask for tracebacks, and for what libraries tell their developers?"""
    return os.environ.get("MOSECTL_DEBUG", "") not in ("", "0")


class Notice(UserWarning):
    """Something that a user should know and that stops nothing; the command line shows it as a hint."""
