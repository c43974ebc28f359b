"""Endpoints of files: listing, downloading, uploading and committing them."""

import fnmatch
import hashlib
import hmac
from urllib.parse import parse_qs

from .cards import InvalidCardError, card_metadata
from .commits import apply, check_card, read_commit
from .connection import Reply, Request
from .discussions import open_discussion
from .errors import EntryNotFoundError, HubError, RevisionNotFoundError
from .hub import Hub, route, web_path, web_url
from .storage import Commit, Repository, StoredFile, Tree, check_path, git_hash


EXPANDED_PAGE_SIZE = 50


def describe(path: str, file: StoredFile) -> dict:
    """A file as listings show it."""
    entry = {"type": "file", "path": path, "size": file.size, "oid": file.oid}
    if file.lfs:
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": len(file.pointer)}
    return entry


def listing(tree: Tree) -> dict[str, dict]:
    """All files and folders of a tree by their path."""
    inside: dict[str, list[str]] = {}
    for path, file in tree.items():
        for end in (end for end, character in enumerate(path) if character == "/"):
            inside.setdefault(path[:end], []).append(f"{path} {file.etag}")
    folders = {}
    for path, contents in inside.items():
        data = "\n".join(sorted(contents)).encode()
        folders[path] = {"type": "directory", "path": path, "size": 0, "oid": git_hash("tree", len(data), [data])}
    return dict(sorted({**folders, **{path: describe(path, file) for path, file in tree.items()}}.items()))


def add_last_commits(repository: Repository, head: Commit, entries: list[dict]) -> list[dict]:
    """The entries, each with the commit that changed it last."""
    pending, found = {entry["path"]: entry["oid"] for entry in entries}, {}
    for commit in repository.history(head.oid):
        before = listing(repository.commit(commit.parent).tree) if commit.parent else {}
        for path in [path for path, oid in pending.items() if before.get(path, {}).get("oid") != oid]:
            found[path] = {"id": commit.oid, "title": commit.title, "date": commit.date}
            del pending[path]
        if not pending:
            break
    return [{**entry, "lastCommit": found[entry["path"]]} for entry in entries]


@route("GET", "{api}/tree/{revision}(?:/{path})?")
def list_folder(hub: Hub, request: Request, repository: Repository, revision: str, path: str) -> Reply:
    commit = repository.commit(repository.find_commit(revision))
    prefix = f"{path.rstrip('/')}/" if path else ""
    inside = [entry for name, entry in listing(commit.tree).items() if name.startswith(prefix)]
    if prefix and not inside:
        raise EntryNotFoundError(f"{path} does not exist on {revision!r}")
    if not request.flag("recursive"):
        inside = [entry for entry in inside if "/" not in entry["path"][len(prefix) :]]
    expand = request.flag("expand")
    page, link = hub.page(request, inside, size=EXPANDED_PAGE_SIZE if expand else None)
    return Reply.json(add_last_commits(repository, commit, page) if expand else page, **link)


@route("POST", "{api}/paths-info/{revision}")
def describe_paths(hub: Hub, request: Request, repository: Repository, revision: str) -> Reply:
    commit = repository.commit(repository.find_commit(revision))
    form = parse_qs(request.read().decode())
    paths, expand = form.get("paths", []), form.get("expand", [""])[0].lower() == "true"
    entries = listing(commit.tree)
    found = [entries[path] for path in paths if path in entries]
    return Reply.json(add_last_commits(repository, commit, found) if expand else found)


@route("GET", "{web}/(?:resolve|raw)/{revision}/{path}")
def download(hub: Hub, request: Request, repository: Repository, revision: str, path: str) -> Reply:
    """Serves large files from here too: the client would lose the headers if it were redirected to the same host."""
    commit = repository.commit(repository.find_commit(revision))
    headers = {"X-Repo-Commit": commit.oid}
    if path not in commit.tree:
        # With the commit, by which the client remembers that the file is missing there.
        reply = Reply.error(EntryNotFoundError(f"{path} does not exist on {revision!r}"))
        reply.headers |= headers
        return reply
    file = commit.tree[path]
    headers |= {"ETag": f'"{file.etag}"', "Content-Type": "application/octet-stream"}
    if file.lfs:
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
    return Reply(200, repository.blob(file.sha256), headers)


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: Hub, request: Request) -> Reply:
    try:
        metadata = card_metadata(str(request.json().get("content", "")))
    except InvalidCardError as error:
        if request.headers.get("Accept") == "text/plain":
            return Reply(400, str(error).encode(), {"Content-Type": "text/plain"})
        return Reply.json({"errors": [{"message": str(error)}], "warnings": []}, status=400)
    warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
    return Reply.json({"errors": [], "warnings": warnings})


@route("POST", "{api}/preupload/{revision}")
def preupload(hub: Hub, request: Request, repository: Repository, revision: str) -> Reply:
    """Says of each file whether it is large, ignored, or already there: under `oid` is what it would have to equal."""
    if request.flag("create_pr"):
        hub.login(request)
    else:
        hub.require_writer(request, repository, revision)
    tree = repository.commit(repository.find_commit(revision)).tree
    body = request.json()
    ignored = body.get("gitIgnore")
    if ignored is None and ".gitignore" in tree:
        ignored = repository.blob(tree[".gitignore"].sha256).read_text()
    attributes = repository.blob(tree[".gitattributes"].sha256).read_text() if ".gitattributes" in tree else ""
    files = []
    for asked in body.get("files", []):
        path = check_path(asked.get("path"))
        lfs = hub.has_large_files and (int(asked.get("size", 0)) >= hub.lfs_threshold or is_large(path, attributes))
        answer = {
            "path": path,
            "uploadMode": "lfs" if lfs else "regular",
            "shouldIgnore": is_ignored(path, ignored or ""),
        }
        if path in tree and tree[path].lfs == lfs:
            answer["oid"] = tree[path].etag
        files.append(answer)
    return Reply.json({"files": files, "commitOid": repository.find_commit(revision)})


def is_large(path: str, attributes: str) -> bool:
    """Whether `.gitattributes` takes a path for large whatever its size; the last line that names it decides."""
    large = False
    for line in attributes.splitlines():
        pattern, *rest = line.split() or ["#"]
        name = path if "/" in pattern else path.rpartition("/")[2]
        if fnmatch.fnmatchcase(name, pattern.replace("/**/", "/*").lstrip("/")):
            large = "filter=lfs" in rest or (large and not {"-filter", "!filter"} & set(rest))
    return large


def is_ignored(path: str, patterns: str) -> bool:
    """What `.gitignore` says of a path (without character classes for slashes and other rarities)."""
    ignored = False
    parents = [path[:end] for end, character in enumerate(path) if character == "/"]
    for line in patterns.splitlines():
        pattern = line.strip().removeprefix("!")
        if not pattern or pattern.startswith("#"):
            continue
        candidates = parents if pattern.endswith("/") else [*parents, path]
        pattern = pattern.rstrip("/")
        if "/" not in pattern:
            candidates = [candidate.rsplit("/", 1)[-1] for candidate in candidates]
        if any(fnmatch.fnmatchcase(candidate, pattern.lstrip("/")) for candidate in candidates):
            ignored = not line.startswith("!")
    return ignored


@route("POST", "{api}/commit/{revision}")
def commit(hub: Hub, request: Request, repository: Repository, revision: str) -> Reply:
    opens_pull_request = request.flag("create_pr")
    author = hub.login(request) if opens_pull_request else hub.require_writer(request, repository, revision)
    header, operations = read_commit(repository, revision, request.lines)
    title, message = header["summary"], str(header.get("description") or "")
    with repository.changing() as state:
        ref = find_branch(state, revision)
        head = state["refs"][ref]
        parent = header.get("parentCommit")
        if parent and not opens_pull_request and not head.startswith(str(parent)):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        if opens_pull_request:
            discussion = open_discussion(state, title, message, author, ref, status="open")
            ref = f"refs/pr/{discussion['num']}"
            head = repository.find_commit(str(parent), state) if parent else head
            state["refs"][ref] = head
        before = repository.commit(head).tree
        after = apply(before, operations)
        if after.get("README.md") != before.get("README.md"):
            check_card(repository, after)
        if after != before:
            head = state["refs"][ref] = repository.add_commit(head, after, title, message, author)
    pull_request = web_url(request, repository, f"/discussions/{discussion['num']}") if opens_pull_request else None
    return Reply.json(
        {
            "success": True,
            "commitOid": head,
            "commitUrl": web_url(request, repository, f"/commit/{head}"),
            "hookOutput": "",
            "pullRequestUrl": pull_request,
        }
    )


def find_branch(state: dict, revision: str) -> str:
    """The ref that a commit goes to: a branch or a pull request, no tag and no hash."""
    for ref in (f"refs/heads/{revision}", revision):
        if ref in state["refs"] and not ref.startswith("refs/tags/"):
            return ref
    raise RevisionNotFoundError(revision)


def sign_upload(hub: Hub, repository: Repository, sha256: str, size: int) -> str:
    message = f"{repository.kind} {repository.id} {sha256} {size}".encode()
    return hmac.new(hub.upload_key, message, hashlib.sha256).hexdigest()


@route("POST", "{web}[.]git/info/lfs/objects/batch")
def lfs_batch(hub: Hub, request: Request, repository: Repository) -> Reply:
    """Says where large files are to be uploaded, if they are not there yet."""
    body = request.json()
    if body.get("operation") != "upload":
        raise HubError(400, "Large files are downloaded from /resolve")
    if "ref" in body:
        hub.require_writer(request, repository, body["ref"].get("name", ""))
    else:  # for a pull request, which anybody may open
        hub.login(request)
    objects = []
    for asked in body.get("objects", []):
        sha256, size = asked.get("oid"), asked.get("size")
        if not isinstance(sha256, str) or not isinstance(size, int):
            raise HubError(400, "An object needs an oid and a size")
        answer = {"oid": sha256, "size": size}
        if not repository.blob(sha256).is_file():
            prefix = f"http://{request.headers['Host']}{web_path(repository)}.git/info/lfs"
            signature = sign_upload(hub, repository, sha256, size)
            answer["actions"] = {
                "upload": {"href": f"{prefix}/upload/{sha256}?size={size}&signature={signature}"},
                "verify": {"href": f"{prefix}/verify"},
            }
        objects.append(answer)
    return Reply.json({"transfer": "basic", "objects": objects})


@route("PUT", "{web}[.]git/info/lfs/upload/{sha256}", signed=True)
def lfs_upload(hub: Hub, request: Request, repository: Repository, sha256: str) -> Reply:
    size = request.query.get("size", [""])[0]
    signature = request.query.get("signature", [""])[0]
    if not size.isdigit() or not hmac.compare_digest(
        signature.encode(), sign_upload(hub, repository, sha256, int(size)).encode()
    ):
        raise HubError(403, "Invalid or expired upload URL")
    repository.add_blob(request.chunks(), expected=(sha256, int(size)))
    return Reply()


@route("POST", "{web}[.]git/info/lfs/verify")
def lfs_verify(hub: Hub, request: Request, repository: Repository) -> Reply:
    hub.login(request)
    asked = request.json()
    blob = repository.blob(str(asked.get("oid")))
    if not blob.is_file() or blob.stat().st_size != asked.get("size"):
        raise HubError(404, f"The LFS object {asked.get('oid')} was not uploaded")
    return Reply.json({})
