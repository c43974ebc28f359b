"""Starts the server: `python -m tests.hub_server --port 0 --data DIR --token hf_alice=alice` prints its URL."""

import argparse
from pathlib import Path

from . import discussions, files, repositories  # noqa: F401  register their endpoints
from .connection import HubHTTPServer
from .hub import Hub
from .storage import Store


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.hub_server", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    parser.add_argument("--data", type=Path, required=True, help="folder of the repositories")
    parser.add_argument("--token", action="append", default=[], metavar="TOKEN=USER", help="who may log in")
    parser.add_argument("--lfs-threshold", type=int, default=10_000_000, help="bytes from which on a file is large")
    parser.add_argument("--page-size", type=int, default=1000, help="entries in one reply to a listing")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    hub = Hub(
        store=Store(arguments.data),
        users=dict(token.split("=", 1) for token in arguments.token),
        lfs_threshold=arguments.lfs_threshold,
        page_size=arguments.page_size,
    )
    with HubHTTPServer(arguments.port, hub.answer) as server:
        print(server.url, flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
