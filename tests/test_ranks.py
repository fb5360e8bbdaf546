"""Ranks as environment variables tell them; two real processes are in tests/cli/test_ranks.py."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cladapt import ranks
from cladapt.errors import ConfigError, EnvironmentProblem
from cladapt.methods import Context, Method
from cladapt.model.packed import PackedLoss
from cladapt.tokens.prompts import Document
from cladapt.train.feeds import PackedFeed
from cladapt.train.loop import Fit, FitSettings
from cladapt.train.sinks import MemorySink
from cladapt_cli.app import run

LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*ranks.LAUNCH, *ranks.MPI, *ranks.UNSUPPORTED):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "rank", "size"),
    [
        ({}, 0, 1),
        ({"RANK": "0", "WORLD_SIZE": "1"}, 0, 1),
        ({"WORLD_SIZE": "8"}, 0, 1),  # a scheduler's variable, not a launcher's
        ({"RANK": "3"}, 0, 1),
        ({"RANK": "3", "WORLD_SIZE": "many"}, 0, 1),
        ({"RANK": "2", "WORLD_SIZE": "3"}, 2, 3),
    ],
)
def test_rank_and_size_come_from_the_launcher(
    environment: dict[str, str], rank: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (ranks.rank(), ranks.ranks(), ranks.is_main()) == (rank, size, rank == 0)


def test_alone_everything_is_the_identity() -> None:
    ranks.start()
    assert ranks.once(lambda: 5) == 5
    assert ranks.gather("x") == ["x"]
    assert ranks.first_to_fail(lambda: 3) == 3


@pytest.mark.parametrize("variable", ranks.UNSUPPORTED)
def test_a_base_cut_over_processes_is_refused(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ConfigError, match=f"{variable}=true: .* cuts the base into parts") as caught:
        ranks.start()
    assert "every process then holds the base whole" in caught.value.hint
    monkeypatch.setenv(variable, "false")
    ranks.start()


def test_what_a_launcher_tells_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    ranks.check()
    monkeypatch.setenv("PMI_SIZE", "4")  # torchrun on each machine of a job
    ranks.check()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "8"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set: {'WORLD_SIZE': '8'}"),
        ({**LAUNCHED, "LOCAL_RANK": None}, "LOCAL_RANK is not set"),
        ({"LOCAL_RANK": "0"}, "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not set"),
        ({**LAUNCHED, "WORLD_SIZE": "many"}, "WORLD_SIZE is no number"),
        ({"RANK": "first"}, "RANK is no number"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2: processes that MPI starts do not find each other"),
    ],
)
def test_half_told_processes_are_refused(
    environment: dict[str, str | None],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in environment.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(EnvironmentProblem) as caught:
        ranks.check()
    assert message in caught.value.message
    assert "torchrun" in caught.value.hint
    monkeypatch.setattr(ranks, "first_to_fail", lambda report: report())
    assert run(["eval"]) == 4
    assert message in capsys.readouterr().err


def test_what_trains_nothing_does_not_mind_half_told_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert run(["methods"]) == 0
    with pytest.raises(EnvironmentProblem, match="RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"):
        ranks.accelerator()


def test_a_job_that_numbers_one_process_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("PMI_SIZE", "1")
    ranks.start()
    assert ranks.accelerator().num_processes == 1


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {**LAUNCHED, "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EnvironmentProblem, match="process 2 of this machine finds 1 GPU ") as caught:
        ranks.start()
    assert caught.value.hint == "start one process for each: torchrun --nproc-per-node 1"


def test_accelerates_own_precision_and_accumulation_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    made = ranks.accelerator()
    assert (made.mixed_precision, made.gradient_accumulation_steps) == ("no", 1)


@pytest.mark.parametrize("command", ["pretrain", "demo", "export"])
def test_commands_for_one_process_refuse_several(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")  # without a store, where each process speaks for itself
    line = ["base", "pretrain", "--data", "stream", "--out", "other"] if command == "pretrain" else [command]
    assert run(line) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error == f"error: `{command}` was started in 2 processes, it works in one"
    assert hint == "hint: start it without torchrun; train, eval, recommend work in several"


def test_training_under_fsdp_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert run(["train"]) == 2
    assert "FSDP cuts the base into parts, which is not supported" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="FSDP"):
        ranks.accelerator()
    assert list(tmp_path.iterdir()) == []


def test_the_end_of_another_process_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]")
    assert not ranks.other_ended(closed)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ranks.other_ended(closed)
    assert ranks.other_ended(torch.distributed.DistBackendError("NCCL error: remote process exited"))
    assert not ranks.other_ended(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not ranks.other_ended(ValueError("gloo"))


class Halves(Method):
    """A term in the loss, whose figure is a share of each process, and a figure that every process has whole."""

    def loss_terms(self, ctx: Context, batch: Any, out: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"term": out.detach() * 0 + 3.0}

    def edit_grads(self, ctx: Context) -> None:
        ctx.log["whole"] = 5.0


def make_fit(sink: MemorySink) -> Fit:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    document = Document(np.array([1, 2, 3]), np.array([False, True, True]))
    feed, settings = PackedFeed([document], [], 8, 8), FitSettings(lr=0.1, epochs=2, seed=0, keep="last")
    return Fit(PackedLoss(model), Halves(), Context(dict(model.named_parameters())), feed, settings, sink)


def test_logged_terms_are_sums_over_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process is played by the sum: it has the same share."""
    sink = MemorySink()
    fit = make_fit(sink)
    monkeypatch.setattr(fit, "_over_ranks", lambda values: [2 * value for value in values])
    fit.run()
    steps = [event for event in sink.events if event["kind"] == "step"]
    assert [(step["term"], step["whole"]) for step in steps] == [(6.0, 5.0)] * 2


def test_a_process_stops_with_a_checkpoint_where_another_has_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    fit, places = make_fit(MemorySink()), []
    monkeypatch.setattr(fit, "_over_ranks", lambda values: [1.0 + value for value in values])
    with pytest.raises(KeyboardInterrupt):
        fit.run(lambda snapshot: places.append(snapshot.position.total_steps))
    assert places == [1]


@pytest.mark.parametrize("code", [0, 3])
def test_one_of_several_ends_without_taking_the_interpreter_down(code: int) -> None:
    script = (
        f"import atexit, os; from cladapt import ranks; atexit.register(os.abort); print('said'); ranks.leave({code})"
    )
    environment = {**os.environ, **LAUNCHED, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "said\n", "")


def test_a_process_that_is_alone_goes_on() -> None:
    ranks.leave(3)
