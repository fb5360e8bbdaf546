"""`cladapt compare` and `cladapt eval --expect` as a user runs them."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest

from cladapt_cli.app import run


def cladapt(line: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(line.split())
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def inside(small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the small world: its runs `twin` (finetune) and `run` (peso) are evaluated."""
    for name in ("stream", "base", "twin", "run"):
        shutil.copytree(small_world / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_comparison_is_a_table_or_one_json_object(inside: Path) -> None:
    code, out, err = cladapt("compare twin run --json --out compared")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert [group["name"] for group in found["groups"]] == ["finetune", "peso"]
    assert {"schema_version", "out", "stream", "summary", "differences"} <= found.keys()
    assert (inside / "compared" / "report.html").is_file()
    code, out, err = cladapt("compare twin run")
    assert (code, err) == (0, "")
    assert "peso - finetune" in out
    groups = {row["group"] for row in found["tails"]}
    assert {"data head", "data tail", "prior head, data tail", "never trained on"} <= groups
    assert all(name in (inside / "compared" / "tails.csv").read_text() for name in groups)
    assert "data tail" in out
    assert "never trained on" not in out


@pytest.mark.parametrize(
    ("line", "code", "error", "hint"),
    [
        ("compare twin twin", 2, "twin is given twice", "name each run once"),
        ("compare twin nowhere", 3, "nowhere is not a run directory", "cladapt train"),
        ("compare", 2, "Missing argument", "cladapt compare --help"),
    ],
)
def test_what_cannot_be_compared(line: str, code: int, error: str, hint: str, inside: Path) -> None:
    found, out, err = cladapt(line)
    assert (found, out) == (code, "")
    assert error in err.splitlines()[0]
    assert hint in err.splitlines()[1]


def test_a_value_outside_its_range_ends_with_5(inside: Path) -> None:
    (inside / "expected.yaml").write_text("peso: {HR@10: [2, 3]}\nfrozen: {MRR: [2, 3]}")
    code, _, err = cladapt("eval run --expect expected.yaml --quiet -o bootstrap=100")
    assert code == 5
    assert err.startswith("error: 2 of 2 expected values do not hold: peso: HR@10=")
    (inside / "expected.yaml").write_text("peso: {HR@10: [0, 1]}")
    assert cladapt("eval run --expect expected.yaml --quiet -o bootstrap=100")[0] == 0
    assert cladapt("eval run --expect nowhere.yaml --quiet")[0] == 3
