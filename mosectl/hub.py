"""The Hugging Face Hub: turn a hub id into a local folder, and its errors into a next step."""

from __future__ import annotations

import re
from pathlib import Path

from mosectl.errors import HubError, ModelError

# Weights as safetensors, and what loads them; no pickles, no code.
_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


def looks_like_repo(name: str) -> bool:
    """"user/model" or "gpt2", as opposed to a path."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII) is not None and not name.startswith(".")


def fetch_model(repo: str, revision: str | None = None) -> tuple[Path, str]:
    """Download a model (or find it in the cache) and return its folder and the commit it was resolved to.

    Raises:
        ModelError: no such model or revision. HubError: gated, unauthorised, offline or unreachable.
    """
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=_FILES, library_name="mosectl"))
    except GatedRepoError as e:
        fix = f"accept its terms at https://huggingface.co/{repo} and run: hf auth login"
        raise HubError("this model is gated", where=repo, fix=fix) from e
    except RevisionNotFoundError as e:
        raise ModelError(f"no revision '{revision}'", where=repo, fix="check --revision") from e
    except (RepositoryNotFoundError, HFValidationError) as e:
        fix = "check the name; a private model needs: hf auth login"
        raise ModelError("no such folder here and no such model on the Hub", where=repo, fix=fix) from e
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as e:
        fix = "give a local folder, or connect and unset HF_HUB_OFFLINE"
        raise HubError("not a local folder, not in the cache, and the Hub is out of reach", where=repo, fix=fix) from e
    except (HfHubHTTPError, httpx.HTTPError) as e:
        raise HubError("the Hub cannot be reached", where=repo, fix="check the network and try again") from e
    return folder, folder.name
