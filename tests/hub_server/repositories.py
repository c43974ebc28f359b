"""Endpoints of users, repositories, branches, tags and commits."""

from .cards import InvalidCardError, card_tags
from .commits import read_card
from .connection import Reply, Request
from .errors import HubError, RepositoryNotFoundError, RevisionNotFoundError
from .hub import Hub, route, web_url
from .storage import REF_NAME, Commit, Repository


@route("GET", "/api/whoami-v2")
def whoami(hub: Hub, request: Request) -> Reply:
    user = hub.login(request)
    identity = {"type": "user", "id": user, "name": user, "fullname": user, "orgs": []}
    return Reply.json({**identity, "auth": {"accessToken": {"displayName": "test", "role": "write"}}})


def named_repository(hub: Hub, request: Request, body: dict) -> Repository:
    """The repository that a JSON body names; the namespace defaults to the user's own."""
    user, kind = hub.login(request), body.get("type") or "model"
    if kind not in ("model", "dataset"):
        raise HubError(400, f"This server has models and datasets, but no {kind!r}")
    return hub.store.repository(kind, str(body.get("organization") or user), str(body.get("name")))


def require_owner(hub: Hub, request: Request, repository: Repository) -> None:
    if hub.login(request) != repository.namespace:
        raise HubError(403, f"You don't have the rights to create a repo in the namespace {repository.namespace!r}")


@route("POST", "/api/repos/create")
def create(hub: Hub, request: Request) -> Reply:
    body = request.json()
    repository = named_repository(hub, request, body)
    require_owner(hub, request, repository)
    url = web_url(request, repository)
    try:
        hub.store.create(repository, asks_for_private(body, default=False))
    except HubError as error:
        error.details["url"] = url  # which the client reads with `exist_ok=True`
        raise
    return Reply.json({"url": url, "name": repository.id, "id": repository.id})


def asks_for_private(body: dict, default: bool) -> bool:
    if "visibility" in body:
        return body["visibility"] == "private"
    return bool(body.get("private", default))


@route("DELETE", "/api/repos/delete")
def delete(hub: Hub, request: Request) -> Reply:
    repository = named_repository(hub, request, request.json())
    if not hub.can_read(request, repository):
        raise RepositoryNotFoundError(hub.user(request))
    hub.require_writer(request, repository)
    hub.store.delete(repository)
    return Reply.json({})


@route("POST", "/api/repos/move")
def move(hub: Hub, request: Request) -> Reply:
    body = request.json()
    named = [str(body.get(key)).partition("/") for key in ("fromRepo", "toRepo")]
    source, target = (
        named_repository(hub, request, {"type": body.get("type"), "organization": namespace, "name": name})
        for namespace, _, name in named
    )
    if not hub.can_read(request, source):
        raise RepositoryNotFoundError(hub.user(request))
    hub.require_writer(request, source)
    require_owner(hub, request, target)
    hub.store.move(source, target)
    return Reply.json({})


@route("GET", "/api/{kind}")
def list_repositories(hub: Hub, request: Request, kind: str) -> Reply:
    if kind not in ("models", "datasets"):
        raise HubError(404, f"No such endpoint: {request.path}")
    author, search = (request.query.get(name, [""])[0] for name in ("author", "search"))
    sort = request.query.get("sort", [""])[0]
    found = []
    for repository in hub.store.repositories(kind.removesuffix("s")):
        if not hub.can_read(request, repository) or author not in ("", repository.namespace):
            continue
        try:
            description = information(repository, repository.commit(repository.find_commit("main")), blobs=False)
        except RepositoryNotFoundError:  # deleted meanwhile
            continue
        asked_tags = set(request.query.get("filter", []) + request.query.get("pipeline_tag", []))
        if asked_tags <= set(description["tags"]) and search.lower() in repository.id.lower():
            if not request.flag("full"):
                del description["siblings"]
            found.append(description)
    if sort in ("lastModified", "createdAt"):
        found.sort(key=lambda description: description[sort], reverse=True)
    page, link = hub.page(request, found)
    return Reply.json(page, **link)


@route("GET", "{api}(?:/revision/{revision})?")
def show_repository(hub: Hub, request: Request, repository: Repository, revision: str) -> Reply:
    commit = repository.commit(repository.find_commit(revision or "main"))
    return Reply.json(information(repository, commit, blobs=request.flag("blobs")))


def information(repository: Repository, commit: Commit, blobs: bool) -> dict:
    """What the Hub tells about a repository at one of its commits."""
    state = repository.state()
    try:
        card = read_card(repository, commit.tree)
    except InvalidCardError:
        card = {}
    siblings = []
    for path, file in commit.tree.items():
        siblings.append({"rfilename": path})
        if blobs:
            siblings[-1] |= {"size": file.size, "blobId": file.oid}
            if file.lfs:
                siblings[-1]["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": len(file.pointer)}
    description = {
        "_id": commit.oid[:24],
        "id": repository.id,
        "author": repository.namespace,
        "sha": commit.oid,
        "createdAt": state["created"],
        "lastModified": commit.date,
        "private": state["private"],
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": card_tags(card),
        "cardData": {key: value for key, value in card.items() if key != "model-index"},
        "siblings": siblings,
    }
    if repository.kind == "model":
        description["modelId"] = repository.id
        description |= {key: card[key] for key in ("library_name", "pipeline_tag", "model-index") if key in card}
    return description


@route("PUT", "{api}/settings")
def settings(hub: Hub, request: Request, repository: Repository) -> Reply:
    hub.require_writer(request, repository)
    body = request.json()
    with repository.changing() as state:
        state["private"] = asks_for_private(body, default=state["private"])
    return Reply.json({"private": state["private"]})


@route("GET", "{api}/auth-check(?P<write>/write)?")
def check_access(hub: Hub, request: Request, repository: Repository, write: str) -> Reply:
    if write:
        hub.require_writer(request, repository)
    return Reply.json({})


@route("GET", "{api}/refs")
def list_refs(hub: Hub, request: Request, repository: Repository) -> Reply:
    refs: dict[str, list[dict]] = {"branches": [], "tags": [], "pullRequests": [], "converts": []}
    prefixes = {"refs/heads/": "branches", "refs/tags/": "tags", "refs/pr/": "pullRequests"}
    for ref, oid in sorted(repository.state()["refs"].items()):
        prefix = next(prefix for prefix in prefixes if ref.startswith(prefix))
        refs[prefixes[prefix]].append({"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid})
    return Reply.json(refs)


@route("GET", "{api}/commits/{revision}")
def list_commits(hub: Hub, request: Request, repository: Repository, revision: str) -> Reply:
    commits = [
        {
            "id": commit.oid,
            "title": commit.title,
            "message": commit.message,
            "authors": [{"user": commit.author}],
            "date": commit.date,
            "formatted": {"title": commit.title, "message": commit.message},
        }
        for commit in repository.history(repository.find_commit(revision))
    ]
    page, link = hub.page(request, commits, size=50)
    return Reply.json(page, **link)


def add_ref(repository: Repository, ref: str, revision: str) -> Reply:
    if not REF_NAME.fullmatch(ref):
        raise HubError(400, f"Invalid reference: {ref!r}")
    with repository.changing() as state:
        target = repository.find_commit(revision, state)
        if ref in state["refs"]:
            raise HubError(409, f"Reference already exists: {ref}")
        if any(other.startswith(f"{ref}/") or ref.startswith(f"{other}/") for other in state["refs"]):
            raise HubError(409, f"Reference {ref} is in the way of another one")
        state["refs"][ref] = target
    return Reply.json({})


def remove_ref(repository: Repository, ref: str) -> Reply:
    with repository.changing() as state:
        if ref not in state["refs"]:
            raise RevisionNotFoundError(ref)
        del state["refs"][ref]
    return Reply.json({})


@route("POST", "{api}/branch/{branch}")
def create_branch(hub: Hub, request: Request, repository: Repository, branch: str) -> Reply:
    hub.require_writer(request, repository)
    return add_ref(repository, f"refs/heads/{branch}", request.json().get("startingPoint") or "main")


@route("DELETE", "{api}/branch/{branch}")
def delete_branch(hub: Hub, request: Request, repository: Repository, branch: str) -> Reply:
    hub.require_writer(request, repository)
    if branch == "main":
        raise HubError(403, "The default branch cannot be deleted")
    return remove_ref(repository, f"refs/heads/{branch}")


@route("POST", "{api}/tag/{revision}")
def create_tag(hub: Hub, request: Request, repository: Repository, revision: str) -> Reply:
    hub.require_writer(request, repository)
    return add_ref(repository, f"refs/tags/{request.json().get('tag')}", revision)


@route("DELETE", "{api}/tag/{tag}")
def delete_tag(hub: Hub, request: Request, repository: Repository, tag: str) -> Reply:
    hub.require_writer(request, repository)
    return remove_ref(repository, f"refs/tags/{tag}")


@route("POST", "{api}/super-squash/{branch}")
def super_squash(hub: Hub, request: Request, repository: Repository, branch: str) -> Reply:
    user = hub.require_writer(request, repository)
    message = str(request.json().get("message") or "Squash")
    with repository.changing() as state:
        if f"refs/heads/{branch}" not in state["refs"]:
            raise RevisionNotFoundError(branch)
        tree = repository.commit(state["refs"][f"refs/heads/{branch}"]).tree
        state["refs"][f"refs/heads/{branch}"] = repository.add_commit(None, tree, message, "", user)
    return Reply.json({})
