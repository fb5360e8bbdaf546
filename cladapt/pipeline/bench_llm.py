"""The engine against the field's usual code, on language models whose vocabulary is far larger than the IDs.

Training: transformers' Trainer with PEFT, each target one prompt, padded to its batch's longest, labels -100 on the
prompt. Decoding: `generate` with `prefix_allowed_tokens_fn`. Both on the same model, targets and token budget, after a
check that losses and rankings are equal. A tiny model with the vocabulary of a pretrained one, and any pretrained one.
"""

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn

from cladapt.config import AdapterConfig, SimulateConfig, TokensConfig, TrainConfig
from cladapt.data.histories import split_block
from cladapt.data.schema import Stream
from cladapt.data.simulate import simulate
from cladapt.errors import CheckFailed
from cladapt.model.adapter import create_adapter
from cladapt.model.load import Base, extend_model
from cladapt.model.packed import PackedLoss
from cladapt.ops import compute_device
from cladapt.pipeline.bench import (
    BASELINE,
    FEW,
    TOLERANCE,
    Case,
    check_equal,
    decoding,
    generation,
    make_fit,
)
from cladapt.tokens.build import build_sids
from cladapt.tokens.prompts import Document, Template, WordedForm, pack, share_prefixes
from cladapt.tokens.sids import SidTable
from cladapt.tokens.tokenizer import add_sid_tokens, sid_token_ids
from cladapt.train.feeds import batches_of
from cladapt.train.sinks import Sink
from cladapt.train.stream import make_form
from cladapt_kernels.timing import Row, compare

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VOCABULARY = 49_152
"""Rows of SmolLM2's embedding."""
TINY: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 2048,
}
STREAM = SimulateConfig(users=80, items=300, events=20, blocks=2)
"""About as many events of a user in a block as in logs of films or music."""
TOKENS = TokensConfig()
BEAMS = 20
WINDOWS = (20, 50)
"""Items of a history: the field's usual number, which moves on from target to target, and room for whole histories."""
ROW_TOKENS = 512
"""Of prompts: many targets of a user in one row, which is short enough that attention is a small part of a step."""
MOST_RUNS = 5
"""Interleaved runs here: one of Trainer or of `generate` takes seconds to minutes."""
SPREAD = 2.0
"""Standard deviation of the logits of IDs, so that ranks do not hang on rounding."""


@dataclass(frozen=True)
class Size:
    """How much is measured: `targets` at least to learn, `users` to decode."""

    targets: int
    users: int


SIZES = {"tiny": Size(24, 16), "llm": Size(24, 4)}


def field(pretrained: Mapping[str, Case], runs: int, sink: Sink) -> list[Row]:
    """Rows of both comparisons on the tiny model, and on the cases of pretrained models by their names."""
    rows, runs = list[Row](), min(runs, MOST_RUNS)
    sized = {f"{VOCABULARY} tokens": (make_llm_case(None), SIZES["tiny"])}
    sized |= {name: (case, SIZES["llm"]) for name, case in pretrained.items()}
    for title, (case, size) in sized.items():
        sink.emit({"kind": "note", "text": f"measuring training and decoding of the field's usual code, {title}"})
        for window in WINDOWS:
            rows += bench_field_training(with_window(case, window), size, title, runs)
        rows += bench_field_decoding(case, size, title, runs)
    return rows


def make_llm_case(source: Path | None, simulated: SimulateConfig = STREAM, tokens: TokensConfig = TOKENS) -> Case:
    """A model with the IDs of a simulated stream added, and the stream's last block; the tiny one where no `source`."""
    device = compute_device()
    stream = simulate(simulated).stream
    sids, _ = build_sids(stream, tokens)
    model, tokenizer = tiny_model(stream, sids) if source is None else extend_model(str(source), sids, seed=0)[:2]
    new = torch.from_numpy(sid_token_ids(tokenizer, sids))
    tables = dict.fromkeys([model.get_input_embeddings().weight, model.get_output_embeddings().weight])
    with torch.no_grad():
        for table in tables:
            scale = SPREAD / table.shape[1] ** 0.5
            table[new] = scale * torch.randn(len(new), table.shape[1], generator=torch.Generator().manual_seed(0))
    cast(nn.Module, model).to(device).requires_grad_(False)
    base = Base(model.eval(), tokenizer, sids, {})
    train = TrainConfig()
    form = make_form("packed", base, train.window, train.row_tokens)
    return Case(stream, base, form, split_block(stream, stream.n_blocks), train, device, BEAMS)


def with_window(case: Case, window: int) -> Case:
    """The same case with histories of up to that many items."""
    train = case.train.model_copy(update={"window": window})
    return replace(case, train=train, form=make_form("packed", case.base, window, train.row_tokens))


def tiny_model(stream: Stream, sids: SidTable) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A small tied Llama with random weights and VOCABULARY rows, of which its tokenizer of subwords uses some."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    subwords = Tokenizer(models.BPE())
    subwords.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    subwords.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    subwords.train_from_iterator([Template().history, Template().empty, *stream.items["text"]], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=subwords, bos_token="<s>", eos_token="<s>", pad_token="<s>")
    add_sid_tokens(tokenizer, sids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, **TINY)
        config._attn_implementation = "sdpa"
        return LlamaForCausalLM(config), tokenizer


def bench_field_training(case: Case, size: Size, title: str, runs: int) -> list[Row]:
    """One epoch over the same targets: Trainer on padded worded prompts, ours on the same prompts and on packed items.

    Between them prompts whose window moves on by half its items at once: the same targets, shorter histories.
    """
    worded, step = worded_form(case), case.train.window // 2
    stepping = worded_form(case, step)
    users = some_users(case, size.targets)
    prompts = [d for i in users for d in worded.examples(*case.split.training(i))]
    shared, stepped, packed = (
        [d for i in users for d in form.documents(*case.split.training(i))] for form in (worded, stepping, case.form)
    )
    levels = case.base.sids.levels
    targets = {sum(int(d.loss.sum()) for d in documents) // levels for documents in (prompts, shared, stepped, packed)}
    if len(targets) != 1:
        raise CheckFailed(f"the forms have {sorted(targets)} targets; no time is recorded", "report this as a bug")
    longest = max(len(d.tokens) for d in prompts)
    train = case.train.model_copy(update={"row_tokens": worded.row_tokens})
    wording, striding = (make_fit(replace(case, train=train), BASELINE, documents) for documents in (shared, stepped))
    packing = make_fit(case, BASELINE, packed)
    trainer = Field(case, prompts, max(1, case.train.batch_tokens // longest))
    some = worded.examples(*case.split.training(users[0]))[:8]
    check_losses(case, some, share_prefixes(some, worded.row_tokens), trainer.collate)
    providers = {
        "Trainer with PEFT, one padded prompt per target": trainer.epoch,
        "prompt form, its prefixes shared": lambda: [wording.step(batches, 0.5) for batches in wording.steps(0)],
        f"prompt form in steps of {step} items": lambda: [striding.step(batches, 0.5) for batches in striding.steps(0)],
        "packed form": lambda: [packing.step(batches, 0.5) for batches in packing.steps(0)],
    }
    window = f"histories up to {case.train.window} items, {case.train.batch_tokens} tokens"
    shape = f"{title}, {targets.pop()} targets, {window}"
    return compare("field training", shape, providers, case.device, runs, counted="interactions")


def bench_field_decoding(case: Case, size: Size, title: str, runs: int) -> list[Row]:
    """Beams for the block's test users: ours and `generate`, whose rankings must be equal."""
    users = case.split.test_users[: size.users]
    prompts = [case.form.prompt(case.split.history(int(i), before="test")) for i in users]
    few = min(FEW, len(prompts))
    ours = decoding(case, prompts)
    check_equal(ours(), generation(case, prompts, few)())
    providers: dict[str, Callable[[], object]] = {
        f"transformers generate, {few} users at once": generation(case, prompts, few, scored=False),
        f"cladapt, {len(prompts)} users at once": ours,
    }
    catalogue = len(case.stream.catalogue(case.split.block))
    shape = f"{title}, {len(prompts)} users, {case.beams} beams, {catalogue} items"
    return compare("field decoding", shape, providers, case.device, runs, counted="users")


def worded_form(case: Case, window_step: int = 1) -> WordedForm:
    """The same histories as worded prompts, in rows that have room for many targets of a user."""
    form = make_form("prompt", case.base, case.train.window, ROW_TOKENS, window_step=window_step)
    return cast(WordedForm, form)


def some_users(case: Case, targets: int) -> list[int]:
    """The first users of the block who have that many training targets together."""
    counts = np.cumsum(case.split.train_stop - case.split.start)
    return list(range(min(len(counts), int(np.searchsorted(counts, targets)) + 1)))


class Field:
    """transformers' Trainer on a stock PEFT adapter: `examples` one per row, `per_batch` rows padded on the right."""

    def __init__(self, case: Case, documents: Sequence[Document], per_batch: int) -> None:
        from transformers import DataCollatorForSeq2Seq

        base = Base(copy.deepcopy(case.base.model), padded_tokenizer(case.base.tokenizer), case.base.sids, {})
        self.model: PeftModel = create_adapter(base, AdapterConfig(), 0, kernels="reference")
        self.examples = labelled(documents)
        self.collate = DataCollatorForSeq2Seq(base.tokenizer, padding=True)
        self.per_batch, self.train, self.on_cpu = per_batch, case.train, case.device.type == "cpu"

    def epoch(self) -> None:
        """One epoch as a script of the field runs it, without logs and checkpoints."""
        from transformers import PrinterCallback, Trainer, TrainingArguments

        with tempfile.TemporaryDirectory() as folder:
            settings = TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=self.per_batch,
                num_train_epochs=1,
                learning_rate=self.train.lr,
                lr_scheduler_type="cosine",
                weight_decay=self.train.weight_decay,
                max_grad_norm=self.train.clip,
                use_cpu=self.on_cpu,
                bf16=False,
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                seed=0,
            )
            trainer = Trainer(self.model, settings, data_collator=self.collate, train_dataset=cast(Any, self.examples))
            trainer.remove_callback(PrinterCallback)  # it writes to stdout
            trainer.train()


def labelled(documents: Sequence[Document]) -> list[dict[str, list[int]]]:
    """Documents as Trainer takes them: token ids, and labels that are -100 on what is not learned."""
    return [{"input_ids": d.tokens.tolist(), "labels": np.where(d.loss, d.tokens, -100).tolist()} for d in documents]


def padded_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """A copy that pads on the right, by the eos token where it has no other."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@torch.no_grad()
def check_losses(
    case: Case, prompts: Sequence[Document], shared: Sequence[Document], collate: Callable[[Any], Mapping[str, Any]]
) -> None:
    """`CheckFailed` unless padded prompts have the loss over the vocabulary that they have packed and shared."""
    lm, device = case.base.model.eval(), case.device
    padded = {key: value.to(device) for key, value in collate(labelled(prompts)).items()}
    theirs = float(lm(**padded).loss)
    for documents in (prompts, shared):
        rows = pack(documents, ROW_TOKENS, None)
        (batch,) = batches_of(rows, len(rows.tokens))
        ours = float(PackedLoss(lm)(*(t.to(device) for t in batch)).mean())
        if not abs(ours - theirs) <= TOLERANCE:
            raise CheckFailed(
                f"the mean loss of {len(prompts)} prompts is {ours:.6f}, that of transformers {theirs:.6f}; no time is "
                "recorded",
                "report this as a bug",
            )
