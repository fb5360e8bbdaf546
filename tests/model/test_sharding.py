"""A base cut over two processes against the whole one: the same losses and gradients, and half of it on each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cladapt.errors import ConfigError
from cladapt.model.sharding import refuse_one_process

SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np
import torch
from cladapt import ranks
from cladapt.config import AdapterConfig
from cladapt.methods import Context
from cladapt.methods.finetune import Finetune
from cladapt.model.adapter import adapted_lm, adapter_parameters, create_adapter
from cladapt.model.load import Base, new_model
from cladapt.model.packed import PackedLoss
from cladapt.model.sharding import is_cut, shard_base
from cladapt.tokens.prompts import Document
from cladapt.tokens.sids import SidTable
from cladapt.train.feeds import PackedFeed
from cladapt.train.loop import Fit, FitSettings
from cladapt.train.sinks import MemorySink

sids = SidTable(("x", "y"), np.array([[0], [1]]), (2,))
rng = np.random.default_rng(0)
documents = [Document(rng.integers(1, 6, size=n), np.arange(n) > 0) for n in rng.integers(4, 12, size=24)]


def learn(cut, checkpointing):
    lm, tokenizer = new_model("small", sids, 0)
    model = create_adapter(Base(lm.requires_grad_(False), tokenizer, sids, {}), AdapterConfig(rank=3, dropout=0.0), 0)
    if cut:
        shard_base(model, torch.device("cpu"))
    parameters = adapter_parameters(model)
    feed = PackedFeed(documents[4:], documents[:4], 64, 16)
    settings = FitSettings(lr=1e-3, epochs=2, seed=0, accumulation=2, checkpointing=checkpointing)
    sink = MemorySink()
    fit = Fit(PackedLoss(adapted_lm(model)), Finetune(), Context(parameters, block=2), feed, settings, sink)
    result = fit.run()
    local = sum((p.to_local() if is_cut(p) else p).numel() for p in model.parameters() if not p.requires_grad)
    return {
        "score": result.score,
        "losses": [e["loss"] for e in sink.events if e["kind"] == "step"],
        "norms": [e["grad_norm"] for e in sink.events if e["kind"] == "step"],
        "adapter": {name: p.tolist() for name, p in parameters.items()},
        "held": local,
        "layers": sum(p.numel() for layer in adapted_lm(model).model.layers for p in layer.parameters()
                      if not p.requires_grad),
    }


found = {"whole": learn(False, False), "cut": learn(True, False), "cut again": learn(True, True)}
Path(f"{sys.argv[1]}.{ranks.rank()}").write_text(json.dumps(found))
ranks.leave(0)
"""


def flat(values: object) -> list[float]:
    return [x for v in values for x in flat(v)] if isinstance(values, list) else [values]  # type: ignore[list-item]


def test_two_processes_that_hold_half_learn_what_two_that_hold_it_whole_do(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "script.py", "out"]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"out.{rank}").read_text()) for rank in (0, 1))
    whole = first["whole"]
    for name in ("cut", "cut again"):
        cut = first[name]
        for key in ("losses", "norms"):
            assert cut[key] == pytest.approx(whole[key], rel=1e-5)
        assert cut["score"] == pytest.approx(whole["score"], rel=1e-5)
        for factor, values in cut["adapter"].items():
            assert flat(values) == pytest.approx(flat(whole["adapter"][factor]), abs=1e-5)
            assert values == second[name]["adapter"][factor]
        halves = [run[name]["held"] - (run["whole"]["held"] - run["whole"]["layers"]) for run in (first, second)]
        assert sum(halves) == whole["layers"]
        assert max(halves) < 0.51 * whole["layers"]


def test_one_process_is_told_how_to_start_several() -> None:
    with pytest.raises(
        ConfigError, match=r"^sharding=full cuts the base over several processes, this is one"
    ) as caught:
        refuse_one_process()
    assert caught.value.hint.startswith("start several: torchrun --nproc-per-node N")
