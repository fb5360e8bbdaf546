"""Every supported family of language models through the life of a stream: a tiny checkpoint of random weights, with its
head tied to the embedding and with one of its own."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cladapt.config import (
    AdapterConfig,
    InitConfig,
    MethodConfig,
    RunConfig,
    SimulateConfig,
    TaskWeights,
    TokensConfig,
    TrainConfig,
    TuneConfig,
)
from cladapt.errors import ConfigError, DataError
from cladapt.export.merge import probe_tokens
from cladapt.model.adapter import quiet
from cladapt.model.attention import block_mask
from cladapt.model.load import load_base
from cladapt.model.saved import load_adapter
from cladapt.pipeline import bases, evaluation, runs, ship, streams
from cladapt.run import Run
from cladapt.tokens.tokenizer import sid_token_ids
from cladapt.train.sinks import MemorySink

pytestmark = pytest.mark.filterwarnings("ignore:.*tuning has left:UserWarning")  # one epoch of a tiny model
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,  # heads together wider than the model, as in Qwen3 and Gemma
    "max_position_embeddings": 512,
}
FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "gemma": (GemmaConfig, GemmaForCausalLM),
}
CASES = [(family, tied) for family in FAMILIES for tied in (True, False)]
QUICK = InitConfig(epochs=1)
TUNE = TuneConfig(epochs=1, batch_tokens=256, row_tokens=64, tasks=TaskWeights(title_to_id=0.5, id_to_title=0.5))
TEXT = ["which item comes next", "the next item of the list is an item"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE, as these families have."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=["<s>", "</s>"], show_progress=False)
    trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def make_checkpoint(folder: Path, kinds: tuple[Any, Any], tied: bool, **changes: Any) -> Path:
    """A random checkpoint with rows beyond its tokenizer, as the Qwen family has."""
    tokenizer = make_tokenizer()
    sizes = {**SIZES, "vocab_size": len(tokenizer) + 5, "tie_word_embeddings": tied, **changes}
    config = kinds[0](**sizes, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kinds[1](config)
        with torch.no_grad():  # the initialisation leaves biases and norms at constants, which would hide mistakes
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "stream"
    streams.simulate_data(folder, SimulateConfig(users=20, items=20, topics=2, blocks=2, events=5))
    streams.build_tokens(folder, TokensConfig(dimensions=4, levels=2, codes=4, capacity=8), None)
    return folder


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{'tied' if case[1] else 'untied'}")
def world(request: pytest.FixtureRequest, stream: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint `source`, what `base init` makes of it (`start`), the `base` that is tuned on block
    1 (all weights of a tied one, a LoRA of an untied one), a `run` that is evaluated, and its exports."""
    family, tied = request.param
    folder = tmp_path_factory.mktemp(family)
    make_checkpoint(folder / "source", FAMILIES[family], tied)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        bases.init_base(str(folder / "source"), stream, folder / "start", "packed", QUICK, MemorySink())
        tune = TUNE.model_copy(update={"rank": 0 if tied else 2})
        bases.tune_base(str(folder / "start"), stream, folder / "base", tune, MemorySink())
        config = RunConfig(
            data=str(stream),
            base=str(folder / "base"),
            adapter=AdapterConfig(rank=2),
            method=MethodConfig(name="peso"),
            train=TrainConfig(epochs=1, batch_tokens=256, row_tokens=64, window=6, lr=1e-2, precision="fp32"),
        )
        runs.train(config, folder / "run", MemorySink())
        evaluation.evaluate(folder / "run", {"bootstrap": 100, "max_users": 8, "next_block": False}, None, MemorySink())
        for target in ("peft", "merged"):
            ship.export(folder / "run", target, folder / target, None, None)
    return folder


@pytest.fixture(scope="module")
def tied(world: Path) -> bool:
    return bool(json.loads((world / "source" / "config.json").read_text())["tie_word_embeddings"])


def test_init_gives_the_source_s_weights_and_id_rows_beside_them(world: Path, tied: bool) -> None:
    source, base = AutoModelForCausalLM.from_pretrained(world / "source"), load_base(world / "start")
    known = len(AutoTokenizer.from_pretrained(world / "source"))
    new = set(sid_token_ids(base.tokenizer, base.sids).tolist())
    assert min(new) == known
    found = base.model.state_dict()
    for name, weight in source.state_dict().items():
        rows = slice(0, known) if "embed_tokens" in name or "lm_head" in name else slice(None)
        assert torch.equal(found[name][rows], weight[rows]), name
    assert (base.model.get_input_embeddings().weight is base.model.get_output_embeddings().weight) == tied
    ids = base.tokenizer.encode("next item " + base.sids.tokens[0], add_special_tokens=False)
    assert ids[-1] in new
    assert base.tokenizer.decode(ids[:-1]).strip() == "next item"


def test_tuning_changes_every_layer_and_says_that_block_1_is_learned(world: Path, tied: bool) -> None:
    start, base = load_base(world / "start"), load_base(world / "base")
    assert (start.fitted_block, base.fitted_block) == (0, 1)
    before, after = start.model.state_dict(), base.model.state_dict()
    same = {name for name, weight in before.items() if torch.equal(weight, after[name])}
    norms = {name for name in before if "norm" in name or "bias" in name}
    assert same <= norms
    assert tied or norms <= same  # a LoRA is merged into linear layers alone
    assert (base.model.get_input_embeddings().weight is base.model.get_output_embeddings().weight) == tied


def test_packed_rows_have_the_hidden_states_of_single_ones(world: Path) -> None:
    base = load_base(world / "base")
    one, two = probe_tokens(base)[:2, :9]
    document = torch.tensor([[1] * 9 + [2] * 9])
    position = torch.arange(9).repeat(2)[None]
    backbone = getattr(base.model, base.model.base_model_prefix)
    with torch.no_grad():
        packed = backbone(
            input_ids=torch.cat([one, two])[None],
            attention_mask=block_mask(document, torch.float32),
            position_ids=position,
            use_cache=False,
        ).last_hidden_state[0]
        single = backbone(input_ids=torch.stack([one, two])).last_hidden_state.flatten(0, 1)
        # the head is all that stands between hidden states and logits
        logits = base.model(input_ids=one[None]).logits[0]
    torch.testing.assert_close(packed, single, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(base.model.get_output_embeddings()(single[:9]), logits, atol=1e-5, rtol=1e-5)


def test_the_run_learned_every_linear_layer_and_was_measured(world: Path, tied: bool) -> None:
    run = Run.open(world / "run")
    assert list(run.adapters) == [2]
    parameters = load_adapter(load_base(world / "base"), run.adapters[2]).state_dict()
    factors = {name: p for name, p in parameters.items() if ".lora_B." in name}
    assert len(factors) == 7 * SIZES["num_hidden_layers"] + (not tied)
    assert all(bool(p.abs().max() > 0) for p in factors.values())
    losses = [e["loss"] for e in map(json.loads, (run.path / "log.jsonl").read_text().splitlines()) if "loss" in e]
    assert losses
    assert all(0.0 < loss < 20.0 for loss in losses)
    rows = pl.read_parquet(run.path / "users" / "block_002.parquet")
    assert rows["log_likelihood"].is_finite().all()
    assert (run.path / "report.html").is_file()


def test_stock_peft_and_transformers_answer_as_we_do(world: Path) -> None:
    base = load_base(world / "base")
    probe = probe_tokens(base)[:3]
    with torch.no_grad(), quiet():
        alone = base.model(input_ids=probe).logits
        expected = load_adapter(base, world / "run" / "adapters" / "block_002")(input_ids=probe).logits
        peft = AutoPeftModelForCausalLM.from_pretrained(world / "peft")(input_ids=probe).logits
        merged = AutoModelForCausalLM.from_pretrained(world / "merged")(input_ids=probe).logits
    torch.testing.assert_close(peft, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(merged, expected, atol=2e-5, rtol=0)
    assert (alone - expected).abs().max() > 1e-3


def test_the_run_and_its_export_recommend_the_same(world: Path, tmp_path: Path) -> None:
    lines = [{"user": f"u{n}", "history": [f"i{n:02d}", f"i{n + 3:02d}"]} for n in range(5)]
    (tmp_path / "h.jsonl").write_text("\n".join(map(json.dumps, lines)))
    given: dict[str, Any] = {"block": None, "top_k": 5, "beams": None, "catalogue": None, "exclude_seen": True}
    found = {}
    for name, base in (("run", None), ("peft", world / "base")):
        out = tmp_path / f"{name}.parquet"
        ship.recommend(tmp_path / "h.jsonl", out, world / name, base, **given)
        found[name] = pl.read_parquet(out)
    assert found["run"].height == 25
    assert found["run"].equals(found["peft"])


def test_gemma_2_which_transforms_its_logits_is_refused(stream: Path, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", (Gemma2Config, Gemma2ForCausalLM), tied=True)
    # transformers has no SDPA for it either, and says so first
    with pytest.raises((ConfigError, DataError), match=r"Gemma2ForCausalLM (transforms its logits|does not support)"):
        bases.init_base(str(source), stream, tmp_path / "base", "packed", QUICK, MemorySink())
    assert not (tmp_path / "base").exists()
