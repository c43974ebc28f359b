"""A log of the requests that were served, and the faults that are to be injected into the next ones."""

import re
import threading
from dataclasses import asdict, dataclass

from .errors import HubError


ACTIONS = ("drop", "lose-reply", "status", "delay")


@dataclass
class Exchange:
    """One request and its reply; bytes are those of the bodies, without headers."""

    method: str
    path: str
    status: int | None = None
    bytes_in: int = 0
    bytes_out: int = 0


@dataclass
class Fault:
    """What goes wrong in the next `count` requests whose method and path match these regular expressions.

    `drop` closes the connection once `after_bytes` of the bodies, received and sent, have passed; `lose-reply` does
    what was asked and then closes the connection; `status` refuses; `delay` waits `seconds` first.
    """

    action: str
    method: str = ""
    path: str = ""
    count: int = 1
    after_bytes: int = 0
    status: int = 503
    seconds: float = 0.0
    retry_after: int | None = None

    def __post_init__(self):
        if self.action not in ACTIONS:
            raise HubError(400, f"Unknown fault {self.action!r}: expected one of {', '.join(ACTIONS)}")

    def matches(self, exchange: Exchange) -> bool:
        return (
            self.count > 0
            and re.search(self.method, exchange.method) is not None
            and re.search(self.path, exchange.path) is not None
        )


class Traffic:
    """The log and the faults of one server, shared by its threads."""

    def __init__(self):
        self._lock = threading.Lock()
        self._log: list[Exchange] = []
        self._faults: list[Fault] = []

    def begin(self, method: str, path: str) -> tuple[Exchange, Fault | None]:
        """Logs a request before it is served: whoever has the reply finds it in the log."""
        exchange = Exchange(method, path)
        with self._lock:
            self._log.append(exchange)
            fault = next((fault for fault in self._faults if fault.matches(exchange)), None)
            if fault is not None:
                fault.count -= 1
        return exchange, fault

    def log(self) -> list[dict]:
        with self._lock:
            return [asdict(exchange) for exchange in self._log]

    def clear_log(self) -> None:
        with self._lock:
            self._log.clear()

    def add_fault(self, fault: Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def clear_faults(self) -> None:
        with self._lock:
            self._faults.clear()
