"""The card: front matter the hub reads, what is known and what is not, and code that runs with stock libraries."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard

from cladapt.artifacts import read_json, write_json
from cladapt.config import AdapterConfig, RunConfig
from cladapt.data.schema import fingerprints_of
from cladapt.export.card import UNKNOWN, Facts, facts_of
from cladapt.export.targets import TARGETS, export
from cladapt.model.adapter import create_adapter
from cladapt.model.load import load_base, new_model, save_base
from cladapt.model.saved import save_adapter
from cladapt.run import Run
from cladapt.tokens.sids import SidTable

SIDS = SidTable(tuple(f"i{n}" for n in range(12)), np.array(list(np.ndindex(4, 3))), (4, 3))
METRICS: dict[str, Any] = {
    "config": {"targets": "test"},
    "table": [{"model": "peso", "users": 9, "HR@10": 0.25, "MRR": None, "HR@10 95 %": "[0.1000, 0.4000]"}],
    "differences": [{"difference": "peso - frozen", "HR@10 shown": "no difference shown"}],
    "matrix": [{"model_block": 2, "block": 3, "users": 4}, {"model_block": 3, "block": 3, "users": 5}],
}
PLACES = {"peft": "out", "merged": "out", "vllm": "out/adapters/block_3"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base` and `adapter`."""
    folder = tmp_path_factory.mktemp("world")
    model, tokenizer = new_model("tiny", SIDS, 0)
    save_base(folder / "base", model, tokenizer, SIDS, {"fitted_block": 1, "stream": "s"})
    base = load_base(folder / "base")
    record = {"block": 3, "stream": "s", "method": "peso", "seed": 5, "form": "packed", "window": 7, "config": "c0ffee"}
    save_adapter(folder / "adapter", create_adapter(base, AdapterConfig(rank=3), 0), base, record)
    return folder


def card(world: Path, target: str, out: Path, facts: Facts | None = None) -> str:
    export(target, world / "adapter", world / "base", out, facts)
    return (out.parent / PLACES[target] / "README.md").read_text()


@pytest.mark.parametrize("target", TARGETS)
def test_the_hub_reads_the_front_matter(target: str, world: Path, tmp_path: Path) -> None:
    data = ModelCard(card(world, target, tmp_path / "out")).data.to_dict()
    assert data["library_name"] == ("transformers" if target == "merged" else "peft")
    assert data.get("base_model") == (None if target == "merged" else "base")
    assert {"continual-learning", "recommendation"} <= set(data["tags"])
    assert (data["license"], data["license_name"]) == ("other", "fill-in")


@pytest.mark.parametrize("target", TARGETS)
def test_the_code_of_a_card_runs_with_stock_libraries(target: str, world: Path, tmp_path: Path) -> None:
    text = card(world, target, tmp_path / "out")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "In the folder of this card:" in text
    assert str(tmp_path) not in code
    code += "\nimport sys; print(tuple(next_token.shape), 'cladapt' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path / PLACES[target], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"({4 + 7},) False"  # specials and codes


def test_a_card_says_what_is_known(world: Path, tmp_path: Path) -> None:
    facts = Facts("CC-BY-4.0", "movielens", METRICS, {"torch": "2.0"})
    text = card(world, "peft", tmp_path / "out", facts)
    fingerprint = load_base(world / "base").fingerprint
    for line in (
        f"- base+tokens: base, fingerprint {fingerprint}",
        "- time block: 3",
        "- method: peso",
        "- history form: packed, at most 7 items",
        "- licence: CC-BY-4.0",
        "- source: movielens",
        "- stream fingerprint: s",
        "| peso | 9 | 0.2500 | - | [0.1000, 0.4000] |",
        "| peso - frozen | no difference shown |",
        "| 3 | 3 | 5 |",
        "- torch: 2.0",
    ):
        assert line in text.splitlines()
    assert "| 2 | 3 | 4 |" not in text


def test_what_is_not_known_is_said(world: Path, tmp_path: Path) -> None:
    text = card(world, "peft", tmp_path / "out")
    assert f"- licence: {UNKNOWN}" in text.splitlines()
    assert "Not evaluated: run `cladapt eval` before the export." in text


def test_facts_of_a_run_hold_for_its_own_stream_alone(tmp_path: Path) -> None:
    files = [{"interactions": "a", "items": "b"}, {"interactions": "c", "items": "d"}]
    manifest = {"license": "MIT", "source": "csv", "hashes": files, "earlier": [["before"]]}
    write_json(tmp_path / "data" / "manifest.json", manifest)
    run = Run(tmp_path / "run", RunConfig(data=str(tmp_path / "data")))
    write_json(run.path / "environment.json", {"packages": {"torch": "2.0", "numpy": "2.1"}})
    for home in (*fingerprints_of(manifest), "before"):
        assert facts_of(run, home) == Facts("MIT", "csv", {}, {"torch": "2.0"})
    assert facts_of(run, "another").license == UNKNOWN
    write_json(run.path / "metrics.json", METRICS)
    assert facts_of(run, "another").metrics == METRICS
    assert facts_of(None, "another") == Facts()


HOSTILE = "x\n---\n# <script>alert(1)</script> [a](http://b) | `c` *d* _e_ ![f](g)\n- licence: MIT"


@pytest.mark.parametrize("target", TARGETS)
def test_texts_of_others_are_shown_as_they_are(target: str, world: Path, tmp_path: Path) -> None:
    metrics = {**METRICS, "table": [{"model": HOSTILE, HOSTILE: 0.5}]}
    plain = card(
        world, target, tmp_path / "plain" / "out", Facts(metrics={**METRICS, "table": [{"model": "x", "y": 0.5}]})
    )
    adapter = shutil.copytree(world / "adapter", tmp_path / "adapter")
    record = read_json(adapter / "cladapt.json")
    write_json(adapter / "cladapt.json", {**record, "method": HOSTILE, "seed": HOSTILE, "config": HOSTILE})
    export(target, adapter, world / "base", tmp_path / "out", Facts(HOSTILE, HOSTILE, metrics, {"torch": HOSTILE}))
    text = (tmp_path / PLACES[target] / "README.md").read_text()
    assert "<script" not in text
    shown = r"x --- # &lt;script&gt;alert(1)&lt;/script&gt; [a\](http://b) \| \`c\` \*d\* \_e\_ ![f\](g) - licence: MIT"
    for line in ("method", "seed", "run configuration", "licence", "source", "torch"):
        assert f"- {line}: {shown}" in text.splitlines()
    assert f"| {shown} | 0.5000 |" in text.splitlines()
    assert ModelCard(text).data.to_dict() == ModelCard(plain).data.to_dict()
    shape = [
        [line.split(" ")[0] for line in card.splitlines() if line.startswith(("#", "---"))] for card in (text, plain)
    ]
    assert shape[0] == shape[1]


@pytest.mark.parametrize("target", ["merged", "vllm"])
def test_generation_settings_that_were_left_out_are_said(target: str, world: Path, tmp_path: Path) -> None:
    old = shutil.copytree(world / "base", tmp_path / "old")  # a base of before, which still has them
    write_json(old / "generation_config.json", {"do_sample": True, "temperature": 0.6, "eos_token_id": 2})
    report = export(target, world / "adapter", old, tmp_path / "out")
    assert report["generation_left_out"] == {"do_sample": True, "temperature": 0.6}
    text = (tmp_path / PLACES[target] / "README.md").read_text()
    assert "- generation settings left out (decoding is greedy): do_sample=true, temperature=0.6" in text.splitlines()
    written = read_json(tmp_path / "out" / ("base" if target == "vllm" else ".") / "generation_config.json")
    del written["transformers_version"]
    assert written == {"do_sample": False, "eos_token_id": 2, "max_new_tokens": 2}
