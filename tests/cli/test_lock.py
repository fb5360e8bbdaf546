"""A run or stream that another command writes into is refused, untouched, with who has it and what to do."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cladapt.lock import locked


@pytest.mark.parametrize("line", ["eval run", "eval sight", "train --resume run", "train --resume half"])
def test_a_run_in_use_is_refused(line: str, hostile: Callable[..., str]) -> None:
    with locked(Path(line.split()[-1])):
        err = hostile(line.split(), {4})
    assert f"error: {line.split()[-1]} is in use: process " in err
    assert err.endswith("hint: wait until it ends, or stop it; then try again\n")


@pytest.mark.parametrize("line", ["eval run -o bootstrap=100", "train --resume half --quiet"])
def test_a_lock_that_a_killed_process_left_is_none(line: str, hostile: Callable[..., str]) -> None:
    run = Path("half" if "half" in line else "run")
    hostile(line.split(), {0}, lambda _: (run / ".lock").write_text("process 1 on elsewhere"), ("run", "half", "runs"))
    assert not (run / ".lock").exists()


@pytest.mark.parametrize("line", ["append bare next.csv", "retire bare catalogue.txt", "forget bare users.txt"])
def test_a_stream_in_use_is_refused(line: str, hostile: Callable[..., str]) -> None:
    with locked(Path("bare")):
        err = hostile(["data", *line.split()], {4})
    assert "error: bare is in use: process " in err
