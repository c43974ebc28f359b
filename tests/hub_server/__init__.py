"""A small Hugging Face Hub on the loopback interface, for tests of what talks to the Hub.

    with HubServer(tmp_path / "hub") as hub:
        subprocess.run([...], env={**os.environ, **client_environment(hub.url, tmp_path / "home", token="hf_alice")})
        hub.faults("drop", path="/resolve/", after_bytes=1000)
        assert hub.log()[-1]["status"] == 200

The clients freeze their endpoint when they are imported, so that whatever uses them runs in a process of its own:
started by the test, as above, or a `HubClient`, which stays alive and calls functions of a module.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import traceback
import urllib.request
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from .hub import NOTHING_IS_LARGE


USERS = {"hf_alice": "alice", "hf_bob": "bob"}
__all__ = ["NOTHING_IS_LARGE", "USERS", "HubClient", "HubClientError", "HubServer", "client_environment"]


class HubServer:
    """A server in a process of its own. With `NOTHING_IS_LARGE` as threshold every file is a regular one."""

    def __init__(self, data: Path, users: dict[str, str] = USERS, lfs_threshold: int = 10_000, page_size: int = 1000):
        self.data = data
        self.url = ""
        self.process: subprocess.Popen | None = None
        self._options = [f"--token={token}={user}" for token, user in users.items()]
        self._options += [f"--data={data}", f"--lfs-threshold={lfs_threshold}", f"--page-size={page_size}"]

    def start(self, port: int = 0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, f"--port={port}", *self._options],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
        self.url = self.process.stdout.readline().strip()
        if not self.url:
            raise RuntimeError(f"The Hub server did not start: exit code {self.process.wait()}")

    def stop(self) -> None:
        """Kills the server: whatever it has acknowledged has to be on disk."""
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def restart(self) -> None:
        """Stops the server and starts it again at the same URL."""
        self.stop()
        self.start(port=int(self.url.rsplit(":", 1)[1]))

    def __enter__(self) -> "HubServer":
        self.start()
        return self

    def __exit__(self, *error) -> None:
        self.stop()

    def faults(self, action: str, **fault) -> None:
        """Adds a fault: `drop`, `lose-reply`, `status` or `delay`, with the fields of `traffic.Fault`."""
        self._administer("POST", "/_faults", {"action": action, **fault})

    def clear_faults(self) -> None:
        self._administer("DELETE", "/_faults")

    def log(self, path: str = "") -> list[dict]:
        """The requests whose path contains this: method, path, status, and the bytes of both bodies.

        The status is None while a request is served, and where the connection was dropped before the reply.
        """
        return [exchange for exchange in self._administer("GET", "/_log") if path in exchange["path"]]

    def clear_log(self) -> None:
        self._administer("DELETE", "/_log")

    def _administer(self, method: str, path: str, content: dict | None = None):
        request = urllib.request.Request(self.url + path, json.dumps(content or {}).encode(), method=method)
        # Not through a proxy that the environment may name.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as reply:
            return json.load(reply)


def client_environment(url: str, home: Path, token: str | None = "hf_alice", xet: bool = False) -> dict[str, str]:
    """What the clients read from the environment, to be laid over `os.environ`.

    With Xet every file has to be a regular one: the server offers no Xet storage.
    """
    return {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_DATASETS_CACHE": str(home / "datasets"),
        "HF_TOKEN": token or "",
        "HF_HUB_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "0" if xet else "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": "1",
    }


class HubClientError(AssertionError):
    """What failed beside the clients. Their own exceptions hold connections and cannot be sent between processes."""


class HubClient:
    """A process that was started with such an environment and calls one function after the other.

    The functions are those of a module, and their arguments and results are pickled.
    """

    def __init__(self, environment: dict[str, str]):
        # Not forked: the clients may be imported here already, with another environment.
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_enter, initargs=(environment,))

    def __call__(self, function: Callable, *arguments):
        """Raises `HubClientError` with the traceback if the function fails."""
        return self._pool.submit(_call, function, arguments).result(timeout=300)

    def stop(self) -> None:
        self._pool.shutdown()


def _enter(environment: dict[str, str]) -> None:
    os.environ.update(environment)
    import huggingface_hub.constants  # noqa: F401  freezes the endpoint before a test module can change it


def _call(function: Callable, arguments: tuple):
    try:
        return function(*arguments)
    except BaseException:  # what pytest raises is no Exception
        raise HubClientError(traceback.format_exc()) from None
