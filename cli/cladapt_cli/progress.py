"""Progress on stderr: a Rich bar on a terminal, one plain line per epoch and block elsewhere."""

import sys
from collections.abc import Mapping
from typing import Any

from cladapt_cli._verb import output, say


class Progress:
    """A sink that shows tokens per second, loss, penalty and the time left."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._block: int | None = None
        output.progress = self

    def emit(self, event: Mapping[str, Any]) -> None:
        kind = event["kind"]
        if kind == "run":
            output.run = event["path"]
        if output.quiet:
            return
        if kind == "run":
            say(f"run: {event['path']}")
        elif kind == "note":
            say(event["text"])
        elif not sys.stderr.isatty():
            if kind in ("epoch", "block"):
                say(_plain(event))
        elif kind == "step":
            self._step(event)
        elif kind == "block":
            self.close()
            say(_plain(event))

    def _step(self, event: Mapping[str, Any]) -> None:
        if self._bar is None or self._block != event["block"]:
            self.close()
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("block {task.fields[block]}"), BarColumn(), TextColumn("{task.fields[text]}"))
            self._bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self._bar.start()
            self._block = event["block"]
            self._task = self._bar.add_task("", total=1.0, block=event["block"], text="")
        penalty = sum(value for key, value in event.items() if key.endswith("/term"))
        speed = next(key for key in event if key.endswith("_per_second"))
        unit = speed.removesuffix("_per_second")
        text = f"loss {event['loss']:.3f}  penalty {penalty:.2e}  {event[speed]:,.0f} {unit}/s"
        self._bar.update(self._task, completed=event["progress"], text=text)

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = None


def _plain(event: Mapping[str, Any]) -> str:
    fields = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in event.items() if k != "kind"]
    return f"{event['kind']}: " + ", ".join(fields)
