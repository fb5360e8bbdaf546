"""Packed rows against plain forward passes, and the trie's softmax against sums over the item list."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from cladapt.config import AdapterConfig
from cladapt.errors import DataError
from cladapt.model.adapter import adapted_lm, adapter_parameters, create_adapter
from cladapt.model.attention import block_mask
from cladapt.model.load import Base
from cladapt.model.packed import PackedLoss, TrieSoftmax
from cladapt.tokens.prompts import Document, PackedForm, PromptForm, Template, pack
from cladapt.tokens.sids import SidTable
from cladapt.tokens.tokenizer import make_tokenizer, sid_token_ids
from cladapt.tokens.trie import Trie

# the prefix (0, 0) branches, (0, 1) and (1,) have only children, (2, 2, 1) is two items'
CODES = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0], [2, 2, 1], [2, 2, 1], [2, 2, 2], [2, 1, 0]])
SIZES = (4, 3, 4)


def table(codes: np.ndarray = CODES, sizes: tuple[int, ...] = SIZES) -> SidTable:
    return SidTable(tuple(f"i{k}" for k in range(len(codes))), codes, sizes)


def make_base(sids: SidTable) -> Base:
    tokenizer = make_tokenizer(sids)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config._attn_implementation = "sdpa"
        config.initializer_range = 0.3  # far from uniform
        lm = LlamaForCausalLM(config).eval()
    return Base(lm.requires_grad_(False), tokenizer, sids, {})


def make_softmax(base: Base, catalogue: np.ndarray | None = None) -> TrieSoftmax:
    ids = torch.from_numpy(sid_token_ids(base.tokenizer, base.sids))
    levels = [ids[a:b] for a, b in pairwise(base.sids.offsets.tolist())]
    codes = base.sids.codes if catalogue is None else catalogue
    return TrieSoftmax(Trie.build(codes), levels, len(base.tokenizer), torch.device("cpu"))


def document(base: Base, items: list[int], first_target: int = 0) -> Document:
    tokens = base.item_tokens()[items].numpy().ravel()
    loss = np.arange(1 + len(tokens)) > first_target * base.sids.levels
    return Document(np.r_[base.bos(), tokens], loss)


def rows_of(documents: list[Document], size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = pack(documents, size, None)
    return tuple(torch.from_numpy(a) for a in (rows.tokens, rows.document, rows.position, rows.loss))  # type: ignore[return-value]


def log_likelihood(base: Base, prompt: np.ndarray, item: int, catalogue: np.ndarray) -> float:
    """Of an item after a prompt, level by level among the codes of the catalogue's items with the same prefix."""
    ids = sid_token_ids(base.tokenizer, base.sids)
    tokens = np.r_[prompt, base.item_tokens()[item].numpy()]
    with torch.no_grad():
        logits = base.model(torch.from_numpy(tokens)[None]).logits[0, len(prompt) - 1 : -1].double()
    total, code = 0.0, base.sids.codes[item]
    for level in range(base.sids.levels):
        alike = catalogue[(catalogue[:, :level] == code[:level]).all(axis=1)]
        siblings = np.unique(alike[:, level])
        among = logits[level, ids[base.sids.offsets[level] + siblings]].log_softmax(0)
        total += among[siblings.tolist().index(code[level])].item()
    return total


def test_a_document_is_blind_to_its_neighbours() -> None:
    base = make_base(table())
    loss = PackedLoss(base.model, make_softmax(base))
    first, second = document(base, [0, 4, 7]), document(base, [6, 1, 2])
    other = document(base, [3, 1, 5])
    tokens, numbers, position, marked = rows_of([first, second], 20)
    assert numbers.max() == 2
    of_second = marked & (numbers == 2)
    plain = loss(tokens, numbers, position, of_second)
    changed = tokens.clone()
    changed[numbers == 1] = torch.from_numpy(other.tokens)
    torch.testing.assert_close(loss(changed, numbers, position, of_second), plain, rtol=0, atol=1e-6)
    alone = rows_of([second], 20)
    torch.testing.assert_close(loss(*alone), plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("row_tokens", [13, 26, 64])
def test_packed_losses_equal_plain_passes_over_each_document(row_tokens: int) -> None:
    base = make_base(table())
    rng = np.random.default_rng(0)
    documents = [document(base, rng.integers(8, size=n).tolist(), first_target=n // 3) for n in (1, 4, 2, 3, 4)]
    total = torch.zeros(())
    for d in documents:
        tokens = torch.from_numpy(d.tokens)[None]
        with torch.no_grad():
            logits = base.model(tokens).logits
        total += F.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none")[torch.from_numpy(d.loss[1:])].sum()
    losses = PackedLoss(base.model)(*rows_of(documents, row_tokens))
    assert losses.dtype == torch.float32
    assert len(losses) == sum(d.loss.sum() for d in documents)
    torch.testing.assert_close(losses.sum(), total, rtol=1e-5, atol=0)


def test_the_vocabulary_softmax_is_the_models_own_loss() -> None:
    base = make_base(table())
    d = document(base, [0, 4, 7, 2], first_target=2)
    tokens = torch.from_numpy(d.tokens)[None]
    labels = torch.where(torch.from_numpy(d.loss), tokens, -100)
    with torch.no_grad():
        own = base.model(tokens, labels=labels).loss
    torch.testing.assert_close(PackedLoss(base.model)(*rows_of([d], len(d.tokens))).mean(), own)


def test_nodes_are_the_prefixes_of_the_catalogue() -> None:
    base = make_base(table())
    softmax = make_softmax(base)
    codes = base.sids.codes
    # a reference numbering: the root, then level by level the distinct prefixes in ascending order
    prefixes = [(), *(tuple(p) for level in (1, 2, 3) for p in np.unique(codes[:, :level], axis=0).tolist())]
    tokens = torch.from_numpy(np.stack([document(base, [i, j]).tokens for i in range(8) for j in range(8)]))
    node = softmax.nodes(tokens)
    assert (node[:, 0] == -1).all()  # bos
    for row, (i, j) in enumerate((i, j) for i in range(8) for j in range(8)):
        expected = [prefixes.index(tuple(codes[item, :level].tolist())) for item in (i, j) for level in range(3)]
        assert node[row, 1:].tolist() == expected


@pytest.mark.parametrize("seed", range(4))
def test_log_probabilities_over_the_catalogue_sum_to_one_and_match_the_item_list(seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = np.unique(rng.integers((3, 2, 4), size=(9, 3)), axis=0)
    base = make_base(table(codes, (3, 2, 4)))
    softmax = make_softmax(base)
    n = len(codes)
    tokens = base.item_tokens()
    prefixes = {tuple(c[:level]) for c in codes.tolist() for level in range(3)}
    after = {p: torch.from_numpy(rng.normal(size=len(base.tokenizer)) * 3).float() for p in sorted(prefixes)}
    logits = torch.stack([torch.stack([after[tuple(c[:level])] for level in range(3)]) for c in codes.tolist()])
    log_prob = softmax.log_prob(
        logits.flatten(0, 1)[:, softmax.rows], softmax.nodes(tokens).flatten(), tokens.flatten()
    ).view(n, 3)
    assert log_prob.sum(dim=1).double().exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    for i in range(n):
        for level in range(3):
            alike = codes[(codes[:, :level] == codes[i, :level]).all(axis=1)]
            siblings = {int(t[level]) for t, c in zip(tokens, codes, strict=True) if c.tolist() in alike.tolist()}
            denominator = sum(math.exp(logits[i, level, t].item()) for t in siblings)
            expected = logits[i, level, tokens[i, level]].item() - math.log(denominator)
            assert log_prob[i, level].item() == pytest.approx(expected, abs=1e-5)
            if len(siblings) == 1:
                assert log_prob[i, level].item() == 0.0


@pytest.mark.parametrize("levels", [(0, 1, 2), (1,)])
def test_choices_are_the_logits_of_all_siblings_and_their_softmax_is_the_log_probability(levels: tuple[int]) -> None:
    base = make_base(table())
    softmax = make_softmax(base)
    tokens = base.item_tokens()
    node, token = (t[:, levels].flatten() for t in (softmax.nodes(tokens), tokens))
    # columns of all ID tokens, or of the one level that all tokens are of
    columns = softmax.rows if len(levels) > 1 else softmax.tokens[levels[0]]
    logits = torch.randn(len(token), len(columns), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, children, row = softmax.choices(logits, node, token)
    assert torch.equal(found, softmax.log_prob(logits, node, token))
    assert row.tolist() == sorted(row.tolist())
    for i, (item, level) in enumerate((item, level) for item in range(len(CODES)) for level in levels):
        alike = tokens[[(CODES[j, :level] == CODES[item, :level]).all() for j in range(len(CODES))], level]
        place = [columns.tolist().index(t) for t in sorted(set(alike.tolist()))]
        assert torch.equal(children[row == i], logits[i, place].float())
        own = place.index(columns.tolist().index(int(token[i])))
        torch.testing.assert_close(children[row == i].log_softmax(0)[own], found[i])


def test_the_trie_loss_of_a_model_is_minus_the_log_likelihood_among_items() -> None:
    base = make_base(table())
    catalogue = CODES[[0, 1, 2, 3, 4, 6]]
    loss = PackedLoss(base.model, make_softmax(base, catalogue))
    for items in ([2, 4], [5, 0], [7, 1, 6]):  # 7 is outside the catalogue, but only seen, not predicted
        d = document(base, items, first_target=len(items) - 1)
        expected = log_likelihood(base, document(base, items[:-1]).tokens, items[-1], catalogue)
        assert loss(*rows_of([d], 16)).sum().item() == pytest.approx(-expected, abs=1e-5)


def test_an_only_child_costs_nothing_and_is_left_out() -> None:
    base = make_base(table())
    loss = PackedLoss(base.model, make_softmax(base))
    assert len(loss(*rows_of([document(base, [0])], 4))) == 3
    assert len(loss(*rows_of([document(base, [2])], 4))) == 2  # (0, 1) has one item
    assert len(loss(*rows_of([document(base, [3])], 4))) == 1  # (1,) leads to one item
    single = PackedLoss(base.model, make_softmax(base, CODES[:1]))
    assert len(single(*rows_of([document(base, [0, 0])], 7))) == 0


@pytest.mark.parametrize(
    ("catalogue", "target"),
    [
        (CODES[:3], 3),  # its first code is unknown
        (CODES[[0, 1, 6]], 7),  # known first code, unknown second
        (CODES[[0, 2, 3, 7]], 1),  # known prefix (0, 0) with the only child 0, but its own last code is 1
        (CODES[[0, 1, 4]], 6),  # the same, elsewhere
        (np.array([[2, 2, 0], [2, 2, 3]]), 4),  # known prefix with several children, its own not among them
    ],
)
def test_a_target_outside_the_catalogue_is_a_data_error(catalogue: np.ndarray, target: int) -> None:
    base = make_base(table())
    loss = PackedLoss(base.model, make_softmax(base, catalogue))
    with pytest.raises(DataError, match="a target's semantic ID is not in the catalogue") as caught:
        loss(*rows_of([document(base, [0, target], first_target=1)], 8))
    assert caught.value.hint == "use a catalogue that holds every target"


def test_padding_rows_and_empty_targets_stay_finite() -> None:
    base = make_base(table())
    tokens, numbers, position, marked = rows_of([document(base, [0, 4])], 12)
    tokens, numbers, position, marked = (
        torch.cat([t, torch.zeros_like(t)]) for t in (tokens, numbers, position, marked)
    )
    for softmax in (None, make_softmax(base)):
        loss = PackedLoss(base.model, softmax)
        assert loss(tokens, numbers, position, marked).isfinite().all()
        assert loss(tokens, numbers, position, torch.zeros_like(marked)).shape == (0,)


def test_the_mark_on_a_first_token_counts_for_nothing() -> None:
    base = make_base(table())
    tokens, numbers, position, marked = rows_of([document(base, [0, 4])], 7)
    plain = PackedLoss(base.model)(tokens, numbers, position, marked)
    marked[:, 0] = True
    assert torch.equal(PackedLoss(base.model)(tokens, numbers, position, marked), plain)
    assert marked[:, 0].all()  # the caller's tensor is left alone


@pytest.mark.parametrize("trie", [True, False])
def test_every_trainable_tensor_gets_a_gradient(trie: bool) -> None:
    base = make_base(table())
    model = create_adapter(base, AdapterConfig(rank=2, dropout=0.0), seed=0)
    parameters = adapter_parameters(model)
    with torch.no_grad():
        for p in parameters.values():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    loss = PackedLoss(adapted_lm(model), make_softmax(base) if trie else None)
    loss(*rows_of([document(base, [0, 4, 6, 1])], 16)).mean().backward()
    assert parameters
    for name, p in parameters.items():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_the_gradient_is_that_of_the_plain_model() -> None:
    base = make_base(table())
    lm = base.model.double().requires_grad_(True)
    d = document(base, [0, 4, 7, 2], first_target=1)
    tokens = torch.from_numpy(d.tokens)[None]
    lm(tokens, labels=torch.where(torch.from_numpy(d.loss), tokens, -100)).loss.backward()
    plain = {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}
    lm.zero_grad()
    PackedLoss(lm)(*rows_of([d, document(base, [1])], 20))[: d.loss.sum()].mean().backward()
    assert plain.keys() == {name for name, _ in lm.named_parameters()}
    for name, p in lm.named_parameters():
        # the loss is in float32 by contract, the rest here in float64
        torch.testing.assert_close(p.grad, plain[name], rtol=1e-4, atol=1e-7)


def test_one_packed_pass_gives_every_target_the_loss_of_its_own_prompt() -> None:
    base = make_base(table())
    form = PackedForm(base.item_tokens().numpy(), base.bos(), window=8, row_tokens=40)
    items = np.array([0, 4, 6, 1, 2, 7])
    loss = PackedLoss(base.model, make_softmax(base))
    separately = [log_likelihood(base, form.prompt(items[:k]), items[k], CODES) for k in range(len(items))]
    (packed,) = form.documents(items, 0)
    assert loss(*rows_of([packed], 40)).sum().item() == pytest.approx(-sum(separately), abs=1e-4)
    (tail,) = form.documents(items, 4)
    assert loss(*rows_of([tail], 40)).sum().item() == pytest.approx(-sum(separately[4:]), abs=1e-4)


def test_a_worded_prompt_and_its_document_mean_the_same() -> None:
    base = make_base(table())
    items = np.array([0, 4, 6, 1, 2])
    for row_tokens in (20, 60):
        form = worded(base, row_tokens)
        separately = [log_likelihood(base, form.prompt(items[:k]), items[k], CODES) for k in range(len(items))]
        for documents in (form.examples(items, 0), form.documents(items, 0)):
            rows = rows_of(documents, row_tokens)
            total = PackedLoss(base.model, make_softmax(base))(*rows).sum().item()
            assert total == pytest.approx(-sum(separately), abs=1e-4)


def test_prompts_that_share_prefixes_give_the_losses_and_gradients_of_whole_ones() -> None:
    base = make_base(table())
    form = worded(base, 90)
    users = [np.array([0, 4, 6, 1, 2, 7]), np.array([3, 5, 0])]  # the first one's window of 3 items moves on
    model, lm = adapted(base, head=True)
    model.eval()
    found = []
    for read in (form.examples, form.documents):
        documents = [d for items in users for d in read(items, 1)]
        rows = rows_of(documents, 90)
        model.zero_grad()
        losses = PackedLoss(lm, make_softmax(base))(*rows)
        losses.sum().backward()
        size = int((rows[1] > 0).sum())
        found.append(({"losses": losses.detach().sort()[0], **gradients(model)}, len(documents), size))
    (whole, many, long), (shared, few, short) = found
    assert (many, few) == (7, 2)
    assert short < 0.8 * long
    assert len(whole["losses"]) > 10
    for name, tensor in whole.items():
        torch.testing.assert_close(shared[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def worded(base: Base, row_tokens: int) -> PromptForm:
    template = Template("a {items} b", "c", ", ")
    return PromptForm(base.item_tokens().numpy(), base.tokenizer, window=3, row_tokens=row_tokens, template=template)


def adapted(base: Base, head: bool) -> tuple[torch.nn.Module, PreTrainedModel]:
    """An adapter on a base with a head of its own, away from B = 0."""
    lm = base.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm.lm_head = torch.nn.Linear(16, len(base.tokenizer), bias=False).requires_grad_(False)
    targets = ("q_proj", "lm_head") if head else ("q_proj",)
    model = create_adapter(base, AdapterConfig(rank=2, dropout=0.2, targets=targets), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter_parameters(model).values():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model, adapted_lm(model)


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_loss_over_id_rows_is_that_over_masked_logits_of_the_whole_head(head: bool, training: bool) -> None:
    base = make_base(table())
    softmax = make_softmax(base)
    rows = rows_of([document(base, [0, 4, 7, 2, 6], 1), document(base, [5, 1])], 24)

    def masked(lm: PreTrainedModel) -> Tensor:
        tokens, _, position, marked = rows
        hidden = lm.model(
            input_ids=tokens, attention_mask=block_mask(position, torch.float32), position_ids=position, use_cache=False
        ).last_hidden_state
        node = softmax.nodes(tokens)
        marked = marked & (softmax.degree[node.clamp_min(0)] > 1)
        logits = lm.get_output_embeddings()(hidden[:, :-1][marked[:, 1:]])
        mask = torch.full_like(logits, -torch.inf)
        for row, (n, token) in enumerate(zip(node[marked].tolist(), tokens[marked].tolist(), strict=True)):
            _, code, _ = softmax.trie.children(torch.tensor([n]))
            mask[row, softmax.tokens[int(softmax.level[token])][code]] = 0.0
        return F.cross_entropy(logits + mask, tokens[marked], reduction="none")

    model, lm = adapted(base, head)
    model.train(training)
    found = []
    for losses in (lambda: PackedLoss(lm, softmax)(*rows), lambda: masked(lm)):
        model.zero_grad()
        torch.manual_seed(3)
        value = losses()
        value.sum().backward()
        found.append({"loss": value.detach(), **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}})
    assert len(found[0]["loss"]) > 10
    for name, tensor in found[1].items():
        torch.testing.assert_close(
            found[0][name], tensor, rtol=1e-3, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_text_is_scored_over_the_vocabulary_between_ids_scored_in_the_trie() -> None:
    base = make_base(table())
    form = PromptForm(
        base.item_tokens().numpy(), base.tokenizer, window=3, row_tokens=40, template=Template("a {items} b", "c", ", ")
    )
    (prompt, *_) = form.documents(np.array([0, 4, 6, 1]), 3)
    softmax = make_softmax(base)
    rows = rows_of([Document(prompt.tokens, np.arange(len(prompt.tokens)) > 1), document(base, [2, 4])], 60)
    tokens, numbers, position, marked = rows
    of_text = marked & (softmax.level[tokens] < 0)
    assert 2 < of_text.sum() < marked.sum() - 4
    loss = PackedLoss(base.model, softmax)
    mixed = loss(*rows)
    branches = marked & (of_text | (softmax.degree[softmax.nodes(tokens).clamp_min(0)] > 1))
    expected = torch.zeros(tokens.shape)
    expected[branches & ~of_text] = loss(tokens, numbers, position, marked & ~of_text)
    expected[of_text] = PackedLoss(base.model)(tokens, numbers, position, of_text)
    torch.testing.assert_close(mixed, expected[branches], rtol=1e-5, atol=1e-6)
    # a text alone, and an ID that the catalogue lacks beside a text
    torch.testing.assert_close(loss(tokens, numbers, position, of_text), expected[of_text], rtol=1e-5, atol=1e-6)
    with pytest.raises(DataError, match="not in the catalogue"):
        PackedLoss(base.model, make_softmax(base, CODES[:3]))(*rows)


def test_no_logits_outside_the_ids_are_computed_unless_text_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(table())
    softmax = make_softmax(base)
    products = []
    multiply = F.linear

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        products.append((x.numel() // x.shape[-1], len(weight)))
        return multiply(x, weight, bias)

    monkeypatch.setattr(F, "linear", watched)
    tokens, numbers, position, marked = rows_of([document(base, [0, 4, 7])], 12)
    n = len(PackedLoss(base.model, softmax)(tokens, numbers, position, marked))
    assert products[-1] == (n, sum(SIZES))
    assert all(rows != len(base.tokenizer) for _, rows in products)


@pytest.mark.parametrize("columns", ["all levels", "one level"])
def test_log_probabilities_take_the_columns_of_all_levels_or_of_one(columns: str) -> None:
    base = make_base(table())
    softmax = make_softmax(base)
    tokens = base.item_tokens()
    node = softmax.nodes(tokens)
    logits = torch.randn(len(tokens), 3, len(base.tokenizer), generator=torch.Generator().manual_seed(0))
    whole = softmax.log_prob(logits.flatten(0, 1)[:, softmax.rows], node.flatten(), tokens.flatten()).view(-1, 3)
    for level in range(3):
        rows = softmax.rows if columns == "all levels" else softmax.tokens[level]
        found = softmax.log_prob(logits[:, level][:, rows], node[:, level], tokens[:, level])
        assert torch.equal(found, whole[:, level])


def test_huge_logits_do_not_overflow_and_bfloat16_is_summed_in_float32() -> None:
    base = make_base(table())
    softmax = make_softmax(base)
    tokens = base.item_tokens()[:3, :1]
    node = softmax.nodes(tokens).flatten()
    logits = torch.zeros(3, len(softmax.rows))
    logits[0, 0], logits[1, 1], logits[2, :3] = 1e4, -1e4, 300.0
    found = softmax.log_prob(logits.bfloat16(), node, tokens.flatten())
    assert found.dtype == torch.float32
    # codes 0, 1 and 2 follow the root; all three tokens are code 0
    torch.testing.assert_close(found, torch.tensor([0.0, -math.log(2), -math.log(3)]))
