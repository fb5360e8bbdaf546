"""Where events go: all of them, in order, one JSON object per line."""

import json
import time
from pathlib import Path

import pytest

from cladapt.errors import EnvironmentProblem
from cladapt.train.sinks import LOG_SCHEMA_VERSION, Fan, JsonlSink, MemorySink


def lines(path: Path) -> list[dict[str, object]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text("utf-8").splitlines()]


def test_jsonl_appends_each_event_with_version_and_time(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.jsonl"
    JsonlSink(path).emit({"kind": "step", "loss": 0.1})
    JsonlSink(path).emit({"kind": "epoch"})  # a resumed run goes on in the same file
    first, second = lines(path)
    assert (first["kind"], first["loss"], first["schema_version"]) == ("step", 0.1, LOG_SCHEMA_VERSION)
    assert second["kind"] == "epoch"
    assert abs(float(str(first["time"])) - time.time()) < 60


def test_a_number_that_json_lacks_becomes_null(tmp_path: Path) -> None:
    JsonlSink(tmp_path / "log.jsonl").emit({"kind": "epoch", "a": float("nan"), "b": float("-inf"), "c": 1.5})
    (event,) = lines(tmp_path / "log.jsonl")
    assert (event["a"], event["b"], event["c"]) == (None, None, 1.5)


def test_a_log_that_cannot_be_written_is_an_environment_problem(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "log.jsonl")
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(EnvironmentProblem, match=r"cannot write .*log\.jsonl: Is a directory"):
        sink.emit({"kind": "step"})


def test_memory_keeps_copies() -> None:
    sink, event = MemorySink(), {"kind": "step", "loss": 1.0}
    sink.emit(event)
    event["loss"] = 2.0
    assert sink.events == [{"kind": "step", "loss": 1.0}]


def test_a_fan_passes_everything_on_in_order() -> None:
    sinks = [MemorySink(), MemorySink()]
    fan = Fan(sinks)
    for number in range(3):
        fan.emit({"kind": "note", "number": number})
    assert sinks[0].events == sinks[1].events == [{"kind": "note", "number": n} for n in range(3)]
