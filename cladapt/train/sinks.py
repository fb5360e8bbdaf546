"""Where the events of a run go. An event is a flat dict with a `kind`; every sink gets all of them, in order."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cladapt.errors import EnvironmentProblem

LOG_SCHEMA_VERSION = 1


class Sink(Protocol):
    """Takes events: `step`, `epoch`, `block`, `checkpoint`, `note` and what later kinds there are."""

    def emit(self, event: Mapping[str, Any]) -> None: ...


class JsonlSink:
    """Appends one JSON object per event to a file, with a schema version and the wall-clock time.

    A number that JSON lacks (no validation, say) becomes null.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def emit(self, event: Mapping[str, Any]) -> None:
        known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in event.items()}
        line = json.dumps({"schema_version": LOG_SCHEMA_VERSION, "time": round(time.time(), 3), **known})
        try:
            with self.path.open("a", encoding="utf-8") as handle:
                handle.write(line + "\n")
        except OSError as error:
            raise EnvironmentProblem(f"cannot write {self.path}: {error.strerror}", "free some space") from error


class MemorySink:
    """Keeps the events in a list."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def emit(self, event: Mapping[str, Any]) -> None:
        self.events.append(dict(event))


class Fan:
    """Passes each event to several sinks."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = tuple(sinks)

    def emit(self, event: Mapping[str, Any]) -> None:
        for sink in self.sinks:
            sink.emit(event)
