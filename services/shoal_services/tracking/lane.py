"""One thread's way from the spool to MLflow. Each kind of service that MLflow consists of has a lane of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from threading import Event, Thread

from shoal_services.tracking.registry import explain_failure
from shoal_services.tracking.sender import Sender
from shoal_services.tracking.spool import Record, Spool

OPS = {
    "runs": ("start", "metrics", "tags", "end", "orphans"), "artefacts": ("artifact", "table"), "registry": ("version",),
}  # fmt: skip
RETRY_EVERY_S = 5.0
# A record that fails so often while the tracker answers is set aside.
ATTEMPTS = 3
# A call that takes longer hangs, and at the end nobody waits for it.
STALL_S = 30.0
POLL_S = 0.2


class Lane:
    """Sends its kinds of records in their order. One that is `after` another stays behind it: only one makes runs."""

    def __init__(self, name: str, spool: Spool, connect: Callable[[], Sender], *, after: Lane | None = None):
        self.name, self.spool, self.after = name, spool, after
        self.position = spool.read_position(name)
        self.wake, self.closing, self.given_up = Event(), Event(), Event()
        self._connect, self._failures = connect, 0
        self._sender: Sender | None = None
        self._problem: str | None = None
        self._sending_since: float | None = None
        self.thread = Thread(target=self._send_forever, name=f"tracking {name}", daemon=True)

    @property
    def problem(self) -> str | None:
        """Why records wait, None if they move."""
        return f"no answer for {STALL_S:.0f} s" if self._is_hanging else self._problem

    @property
    def is_working(self) -> bool:
        """Whether it is worth waiting for: it neither failed just now nor hangs, nor does the lane before it."""
        return not self.problem and (self.after is None or self.after.is_working)

    @property
    def _is_hanging(self) -> bool:
        since = self._sending_since
        return since is not None and time.monotonic() - since > STALL_S

    def count_unsent(self) -> int:
        """Records of this lane that MLflow has not got yet."""
        return sum(record["op"] in OPS[self.name] for record, _ in self.spool.read(self.position))

    def _send_forever(self) -> None:
        while not self.given_up.is_set():
            self.wake.clear()
            try:
                self._send_all()
                self._problem = None
            # Whatever a tracker raises (network, database, server errors), the search goes on and the record stays.
            except Exception as error:
                self._problem = explain_failure(error)
                self.closing.wait(RETRY_EVERY_S)
                self.given_up.wait(1 if self.closing.is_set() else 0)
                continue
            is_done = self.position >= self.spool.size()
            if self.closing.is_set() and is_done:
                return
            self.wake.wait(None if is_done else POLL_S)

    def _send_all(self) -> None:
        for record, end in self._next():
            if record["op"] in OPS[self.name]:
                if refusal := self._send(record):
                    self.spool.refuse(record, refusal)
                self.spool.write_position(self.name, end)
            self.position = end

    def _next(self) -> Iterator[tuple[Record, int]]:
        for record, end in self.spool.read(self.position):
            if self.after and end > self.after.position:
                return
            yield record, end

    def _send(self, record: Record) -> str | None:
        """None once MLflow has it, or why it is set aside. Raises what a tracker raises that takes nothing now."""
        # One that fails is not used again: what it knows of runs may be out of date.
        sender, self._sender = self._sender or self._connect(), None
        self._sending_since = time.monotonic()
        try:
            refusal = sender.send(record)
        except Exception as error:
            self._failures += 1
            if self._concerns_all(error) or (self._failures < ATTEMPTS and not isinstance(error, ImportError)):
                raise
            refusal = explain_failure(error)
        finally:
            self._sending_since = None
        self._sender, self._failures = sender, 0
        return refusal

    def _concerns_all(self, error: Exception) -> bool:
        """Whether the records behind would fare no better: nobody may write to the experiment, or it was deleted."""
        denied = getattr(error, "error_code", None) in ("PERMISSION_DENIED", "UNAUTHENTICATED")
        return type(error) is RuntimeError or (denied and self.name == "runs")
