"""Repositories of GGUF files on the Hub: which of their files is meant, and fetching it.

user/repo (of the only one), user/repo/FILE.gguf, or user/repo:Q4_K_M as llama.cpp and Ollama write it.
"""

from __future__ import annotations

import re
from pathlib import Path

from mosectl.errors import HubError, ModelError
from mosectl.storage.gguf_header import SUFFIX
from mosectl.storage.hub import PART, cached_model, hub_errors

_NAMED = re.compile(rf"({PART}/{PART})(?:/({PART}(?:/{PART})*)|:([\w.-]+))", re.ASCII)
_NO_MODEL = re.compile(r"(?:.*/)?(?:mmproj|imatrix)[^/]*|.*[-_.](?:mmproj|imatrix)", re.IGNORECASE)  # beside a model
_SHOWN = 12  # file names in a message


def named(model: str) -> tuple[str, str]:
    """The repository that a model's name may mean, and which GGUF file of it: its path, ":" and a tag, or "" for none."""
    found = _NAMED.fullmatch(model) if len(model) <= 400 else None
    if found and found[3]:
        return found[1], f":{found[3]}"
    if found and found[2].lower().endswith(SUFFIX):
        return found[1], found[2]
    return model, ""


def fetch_gguf(repo: str, wanted: str, revision: str | None = None) -> tuple[Path, str, str] | None:
    """A GGUF file in the Hub's cache, downloaded if need be; its name as user/repo/file, and the commit.

    Args:
        wanted: as of :func:`named`; "" takes the only one, and gives None where there are none, or other weights besides.
    Raises:
        ModelError: there is no such file, or several that may be meant. HubError: the Hub refuses, or is out of reach and
        the file is not in the cache.
    """
    from huggingface_hub import hf_hub_download

    names = _listed(repo, revision, needed=bool(wanted))
    files = [n for n in names if n.lower().endswith(SUFFIX)]
    if not wanted and (not files or any(n.endswith(".safetensors") for n in names)):
        return None
    file = _chosen(repo, wanted, files)
    with hub_errors(repo, revision):
        # By the revision's own name, so that it is found in the cache by that.
        path = Path(hf_hub_download(repo, file, revision=revision, library_name="mosectl"))
    return path, f"{repo}/{file}", path.parents[file.count("/")].name


def _listed(repo: str, revision: str | None, *, needed: bool) -> list[str]:
    """The names of a repository's files; of those in the cache where the Hub is out of reach.

    Args:
        needed: a GGUF file has to be among them.
    """
    from huggingface_hub import HfApi

    try:
        with hub_errors(repo, revision):
            found = HfApi(library_name="mosectl").model_info(repo, revision=revision)
    except HubError:
        folder = cached_model(repo, revision or "main", ["/"])  # as much of it as there is
        here = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) if folder else []
        if not folder or (needed and not any(n.lower().endswith(SUFFIX) for n in here)):
            raise
        return here
    return sorted(s.rfilename for s in found.siblings or ())


def _chosen(repo: str, wanted: str, files: list[str]) -> str:
    """The one file that is meant."""
    models = [f for f in files if not _NO_MODEL.fullmatch(f[: -len(SUFFIX)])] or files
    if wanted.startswith(":"):
        tag = re.compile(rf"(?:.*[-_./])?{re.escape(wanted[1:])}", re.IGNORECASE)
        fitting = [f for f in models if tag.fullmatch(f[: -len(SUFFIX)])]
    else:
        fitting = [f for f in files if f == wanted] if wanted else models
    if len(fitting) == 1:
        return fitting[0]
    of = fitting or models
    shown = ", ".join(of[:_SHOWN]) + (f" and {len(of) - _SHOWN} more" if len(of) > _SHOWN else "")
    if fitting:
        what = f"holds {len(of)} GGUF files" + f" for '{wanted[1:]}'" * bool(wanted) + f": {shown}"
    else:
        what = f"holds no GGUF file '{wanted.lstrip(':')}'" + (f", but {shown}" if of else "")
    fix = f"name one: --model {repo}/{of[0]}" if of else "check the name on its page"
    raise ModelError(what, where=repo, fix=fix)
