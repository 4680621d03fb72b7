"""The Hugging Face Hub: turn a hub id into a local folder, and its errors into a next step."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mosectl.errors import FactsError, HubError, ModelError, PatchError, debugging
from mosectl.storage.inputs import MAX_JSON

# Weights as safetensors, and what loads them; no pickles, no code.
_SMALL = ["*.json", "*.txt", "*.model", "*.jinja"]
_WEIGHTS = ["*.safetensors"]
_FIRST = 100_000  # bytes of a file asked for at first: most headers are shorter
SCHEME = "hf://"
_NEARLY = re.compile(r"hf:/*|https?:/+(?:www\.)?(?:huggingface\.co|hf\.co)/", re.IGNORECASE)
PART = r"(?!\.\.?(?:/|$))[\w.-]+"  # of a path: not empty, "." or ".."
REVISION = rf"refs/[\w-]+/{PART}|{PART}(?:/{PART})*?"


def nearly(text: str) -> str:
    """What stands behind something that is meant as "hf://" or as a page of the Hub, and is neither it nor a file here.

    Returns:
        user/repo… as it was written; empty for anything else.
    """
    found = _NEARLY.match(text)
    if not found or text.startswith(SCHEME) or os.path.lexists(text):
        return ""
    return text[found.end() :].strip("/")


def looks_like_repo(name: str) -> bool:
    """Whether it reads as "user/model" or "gpt2" do, as opposed to a path."""
    return (
        len(name) <= 200
        and not name.startswith(".")
        and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII) is not None
    )


def is_repo(name: str) -> bool:
    """Is this user/name, as the Hub allows it?"""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    with suppress(HFValidationError):
        validate_repo_id(name)
        return name.count("/") == 1
    return False


def fetch_model(repo: str, revision: str | None = None, *, weights: bool = True) -> tuple[Path, str]:
    """Download a model (or find it in the cache) and return its folder and the commit it was resolved to.

    Args:
        weights: False fetches only config and tokenizer.
    Raises:
        ModelError: no such model or revision. HubError: gated, unauthorised, offline or unreachable.
    """
    from huggingface_hub import snapshot_download

    patterns = _SMALL + _WEIGHTS if weights else _SMALL
    with hub_errors(repo, revision):
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, library_name="mosectl"))
    return folder, folder.name


def cached_model(repo: str, revision: str, patterns: Sequence[str] = (*_SMALL, *_WEIGHTS)) -> Path | None:
    """The folder of a hub model in the local cache; None where it is not there. Never asks the Hub.

    Args:
        patterns: what has to be there of the repository's files, where the client knows which it has.
    """
    from huggingface_hub import snapshot_download

    with suppress(OSError, ValueError):  # the client's own errors are kinds of these
        return Path(snapshot_download(repo, revision=revision, allow_patterns=[*patterns], local_files_only=True))
    return None


def remote_tensors(repo: str, revision: str | None = None) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → (dtype, shape) of every tensor of a hub model, read from the files' headers by range requests.

    Raises:
        ModelError: no safetensors there. HubError: the Hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    with hub_errors(repo, revision):
        try:
            found = HfApi(library_name="mosectl").get_safetensors_metadata(repo, revision=revision)
        except (NotASafetensorsRepoError, SafetensorsParsingError) as e:
            fix = "mosectl reads safetensors only: convert with from_pretrained(...).save_pretrained(folder)"
            raise ModelError("no safetensors weights", where=repo, fix=fix) from e
    return {
        name: (str(t.dtype), tuple(t.shape))
        for file in found.files_metadata.values()
        for name, t in file.tensors.items()
    }


def remote_header(repo: str, file: str, revision: str | None = None) -> tuple[bytes, int]:
    """The beginning of a safetensors file on the Hub, its header at least, and the size of the whole file in bytes.

    Raises:
        the client's own errors, for :func:`hub_errors`. PatchError: the header is larger than safetensors allows.
    """
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

    url, headers = hf_hub_url(repo, file, revision=revision), build_hf_headers(library_name="mosectl")

    def part(start: int, stop: int) -> tuple[bytes, int]:
        asked = {**headers, "Range": f"bytes={start}-{stop - 1}"}
        answer = get_session().get(url, headers=asked, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        hf_raise_for_status(answer)
        whole = re.fullmatch(r"bytes .*/(\d{1,18})", answer.headers.get("Content-Range", ""))
        return answer.content, int(whole[1]) if whole else start + len(answer.content)

    data, size = part(0, _FIRST)
    needed = 8 + int.from_bytes(data[:8], "little")
    if needed > 8 + MAX_JSON:
        raise PatchError("not a safetensors file", where=f"{repo}/{file}", fix="give a file made by mosectl edit")
    if len(data) < min(needed, size):
        data += part(len(data), needed)[0]
    return data, size


@contextmanager
def quiet_client() -> Iterator[None]:
    """Without what the Hub's client and the library datasets log of each try: our one error tells how it ended.

    Not so with MOSECTL_DEBUG=1.
    """
    import huggingface_hub.utils  # noqa: F401  (importing it sets its logger's level)

    loggers = [] if debugging() else [logging.getLogger(name) for name in ("huggingface_hub", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def hub_errors(repo: str, revision: str | None, kind: str = "model") -> Iterator[None]:
    """The client's many exceptions as one clear error with the next step; ``kind`` is "model", "patch" or "data set"."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    missing = {"model": ModelError, "patch": PatchError, "data set": FactsError}[kind]
    page = f"datasets/{repo}" if kind == "data set" else repo
    where = f"{SCHEME}{page}" if kind == "data set" else repo
    try:
        with quiet_client():
            yield
    except GatedRepoError as e:
        fix = f"accept its terms at https://huggingface.co/{page} and run: hf auth login"
        raise HubError(f"this {kind} is gated", where=where, fix=fix) from e
    except RevisionNotFoundError as e:
        fix = "check --revision" if kind == "model" else "check what stands behind the @"
        raise missing(f"no revision '{revision}'", where=where, fix=fix) from e
    except (RepositoryNotFoundError, HFValidationError) as e:
        fix = f"check the name; a private {kind} needs: hf auth login"
        here = {
            "model": "no such folder here and no such model on the Hub",
            "patch": "no such repository on the Hub",
            "data set": "no such data set on the Hub",
        }[kind]
        raise missing(here, where=where, fix=fix) from e
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as e:
        fix = f"check the name; for a file or folder its path; for a hub {kind} connect, and unset HF_HUB_OFFLINE"
        raise HubError("not on this disk, not in the cache, and the Hub is out of reach", where=where, fix=fix) from e
    except Exception as e:  # the client's transport (httpx, httpx2) has errors of its own
        if not isinstance(e, HfHubHTTPError | OSError) and not type(e).__module__.startswith("httpx"):
            raise
        status = getattr(getattr(e, "response", None), "status_code", None)
        if status in (401, 403):
            may = "read" if kind == "data set" else "write"
            fix = f"run: hf auth login, with a token that may {may} there"
            raise HubError(f"the Hub refuses ({status}): no right to do this", where=where, fix=fix) from e
        what = f"the Hub answers {status}" if status else "the Hub cannot be reached"
        raise HubError(what, where=where, fix="check the network and try again") from e
