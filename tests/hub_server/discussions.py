"""Discussions and pull requests: opened, listed and shown. Nobody merges them."""

from .connection import Reply, Request
from .errors import HubError
from .hub import Hub, route
from .storage import Repository, now


def open_discussion(state: dict, title: str, text: str, author: str, ref: str | None, status: str) -> dict:
    """Adds a discussion to a repository's state; a pull request is one about a branch."""
    discussion = {
        "num": len(state["discussions"]) + 1,
        "title": title,
        "text": text,
        "author": author,
        "date": now(),
        "status": status,
        "base": ref,
    }
    state["discussions"].append(discussion)
    return discussion


def describe(repository: Repository, discussion: dict) -> dict:
    return {
        "num": discussion["num"],
        "title": discussion["title"],
        "author": {"name": discussion["author"]},
        "createdAt": discussion["date"],
        "status": discussion["status"],
        "isPullRequest": discussion["base"] is not None,
        "repo": {"name": repository.id, "type": repository.kind},
    }


@route("GET", "{api}/discussions")
def list_discussions(hub: Hub, request: Request, repository: Repository) -> Reply:
    found = [describe(repository, discussion) for discussion in reversed(repository.state()["discussions"])]
    return Reply.json({"discussions": found, "count": len(found), "start": 0})


@route("POST", "{api}/discussions")
def create_discussion(hub: Hub, request: Request, repository: Repository) -> Reply:
    author, body = hub.login(request), request.json()
    with repository.changing() as state:
        ref = "refs/heads/main" if body.get("pullRequest") else None
        status = "draft" if ref else "open"
        title, text = str(body.get("title")), str(body.get("description") or "")
        discussion = open_discussion(state, title, text, author, ref, status)
        if ref:
            state["refs"][f"refs/pr/{discussion['num']}"] = state["refs"][ref]
    return Reply.json({"num": discussion["num"], "pullRequest": bool(ref)})


def find_discussion(state: dict, num: str) -> dict:
    for discussion in state["discussions"]:
        if str(discussion["num"]) == num:
            return discussion
    raise HubError(404, f"There is no discussion {num}")


@route("GET", "{api}/discussions/{num}")
def show_discussion(hub: Hub, request: Request, repository: Repository, num: str) -> Reply:
    state = repository.state()
    discussion = find_discussion(state, num)
    comment = {
        "id": f"{discussion['num']:024x}",
        "type": "comment",
        "author": {"name": discussion["author"]},
        "createdAt": discussion["date"],
        "data": {"edited": False, "hidden": False, "latest": {"raw": discussion["text"]}},
    }
    details = {**describe(repository, discussion), "events": [comment]}
    if discussion["base"] is not None:
        details["changes"] = {"base": discussion["base"], "mergeCommitId": None}
        details["filesWithConflicts"] = []
        details["diff"] = ""
    return Reply.json(details)
