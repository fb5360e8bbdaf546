"""Base models: a small causal LM trained from scratch on block 1, or new token rows fitted in a given one."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from torch.nn import functional as F

from cladapt.config import BaseConfig, PretrainConfig, VitConfig
from cladapt.methods import Context
from cladapt.methods.finetune import Finetune
from cladapt.model.adapter import quiet
from cladapt.model.packed import PackedLoss, TrieSoftmax
from cladapt.sequential import SequentialBaseConfig
from cladapt.tokens.prompts import Document
from cladapt.train.feeds import Feed, PackedFeed
from cladapt.train.loop import Fit, FitResult, FitSettings
from cladapt.train.sinks import Sink

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def pretrain(
    model: "PreTrainedModel",
    softmax: TrieSoftmax | None,
    train: Sequence[Document],
    valid: Sequence[Document],
    config: PretrainConfig,
    sink: Sink,
) -> FitResult:
    """Train all weights of `model` on block 1, stopping by the validation log-likelihood."""
    with residual_dropout(model, config.dropout):
        feed = PackedFeed(train, valid, config.batch_tokens, config.row_tokens)
        return fit_base(PackedLoss(model, softmax), dict(model.named_parameters()), feed, config, sink)


def fit_token_rows(
    model: "PreTrainedModel",
    new_ids: Sequence[int],
    softmax: TrieSoftmax | None,
    train: Sequence[Document],
    valid: Sequence[Document],
    config: BaseConfig,
    sink: Sink,
) -> tuple["PreTrainedModel", FitResult]:
    """Train the embedding (and untied head) rows of `new_ids` alone and bake them into the model."""
    wrapped = with_token_rows(model, new_ids)
    parameters = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    feed = PackedFeed(train, valid, config.batch_tokens, config.row_tokens)
    loss = PackedLoss(cast("PreTrainedModel", wrapped.get_base_model()), softmax)
    result = fit_base(loss, parameters, feed, config, sink)
    return cast("PreTrainedModel", wrapped.merge_and_unload()), result


def with_token_rows(model: "PreTrainedModel", ids: Sequence[int]) -> "PeftModel":
    """The model with the rows of `ids` in its embedding, and in an untied head, as all that learns."""
    from peft import TrainableTokensConfig, get_peft_model

    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    tables = [model.get_input_embeddings()] + ([] if tied else [model.get_output_embeddings()])
    names = [name for name, module in model.named_modules() if any(module is table for table in tables)]
    with quiet():
        return get_peft_model(model, TrainableTokensConfig(token_indices=list(ids), target_modules=names))


def fit_base(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    feed: Feed,
    config: BaseConfig | VitConfig | SequentialBaseConfig,
    sink: Sink,
) -> FitResult:
    """Train what a base learns by itself, stopping by the validation log-likelihood."""
    settings = FitSettings(
        lr=config.lr,
        epochs=config.epochs,
        seed=config.seed,
        weight_decay=config.weight_decay,
        patience=config.patience,
    )
    result = Fit(module, Finetune(), Context(parameters, block=1), feed, settings, sink).run()
    module.eval()
    return result


@contextmanager
def residual_dropout(model: "PreTrainedModel", p: float) -> Iterator[None]:
    """Dropout on the embeddings and every attention and MLP branch of a Llama-family model in training mode."""

    def drop(module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (F.dropout(output[0], p, module.training), *output[1:])
        return F.dropout(output, p, module.training)

    branches = [m for n, m in model.named_modules() if n.rpartition(".")[2] in ("self_attn", "mlp", "embed_tokens")]
    handles = [branch.register_forward_hook(drop) for branch in branches]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
