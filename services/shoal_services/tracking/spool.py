"""Records on disk, one a line, until MLflow has them: what was told, how far each lane has sent, what was refused.

tracking.jsonl              every record, in order
tracking.LANE.position      the byte up to which a lane has sent its records
tracking.refused.jsonl      what MLflow did not take, and why; told again at the next start
tracking.id                 tells this folder's runs from those of another folder of the same path
"""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from shoal.files import write_text
from shoal.value import fingerprint

Record = dict[str, Any]


class Spool:
    """The records of one folder. Writing is for several threads of one process."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.file, self.refused_file = folder / "tracking.jsonl", folder / "tracking.refused.jsonl"
        self._lock = threading.Lock()
        if not self.file.exists():  # not in a folder of before there were identities: its runs keep their keys
            write_text(folder / "tracking.id", uuid.uuid4().hex)
            self.file.touch()
        _drop_torn_line(self.file)
        self._take_back()

    @property
    def identity(self) -> str:
        """The same for the same folder, and for no other one: not for one that was deleted, or is on another machine."""
        file = self.folder / "tracking.id"
        return fingerprint([str(self.folder), file.read_text()] if file.exists() else str(self.folder))

    def append(self, record: Record) -> None:
        """Raises OSError if there is no room; then no part of the record is left."""
        self._write(self.file, json.dumps(record))

    def refuse(self, record: Record, refusal: str) -> None:
        """Keeps a record that MLflow does not take out of the way of those behind it."""
        self._write(self.refused_file, json.dumps({**record, "refusal": refusal}))

    def size(self) -> int:
        """Bytes of all records."""
        return self.file.stat().st_size

    def read(self, position: int = 0) -> Iterator[tuple[Record, int]]:
        """Records behind a position, each with the position behind it; of a damaged line, a record of op `damaged`."""
        with self.file.open("rb") as file:
            file.seek(position)
            while (line := file.readline()).endswith(b"\n"):
                yield _parse(line), file.tell()

    def read_refused(self) -> list[Record]:
        """The records that MLflow did not take, with the reason under `refusal`."""
        lines = self.refused_file.read_bytes().splitlines() if self.refused_file.exists() else []
        return [record for record in map(_parse, lines) if record["op"] != "damaged"]

    def find_ended(self) -> dict[str, bool]:
        """Every run that was started, by key, and whether it was ended since."""
        ended: dict[str, bool] = {}
        for record, _ in self.read():
            if record["op"] in ("start", "end"):
                ended[record["key"]] = record["op"] == "end"
        return ended

    def read_position(self, lane: str) -> int:
        """How far a lane had come; 0 if it has sent nothing."""
        # Before there were lanes, one position stood for all.
        files = filter(Path.exists, (self._position_file(lane), self.folder / "tracking.position"))
        return next((int(file.read_text() or 0) for file in files), 0)

    def write_position(self, lane: str, position: int) -> None:
        write_text(self._position_file(lane), str(position))

    def _position_file(self, lane: str) -> Path:
        return self.folder / f"tracking.{lane}.position"

    def _write(self, path: Path, line: str) -> None:
        with self._lock, path.open("ab") as file:
            before = file.tell()
            try:
                file.write(f"{line}\n".encode())
                file.flush()
            except OSError:
                file.truncate(before)
                raise

    def _take_back(self) -> None:
        """What was refused is told once more: the cause may be gone."""
        refused = self.read_refused()
        ended = self.find_ended() if refused else {}
        for record in _without_stale_starts(refused, ended):
            self.append({name: value for name, value in record.items() if name != "refusal"})
        self.refused_file.unlink(missing_ok=True)


def _without_stale_starts(records: Iterable[Record], ended: dict[str, bool]) -> Iterator[Record]:
    """A run that has ended must not begin again because its start is told late."""
    return (record for record in records if not (record["op"] == "start" and ended.get(record["key"])))


def _drop_torn_line(file: Path) -> None:
    """A process that was killed while writing leaves half a line at the end."""
    data = file.read_bytes()
    if data and not data.endswith(b"\n"):
        os.truncate(file, data.rfind(b"\n") + 1)


def _parse(line: bytes) -> Record:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    return record if isinstance(record, dict) and "op" in record else {"op": "damaged"}
