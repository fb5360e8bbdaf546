"""Priors of items against a forward pass for each item alone, and of titles against transformers' own loss."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from cladapt.data.schema import INTERACTIONS, ITEMS, Stream
from cladapt.eval import prior as module
from cladapt.eval.prior import TITLE_TOKENS, Priors, title_prior
from cladapt.model.load import Base, extend_model, new_model
from cladapt.model.packed import Softmax
from cladapt.tokens.prompts import Form, PackedForm, PromptForm
from cladapt.tokens.sids import SidTable

CODES = {"a": (0, 0, 1), "b": (0, 0, 1), "c": (0, 1, 0), "d": (0, 1, 1), "e": (1, 2, 0), "f": (2, 0, 0), "g": (2, 1, 1)}
TEXTS = (
    "the next item",
    "",
    "which item",
    "list  of the\nitem",
    "<a_0> next",
    "item " * 90,
    "the next item of the list",
)
BORN = (1, 1, 1, 1, 1, 2, 2)
FORMS = ("packed", "prompt")


@pytest.fixture(scope="module")
def stream() -> Stream:
    events = pl.DataFrame([("u", "a", None, 0, 1), ("u", "g", None, 1, 2)], schema=INTERACTIONS, orient="row")
    return Stream(events, pl.DataFrame({"item": [*CODES], "text": TEXTS, "first_block": BORN}, schema=ITEMS))


@pytest.fixture(scope="module")
def base(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Base:
    sids = SidTable(tuple(CODES), np.array(list(CODES.values())), (3, 3, 2))
    source = checkpoint(tmp_path_factory.mktemp("llm") / "llm")
    model, tokenizer, _ = extend_model(str(source), sids, 0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0)  # far from uniform
    return Base(model.eval(), tokenizer, sids, {})


def form_of(base: Base, name: str) -> Form:
    tokens = base.item_tokens().numpy()
    return PackedForm(tokens, base.bos(), 4, 64) if name == "packed" else PromptForm(tokens, base.tokenizer, 4, 512)


@torch.no_grad()
def alone(base: Base, form: Form, item: str, catalogue: list[str], softmax: Softmax) -> float:
    """The mean over an item's tokens, from one forward pass in float64 for each of them."""
    tokens = dict(zip(CODES, base.item_tokens().tolist(), strict=True))
    prompt, own = form.prompt(np.array([], dtype=np.int64)).tolist(), tokens[item]
    total = 0.0
    for level, token in enumerate(own):
        logits = base.model.double()(input_ids=torch.tensor([[*prompt, *own[:level]]])).logits[0, -1]
        siblings = sorted({tokens[other][level] for other in catalogue if tokens[other][:level] == own[:level]})
        rivals = logits if softmax == "vocabulary" else logits[siblings]
        total += float(logits[token] - rivals.logsumexp(0))
    base.model.float()
    return total / len(own)


@pytest.mark.parametrize("softmax", ["trie", "vocabulary"])
@pytest.mark.parametrize("name", FORMS)
def test_the_prior_of_an_id_is_that_of_a_forward_pass_for_each_item_alone(
    stream: Stream, base: Base, name: str, softmax: Softmax
) -> None:
    form, catalogue = form_of(base, name), ["b", "c", "d", "e", "g", "a"]
    items = np.array(sorted(list(CODES).index(item) for item in catalogue))
    expected = [alone(base, form, [*CODES][i], catalogue, softmax) for i in items]
    for batch in (1, 4):
        found = Priors(stream, base, form, softmax, batch).of_ids(items, "here")
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found[0] == found[1]  # a and b share an ID
    assert len({*np.round(found, 4)}) == 5


def test_the_prior_depends_on_the_catalogue_it_is_asked_for(stream: Stream, base: Base) -> None:
    form = form_of(base, "packed")
    priors = Priors(stream, base, form, "trie", 8)
    assert priors.of_ids(np.array([4]), "here").tolist() == [0.0]  # it has no rival
    pair = [alone(base, form, item, ["c", "d"], "trie") for item in "cd"]
    np.testing.assert_allclose(priors.of_ids(np.array([2, 3]), "here"), pair, atol=1e-5)


@pytest.mark.parametrize("at_once", [2, 64])
def test_the_prior_of_a_title_is_transformers_loss(
    stream: Stream, base: Base, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    found = Priors(stream, base, form_of(base, "packed"), "trie", 8).of_titles(2)
    for text, value in zip(TEXTS, found, strict=True):
        words = " ".join(text.replace("<a_0>", "").split())
        if not words:
            assert np.isnan(value)
            continue
        inside = f"  {words}" if "<a_0>" in text else f" {words}"  # the ID that is left out leaves its space
        ids = base.tokenizer.encode(inside, add_special_tokens=False)[:TITLE_TOKENS]
        tokens = torch.tensor([[base.bos(), *ids]])
        with torch.no_grad():
            loss = base.model(input_ids=tokens, labels=tokens).loss
        assert value == pytest.approx(-float(loss), abs=1e-5), text


def test_titles_are_the_same_to_the_last_bit_whatever_blocks_follow(stream: Stream, base: Base) -> None:
    form = form_of(base, "packed")
    both = Priors(stream, base, form, "trie", 8).of_titles(2)
    first = Priors(stream.prefix(1), base, form, "trie", 8).of_titles(1)
    np.testing.assert_array_equal(both[:5], first)
    assert len(both) == 7


def test_a_base_from_scratch_knows_no_title(stream: Stream, base: Base) -> None:
    model, tokenizer = new_model("tiny", base.sids, 0)
    own = replace(base, model=model, tokenizer=tokenizer)
    assert np.isnan(Priors(stream, own, form_of(own, "packed"), "trie", 8).of_titles(2)).all()
    assert title_prior(model, [], 0).shape == (0,)
