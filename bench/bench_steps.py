"""Whole training steps of a method on a random base, for the registry."""

from collections.abc import Callable

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cladapt.config import AdapterConfig, MethodConfig
from cladapt.methods import Context, build
from cladapt.model.adapter import adapted_lm, adapter_parameters, create_adapter
from cladapt.model.load import Base
from cladapt.model.packed import PackedLoss
from cladapt.tokens.prompts import Document
from cladapt.tokens.sids import SidTable
from cladapt.tokens.tokenizer import make_tokenizer
from cladapt.train.loop import Fit, FitSettings
from cladapt.train.sinks import MemorySink

ROW, ROWS = 128, 16


def training_step(method: str, hidden: int, layers: int, device: torch.device) -> Callable[[], object]:
    """One optimiser step of `method` on ROWS rows of ROW tokens, through the training loop itself."""
    codes = np.random.default_rng(0).integers(256, size=(1000, 4)).astype(np.int32)
    sids = SidTable(tuple(map(str, range(1000))), codes, (256,) * 4)
    tokenizer = make_tokenizer(sids)
    torch.manual_seed(0)
    lm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            tie_word_embeddings=True,
        )
    ).to(device)
    lm.requires_grad_(False)
    base = Base(lm, tokenizer, sids, {})
    model = create_adapter(base, AdapterConfig(), seed=0)
    tokens = base.item_tokens().numpy()[np.random.default_rng(1).integers(1000, size=(ROWS, (ROW - 1) // 4))]
    documents = [Document(np.r_[base.bos(), row.ravel()], np.arange(1 + row.size) > 0) for row in tokens]
    fit = Fit(
        PackedLoss(adapted_lm(model)),
        build(MethodConfig(name=method)),
        Context(adapter_parameters(model), block=2),
        documents,
        [],
        FitSettings(lr=1e-4, epochs=1, batch_tokens=ROW * ROWS, row_tokens=ROW, seed=0, keep="last"),
        MemorySink(),
    )
    fit.method.begin_block(fit.ctx)
    (step,) = fit.steps(0)
    return lambda: fit.step(step, progress=0.5)
