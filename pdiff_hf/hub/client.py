"""What is asked of the Hub, and what its client's errors mean."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

from huggingface_hub import HfApi, RepoCard, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx, validate_repo_id  # type: ignore[attr-defined]  # the client's own

from ..errors import HubError
from ..text import printable


# Of weights: what ends so is a file, that may lack.
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def is_repository(name_or_path: str | os.PathLike[str]) -> bool:
    """Whether this can be the name of a repository: `namespace/name`, and neither something here nor a path. In
    `runs/` are the folders of the defaults."""
    return "/" in str(name_or_path) and is_model(str(name_or_path))


def is_model(name: str) -> bool:
    """The same, or the name alone, as the first models on the Hub have it."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not (name.startswith(("runs/", ".")) or name.endswith(SUFFIXES) or os.path.lexists(name))


def download(repo_id: str, repo_type: str, revision: str | None, token: str | None, patterns: list[str]) -> str:
    """The folder in the cache that holds these files of a repository."""
    with explained(repo_id, revision):
        return snapshot_download(repo_id, repo_type=repo_type, revision=revision, token=token, allow_patterns=patterns)


def download_file(repo_id: str, repo_type: str, revision: str | None, token: str | None, name: str) -> str:
    """One file of a repository, in the cache."""
    with explained(repo_id, revision):
        return hf_hub_download(repo_id, name, repo_type=repo_type, revision=revision, token=token)


def matching_models(pattern: str, token: str | None) -> list[tuple[str, str]]:
    """Names and present commits of the model repositories that a pattern, such as `org/*-digits`, matches."""
    if re.fullmatch(r"[\w.-]+/[\w.*?\[\]-]+", pattern) is None:
        raise HubError(
            f"{pattern!r} is no pattern of repositories: expected namespace/name, * and ? in the name only."
        )
    with explained(pattern, None):
        found = HfApi(token=token).list_models(author=pattern.partition("/")[0])
        names = sorted(model.id for model in found if fnmatchcase(model.id, pattern))
        return [(name, str(HfApi(token=token).model_info(name).sha)) for name in names]


def commit_of(repo_id: str, token: str | None) -> str:
    """The present commit of a model repository."""
    with explained(repo_id, None):
        return str(HfApi(token=token).model_info(repo_id).sha)


def license_of(repo_id: str, token: str | None = None) -> str | None:
    """The licence that the card of a model repository names, where it can be read and names one."""
    try:
        with explained(repo_id, None):
            card = HfApi(token=token).model_info(repo_id).card_data
    except HubError:
        return None
    license = getattr(card, "license", None)
    return license if isinstance(license, str) else None


def check_card(card: str, repo_type: str) -> None:
    """Asks the Hub, which knows what licences there are, before a repository is made that would stay empty."""
    try:
        RepoCard(card).validate(repo_type)
    except ValueError as error:
        raise HubError(f"The Hub does not take the card: {error}") from error
    except httpx.TransportError:
        # Clients of version 1 ask huggingface.co, whatever `HF_ENDPOINT` says; a Hub that is not there shows next.
        return


def repository_files(repo_id: str, revision: str, token: str | None) -> list[str]:
    """Names of the files of a model repository."""
    with explained(repo_id, revision):
        return HfApi(token=token).list_repo_files(repo_id, revision=revision)


def address(repo_id: str, is_zoo: bool) -> str:
    """Where people look at a repository."""
    return f"{constants.ENDPOINT}/{'datasets/' if is_zoo else ''}{repo_id}"


def _hub() -> str:
    """The Hub, and where the client looks for it, without what an address may hold beside the host."""
    host = urlsplit(constants.ENDPOINT)
    return f"the Hub at {host.hostname}{f':{host.port}' if host.port else ''}"


def _reason(error: HfHubHTTPError) -> str:
    """What a status means, and what the Hub said of it."""
    status = error.response.status_code if error.response is not None else None
    reasons = {
        401: "The Hub refused the token. Log in with `hf auth login`.",
        403: "This account may not do that there. Check the namespace and the rights of the token.",
        412: "Somebody else pushed meanwhile. Nothing was changed: pull, and push again.",
        429: "The Hub asks for patience (too many requests). Try again later.",
    }
    later = " Try again later." if (status or 0) >= 500 else ""
    reason = reasons.get(status or 0, f"The Hub answered with status {status}.{later}")
    said = re.sub(r"\w+://\S+|hf_\w+", "...", error.server_message or "")
    said = " ".join(printable(said).split())[:200]
    return f"{reason} It says: {said}" if said else reason


@contextmanager
def explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turns the client's errors into ones that say what to do. Tokens, and addresses but for the Hub's host, stay out
    of the message."""
    at = f" at revision {revision!r}" if revision else ""
    try:
        yield
    except GatedRepoError as error:
        raise HubError(
            f"{repo_id} is open to those alone who were given access: ask for it on its page, and log in with "
            "`hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{repo_id} is no folder here, and is not on the Hub or is private. Check the name, or log in with "
            "`hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{repo_id} has no revision {revision!r}.") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if isinstance(error.__cause__, HfHubHTTPError):
            raise HubError(f"{repo_id}{at}: {_reason(error.__cause__)}") from error
        raise HubError(
            f"{repo_id}{at} is no folder here and not in the cache, and {_hub()} cannot be reached (offline?). Go "
            "online and try again."
        ) from error
    except EntryNotFoundError as error:
        raise HubError(f"{repo_id}{at} lacks a file that it should have: its upload is not complete.") from error
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is no name of a repository: expected namespace/name.") from error
    except HfHubHTTPError as error:
        raise HubError(f"{repo_id}{at}: {_reason(error)}") from error
    except json.JSONDecodeError as error:
        raise HubError(f"{repo_id}{at}: what {_hub()} answered is no JSON. Try again later.") from error
    except (httpx.LocalProtocolError, UnicodeEncodeError):
        # The client's error quotes it.
        raise HubError(f"{repo_id}{at}: the token holds characters that none has. Copy it again.") from None
    except (httpx.HTTPError, ConnectionError, TimeoutError, RuntimeError) as error:
        # An upload that loses its connection is a RuntimeError of the client, and an older one of its `hf_xet`.
        of_client = isinstance(error.__cause__, httpx.HTTPError) or str(error).startswith("Data processing error")
        if isinstance(error, RuntimeError) and not of_client:
            raise
        raise HubError(
            f"{repo_id}{at}: the connection to {_hub()} was lost. Try again: what was transferred is not repeated."
        ) from error
