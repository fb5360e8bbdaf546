"""A real pretrained model, SmolLM2-135M-Instruct from a GGUF file: base, a step, exports in stock libraries.

The model is loaded a few times only: it takes seconds each.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from torch import Tensor
from transformers import AutoModelForCausalLM

from cladapt.artifacts import read_json
from cladapt.config import (
    AdapterConfig,
    InitConfig,
    MethodConfig,
    RunConfig,
    SimulateConfig,
    TokensConfig,
    TrainConfig,
)
from cladapt.export.merge import probe_tokens
from cladapt.model.adapter import quiet
from cladapt.model.load import Base, load_base
from cladapt.model.saved import load_adapter
from cladapt.pipeline import bases, runs, ship, streams
from cladapt.tokens.tokenizer import sid_token_ids
from cladapt.train.sinks import MemorySink

pytestmark = pytest.mark.llm

VOCABULARY = 49152
SENTENCE = "The capital of France is"
SENTENCE_TOKENS = [504, 3575, 282, 4649, 314]  # those of the Hugging Face checkpoint's tokenizer


@pytest.fixture(scope="module")
def world(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small `stream` and the `base` made of the model, no row of which was fitted."""
    folder = tmp_path_factory.mktemp("smollm2")
    streams.simulate_data(folder / "stream", SimulateConfig(users=8, items=20, topics=2, blocks=2, events=5))
    streams.build_tokens(folder / "stream", TokensConfig(dimensions=4, levels=2, codes=4, capacity=8), None)
    config = InitConfig(epochs=0)
    bases.init_base(str(smollm2), folder / "stream", folder / "base", "packed", config, MemorySink())
    return folder


@pytest.fixture(scope="module")
def base(world: Path) -> Base:
    return load_base(world / "base")


@pytest.fixture(scope="module")
def losses(world: Path) -> list[float]:
    """Train a `run`, export its adapter, and give the loss of every step."""
    sink = MemorySink()
    config = RunConfig(
        data=str(world / "stream"),
        base=str(world / "base"),
        adapter=AdapterConfig(rank=2),
        method=MethodConfig(name="finetune"),
        train=TrainConfig(epochs=1, batch_tokens=256, row_tokens=64, checkpointing=True, lr=5e-3),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        runs.train(config, world / "run", sink)
        for target in ("peft", "merged"):
            ship.export(world / "run", target, world / target, None, None)
    return [e["loss"] for e in sink.events if e["kind"] == "step"]


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits.float()


def test_the_base_is_the_model_with_id_rows(base: Base, world: Path) -> None:
    config = read_json(world / "base" / "config.json")
    assert (config["model_type"], config["num_hidden_layers"], config["hidden_size"]) == ("llama", 30, 576)
    assert "quantization_config" not in config
    assert base.model.get_input_embeddings().weight is base.model.get_output_embeddings().weight
    ids = torch.tensor([SENTENCE_TOKENS])
    best = logits(base.model, ids)[0, -1].argmax().item()
    assert base.tokenizer.decode([best]) == " Paris"  # its knowledge came through the unpacking


def test_text_and_ids_go_through_the_tokenizer_and_back(base: Base) -> None:
    assert base.tokenizer.encode(SENTENCE) == SENTENCE_TOKENS
    own = sid_token_ids(base.tokenizer, base.sids)
    assert own.min() == VOCABULARY
    for text in ("Amélie (2001), 甲 — “quoted”\n\ttabs  and  spaces", SENTENCE):
        ids = base.tokenizer.encode(text, add_special_tokens=False)
        assert base.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    item = base.sids.spelt(base.sids.items[0])
    ids = base.tokenizer.encode(f"Next: {item}.", add_special_tokens=False)
    assert set(base.item_tokens()[0].tolist()) == set(ids) & set(own.tolist())
    assert len(set(ids) & set(own.tolist())) == base.sids.levels


def test_training_starts_near_a_guess_and_stays_finite(losses: list[float], world: Path) -> None:
    assert losses
    assert all(0.0 < loss < 10.0 for loss in losses)
    log = [json.loads(line) for line in (world / "run" / "log.jsonl").read_text().splitlines()]
    assert {e["block"] for e in log if e["kind"] == "block"} == {1, 2}


def test_stock_peft_and_transformers_answer_as_we_do(losses: list[float], world: Path, base: Base) -> None:
    probe, adapter = probe_tokens(base)[:2], world / "run" / "adapters" / "block_002"
    before = logits(base.model, probe)
    truth = logits(load_adapter(load_base(world / "base"), adapter), probe)
    assert (truth - before).abs().max() > 0.01  # the adapter says something
    half = torch.bfloat16
    ours = logits(load_adapter(load_base(world / "base", half), adapter), probe)
    with quiet():
        stock = AutoPeftModelForCausalLM.from_pretrained(world / "peft", dtype=torch.float32)
        torch.testing.assert_close(logits(stock, probe), truth, atol=1e-4, rtol=0)
        stock = AutoPeftModelForCausalLM.from_pretrained(world / "peft", dtype=half)
    torch.testing.assert_close(logits(stock, probe), ours, atol=1e-6, rtol=0)
    merged = AutoModelForCausalLM.from_pretrained(world / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged, probe), truth, atol=1e-3, rtol=0)
    rounding = (ours - truth).abs()
    in_half = (logits(merged.to(half), probe) - truth).abs()
    assert in_half.max() <= 2 * rounding.max()
    assert in_half.mean() <= 2 * rounding.mean()
