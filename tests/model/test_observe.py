"""What goes into layers and comes out behind the head, against plain passes over each document or image alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cladapt.config import AdapterConfig, VitConfig
from cladapt.model.adapter import adapted_lm, adapter_parameters, create_adapter, lora_layers
from cladapt.model.checkpointing import set_checkpointing
from cladapt.model.load import Base, new_model, trie_softmax
from cladapt.model.observe import InputWatch, Observable, Outputs, outputs_of, values_of
from cladapt.model.packed import PackedLoss
from cladapt.model.vit import CLASSIFIER, ClassLoss, VisionBase, new_vit
from cladapt.tokens.prompts import Document, pack
from cladapt.tokens.sids import SidTable
from cladapt.tokens.trie import Trie

# the prefix (1,) leads to one item, so its second code has no alternative
CODES = np.array([[0, 0], [0, 1], [0, 2], [1, 0], [2, 0], [2, 1]])
SIDS = SidTable(tuple(f"i{k}" for k in range(len(CODES))), CODES, (3, 3))
ITEMS = [[0, 4, 3, 5], [3, 1], [2, 2, 0], [5]]
EARLIER = np.array([0, 2, 3])


class Learner:
    """A loss over a base whose adapter has left its start, and one batch for it."""

    loss: Any
    batch: tuple[Tensor, ...]
    watch: InputWatch

    def adapt(self, base: Any) -> None:
        self.model = create_adapter(base, AdapterConfig(rank=2, dropout=0.0), seed=0)
        self.parameters = adapter_parameters(self.model)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in self.parameters.values():
                p += 0.1 * torch.randn(p.shape, generator=generator)

    def seen(self, backward: bool = False) -> dict[str, Tensor]:
        """What one pass shows, each input once."""
        found: dict[str, Tensor] = {}

        def see(name: str, rows: Tensor) -> None:
            assert name not in found
            assert not rows.requires_grad
            found[name] = rows.clone()

        self.watch = InputWatch(self.loss, self.parameters)
        with self.watch.watching(see):
            losses = self.loss(*self.batch)
        if backward:
            losses.sum().backward()
        return found


class Recommender(Learner):
    """Packed rows with padding, one of them without a loss, and a mark on a token that is in no ID."""

    def __init__(self, trie: bool = True) -> None:
        lm, tokenizer = new_model("tiny", SIDS, seed=0)
        self.base = Base(lm.requires_grad_(False), tokenizer, SIDS, {})
        self.adapt(self.base)
        softmax = trie_softmax(self.base, Trie.build(CODES)) if trie else None
        self.loss = PackedLoss(adapted_lm(self.model), softmax).eval()
        tokens = self.base.item_tokens().numpy()
        documents = []
        for items in ITEMS:
            ids = np.r_[self.base.bos(), tokens[items].ravel(), tokenizer.eos_token_id]
            documents.append(Document(ids, np.arange(len(ids)) > 2 * (len(items) > 2)))
        rows = pack(documents, 13, None)
        arrays = (rows.tokens, rows.document, rows.position, rows.loss)
        self.batch = tuple(torch.cat([t, t[:1]]) for t in map(torch.from_numpy, arrays))
        self.batch[-1][-1] = False

    def documents(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens and marks of every document that has a mark, in the order of the rows."""
        for tokens, number, _, marked in zip(*self.batch, strict=True):
            for k in range(1, int(number.max()) + 1):
                if marked[number == k].any():
                    yield tokens[number == k], marked[number == k]

    def plain(self) -> Iterator[tuple[Tensor, ...]]:
        """A pass over each document alone."""
        for tokens, _ in self.documents():
            yield (self.loss.lm(tokens[None], output_hidden_states=True),)

    def siblings(self, tokens: Tensor, at: int) -> list[int] | None:
        """The tokens that an item of the catalogue has in place of the one `at` a place; None for one of no ID."""
        vocabulary = self.base.item_tokens()
        level = next((level for level in (0, 1) if tokens[at] in vocabulary[:, level]), None)
        if level is None:
            return None
        alike = vocabulary if level == 0 else vocabulary[vocabulary[:, 0] == tokens[at - 1]]
        return sorted(set(alike[:, level].tolist()))


class Classifier(Learner):
    """Images of which one does not count."""

    def __init__(self) -> None:
        model = new_vit(VitConfig(hidden=32, layers=2, patch=2), 8, 1, 6)
        generator = torch.Generator().manual_seed(2)
        nn.init.normal_(model.get_submodule(CLASSIFIER).weight, generator=generator)  # type: ignore[arg-type]
        self.adapt(VisionBase(model.requires_grad_(False), {"classes": ""}))
        self.loss = ClassLoss(adapted_lm(self.model), np.array([1, 4, 5]), EARLIER).eval()
        pixels = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        self.batch = (pixels, torch.tensor([1, 4, 1, 4, 5]), torch.tensor([True, True, False, True, True]))

    def plain(self) -> Iterator[tuple[Tensor, ...]]:
        """A pass over each image alone."""
        pixels, _, counted = self.batch
        for image in pixels[counted]:
            yield (self.loss.model(pixel_values=image[None]),)


def brute_force(learner: Recommender | Classifier) -> dict[str, Tensor]:
    """Gram of what goes into every adapted linear, over tokens and passes one at a time, in float64; by module."""
    grams: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def before(_: nn.Module, given: tuple[Tensor]) -> None:
            for x in given[0].flatten(0, -2).double():
                grams[name] = grams.get(name, torch.zeros(())) + torch.outer(x, x)

        return before

    layers = lora_layers(learner.model)
    handles = [layer.base_layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    with torch.no_grad():
        for _ in learner.plain():
            pass
    for handle in handles:
        handle.remove()
    return grams


def last_names(inputs: dict[str, str], layer: int) -> dict[str, str]:
    """The inputs of the layers of one block, by the ends of their names."""
    return {a.rpartition(".")[2]: b.rpartition(".")[2] for a, b in inputs.items() if f".{layer}." in a}


def test_layers_that_are_given_one_tensor_have_one_input() -> None:
    llama, vit = Recommender(), Classifier()
    for learner in (llama, vit):
        learner.seen()
        assert learner.watch.inputs.keys() == lora_layers(learner.model).keys()
    shared = {"q_proj": "q_proj", "k_proj": "q_proj", "v_proj": "q_proj", "o_proj": "o_proj"}
    for layer in (0, 1):
        mlp = {"gate_proj": "gate_proj", "up_proj": "gate_proj", "down_proj": "down_proj"}
        assert last_names(llama.watch.inputs, layer) == shared | mlp
        assert last_names(vit.watch.inputs, layer) == shared | {"fc1": "fc1", "fc2": "fc2"}
    head = "base_model.model.lm_head"
    assert llama.watch.inputs[head] == head


@contextmanager
def runs_of(module: nn.Module) -> Iterator[list[int]]:
    """Counts the runs of a module inside."""
    count = [0]
    handle = module.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    yield count
    handle.remove()


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("kind", [Recommender, lambda: Recommender(trie=False), Classifier])
def test_what_is_seen_is_what_plain_passes_see_also_where_layers_are_computed_again(kind: Any, again: bool) -> None:
    learner = kind()
    learner.loss.train()
    set_checkpointing(learner.loss, again)
    some = next(iter(lora_layers(learner.model).values()))
    with runs_of(some) as runs:
        found = learner.seen(backward=True)
    assert runs == [1 + again]
    assert all(p.grad is not None for p in learner.parameters.values())
    learner.loss.eval()
    expected = brute_force(learner)
    head = "base_model.model.lm_head"
    for module, name in learner.watch.inputs.items():
        rows = found[name].double()
        if module != head:
            torch.testing.assert_close(rows.mT @ rows, expected[module], rtol=1e-4, atol=1e-4)
    assert {*found} == {*learner.watch.inputs.values()}


def test_rows_that_count_nothing_are_zero() -> None:
    llama, vit = Recommender(), Classifier()
    tokens, document, _, marked = llama.batch
    counts = (document > 0) & marked.any(1, keepdim=True)
    assert 0 < int(counts.sum()) < int((document > 0).sum()) < tokens.numel()
    for name, rows in llama.seen().items():
        if not name.endswith("lm_head"):
            assert torch.equal(rows.abs().sum(1) > 0, counts.flatten()), name
    for name, rows in vit.seen().items():
        assert torch.equal(rows.abs().sum(1) > 0, vit.batch[2].repeat_interleave(len(rows) // 5)), name


def test_the_head_sees_the_hidden_rows_before_the_losses_and_is_not_run_for_the_whole_vocabulary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learner = Recommender()
    expected = torch.cat([hidden for _, hidden, _, _ in plain_losses(learner)])
    called, call = [], nn.Module.__call__

    def spy(self: nn.Module, *given: Any, **named: Any) -> Any:
        called.append((self, given[0].shape[0] if given and isinstance(given[0], Tensor) else 0))
        return call(self, *given, **named)

    monkeypatch.setattr(nn.Module, "__call__", spy)
    found = learner.seen()["base_model.model.lm_head"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    tokens, _, _, marked = learner.batch
    eos = int((tokens[marked] == learner.base.tokenizer.eos_token_id).sum())
    head = learner.loss.head
    # whole for the tokens that are in no ID, as without anybody who looks
    assert [rows for module, rows in called if module is head] == [eos]
    assert eos < len(found)


def plain_losses(learner: Recommender) -> Iterator[tuple[int, Tensor, Tensor | None, int | None]]:
    """Of every loss: the token, the row [1, d] before it, the logits of its alternatives, the place of its own there.

    The last two are None for a token of no ID; what has no alternative has no loss.
    """
    with torch.no_grad():
        for (tokens, marked), (out,) in zip(learner.documents(), learner.plain(), strict=True):
            for at in marked.nonzero()[:, 0].tolist():
                if at == 0:
                    continue
                siblings, token = learner.siblings(tokens, at), int(tokens[at])
                row = out.hidden_states[-1][0, at - 1 : at]
                if siblings is None:
                    yield token, row, None, None
                elif len(siblings) > 1:
                    yield token, row, out.logits[0, at - 1, siblings], siblings.index(token)


def test_outputs_of_recommendations_are_those_of_plain_passes() -> None:
    learner = Recommender()
    losses = list(plain_losses(learner))
    found = outputs_of(learner.loss, *learner.batch)
    torch.testing.assert_close(found.hidden, torch.cat([row for _, row, _, _ in losses]), rtol=1e-4, atol=1e-5)
    firsts = learner.base.item_tokens()[:, 0].tolist()
    of_class = [(row, CODES[firsts.index(token), 0]) for token, row, _, _ in losses if token in firsts]
    torch.testing.assert_close(found.features, torch.cat([row for row, _ in of_class]), rtol=1e-4, atol=1e-5)
    assert found.label.tolist() == [code for _, code in of_class]
    assert found.classes == 3
    choices = [(logits, own) for _, _, logits, own in losses if logits is not None]
    torch.testing.assert_close(found.scores, torch.cat([each for each, _ in choices]), rtol=1e-4, atol=1e-5)
    assert found.choice.tolist() == [i for i, (each, _) in enumerate(choices) for _ in each]
    # a softmax over each choice is what the losses of IDs are made of
    with torch.no_grad():
        of_ids = learner.loss(*learner.batch)[[logits is not None for _, _, logits, _ in losses]]
    own = [found.scores[found.choice == i].log_softmax(0)[place] for i, (_, place) in enumerate(choices)]
    torch.testing.assert_close(-of_ids, torch.stack(own))


def test_without_a_trie_there_are_neither_classes_nor_choices() -> None:
    learner = Recommender(trie=False)
    found = outputs_of(learner.loss, *learner.batch)
    assert len(found.hidden) == int(learner.batch[-1][:, 1:].sum())
    for empty in (found.features, found.label, found.scores, found.choice):
        assert len(empty) == 0
    assert found.classes == 0


def test_outputs_of_images_are_their_features_labels_and_the_logits_of_earlier_classes() -> None:
    learner = Classifier()
    found = outputs_of(learner.loss, *learner.batch)
    pixels, label, counted = learner.batch
    with torch.no_grad():
        hidden = learner.loss.model.base_model(pixel_values=pixels[counted]).last_hidden_state[:, 0]
        logits = torch.cat([out.logits for (out,) in learner.plain()])
    torch.testing.assert_close(found.features, hidden, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.hidden, found.features)
    assert torch.equal(found.label, label[counted])
    torch.testing.assert_close(found.scores.view(4, 3), logits[:, EARLIER], rtol=1e-4, atol=1e-5)
    assert found.choice.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert found.classes == 6


def test_the_first_block_of_images_has_no_choices() -> None:
    learner = Classifier()
    learner.loss = ClassLoss(learner.loss.model, np.array([1, 4, 5]))
    found = outputs_of(learner.loss, *learner.batch)
    assert found.scores.shape == found.choice.shape == (0,)
    assert len(found.features) == 4


@pytest.mark.parametrize("kind", [Recommender, Classifier])
def test_gradients_go_through_the_outputs(kind: Any) -> None:
    learner = kind()
    learner.loss.observed = True
    learner.loss(*learner.batch)
    found = learner.loss.outputs
    (found.features.sum() + found.scores.sum()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in learner.parameters.values())


@pytest.mark.parametrize("kind", [Recommender, Classifier])
def test_nobody_looks_afterwards_also_after_a_failure(kind: Any) -> None:
    learner = kind()

    def fails(name: str, rows: Tensor) -> None:
        raise KeyboardInterrupt

    learner.seen()
    with pytest.raises(KeyboardInterrupt), InputWatch(learner.loss, learner.parameters).watching(fails):
        learner.loss(*learner.batch)
    assert not learner.loss.observed
    assert not any(module._forward_pre_hooks for module in learner.loss.modules())
    learner.loss.outputs = None
    learner.loss(*learner.batch)
    assert learner.loss.outputs is None


@pytest.mark.parametrize("kind", [Recommender, Classifier])
def test_a_graph_made_before_other_values_gives_the_gradient_at_its_own(kind: Any) -> None:
    learner, twin = kind(), kind()
    twin.loss(*twin.batch).sum().backward()
    losses = learner.loss(*learner.batch)
    values = {name: torch.full_like(p, 0.3) for name, p in learner.parameters.items()}
    held = {name: p.data for name, p in learner.parameters.items()}
    with values_of(learner.parameters, values):
        assert all(torch.equal(p, values[name]) for name, p in learner.parameters.items())
        other = learner.loss(*learner.batch)
    assert all(p.data.data_ptr() == held[name].data_ptr() for name, p in learner.parameters.items())
    assert (other - losses).abs().max() > 1e-3
    losses.sum().backward()
    for name, p in learner.parameters.items():
        assert torch.equal(p.grad, twin.parameters[name].grad), name
    with pytest.raises(ValueError, match="inside"), values_of(learner.parameters, values):
        raise ValueError("inside")
    assert all(p.data.data_ptr() == held[name].data_ptr() for name, p in learner.parameters.items())


def test_a_pass_for_outputs_has_no_dropout_and_leaves_every_modules_mode() -> None:
    learner = Recommender()
    expected = outputs_of(learner.loss, *learner.batch)
    learner.loss.train()
    for layer in lora_layers(learner.model).values():
        layer.lora_dropout["default"] = nn.Dropout(0.5)
    still = next(iter(lora_layers(learner.model).values()))
    still.eval()
    modes = {name: module.training for name, module in learner.loss.named_modules()}
    found = outputs_of(learner.loss, *learner.batch)
    assert torch.equal(found.scores, expected.scores)
    assert not found.hidden.requires_grad
    assert {name: module.training for name, module in learner.loss.named_modules()} == modes
    assert not learner.loss.observed


def test_a_loss_that_keeps_nothing_is_told() -> None:
    class Forgetful(Observable):
        def forward(self, x: Tensor) -> Tensor:
            return x

    loss = Forgetful()
    assert loss.head is None
    with pytest.raises(RuntimeError, match="Forgetful kept no outputs"):
        outputs_of(loss, torch.ones(1))
    assert not loss.observed


def test_outputs_are_kept_for_who_asks_alone() -> None:
    learner = Recommender()
    learner.loss(*learner.batch)
    assert learner.loss.outputs is None
    learner.loss.observed = True
    learner.loss(*learner.batch)
    assert isinstance(learner.loss.outputs, Outputs)
