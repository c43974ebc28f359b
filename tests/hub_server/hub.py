"""The Hub: finds the endpoint of a request, the user who sent it and the repository that it is about."""

import re
import secrets
from collections.abc import Callable
from urllib.parse import quote, unquote, urlencode

from .connection import Reply, Request
from .errors import HubError, RepositoryNotFoundError
from .storage import Repository, Store


NOTHING_IS_LARGE = 1 << 60
REPOSITORY = r"(?P<namespace>[^/]+)/(?P<name>[^/]+?)"
PLACEHOLDERS = {
    "{api}": rf"/api/(?P<kind>models|datasets)/{REPOSITORY}",
    "{web}": rf"/(?P<kind>datasets/)?{REPOSITORY}",
    "{path}": r"(?P<path>.+)",
}
ROUTES: list[tuple[str, re.Pattern, Callable, bool]] = []


def route(method: str, template: str, signed: bool = False) -> Callable:
    """Registers an endpoint, called with the hub, the request, the repository if any, and the unquoted rest.

    To signed URLs the client sends no token.
    """
    pattern = re.sub(r"\{\w+\}", lambda match: PLACEHOLDERS.get(match[0], f"(?P<{match[0][1:-1]}>[^/]+)"), template)

    def register(endpoint: Callable) -> Callable:
        ROUTES.append((method, re.compile(pattern), endpoint, signed))
        return endpoint

    return register


class Hub:
    """What all endpoints share."""

    def __init__(self, store: Store, users: dict[str, str], lfs_threshold: int, page_size: int):
        self.store = store
        self.users = users
        self.lfs_threshold = lfs_threshold
        self.has_large_files = lfs_threshold < NOTHING_IS_LARGE
        self.page_size = page_size
        # Upload URLs are signed, since the client sends no token to them; like real ones they expire (at a restart).
        self.upload_key = secrets.token_bytes(32)

    def answer(self, request: Request) -> Reply:
        method = "GET" if request.method == "HEAD" else request.method
        for routed_method, pattern, endpoint, signed in ROUTES:
            match = pattern.fullmatch(request.path)
            if match is None or routed_method != method:
                continue
            arguments = {key: unquote(value or "") for key, value in match.groupdict().items()}
            if "name" not in arguments:
                return endpoint(self, request, **arguments)
            kind = "dataset" if arguments.pop("kind").startswith("datasets") else "model"
            repository = self.store.repository(kind, arguments.pop("namespace"), arguments.pop("name"))
            if not signed and not self.can_read(request, repository):
                raise RepositoryNotFoundError(self.user(request))
            return endpoint(self, request, repository, **arguments)
        raise HubError(404, f"No such endpoint: {request.method} {request.path}")

    def user(self, request: Request) -> str | None:
        """Who sent a request; None without a token."""
        token = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if token and token not in self.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.users.get(token)

    def login(self, request: Request) -> str:
        user = self.user(request)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        return user

    def can_read(self, request: Request, repository: Repository) -> bool:
        user = self.user(request)
        try:
            state = repository.state()
        except RepositoryNotFoundError:
            return False
        return not state["private"] or user == repository.namespace

    def require_writer(self, request: Request, repository: Repository, ref: str = "") -> str:
        """The user, who may write to a repository of their own, or to a pull request of their own."""
        user = self.login(request)
        authors = {
            f"refs/pr/{discussion['num']}": discussion["author"] for discussion in repository.state()["discussions"]
        }
        if user not in (repository.namespace, authors.get(ref)):
            raise HubError(403, f"Forbidden: {user} has no write access to {repository.id} (pass `create_pr=1`)")
        return user

    def page(self, request: Request, items: list, size: int | None = None) -> tuple[list, dict[str, str]]:
        """The items from the cursor of a request on, and the header that links to the next page."""
        size = min(size or self.page_size, self.page_size)
        limit = request.query.get("limit", [""])[0]
        if limit.isdigit() and int(limit) > 0:
            size = min(size, int(limit))
        cursor = request.query.get("cursor", ["0"])[0]
        start = int(cursor) if cursor.isdigit() else 0
        if start + size >= len(items):
            return items[start:], {}
        query = urlencode({**request.query, "cursor": start + size}, doseq=True)
        url = f"http://{request.headers.get('Host', '127.0.0.1')}{quote(request.path, safe='/%')}?{query}"
        return items[start : start + size], {"Link": f'<{url}>; rel="next"'}


def web_path(repository: Repository) -> str:
    """Where a repository is shown, relative to the server."""
    return f"/datasets/{repository.id}" if repository.kind == "dataset" else f"/{repository.id}"


def web_url(request: Request, repository: Repository, rest: str = "") -> str:
    return f"http://{request.headers.get('Host', '127.0.0.1')}{web_path(repository)}{rest}"
