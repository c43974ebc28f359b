# Over 400 lines: all of it shares one running server and its clients.
"""The Hub server of the tests, driven by the unmodified clients in both of their upload modes.

Checks run in a process whose clients are connected to the server, since clients freeze their endpoint on import.
"""

import base64
import filecmp
import hashlib
import http.client
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    get_hf_file_metadata,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.constants import DOWNLOAD_CHUNK_SIZE
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session, hf_raise_for_status

from .hub_server import NOTHING_IS_LARGE, HubClient, HubServer, client_environment


LARGE = bytes(range(256)) * 200  # above the threshold of the mode that has large files
API = HfApi()


@dataclass
class Connected:
    """A server and a process of alice's whose clients talk to it."""

    server: HubServer
    client: HubClient


def connect(folder: Path, xet: bool) -> Iterator[Connected]:
    # With Xet the clients upload in several commits, and only regular files to a server without Xet storage.
    with HubServer(folder / "hub", lfs_threshold=NOTHING_IS_LARGE if xet else 10_000, page_size=7) as server:
        client = HubClient(client_environment(server.url, folder / "home", xet=xet))
        yield Connected(server, client)
        client.stop()


@pytest.fixture(scope="session")
def lfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Connected]:
    """Large files are uploaded by LFS, and folders in one commit."""
    yield from connect(tmp_path_factory.mktemp("lfs"), xet=False)


@pytest.fixture(scope="session")
def xet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Connected]:
    """All files are regular, and folders are uploaded in several commits."""
    yield from connect(tmp_path_factory.mktemp("xet"), xet=True)


@pytest.fixture(params=["lfs", "xet"])
def either(request: pytest.FixtureRequest) -> Connected:
    """Each upload mode in turn."""
    return request.getfixturevalue(request.param)


def with_client(check: Callable) -> Callable:
    """Makes a test of a check that runs beside the clients, in each upload mode, on a new repository of alice's."""

    def test(either: Connected) -> None:
        either.client(run_check, check.__name__)

    test.check = check
    test.__doc__ = check.__doc__
    return test


def run_check(name: str) -> None:
    repo_id = f"alice/{name.removeprefix('test_')}"
    API.create_repo(repo_id)
    globals()[name].check(repo_id)


def upload(repo_id: str, path: str, content: bytes, **options) -> str:
    """Uploads one file; returns the commit."""
    return API.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=repo_id, **options).oid


def read(repo_id: str, path: str, **options) -> bytes:
    return Path(hf_hub_download(repo_id, path, **options)).read_bytes()


def write_folder(files: dict[str, bytes]) -> str:
    folder = Path(tempfile.mkdtemp())
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return str(folder)


@contextmanager
def raises_status(status: int) -> Iterator[None]:
    with pytest.raises(HfHubHTTPError) as error:
        yield
    assert error.value.response.status_code == status


# Repositories


@with_client
def test_create_and_delete(repo_id: str):
    assert API.whoami()["name"] == "alice"
    assert API.create_repo(repo_id, exist_ok=True).repo_id == repo_id
    with raises_status(409):
        API.create_repo(repo_id)
    info = API.model_info(repo_id)
    assert (info.id, info.author, info.private) == (repo_id, "alice", False)
    API.auth_check(repo_id)
    API.delete_repo(repo_id)
    assert not API.repo_exists(repo_id)
    with pytest.raises(RepositoryNotFoundError):
        API.delete_repo(repo_id)


@with_client
def test_move(repo_id: str):
    commit = upload(repo_id, "weights.bin", LARGE)
    API.move_repo(repo_id, f"{repo_id}-moved")
    assert API.model_info(f"{repo_id}-moved").sha == commit
    assert read(f"{repo_id}-moved", "weights.bin") == LARGE
    assert not API.repo_exists(repo_id)
    with raises_status(403):
        API.move_repo(f"{repo_id}-moved", "bob/taken")


@with_client
def test_a_dataset_and_a_model_may_share_a_name(repo_id: str):
    API.create_repo(repo_id, repo_type="dataset")
    upload(repo_id, "rows.bin", LARGE, repo_type="dataset")
    assert read(repo_id, "rows.bin", repo_type="dataset") == LARGE
    assert not API.file_exists(repo_id, "rows.bin")
    assert API.dataset_info(repo_id).id == repo_id


@with_client
def test_lists_are_filtered_by_author_and_tag(repo_id: str):
    card = b"---\ntags: [unusual]\nlicense: mit\nlibrary_name: diffusers\n---\n# Title\n"
    upload(repo_id, "README.md", card)
    assert repo_id in [model.id for model in API.list_models(author="alice")]  # on more than one page
    assert [model.id for model in API.list_models(filter=["unusual", "license:mit"])] == [repo_id]
    assert list(API.list_models(author="bob", filter="unusual")) == []
    assert list(API.list_datasets(filter="unusual")) == []
    info = API.model_info(repo_id)
    assert (info.library_name, info.card_data.license) == ("diffusers", "mit")


@with_client
def test_invalid_metadata_is_refused(repo_id: str):
    with pytest.raises(ValueError, match="Invalid YAML"):
        upload(repo_id, "README.md", b"---\ntags: [\n---\n")
    with pytest.warns(UserWarning, match="empty or missing"):
        upload(repo_id, "README.md", b"# No metadata\n")
    card = {"path": "README.md", "content": "---\njust text\n---\n"}
    refused = raw_commit(repo_id, {"key": "file", "value": card})  # the server does not rely on the client's request
    assert (refused.status_code, "should be an object" in refused.text) == (400, True)


# Files


@with_client
def test_a_folder_is_uploaded_and_downloaded(repo_id: str):
    files = {"weights.bin": LARGE, "config.json": b"{}", "parts/one.bin": LARGE[1:], "empty.txt": b""}
    commit = API.upload_folder(repo_id=repo_id, folder_path=write_folder(files)).oid
    assert API.model_info(repo_id).sha == commit
    assert set(API.list_repo_files(repo_id)) == {*files, ".gitattributes"}
    snapshot = Path(snapshot_download(repo_id))
    assert {path: (snapshot / path).read_bytes() for path in files} == files
    metadata = get_hf_file_metadata(f"{API.endpoint}/{repo_id}/resolve/main/weights.bin")
    assert (metadata.commit_hash, metadata.size) == (commit, len(LARGE))
    assert (snapshot / "weights.bin").resolve().name == metadata.etag  # contents are cached by it


@with_client
def test_metadata_of_files(repo_id: str):
    upload(repo_id, "weights.bin", LARGE)
    [file] = [
        file for file in API.model_info(repo_id, files_metadata=True).siblings if file.rfilename == "weights.bin"
    ]
    assert file.size == len(LARGE)
    etag = get_hf_file_metadata(f"{API.endpoint}/{repo_id}/resolve/main/weights.bin").etag
    if os.environ["HF_HUB_DISABLE_XET"] == "1":
        assert file.lfs.sha256 == etag == hashlib.sha256(LARGE).hexdigest()
    else:
        assert file.lfs is None
        assert file.blob_id == etag == hashlib.sha1(b"blob %d\0" % len(LARGE) + LARGE).hexdigest()


@with_client
def test_trees_are_listed_page_by_page(repo_id: str):
    operations = [CommitOperationAdd(f"folder/{number:02}.txt", str(number).encode()) for number in range(20)]
    first = API.create_commit(repo_id, operations, commit_message="Many").oid
    upload(repo_id, "folder/03.txt", b"changed")
    assert [entry.path for entry in API.list_repo_tree(repo_id)] == [".gitattributes", "folder"]
    tree = list(API.list_repo_tree(repo_id, "folder", recursive=True, expand=True))  # pages hold seven
    assert [entry.path for entry in tree] == [f"folder/{number:02}.txt" for number in range(20)]
    assert [entry.path for entry in tree if entry.last_commit.oid != first] == ["folder/03.txt"]
    with pytest.raises(EntryNotFoundError):
        list(API.list_repo_tree(repo_id, "nowhere"))
    info = API.get_paths_info(repo_id, ["folder", "folder/00.txt", "missing"], expand=True)
    assert [(entry.path, entry.last_commit.title) for entry in info][1] == ("folder/00.txt", "Many")


@with_client
def test_delete_and_copy(repo_id: str):
    folder = write_folder({"weights.bin": LARGE, "small.txt": b"small", "old/one.txt": b"1", "old/two.txt": b"2"})
    API.upload_folder(repo_id=repo_id, folder_path=folder)
    copies = [CommitOperationCopy("weights.bin", "copy.bin"), CommitOperationCopy("small.txt", "copy.txt")]
    API.create_commit(repo_id, [*copies, CommitOperationDelete("old/")], commit_message="Rearrange")
    API.delete_file("small.txt", repo_id)
    assert set(API.list_repo_files(repo_id)) == {".gitattributes", "weights.bin", "copy.bin", "copy.txt"}
    assert (read(repo_id, "copy.bin"), read(repo_id, "copy.txt")) == (LARGE, b"small")
    with pytest.raises(EntryNotFoundError, match="doesn't exist"):
        API.delete_file("small.txt", repo_id)
    with pytest.raises(EntryNotFoundError):
        API.delete_folder("old", repo_id)


@with_client
def test_ignored_files_are_not_uploaded(repo_id: str):
    files = {
        ".gitignore": b"*.log\nbuild/\n!kept.log\n",
        "a.log": LARGE,
        "kept.log": b"",
        "build/x": b"",
        "b.txt": b"",
    }
    API.upload_folder(repo_id=repo_id, folder_path=write_folder(files))
    assert set(API.list_repo_files(repo_id)) == {".gitattributes", ".gitignore", "kept.log", "b.txt"}


@with_client
def test_ranges(repo_id: str):
    upload(repo_id, "weights.bin", LARGE)
    with HfFileSystem().open(f"{repo_id}/weights.bin", block_size=100) as file:
        file.seek(1000)
        assert file.read(50) == LARGE[1000:1050]
    url = f"{API.endpoint}/{repo_id}/resolve/main/weights.bin"
    for asked, expected in [("0-0", LARGE[:1]), ("51100-", LARGE[51100:]), ("-7", LARGE[-7:]), ("9-99999", LARGE[9:])]:
        reply = get_session().get(url, headers={"Range": f"bytes={asked}"})
        assert (reply.status_code, reply.content) == (206, expected)
        assert reply.headers["Content-Range"].endswith(f"/{len(LARGE)}")
    assert get_session().get(url, headers={"Range": f"bytes={len(LARGE)}-"}).status_code == 416
    head = get_session().head(url)
    assert (int(head.headers["Content-Length"]), head.content) == (len(LARGE), b"")
    assert head.headers["X-Repo-Commit"] == API.model_info(repo_id).sha


# Commits and refs


@with_client
def test_branches_and_tags(repo_id: str):
    first = upload(repo_id, "file.txt", b"first")
    API.create_branch(repo_id, branch="feature/one")
    second = upload(repo_id, "file.txt", b"second", revision="feature/one")
    API.create_tag(repo_id, tag="v1.0", revision="feature/one", tag_message="Release")
    assert [read(repo_id, "file.txt", revision=name) for name in ("main", "feature/one", "v1.0", first)] == [
        *(b"first", b"second", b"second", b"first")
    ]
    refs = API.list_repo_refs(repo_id)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": first, "feature/one": second}
    assert [(ref.ref, ref.target_commit) for ref in refs.tags] == [("refs/tags/v1.0", second)]
    API.create_tag(repo_id, tag="v1.0", exist_ok=True)
    API.create_branch(repo_id, branch="feature/one", exist_ok=True)
    with raises_status(409):
        API.create_branch(repo_id, branch="feature/one")
    API.delete_branch(repo_id, branch="feature/one")
    API.delete_tag(repo_id, tag="v1.0")
    with pytest.raises(RevisionNotFoundError):
        API.delete_tag(repo_id, tag="v1.0")
    with pytest.raises(RevisionNotFoundError):
        API.model_info(repo_id, revision="feature/one")
    with raises_status(403):
        API.delete_branch(repo_id, branch="main")


@with_client
def test_history_and_squash(repo_id: str):
    for number in range(9):  # on two pages
        upload(repo_id, "file.txt", str(number).encode(), commit_message=f"Write {number}", commit_description="Why")
    history = API.list_repo_commits(repo_id)
    assert [commit.title for commit in history] == [*(f"Write {n}" for n in range(8, -1, -1)), "initial commit"]
    assert (history[0].message, history[0].authors) == ("Why", ["alice"])
    API.super_squash_history(repo_id, commit_message="All")
    assert [commit.title for commit in API.list_repo_commits(repo_id)] == ["All"]
    assert read(repo_id, "file.txt") == b"8"


@with_client
def test_a_commit_without_changes_makes_none(repo_id: str):
    folder = write_folder({"weights.bin": LARGE, "config.json": b"{}"})
    first = API.upload_folder(repo_id=repo_id, folder_path=folder).oid
    assert API.upload_folder(repo_id=repo_id, folder_path=folder).oid == first
    asked = [{"path": "weights.bin", "size": len(LARGE)}, {"path": "config.json", "size": 2}]
    known = post(f"/api/models/{repo_id}/preupload/main", {"files": asked}).json()["files"]
    assert [file["oid"] for file in known] == [
        get_hf_file_metadata(f"{API.endpoint}/{repo_id}/resolve/main/{file['path']}").etag for file in asked
    ]
    line = {"path": "config.json", "content": base64.b64encode(b"{}").decode(), "encoding": "base64"}
    assert raw_commit(repo_id, {"key": "file", "value": line}).json()["commitOid"] == first  # nor from other clients
    assert len(API.list_repo_commits(repo_id)) == 2


@with_client
def test_a_moved_parent_is_refused(repo_id: str):
    parent = upload(repo_id, "file.txt", b"first")
    upload(repo_id, "file.txt", b"second", parent_commit=parent)
    with raises_status(412):
        upload(repo_id, "file.txt", b"third", parent_commit=parent)
    with raises_status(412):
        API.upload_folder(repo_id=repo_id, folder_path=write_folder({"file.txt": b"4"}), parent_commit=parent)
    assert read(repo_id, "file.txt") == b"second"


@with_client
def test_one_of_several_writers_wins(repo_id: str):
    # A commit takes long enough here for the writers to meet.
    files = [CommitOperationAdd(f"{number}.txt", b"") for number in range(500)]
    parent = API.create_commit(repo_id, files, commit_message="Many").oid
    for _ in range(3):
        barrier, replies = threading.Barrier(6), []

        def write(number: int, parent: str = parent, barrier=barrier, replies=replies) -> None:
            file = {"path": "file.txt", "content": f"{parent} {number}", "encoding": "utf-8"}
            barrier.wait()
            replies.append(raw_commit(repo_id, {"key": "file", "value": file}, parent=parent))

        writers = [threading.Thread(target=write, args=(number,)) for number in range(6)]
        [writer.start() for writer in writers]
        [writer.join() for writer in writers]
        assert sorted(reply.status_code for reply in replies) == [200] + [412] * 5
        [winner] = [reply.json()["commitOid"] for reply in replies if reply.status_code == 200]
        assert [commit.commit_id for commit in API.list_repo_commits(repo_id)][:2] == [winner, parent]
        parent = winner


@with_client
def test_pull_requests(repo_id: str):
    upload(repo_id, "file.txt", b"ours")
    bob = HfApi(token="hf_bob")
    folder = write_folder({"theirs.txt": b"theirs", "weights.bin": LARGE})
    commit = bob.upload_folder(repo_id=repo_id, folder_path=folder, create_pr=True, commit_message="A proposal")
    assert (commit.pr_num, commit.pr_revision) == (1, "refs/pr/1")
    assert read(repo_id, "weights.bin", revision="refs/pr/1") == LARGE
    assert not API.file_exists(repo_id, "theirs.txt")
    upload(repo_id, "more.txt", b"more", revision="refs/pr/1", token="hf_bob")
    [shown] = API.get_repo_discussions(repo_id)
    assert (shown.title, shown.author, shown.is_pull_request) == ("A proposal", "bob", True)
    assert len(API.list_repo_refs(repo_id, include_pull_requests=True).pull_requests) == 1
    details = API.get_discussion_details(repo_id, 1)
    assert (details.target_branch, details.git_reference) == ("refs/heads/main", "refs/pr/1")
    with raises_status(403):
        upload(repo_id, "more.txt", b"more", token="hf_bob")
    assert read(repo_id, "more.txt", revision="refs/pr/1") == b"more"
    assert bob.create_commit(repo_id, [CommitOperationAdd("x", b"x")], commit_message="x", create_pr=True).pr_num == 2


# Users and errors


@with_client
def test_private_repositories_are_invisible(repo_id: str):
    upload(repo_id, "weights.bin", LARGE)
    API.update_repo_settings(repo_id, private=True)
    assert read(repo_id, "weights.bin") == LARGE
    for token in ("hf_bob", False):
        stranger = HfApi(token=token)
        for look in (
            stranger.model_info,
            stranger.list_repo_files,
            stranger.list_repo_refs,
            stranger.list_repo_commits,
        ):
            with pytest.raises(RepositoryNotFoundError):
                look(repo_id)
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download(repo_id, "weights.bin", token=token, cache_dir=tempfile.mkdtemp())
        assert repo_id not in [model.id for model in stranger.list_models(author="alice")]
    API.update_repo_settings(repo_id, private=False)
    assert HfApi(token=False).model_info(repo_id).private is False


@with_client
def test_users_write_into_their_own_namespace(repo_id: str):
    bob = HfApi(token="hf_bob")
    writes = [
        lambda: bob.upload_file(path_or_fileobj=b"", path_in_repo="file.txt", repo_id=repo_id),
        lambda: bob.create_branch(repo_id, branch="bob"),
        lambda: bob.create_tag(repo_id, tag="bob"),
        lambda: bob.update_repo_settings(repo_id, private=True),
        lambda: bob.super_squash_history(repo_id),
        lambda: bob.delete_repo(repo_id),
        lambda: bob.move_repo(repo_id, f"bob/{repo_id.split('/')[1]}"),
        lambda: bob.create_repo(f"{repo_id}-by-bob"),
        lambda: bob.auth_check(repo_id, write=True),
    ]
    for write in writes:
        with raises_status(403):
            write()
    with raises_status(401):
        HfApi(token=False).create_repo("anonymous")
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(token="hf_unknown").whoami()
    assert len(API.list_repo_commits(repo_id)) == 1


@with_client
def test_errors_have_the_client_s_types(repo_id: str):
    upload(repo_id, "file.txt", b"")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("alice/missing", "file.txt")
    with pytest.raises(RepositoryNotFoundError):
        API.model_info("alice/missing", token=False)
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(repo_id, "file.txt", revision="missing")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(repo_id, "missing.txt")
    with pytest.raises(RevisionNotFoundError):
        upload(repo_id, "file.txt", b"", revision="missing")


@with_client
def test_no_path_leaves_the_repository(repo_id: str):
    for path in ("../up", "a/../../up", "/absolute", "a//b", ".git/config", "a\\b", "a\nb", "", "./a"):
        operation = {"key": "file", "value": {"path": path, "content": "", "encoding": "base64"}}
        assert raw_commit(repo_id, operation).status_code == 400, path
    for path, status in {
        "/../../etc/passwd": 404,
        f"/{repo_id}/resolve/main/../../repository.json": 404,
        f"/{repo_id}/resolve/main/%2e%2e%2f%2e%2e%2frepository.json": 404,
        f"/{repo_id}/resolve/..%2f..%2frepository/file": 404,
        f"/api/models/{repo_id}/tree/main/..%2f..": 404,
        f"/api/models/{repo_id}/revision/..%2f..%2frepository": 404,
        "/api/models/..%2fmodels/alice": 400,
        "/api/models/alice/..": 400,
        "/..%2f../x/resolve/main/y": 400,
    }.items():
        # The client would resolve the dots by itself.
        connection = http.client.HTTPConnection(urlsplit(API.endpoint).netloc)
        connection.request("GET", path, headers={"Authorization": "Bearer hf_alice"})
        assert connection.getresponse().status == status, path
        connection.close()
    for name in ("..", "../../x", ".hidden", "a/b", "x" * 200, "a\0b"):
        body = {"name": name, "organization": "alice"}
        assert post("/api/repos/create", body).status_code == 400, name
    assert post(f"/api/models/{repo_id}/tag/main", {"tag": "../x"}).status_code == 400
    assert API.list_repo_files(repo_id) == [".gitattributes"]


def post(path: str, content: dict):
    return get_session().post(API.endpoint + path, json=content, headers={"Authorization": "Bearer hf_alice"})


def raw_commit(repo_id: str, *operations: dict, parent: str | None = None):
    """Commits without the client's own checks."""
    lines = [{"key": "header", "value": {"summary": "Raw", "parentCommit": parent}}, *operations]
    return get_session().post(
        f"{API.endpoint}/api/models/{repo_id}/commit/main",
        content="\n".join(map(json.dumps, lines)),
        headers={"Authorization": "Bearer hf_alice"},
    )


def test_checksums_are_verified(lfs: Connected):
    lfs.client(upload_corrupted, "alice/corrupted")


def upload_corrupted(repo_id: str) -> None:
    API.create_repo(repo_id)
    corrupted = b"!" + LARGE[1:]
    sha256 = hashlib.sha256(LARGE).hexdigest()
    objects = {"operation": "upload", "objects": [{"oid": sha256, "size": len(LARGE)}]}
    actions = post(f"/{repo_id}.git/info/lfs/objects/batch", objects).json()["objects"][0]["actions"]
    for content in (corrupted, LARGE[:-1]):
        reply = get_session().put(actions["upload"]["href"], content=content)
        assert (reply.status_code, "Checksum mismatch" in reply.text) == (400, True)
    forged = re.sub(r"size=\d+", "size=1", actions["upload"]["href"])
    assert get_session().put(forged, content=b"!").status_code == 403
    verify = actions["verify"]["href"].removeprefix(API.endpoint)
    assert post(verify, {"oid": sha256, "size": len(LARGE)}).status_code == 404
    large_file = {"key": "lfsFile", "value": {"path": "weights.bin", "oid": sha256, "size": len(LARGE)}}
    assert raw_commit(repo_id, large_file).status_code == 400
    hf_raise_for_status(get_session().put(actions["upload"]["href"], content=LARGE))
    assert post(verify, {"oid": sha256, "size": len(LARGE) + 1}).status_code == 404
    assert post(verify, {"oid": sha256, "size": len(LARGE)}).status_code == 200
    assert raw_commit(repo_id, large_file).status_code == 200
    copy = {"key": "copyFile", "value": {"path": "copy.bin", "srcPath": "weights.bin"}}
    assert raw_commit(repo_id, copy).status_code == 200
    assert read(repo_id, "copy.bin") == LARGE


# Faults


def new_repository(repo_id: str) -> None:
    API.create_repo(repo_id)
    upload(repo_id, "weights.bin", LARGE)


def test_a_dropped_download_is_resumed(either: Connected):
    chunk = either.client(upload_more_than_a_chunk, "alice/dropped")
    either.server.clear_log()
    either.server.faults("drop", method="GET", path="/resolve/", after_bytes=chunk + 1000)
    assert either.client(downloaded_size, "alice/dropped") == chunk + 2000
    downloads = [exchange for exchange in either.server.log("/resolve/") if exchange["method"] == "GET"]
    assert [(exchange["status"], exchange["bytes_out"]) for exchange in downloads] == [
        (200, chunk + 1000),
        (206, 2000),  # the client writes, and therefore keeps, whole chunks
    ]


def upload_more_than_a_chunk(repo_id: str) -> int:
    API.create_repo(repo_id)
    upload(repo_id, "weights.bin", os.urandom(DOWNLOAD_CHUNK_SIZE + 2000))
    return DOWNLOAD_CHUNK_SIZE


def downloaded_size(repo_id: str) -> int:
    content = read(repo_id, "weights.bin")
    [file] = [
        file for file in API.model_info(repo_id, files_metadata=True).siblings if file.rfilename == "weights.bin"
    ]
    blob_id = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    assert (file.lfs.sha256 if file.lfs else file.blob_id) in (hashlib.sha256(content).hexdigest(), blob_id)
    return len(content)


def test_a_dropped_upload_is_repeated(lfs: Connected):
    lfs.server.clear_log()
    lfs.server.faults("drop", method="PUT", after_bytes=20_000)
    lfs.client(new_repository, "alice/dropped-upload")
    uploads = lfs.server.log("/upload/")
    assert [(exchange["status"], exchange["bytes_in"]) for exchange in uploads] == [(None, 20_000), (200, len(LARGE))]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_refusals_are_repeated(lfs: Connected, status: int):
    lfs.server.clear_log()
    lfs.server.faults("status", path="/preupload/", status=status, retry_after=0)
    lfs.client(new_repository, f"alice/refused-{status}")
    assert [exchange["status"] for exchange in lfs.server.log("/preupload/")] == [status, 200]


def test_a_lost_reply_is_not_a_lost_commit(xet: Connected):
    xet.client(new_repository, "alice/lost-reply")
    xet.server.clear_log()
    xet.server.faults("lose-reply", path="/commit/")
    assert xet.client(upload_and_count_commits, "alice/lost-reply") == 3  # the repeated request changed nothing
    assert [exchange["status"] for exchange in xet.server.log("/commit/")] == [None, 200]


def upload_and_count_commits(repo_id: str) -> int:
    API.upload_folder(repo_id=repo_id, folder_path=write_folder({"more.txt": b"more"}))
    return len(API.list_repo_commits(repo_id))


def test_a_delay_delays_and_faults_end(lfs: Connected):
    lfs.client(new_repository, "alice/delayed")
    lfs.server.faults("delay", path="/alice/delayed", seconds=0.5)
    assert lfs.client(time_of_information, "alice/delayed") >= 0.5
    assert lfs.client(time_of_information, "alice/delayed") < 0.5
    lfs.server.faults("status", path="/alice/delayed", status=500)
    lfs.server.clear_faults()
    assert lfs.client(time_of_information, "alice/delayed") < 0.5


def time_of_information(repo_id: str) -> float:
    start = time.perf_counter()
    API.model_info(repo_id)
    return time.perf_counter() - start


def test_an_interrupted_upload_leaves_nothing(lfs: Connected):
    lfs.server.faults("drop", path="/commit/", after_bytes=40)
    lfs.client(interrupt_upload, "alice/interrupted")
    assert list((lfs.server.data / "scratch").iterdir()) == []


def interrupt_upload(repo_id: str) -> None:
    API.create_repo(repo_id)
    with pytest.raises(Exception, match=r"(?i)disconnect|reset|broken pipe"):
        upload(repo_id, "weights.bin", LARGE)
    assert API.list_repo_files(repo_id) == [".gitattributes"]


def test_replies_do_not_wait_for_acknowledgements(lfs: Connected):
    lfs.client(new_repository, "alice/prompt")
    durations = [lfs.client(time_of_information, "alice/prompt") for _ in range(20)]
    # Nagle's algorithm would hold each back for 40 ms, once the connection has lasted for a while.
    assert min(durations[10:]) < 0.03


# The other clients


def test_datasets_loads_a_dataset(either: Connected):
    either.client(load_dataset, "alice/rows")


def load_dataset(repo_id: str) -> None:
    import datasets

    datasets.config.USE_PARQUET_EXPORT = False
    API.create_repo(repo_id, repo_type="dataset")
    rows = [{"seed": seed, "accuracy": seed / 10} for seed in range(1000)]
    upload(repo_id, "data/train.jsonl", "\n".join(map(json.dumps, rows)).encode(), repo_type="dataset")
    assert datasets.load_dataset(repo_id, split="train")[999] == rows[999]
    assert next(iter(datasets.load_dataset(repo_id, split="train", streaming=True))) == rows[0]


def test_diffusers_pushes_and_loads(either: Connected):
    either.client(push_scheduler, "alice/scheduler")


def push_scheduler(repo_id: str) -> None:
    from diffusers import DDPMScheduler

    DDPMScheduler(num_train_timesteps=123).push_to_hub(repo_id)
    assert DDPMScheduler.from_pretrained(repo_id).config.num_train_timesteps == 123
    commits = len(API.list_repo_commits(repo_id))
    DDPMScheduler.from_pretrained(repo_id).push_to_hub(repo_id)
    assert len(API.list_repo_commits(repo_id)) == commits
    with pytest.raises(OSError, match="missing"):
        DDPMScheduler.from_pretrained(repo_id, revision="missing")


# The server itself


def test_a_restart_keeps_everything(tmp_path: Path):
    with HubServer(tmp_path / "hub") as server:
        client = HubClient(client_environment(server.url, tmp_path / "home"))
        before = client(fill, "alice/kept")
        server.restart()
        assert client(describe, "alice/kept") == before
        client.stop()


def fill(repo_id: str) -> tuple:
    API.create_repo(repo_id, private=True)
    upload(repo_id, "weights.bin", LARGE)
    API.create_tag(repo_id, tag="v1")
    upload(repo_id, "file.txt", b"later", create_pr=True)
    return describe(repo_id)


def describe(repo_id: str) -> tuple:
    refs = API.list_repo_refs(repo_id, include_pull_requests=True)
    content = hashlib.sha256(read(repo_id, "weights.bin", force_download=True)).hexdigest()
    commits = [(commit.commit_id, commit.created_at) for commit in API.list_repo_commits(repo_id)]
    return str(refs), content, commits, API.model_info(repo_id).private


@pytest.mark.parametrize("megabytes", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_files(tmp_path: Path, megabytes: int):
    with HubServer(tmp_path / "hub") as server:
        client = HubClient(client_environment(server.url, tmp_path / "home"))
        client(new_repository, "alice/big")
        before = peak_memory(server)
        assert client(upload_and_download, "alice/big", megabytes) == megabytes << 20
        client(commit_regular_file, "alice/big", megabytes)
        client.stop()
        assert peak_memory(server) - before < 16 << 20
        received = max(server.log("/upload/"), key=lambda exchange: exchange["bytes_in"])
        assert received["bytes_in"] == megabytes << 20


def peak_memory(server: HubServer) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) << 10


def upload_and_download(repo_id: str, megabytes: int) -> int:
    path = Path(tempfile.mkdtemp()) / "big.bin"
    with path.open("wb") as file:
        for _ in range(megabytes):
            file.write(os.urandom(1 << 20))
    API.upload_file(path_or_fileobj=path, path_in_repo="big.bin", repo_id=repo_id)
    downloaded = Path(hf_hub_download(repo_id, "big.bin"))
    assert filecmp.cmp(path, downloaded, shallow=False)
    path.unlink()
    return downloaded.stat().st_size


def commit_regular_file(repo_id: str, megabytes: int) -> None:
    """One line of a commit as long as the file; the client would hold it in memory, this does not."""
    encoded = base64.b64encode(bytes(3 << 18))  # a megabyte

    def lines() -> Iterator[bytes]:
        yield b'{"key": "header", "value": {"summary": "Big"}}\n{"key": "file", "value": {"content": "'
        for _ in range(megabytes):
            yield encoded
        yield b'", "path": "regular.bin", "encoding": "base64"}}\n'
        yield b'{"key": "file", "value": {"content": "YQ==", "path": "a", "encoding": "base64"}}\n'

    url, headers = f"{API.endpoint}/api/models/{repo_id}/commit/main", {"Authorization": "Bearer hf_alice"}
    hf_raise_for_status(get_session().post(url, content=lines(), headers=headers))
    assert [file.size for file in API.get_paths_info(repo_id, ["regular.bin", "a"])] == [megabytes * (3 << 18), 1]


# ---- files that are large by their type


def push_and_load_a_table(repo_id: str) -> list[dict]:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]).push_to_hub(repo_id)
    return datasets.load_dataset(repo_id, split="train").to_list()


def test_a_small_table_that_datasets_pushes_is_one_that_it_loads(lfs):
    pytest.importorskip("datasets")
    assert lfs.client(push_and_load_a_table, "alice/small-table") == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]


def small_files(repo_id: str, attributes: str | None) -> dict[str, dict | None]:
    """What the server says of small files of several types: their `lfs`, in each of three listings."""
    API.create_repo(repo_id)
    files = {"a.safetensors": b"weights", "data/b.parquet": b"table", "c.txt": b"text", "saved_model/x/y": b"z"}
    if attributes is not None:
        API.upload_file(path_or_fileobj=attributes.encode(), path_in_repo=".gitattributes", repo_id=repo_id)
    for name, content in files.items():
        API.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=repo_id)
    siblings = {one.rfilename: one.lfs for one in API.repo_info(repo_id, files_metadata=True).siblings}
    listed = {one.path: one.lfs for one in API.list_repo_tree(repo_id, recursive=True) if hasattr(one, "lfs")}
    asked = {one.path: one.lfs for one in API.get_paths_info(repo_id, list(files))}
    for name, content in files.items():
        assert Path(API.hf_hub_download(repo_id, name)).read_bytes() == content
        for described in (siblings, listed, asked):
            lfs = described[name]
            assert lfs is None or (lfs.sha256, lfs.size) == (hashlib.sha256(content).hexdigest(), len(content))
        assert (siblings[name] is None) == (listed[name] is None) == (asked[name] is None)
    return {name: siblings[name] is not None for name in files}


def test_types_that_are_large_on_the_hub_are_large_whatever_their_size(lfs):
    found = lfs.client(small_files, "alice/types", None)
    assert found == {"a.safetensors": True, "data/b.parquet": True, "c.txt": False, "saved_model/x/y": True}


def test_a_repository_decides_itself_which_types_are_large(lfs):
    found = lfs.client(small_files, "alice/own-types", "*.txt filter=lfs diff=lfs merge=lfs -text\n# *.parquet\n")
    assert found == {"a.safetensors": False, "data/b.parquet": False, "c.txt": True, "saved_model/x/y": False}


def test_without_large_files_none_is_large_by_its_type(xet):
    assert not any(xet.client(small_files, "alice/regular-types", None).values())
