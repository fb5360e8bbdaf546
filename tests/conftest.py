"""What every test runs under: no network, one thread, no choice of kernels from the shell, kernels interpreted."""

import os
import signal
from pathlib import Path

import pytest

# set before torch or transformers is first imported; subprocesses of tests inherit it
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("CLADAPT_KERNELS", None)
# a shell starts background jobs with Ctrl-C ignored, and Python then installs no handler for it
signal.signal(signal.SIGINT, signal.default_int_handler)

import torch  # noqa: E402 - the variables above come first

if not torch.cuda.is_available():  # kernels are interpreted, which is chosen where triton is first imported
    os.environ["TRITON_INTERPRET"] = "1"

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"the real data is not on this machine: no folder {SHARED_DATA}")
    return SHARED_DATA
