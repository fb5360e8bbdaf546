"""What the methods cost and what the engine saves, measured on a simulated stream made in memory.

Five comparisons, each interleaved in one process: packed training against one padded example per target, constrained
decoding against transformers' `generate`, a training step of every method against fine-tuning, sharpness-aware steps
against plain ones and against a loop over items, and training and decoding with a pretrained model's vocabulary against
the same model with ID tokens alone.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from cladapt.artifacts import atomic_path
from cladapt.config import AdapterConfig, MethodConfig, PretrainConfig, SimulateConfig, TokensConfig, TrainConfig
from cladapt.data.histories import BlockSplit, split_block
from cladapt.data.schema import Stream
from cladapt.data.simulate import simulate
from cladapt.errors import CheckFailed
from cladapt.eval.decode import left_pad
from cladapt.eval.lists import Catalogue, make_decoder
from cladapt.methods import Context, available, build
from cladapt.model.adapter import adapted_lm, adapter_parameters, create_adapter
from cladapt.model.load import Base, new_model
from cladapt.model.packed import PackedLoss
from cladapt.ops import compute_device
from cladapt.pipeline.kernels import check_request
from cladapt.pipeline.memory import peak_bytes
from cladapt.tokens.build import build_sids
from cladapt.tokens.prompts import Document, Form
from cladapt.train.blocks import fit_settings
from cladapt.train.feeds import Batch, PackedFeed
from cladapt.train.loop import Fit
from cladapt.train.pretrain import pretrain
from cladapt.train.sinks import MemorySink, Sink
from cladapt.train.stream import (
    catalogue_softmax,
    make_form,
    packed_targets,
    training_documents,
    validation_documents,
)
from cladapt_kernels.timing import Row, compare, where, write_rows

PRESET = "tiny"
BASELINE = "finetune"
BEAMS = 10
EPOCHS = 3  # of the base
USERS = 64  # to decode
FEW = 8  # of them at once where memory traffic rules: what `generate` is fastest with on a CPU
STEPS = 4  # optimiser steps of one timed call
VOCABULARY = 151_936  # Qwen2.5's
LAYERS, HIDDEN, INTERMEDIATE, HEADS, KEY_HEADS = 4, 576, 1536, 9, 3  # four layers of SmolLM2-135M
TOLERANCE = 1e-3  # between two float32 computations of a log-likelihood
LARGE, ALONE = "with a pretrained vocabulary", "ID tokens alone"
TARGETS: Mapping[tuple[str, str], str] = {
    ("training", "packed"): ">= 4",
    ("decoding", "cladapt"): ">= 5",
    ("step", "peso"): "<= 1.05",
    ("step", "eblora"): "<= 1.10",
    ("step", "janus"): "<= 1.15",
    ("sharpness step", "eisam by item"): "<= 2.15",
    ("sharpness step", "eisam by history"): "<= 2.15",
    ("sharpness step, exact", "eisam by item"): "<= 2.15",
    ("sharpness step, exact", "eisam by history"): "<= 2.15",
    ("sharpness by item", "at once"): ">= 1.5",
    ("sharpness memory", "eisam by item"): "within 10 % of 1",
    ("sharpness memory", "eisam by history"): "within 10 % of 1",
    ("vocabulary: training step", LARGE): "<= 1.10",
    ("vocabulary: decoding batch", LARGE): "<= 1.10",
    ("vocabulary: memory of a training step", LARGE): "<= 1.10",
    ("vocabulary: memory of a decoding batch", LARGE): "<= 1.10",
    ("field training", "packed form"): ">= 8",
    ("field training", "prompt form"): ">= 1.3",
    ("field decoding", "cladapt"): ">= 8",
}


@dataclass(frozen=True)
class Case:
    """A base trained on block 1 of a simulated stream, and the stream's last block as the one to adapt to."""

    stream: Stream
    base: Base
    form: Form
    split: BlockSplit
    train: TrainConfig
    device: torch.device
    beams: int = BEAMS


def methods(runs: int, out: Path | None, sink: Sink, llm: Path | None = None) -> dict[str, Any]:
    """Measure all comparisons; rows go to the csv file `out` as well where one is given.

    `llm`: a pretrained causal LM on which the field's usual code is measured too; see `cladapt.pipeline.bench_llm`.
    """
    from cladapt.pipeline.bench_llm import field, make_llm_case  # which measure with what is here
    from cladapt.pipeline.bench_sharpness import bench_sharpness

    check_request(runs, out)
    # first, so that a mistake shows before anything is measured
    pretrained = {} if llm is None else {llm.name: make_llm_case(llm)}
    sink.emit({"kind": "note", "text": "simulating a stream and training a base on its first block"})
    case = make_case(SimulateConfig(), TokensConfig())
    here = where(case.device)
    rows: list[Row] = []
    for what, measure in (
        ("training", bench_training),
        ("decoding", bench_decoding),
        ("steps", bench_steps),
        ("sharpness-aware steps", bench_sharpness),
        ("vocabulary", bench_vocabulary),
    ):
        sink.emit({"kind": "note", "text": f"measuring {what}"})
        rows += measure(case, runs)
    rows += field(pretrained, runs, sink)
    if out is not None:
        with atomic_path(out) as temporary:
            write_rows(temporary, [{**row, **here} for row in rows])
    return {**here, "runs": runs, "out": None if out is None else str(out), "measured": [_shown(row) for row in rows]}


def make_case(config: SimulateConfig, tokens: TokensConfig) -> Case:
    """The stream, its semantic IDs and a base trained for a few epochs: logits far enough apart to rank by."""
    device = compute_device()
    train = TrainConfig()
    stream = simulate(config).stream
    sids, _ = build_sids(stream, tokens)
    model, tokenizer = new_model(PRESET, sids, seed=0)
    cast(torch.nn.Module, model).to(device)
    base = Base(model, tokenizer, sids, {})
    form = make_form("packed", base, train.window, train.row_tokens)
    first = split_block(stream, 1)
    softmax = catalogue_softmax(base, stream, 1, train.softmax)
    documents = training_documents(first, form), validation_documents(first, form)
    pretrain(model, softmax, *documents, PretrainConfig(epochs=EPOCHS), MemorySink())
    model.requires_grad_(False)
    return Case(stream, base, form, split_block(stream, stream.n_blocks), train, device)


def make_fit(
    case: Case, method_name: str, documents: Sequence[Document], dropout: float | None = None, **options: Any
) -> Fit:
    """The loop of a method on its own copy of the base, at its second block, with what it keeps of the first."""
    adapter = AdapterConfig() if dropout is None else AdapterConfig(dropout=dropout)
    base = Base(copy.deepcopy(case.base.model), case.base.tokenizer, case.base.sids, {})
    method = build(MethodConfig(name=method_name, options=options))
    model = create_adapter(base, adapter, 0, method.parameters, by_item=method.flattens)
    initial = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    feed = PackedFeed(
        documents,
        validation_documents(case.split, case.form),
        case.train.batch_tokens,
        case.train.row_tokens,
        packed_targets(case.stream, case.split.block, case.form),
    )

    def at(block: int) -> Fit:
        fit = Fit(
            PackedLoss(adapted_lm(model), catalogue_softmax(base, case.stream, case.split.block, case.train.softmax)),
            method,
            Context.of(model, block, initial),
            feed,
            fit_settings(case.train, 0, block),
            MemorySink(),
        )
        fit.begin()
        return fit

    before = at(2)  # as after a base that has learned block 1
    before.step(before.steps(0)[0], 0.5)
    method.end_block(before.ctx)
    return at(3)


def bench_training(case: Case, runs: int) -> list[Row]:
    """One epoch over the block's targets, packed or one padded example each: same model, softmax and token budget."""
    packed = training_documents(case.split, case.form)
    padded = padded_documents(case.split, case.form, case.base.sids.levels)

    padding, packing = make_fit(case, BASELINE, packed), make_fit(case, BASELINE, packed)
    budget = case.train.batch_tokens
    providers = {
        "one padded example per target": lambda: [
            padding.step([batch], 0.5) for batch in padded_batches(padded, budget, np.random.default_rng(0))
        ],
        "packed": lambda: [packing.step(step, 0.5) for step in packing.steps(0)],
    }
    shape = f"{PRESET}, {len(padded)} targets, histories up to {case.train.window} items, {budget} tokens"
    return compare("training", shape, providers, case.device, runs, counted="interactions")


def bench_decoding(case: Case, runs: int) -> list[Row]:
    """Ten beams for the block's test users: ours and `generate`, whose results must be equal."""
    prompts = [case.form.prompt(case.split.history(int(i), before="test")) for i in case.split.test_users][:USERS]
    ours = decoding(case, prompts)
    for at_once in (FEW, len(prompts)):
        check_equal(ours(), generation(case, prompts, at_once)())
    # without the scores that only the check needs, and in the batches that suit its copies of the history per beam
    providers = {
        f"transformers generate, {FEW} users at once": generation(case, prompts, FEW, scored=False),
        f"transformers generate, {len(prompts)} users at once": generation(case, prompts, len(prompts), scored=False),
        f"cladapt, {len(prompts)} users at once": ours,
    }
    catalogue = len(case.stream.catalogue(case.split.block))
    shape = f"{PRESET}, {len(prompts)} users, {BEAMS} beams, {catalogue} items"
    return compare("decoding", shape, providers, case.device, runs, counted="users")


def bench_steps(case: Case, runs: int) -> list[Row]:
    """Optimiser steps of every method that trains, against the same steps of fine-tuning."""
    names = [BASELINE, *(name for name, kind in available().items() if kind.trains and name != BASELINE)]
    documents = training_documents(case.split, case.form)
    fits = {name: make_fit(case, name, documents) for name in names}
    providers = {name: partial(run_steps, fit, fit.steps(0)[:STEPS]) for name, fit in fits.items()}
    shape = f"{PRESET}, rank {AdapterConfig().rank}, {case.train.batch_tokens} tokens"
    return compare("step", shape, providers, case.device, runs)


def bench_vocabulary(case: Case, runs: int) -> list[Row]:
    """A step of fine-tuning and a decoding batch, time and peak memory beyond the weights, with both vocabularies.

    The two models have the same weights but for the rows of text, so their losses and lists must be equal.
    """
    alone = replace(case, base=wide_base(case, len(case.base.tokenizer)))
    large = replace(case, base=wide_base(case, VOCABULARY))
    cases = {ALONE: alone, f"{LARGE}, {VOCABULARY} tokens": large}
    prompts = [case.form.prompt(case.split.history(int(i), before="test")) for i in case.split.test_users][:FEW]
    documents = training_documents(case.split, case.form)
    decoders = {name: decoding(some, prompts) for name, some in cases.items()}
    check_equal(*(decode() for decode in decoders.values()))
    check_losses(*(validation_losses(some) for some in cases.values()))
    fits = {name: make_fit(some, BASELINE, documents) for name, some in cases.items()}
    step: Mapping[str, Callable[[], object]] = {
        name: partial(run_steps, fit, fit.steps(0)[:1]) for name, fit in fits.items()
    }
    rows: list[Row] = []
    for what, providers, size in (
        ("training step", step, f"{case.train.batch_tokens} tokens"),
        ("decoding batch", decoders, f"{len(prompts)} users, {BEAMS} beams"),
    ):
        shape = f"{LAYERS} layers, width {HIDDEN}, {len(case.base.sids.offsets) - 1} levels, {size}"
        rows += compare(f"vocabulary: {what}", shape, providers, case.device, runs)
        rows += _memory(f"vocabulary: memory of a {what}", shape, providers, case.device)
    return rows


def wide_base(case: Case, vocabulary: int) -> Base:
    """Random weights of a pretrained model's proportions with a tied table of `vocabulary` rows, IDs among them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens = len(case.base.tokenizer)
    config = LlamaConfig(
        vocab_size=tokens,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        initializer_range=0.1,  # lists that rounding cannot reorder
        tie_word_embeddings=True,
        pad_token_id=case.base.tokenizer.pad_token_id,
    )
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    cast(torch.nn.Module, model).to(case.device).requires_grad_(False)
    return Base(model, case.base.tokenizer, case.base.sids, {})


@torch.no_grad()
def validation_losses(case: Case) -> torch.Tensor:
    """The base's losses on the first batch of the block's validation targets."""
    loss = PackedLoss(case.base.model, catalogue_softmax(case.base, case.stream, case.split.block, case.train.softmax))
    documents = validation_documents(case.split, case.form)
    feed = PackedFeed(documents, documents, case.train.batch_tokens, case.train.row_tokens)
    batch = next(feed.validation())
    return cast(torch.Tensor, loss.eval()(*(t.to(case.device) for t in batch)))


def check_losses(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """`CheckFailed` unless both vocabularies give the same losses."""
    difference = (ours - theirs).abs().max().item() if ours.shape == theirs.shape else float("nan")
    if not difference <= TOLERANCE:
        raise CheckFailed(
            f"losses with ID tokens alone and with {VOCABULARY} tokens differ by {difference:.1e}; no time is recorded",
            "report this as a bug",
        )


def _memory(name: str, shape: str, providers: Mapping[str, Callable[[], object]], device: torch.device) -> list[Row]:
    """Rows of the peak of one call of each provider, beyond what exists before it, over that of the first."""
    peaks = {provider: peak_bytes(call, device) for provider, call in providers.items()}
    baseline, *_ = peaks
    common: Row = {"name": name, "shape": shape, "runs": 1}
    rows: list[Row] = []
    for provider, peak in peaks.items():
        figures = [(f"peak memory over '{baseline}'", "ratio", peak / peaks[baseline]), ("peak memory", "bytes", peak)]
        for metric, unit, value in figures:
            quantile = dict.fromkeys(("q20", "q50", "q80"), value)
            rows.append({**common, "provider": provider, "metric": metric, "unit": unit, **quantile})
    return rows


def run_steps(fit: Fit, steps: Sequence[list[Batch]]) -> None:
    """Steps in the middle of a fit."""
    for step in steps:
        fit.step(step, 0.5 * fit.settings.epochs)


def padded_documents(split: BlockSplit, form: Form, levels: int) -> list[Document]:
    """Every training target of the block as an example of its own: its prompt, then its tokens."""
    documents = []
    for i in range(len(split.user)):
        items, first_target = split.training(i)
        for place in range(first_target, len(items)):
            prompt = form.prompt(items[:place])
            tokens = np.concatenate([prompt, form.prompt(items[place : place + 1])[-levels:]])
            documents.append(Document(tokens, np.arange(len(tokens)) >= len(prompt)))
    return documents


def padded_batches(documents: Sequence[Document], batch_tokens: int, order: np.random.Generator) -> Iterator[Batch]:
    """Shuffled examples, one per row, padded on the right to their batch's longest, `batch_tokens` with padding."""
    chosen: list[Document] = []
    for index in order.permutation(len(documents)):
        longest = max(len(d.tokens) for d in [*chosen, documents[index]])
        if chosen and longest * (len(chosen) + 1) > batch_tokens:
            yield _padded(chosen)
            chosen = []
        chosen.append(documents[index])
    if chosen:
        yield _padded(chosen)


def _padded(documents: Sequence[Document]) -> Batch:
    """(tokens, document, position, loss) of one example per row."""
    width = max(len(d.tokens) for d in documents)
    tokens, loss = np.zeros((len(documents), width), dtype=np.int64), np.zeros((len(documents), width), dtype=bool)
    for row, example in enumerate(documents):
        tokens[row, : len(example.tokens)] = example.tokens
        loss[row, : len(example.tokens)] = example.loss
    real = np.arange(width) < np.array([[len(d.tokens)] for d in documents])
    document, position = real.astype(np.int64), np.arange(width) * real
    return torch.from_numpy(tokens), torch.from_numpy(document), torch.from_numpy(position), torch.from_numpy(loss)


Found = tuple[np.ndarray, np.ndarray]


def decoding(case: Case, prompts: Sequence[np.ndarray]) -> Callable[[], Found]:
    """Our decoder on all prompts at once: (token ids [users, beams, levels], log-likelihoods [users, beams])."""
    catalogue = Catalogue(case.base.sids, case.stream.catalogue(case.split.block))
    decoder = make_decoder(case.base.model, case.base, catalogue, case.beams, case.train.softmax)
    leaves = case.base.item_tokens().numpy()[[items[0] for items in catalogue.items_of_leaf]]

    def run() -> Found:
        beams = decoder.decode(prompts)
        return leaves[beams.leaf.cpu().numpy()], beams.score.cpu().numpy()

    return run


def generation(case: Case, prompts: Sequence[np.ndarray], at_once: int, scored: bool = True) -> Callable[[], Found]:
    """The same by `generate` with `prefix_allowed_tokens_fn` over a dictionary of prefixes, made beforehand.

    Unless `scored` the log-likelihoods are not asked for, and are NaN.
    """
    from transformers import GenerationConfig

    items = case.base.item_tokens().numpy()[case.stream.catalogue(case.split.block)]
    below: dict[tuple[int, ...], set[int]] = {}
    for item in items.tolist():
        for level, token in enumerate(item):
            below.setdefault(tuple(item[:level]), set()).add(token)
    allowed = {prefix: sorted(tokens) for prefix, tokens in below.items()}
    pad, levels = case.base.tokenizer.pad_token_id or 0, items.shape[1]
    settings = GenerationConfig(
        num_beams=case.beams,
        num_return_sequences=case.beams,
        max_new_tokens=levels,
        length_penalty=0.0,
        renormalize_logits=case.train.softmax == "trie",
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=scored,
        pad_token_id=pad,
    )
    lm = case.base.model.eval()

    def generate(some: Sequence[np.ndarray]) -> Found:
        tokens, length = left_pad(some, pad, case.device)
        width = tokens.shape[1]
        found = lm.generate(
            tokens,
            attention_mask=(torch.arange(width, device=case.device) >= (width - length)[:, None]).long(),
            generation_config=settings,
            prefix_allowed_tokens_fn=lambda _, sent: allowed[tuple(sent[width:].tolist())],
        )
        leaves = found.sequences[:, width:].view(len(some), case.beams, levels).cpu().numpy()
        if not scored:
            return leaves, np.full(leaves.shape[:2], np.nan)
        return leaves, found.sequences_scores.view(len(some), case.beams).cpu().numpy()

    def run() -> Found:
        leaves, scores = zip(
            *(generate(prompts[i : i + at_once]) for i in range(0, len(prompts), at_once)), strict=True
        )
        return np.concatenate(leaves), np.concatenate(scores)

    return run


def check_equal(ours: Found, theirs: Found) -> None:
    """`CheckFailed` unless both rank the same items with the same scores; scores closer than rounding are a tie."""
    (items, scores), (their_items, their_scores) = ours, theirs
    differ = ~np.isclose(scores, their_scores, rtol=0.0, atol=TOLERANCE)  # not-a-number differs too
    if differ.any():
        user, place = np.argwhere(differ)[0]
        raise CheckFailed(
            f"user {user}, place {place + 1}: our log-likelihood is {scores[user, place]:.6f}, "
            f"that of generate {their_scores[user, place]:.6f}; no time is recorded",
            "report this as a bug",
        )
    gap = np.full((len(scores), scores.shape[1] + 1), np.inf)
    gap[:, 1:-1] = scores[:, :-1] - scores[:, 1:]
    gap[:, -1] = 0.0  # what comes after the last place is not known
    tied = np.minimum(gap[:, :-1], gap[:, 1:]) <= 2 * TOLERANCE
    wrong = (items != their_items).any(axis=2) & ~tied
    if wrong.any():
        user, place = np.argwhere(wrong)[0]
        raise CheckFailed(
            f"user {user}, place {place + 1}: we rank {items[user, place].tolist()}, "
            f"generate ranks {their_items[user, place].tolist()}; no time is recorded",
            "report this as a bug",
        )


def _shown(row: Row) -> Row:
    """A row for people, with the target it should meet."""
    keys = ("name", "provider", "metric", "unit", "q20", "q50", "q80", "shape")
    target = TARGETS.get((str(row["name"]), str(row["provider"]).partition(",")[0])) if row["unit"] == "ratio" else None
    return {**{key: row[key] for key in keys}, "target": target}
