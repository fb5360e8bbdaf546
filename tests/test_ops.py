"""The seam: which implementation runs, and what it says about it."""

import pytest
import torch

from cladapt import ops
from cladapt.errors import ConfigError, EnvironmentProblem


def test_models_run_on_this_processs_gpu_or_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert ops.compute_device() == torch.device("cpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert ops.compute_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert ops.compute_device() == torch.device("cuda", 3)


def test_every_op_reports_its_implementation_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLADAPT_KERNELS", raising=False)
    report = ops.backends()
    assert set(report) == set(ops.OPS)
    assert all(impl == "reference" and "no Triton kernel" in reason for impl, reason in report.values())
    assert all("asked for" in reason for _, reason in ops.backends("reference").values())


def test_the_environment_overrides_the_configured_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLADAPT_KERNELS", "reference")
    assert ops.requested("auto") == "reference"
    monkeypatch.setenv("CLADAPT_KERNELS", "cuda")
    with pytest.raises(ConfigError, match="CLADAPT_KERNELS='cuda'"):
        ops.requested()


def test_asking_for_a_kernel_that_does_not_exist_is_an_error_not_a_fallback() -> None:
    with pytest.raises(EnvironmentProblem, match="kernels=triton: no Triton kernel exists for proximal_kl"):
        ops.backends("triton")
