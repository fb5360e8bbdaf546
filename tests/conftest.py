"""What every test runs under: no network, one thread, no choice of kernels from the shell, kernels interpreted."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
def real_data() -> Callable[[str], Path]:
    """Gives a folder or file of the real data beside the checkout by its name; skips the test where it is absent."""

    def path_of(name: str) -> Path:
        path = SHARED_DATA / name
        if not path.exists():
            pytest.skip(f"the real data is not on this machine: no {path}")
        return path

    return path_of


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base of twelve items with two codes each, k // 3 and k % 3 those of item k."""
    import numpy as np

    from cladapt.model.load import new_model, save_base
    from cladapt.tokens.sids import SidTable

    sids = SidTable(tuple(f"i{k}" for k in range(12)), np.array([[k // 3, k % 3] for k in range(12)]), (4, 3))
    path = tmp_path_factory.mktemp("twelve") / "base"
    save_base(path, *new_model("tiny", sids, seed=0), sids, {"fitted_block": 1})
    return path


@pytest.fixture(scope="session")
def checkpoint() -> Callable[..., Path]:
    """Writes a tiny random checkpoint with a byte-level tokenizer: `checkpoint(folder, family, tied, padding)`."""
    return write_checkpoint


def write_checkpoint(folder: Path, family: str = "llama", tied: bool = True, padding: int = 7) -> Path:
    """`padding`: rows of the model beyond its tokenizer, as the Qwen family has."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=["<s>", "</s>"], show_progress=False)
    trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(["which item next", "the next item of the list"], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    config: Any = transformers.AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer) + padding,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        head_dim=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Peak:
    """Bytes: the most that lived at one time of what was allocated inside."""

    bytes = 0


@pytest.fixture
def measured() -> Callable[[], Any]:
    """A context that gives the peak of what PyTorch allocates on the CPU inside, by its profiler."""
    from torch.profiler import ProfilerActivity, profile

    @contextmanager
    def inside() -> Iterator[Peak]:
        found, now = Peak(), 0
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            yield found
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        for event in sorted(events, key=lambda e: e.start_ns()):
            now += event.nbytes()
            found.bytes = max(found.bytes, now)

    return inside
