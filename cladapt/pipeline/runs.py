"""Runs: adapt block after block, then measure every adapter against every block."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import polars as pl
import torch

from cladapt import ops, ranks
from cladapt.artifacts import atomic_dir, atomic_path, write_json, write_parquet
from cladapt.config import BaseConfig, EvalConfig, RunConfig, SimulateConfig, TokensConfig, resolve
from cladapt.data.histories import split_block
from cladapt.data.schema import Stream
from cladapt.data.simulate import ceiling
from cladapt.errors import ConfigError, DataError
from cladapt.eval.evaluate import Evaluator
from cladapt.eval.expect import check_expected, read_expected
from cladapt.eval.protocol import CEILING, COUNTS, FROZEN, Measures, measure_counts, measure_run, table_columns
from cladapt.methods import Method, build
from cladapt.model.adapter import adapted_lm, adapter_parameters, create_adapter
from cladapt.model.anchors import module_of
from cladapt.model.history import unload
from cladapt.model.load import Base, load_base
from cladapt.model.saved import adapter_block, load_adapter, start_from
from cladapt.pipeline import bases, streams
from cladapt.pipeline.lifecycle import Workload, begin, names_inputs, refuse_unfinished, refuse_unnamed
from cladapt.pipeline.lifecycle import resume as continue_run
from cladapt.pipeline.report import run_report
from cladapt.run import RUNS, Run
from cladapt.tokens.prompts import Form, pack
from cladapt.train.sinks import Sink
from cladapt.train.stream import blocks_to_learn, learned_block, make_form, train_stream, training_documents

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDED = RUNS / "embedded"
METRICS_SCHEMA_VERSION = 2


def train(config: RunConfig, out: Path | None, sink: Sink) -> dict[str, Any]:
    """Start a run: adapt the base to every block that it has not seen."""
    if out is not None:
        ranks.once(lambda: Run.refuse_existing(out))
    config = with_embedded(config, sink)
    stream, base = open_inputs(config)
    prepare(config, base)
    return begin(workload(), config, stream, base, out, sink)


def resume(path: Path, sink: Sink, asked: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Continue an interrupted run; see `cladapt.pipeline.lifecycle.resume`."""
    return continue_run(workload(), Run.open(path), sink, asked)


def workload() -> Workload[RunConfig]:
    """Recommending, as the life of a run sees it."""
    return Workload(
        open_inputs,
        lambda config, stream, base: blocks_to_learn(stream, learned_block(config, base)),
        train_stream,
        lambda config: {
            "form": config.train.form,
            "window": config.train.window,
            "softmax": config.train.softmax,
            "from_adapter": config.from_adapter or None,
            "beams": config.eval.beams,
        },
    )


def prepare(config: RunConfig, base: Base) -> tuple[Method, Form, dict[str, torch.nn.Parameter]]:
    """Method, form and adapter parameters of a run: mistakes in its settings show before anything is written."""
    method = build(config.method)
    form = make_form(config.train.form, base, config.train.window, config.train.row_tokens)
    model = create_adapter(base, config.adapter, config.seed, method.parameters, config.kernels)
    if config.from_adapter:
        start = Path(config.from_adapter)
        adapter_block(start)
        start_from(model, start, base)
    parameters = adapter_parameters(model)
    unload(model)
    return method, form, parameters


def plan(config: RunConfig) -> dict[str, Any]:
    """What a run would do: everything validated, tokens and parameters counted, memory estimated, nothing written."""
    refuse_unnamed(config)
    stream, base = open_inputs(config)
    method, form, parameters = prepare(config, base)
    blocks = []
    for block in blocks_to_learn(stream, learned_block(config, base)):
        documents = training_documents(split_block(stream, block), form)
        rows = pack(documents, config.train.row_tokens, None)
        batches = math.ceil(len(rows.tokens) / max(1, config.train.batch_tokens // config.train.row_tokens))
        blocks.append(
            {
                "block": block,
                "documents": len(documents),
                "targets": int(sum(d.loss.sum() for d in documents)) // base.sids.levels,
                "tokens_per_epoch": int((rows.document > 0).sum()),
                "filled": float((rows.document > 0).mean()),
                "steps": config.train.epochs * math.ceil(batches / config.train.accumulation),
            }
        )
    trained = sum(p.numel() for p in parameters.values())
    total = sum(p.numel() for p in base.model.parameters())
    return {
        "method": config.method.name,
        "base_parameters": total,
        "trained_parameters": trained,
        "adapted_modules": len({module_of(name) for name in parameters}),
        "method_state_bytes": method.state_bytes(parameters),
        "memory_bytes": _memory(config, base, total, trained),
        "kernels": {op: implementation for op, (implementation, _) in ops.backends(config.kernels).items()},
        "blocks": blocks,
    }


def _memory(config: RunConfig, base: Base, total: int, trained: int) -> int:
    """Weights, adapter with gradient and two Adam moments, and the activations and logits of one micro-batch."""
    bytes_per = 2 if config.train.precision == "bf16" else 4
    settings = base.model.config
    per_token = settings.num_hidden_layers * (10 * settings.hidden_size + 3 * settings.intermediate_size)
    attention = settings.num_hidden_layers * settings.num_attention_heads * config.train.row_tokens
    logits = 2 * settings.vocab_size
    activations = config.train.batch_tokens * (bytes_per * (per_token + attention) + 4 * logits)
    return bytes_per * total + 16 * trained + activations


def evaluate(
    path: Path | None, settings: Mapping[str, Any], block: int | None, sink: Sink, expect: Path | None = None
) -> dict[str, Any]:
    """Test every adapter of a run on every block (or on one).

    `expect`: a file of ranges, see `cladapt.eval.expect`; `CheckFailed`, after all is written, when a value is outside.
    """
    run = Run.latest() if path is None else Run.open(path)
    config = resolve(EvalConfig, {**run.config.eval.model_dump(), **settings}, "eval")
    lines = (run.config.method.name, FROZEN, *COUNTS, CEILING)
    expected = read_expected(expect, table_columns(config), lines) if expect else {}
    _, result = evaluate_run(run, config, block, sink)
    check_expected(expected, result["table"])
    return {
        "run": str(run.path),
        "method": run.config.method.name,
        "report": str(run.path / "report.html"),
        "table": result["table"],
        "differences": result["differences"],
        "continual": result["continual"],
        "next_block": result["next_block"]["table"],
    }


def evaluate_run(run: Run, config: EvalConfig, block: int | None, sink: Sink) -> tuple[Measures, dict[str, Any]]:
    """Measure a run and write its per-user rows, metrics.json and report.html."""
    stream, base = open_inputs(run.config)
    if block is not None and not 1 <= block <= stream.n_blocks:
        raise ConfigError(f"--block {block}: the stream has blocks 1 to {stream.n_blocks}", "choose one of them")
    run.environment()  # the report tells of it: what is damaged shows now
    measures = measure(run, stream, base, config, block, sink)
    return measures, ranks.once(lambda: _write_measures(run, measures, stream, base))


def _write_measures(run: Run, measures: Measures, stream: Stream, base: Base) -> dict[str, Any]:
    """Per-user rows, metrics.json and report.html; the content of metrics.json."""
    html, result = run_report(run, measures, stream, base)  # first: it reads files that may be damaged
    with atomic_dir(run.path / "users") as users:  # whole, so that no rows of an earlier evaluation stay
        for s in measures.rows["block"].unique().sort().to_list():
            write_parquet(users / f"block_{s:03d}.parquet", measures.rows.filter(pl.col("block") == s))
        for name, rows in measures.beside.items():
            write_parquet(users / f"counts_{name.replace(' ', '_')}.parquet", rows)
        if measures.next:
            write_parquet(users / "next_block.parquet", measures.next.rows)
            for name, rows in measures.next.beside.items():
                write_parquet(users / f"next_counts_{name.replace(' ', '_')}.parquet", rows)
    write_json(run.path / "metrics.json", {"schema_version": METRICS_SCHEMA_VERSION, **result})
    with atomic_path(run.path / "report.html") as temporary:
        temporary.write_text(html, encoding="utf-8")
    return result


def measure(run: Run, stream: Stream, base: Base, config: EvalConfig, block: int | None, sink: Sink) -> Measures:
    """Rows of what the run starts from and of its adapters on every block, and of the counts-only models."""
    adapters = run.adapters
    trains = build(run.config.method).trains
    learned = learned_block(run.config, base)
    expected = list(blocks_to_learn(stream, learned))
    if trains:
        refuse_unfinished(run, expected)
    start = Path(run.config.from_adapter) if run.config.from_adapter else None
    for _ in _models(base, start, learned, adapters):
        pass  # a damaged adapter shows now, not when those before it are measured
    form = make_form(run.config.train.form, base, run.config.train.window, run.config.train.row_tokens)
    evaluator = Evaluator(stream, base, form, config, run.config.train.softmax, run.config.seed)
    blocks = list(range(1, stream.n_blocks + 1)) if block is None else [block]

    later = [b for b in blocks if b > learned]
    truth = streams.truth_of(Path(run.config.data)) if config.targets == "test" else None
    best = {} if truth is None else {b: ceiling(truth, stream, b, config.top_k) for b in later}
    models = _models(base, start, learned, adapters)
    rows, first = measure_run(evaluator, models, blocks, lambda text: sink.emit({"kind": "note", "text": text}))
    name = run.config.method.name
    following = [b for b in later if b > learned + 1]
    after = None
    if first.height:
        after = Measures(name, first, measure_counts(evaluator, following, lag=1), learned, config, lag=1)
    return Measures(name, rows, measure_counts(evaluator, later), learned, config, best, next=after)


def _models(
    base: Base, start: Path | None, learned: int, adapters: Mapping[int, Path]
) -> Iterator[tuple[int, "PreTrainedModel"]]:
    """What the run starts from, then each of its adapters in turn; the base is bare again at the end."""
    if start is None:
        yield learned, base.model
    for block, folder in {**({} if start is None else {learned: start}), **adapters}.items():
        model = load_adapter(base, folder)  # each anew: their ranks may differ
        yield block, adapted_lm(model)
        unload(model)


def open_inputs(config: RunConfig) -> tuple[Stream, Base]:
    """The stream and the base of a configuration, checked to belong together."""
    stream = Stream.load(Path(config.data))
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    base = load_base(Path(config.base), dtype)
    cast(torch.nn.Module, base.model).to(ops.compute_device())
    aligned = base.sids.align(stream.items["item"].to_list())
    if base.fitted_block and base.provenance.get("stream") != stream.fingerprint:
        raise DataError(
            f"{config.base} was trained on block {base.fitted_block} of the stream {base.provenance.get('stream')}, "
            f"{config.data} is the stream {stream.fingerprint}",
            "use the stream that the base was made from, so that no test event is in its training data",
        )
    return stream, replace(base, sids=aligned)


def with_embedded(config: RunConfig, sink: Sink) -> RunConfig:
    """Fill in the embedded stream and tiny base where the configuration names none, making them once."""
    if names_inputs(config, "the embedded stream and its tiny base"):
        return config
    stream, base = EMBEDDED / "stream", EMBEDDED / "base"
    make_embedded(stream, base, SimulateConfig(), BaseConfig(), sink)
    return config.model_copy(update={"data": str(stream), "base": str(base)})


def make_embedded(stream: Path, base: Path, simulate: SimulateConfig, pretrain: BaseConfig, sink: Sink) -> None:
    """A simulated stream with semantic IDs and a base trained on its block 1; what exists is kept."""

    def make_stream() -> None:
        sink.emit({"kind": "note", "text": f"simulating the embedded stream in {stream}"})
        with atomic_dir(stream) as folder:
            streams.simulate_data(folder, simulate)
            streams.build_tokens(folder, TokensConfig(), None)

    if not ranks.once(stream.is_dir):
        ranks.once(make_stream)
    if not ranks.once(base.is_dir):  # all processes train it
        sink.emit({"kind": "note", "text": f"training the embedded base in {base}"})
        bases.pretrain_base(stream, base, pretrain, sink)
