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


def test_the_precision_is_bf16_where_a_gpu_has_it_and_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpu, capable, auto in ((False, True, "fp32"), (True, False, "fp32"), (True, True, "bf16")):
        monkeypatch.setattr("torch.cuda.is_available", lambda gpu=gpu: gpu)
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation, c=capable: c)
        assert ops.precision("auto") == auto
        assert (ops.precision("fp32"), ops.precision("bf16")) == ("fp32", "bf16")


def test_every_op_reports_its_implementation_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLADAPT_KERNELS", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    report = ops.backends()
    assert set(report) == {*ops.KERNELS, *ops.REFERENCES}
    assert report["lora_linear"] == ("reference", "auto: there is no GPU; plain torch on CPU")
    assert report["proximal_kl"] == ("reference", "this op has no Triton kernel; plain torch on CPU")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert ops.backends()["lora_linear"] == ("triton", "auto: there is a GPU")
    assert ops.backends("triton")["lora_linear"] == ("triton", "asked for")
    assert ops.backends("reference")["lora_linear"] == ("reference", "asked for; plain torch on CUDA")
    assert ops.uses_kernel("lora_linear")
    assert not ops.uses_kernel("lora_linear", "reference")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert ops.backends()["lora_linear"] == ("reference", "auto: triton is not installed; plain torch on CUDA")


def test_the_environment_overrides_the_configured_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLADAPT_KERNELS", "reference")
    assert ops.requested("auto") == "reference"
    monkeypatch.setenv("CLADAPT_KERNELS", "cuda")
    with pytest.raises(ConfigError, match="CLADAPT_KERNELS='cuda'"):
        ops.requested()


def test_asking_for_a_kernel_that_cannot_run_is_an_error_not_a_fallback() -> None:
    with pytest.raises(EnvironmentProblem, match="kernels=triton: there is no GPU"):
        ops.backends("triton")


@pytest.mark.parametrize(
    ("version", "capability", "wrong"),
    [("3.3.1", 9, False), ("3.4.0", 9, True), ("3.7.0+git1", 9, True), ("3.7.0", 8, False), ("3.7.1", 9, False)],
)
def test_a_triton_that_is_known_to_compile_wrongly_for_this_gpu_is_named(
    monkeypatch: pytest.MonkeyPatch, version: str, capability: int, wrong: bool
) -> None:
    monkeypatch.setattr("triton.__version__", version)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (capability, 0))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert ops.compiler_problem() == ""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    found = ops.compiler_problem()
    assert bool(found) == wrong
    assert not wrong or found.startswith(f"Triton {version} is known to compile a backward kernel of another package")
