"""The decoder against plain forward passes, a beam search that recomputes everything, and transformers' `generate`."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from cladapt.errors import ConfigError, DataError
from cladapt.eval.decode import Decoder, ScoresNotFinite, TreeMask, left_pad
from cladapt.model.packed import Softmax, TrieSoftmax
from cladapt.tokens.trie import Trie

KINDS = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
SOFTMAXES: tuple[Softmax, ...] = ("trie", "vocabulary")
SPECIALS = 3
Path = tuple[int, ...]


def make_lm(kind: str, vocabulary: int, seed: int = 0) -> PreTrainedModel:
    config_class, model_class = KINDS[kind]
    config = config_class(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.3,  # logits far enough apart for an order that rounding cannot change
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config).eval()


class Case:
    """A random model and a catalogue; a code's token id says nothing about its order."""

    def __init__(self, codes: np.ndarray, sizes: Sequence[int], kind: str = "llama", seed: int = 0) -> None:
        ids = torch.from_numpy(np.random.default_rng(seed).permutation(sum(sizes)) + SPECIALS)
        self.levels = list(ids.split(list(sizes)))
        self.lm = make_lm(kind, SPECIALS + sum(sizes), seed)
        self.codes = TrieSoftmax(Trie.build(codes), self.levels, SPECIALS + sum(sizes), torch.device("cpu"))
        #: token ids of every leaf, in leaf order
        self.leaves = [self.tokens(row) for row in np.unique(codes, axis=0)]

    def tokens(self, codes: Sequence[int]) -> Path:
        return tuple(int(self.levels[level][code]) for level, code in enumerate(codes))

    def below(self, prefix: Path) -> list[int]:
        """Leaves under a prefix."""
        return [i for i, leaf in enumerate(self.leaves) if leaf[: len(prefix)] == prefix]

    def children(self, prefix: Path) -> list[int]:
        return sorted({self.leaves[i][len(prefix)] for i in self.below(prefix)})

    @torch.no_grad()
    def next_log_p(self, prompt: np.ndarray, prefix: Path, softmax: Softmax) -> dict[int, float]:
        """Log-probability of each child, by one plain forward pass over the whole sequence."""
        logits = self.lm(input_ids=torch.tensor([[*prompt.tolist(), *prefix]])).logits[0, -1].double()
        allowed = self.children(prefix)
        logp = logits[allowed].log_softmax(0) if softmax == "trie" else logits.log_softmax(0)[allowed]
        return dict(zip(allowed, logp.tolist(), strict=True))

    def leaf_scores(self, prompt: np.ndarray, softmax: Softmax) -> np.ndarray:
        known: dict[Path, dict[int, float]] = {}
        scores = np.zeros(len(self.leaves))
        for i, leaf in enumerate(self.leaves):
            for level, token in enumerate(leaf):
                prefix = leaf[:level]
                if prefix not in known:
                    known[prefix] = self.next_log_p(prompt, prefix, softmax)
                scores[i] += known[prefix][token]
        return scores

    def beam_search(
        self, prompt: np.ndarray, beams: int, softmax: Softmax, seen: Sequence[int] = ()
    ) -> list[tuple[int, float]]:
        """(leaf, score), best first, keeping at each level the best prefixes that lead to an unseen leaf."""
        alive: list[tuple[float, Path]] = [(0.0, ())]
        for _ in range(len(self.levels)):
            grown = [
                (score + logp, (*prefix, token))
                for score, prefix in alive
                for token, logp in self.next_log_p(prompt, prefix, softmax).items()
                if not set(self.below((*prefix, token))) <= set(seen)
            ]
            alive = sorted(grown, reverse=True)[:beams]
        return [(self.leaves.index(path), score) for score, path in alive]

    def decoder(self, beams: int, softmax: Softmax = "trie") -> Decoder:
        return Decoder(self.lm, self.codes, beams, softmax)


def full_codes(*sizes: int) -> np.ndarray:
    return np.array(list(np.ndindex(*sizes)))


def random_codes(sizes: Sequence[int], count: int, seed: int = 0) -> np.ndarray:
    return full_codes(*sizes)[np.random.default_rng(seed).permutation(int(np.prod(sizes)))[:count]]


def prompts_of(case: Case, *lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.integers(1, case.lm.config.vocab_size, size=n) for n in lengths]


@pytest.mark.parametrize("softmax", SOFTMAXES)
@pytest.mark.parametrize("kind", KINDS)
def test_beams_as_wide_as_the_catalogue_rank_it_as_plain_forward_passes_do(kind: str, softmax: Softmax) -> None:
    case = Case(random_codes((3, 4, 3), 14), (3, 4, 3), kind)
    prompts = prompts_of(case, 1, 9, 4, 5)
    beams = case.decoder(14, softmax).decode(prompts)
    for row, prompt in enumerate(prompts):
        expected = case.leaf_scores(prompt, softmax)
        assert beams.leaf[row].tolist() == np.argsort(-expected).tolist()
        np.testing.assert_allclose(beams.score[row], np.sort(expected)[::-1], atol=1e-4)
    assert beams.target.isnan().all()


def test_trie_probabilities_of_all_leaves_sum_to_one_and_vocabulary_ones_do_not() -> None:
    case = Case(random_codes((3, 4, 3), 14), (3, 4, 3))
    prompts = prompts_of(case, 2, 6)
    torch.testing.assert_close(case.decoder(20, "trie").decode(prompts).score.exp().sum(1), torch.ones(2))
    assert (case.decoder(20, "vocabulary").decode(prompts).score.exp().sum(1) < 0.99).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_user_s_result_does_not_depend_on_the_rest_of_the_batch(kind: str) -> None:
    case = Case(random_codes((4, 4, 2), 20), (4, 4, 2), kind)
    prompts = prompts_of(case, 3, 12, 1, 7)
    targets = torch.tensor([case.leaves[i] for i in (0, 5, 9, 19)])
    seen = [np.array(s, dtype=np.int64) for s in ([1, 2], [], [0], [7, 19])]
    decoder = case.decoder(6)
    together = decoder.decode(prompts, targets, seen)
    for row in range(4):
        alone = decoder.decode([prompts[row]], targets[row : row + 1], [seen[row]])
        assert together.leaf[row].tolist() == alone.leaf[0].tolist()
        torch.testing.assert_close(together.score[row], alone.score[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(together.target[row], alone.target[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("softmax", SOFTMAXES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beams", [1, 3, 7])
def test_narrow_beams_equal_a_search_that_recomputes_everything(kind: str, softmax: Softmax, beams: int) -> None:
    case = Case(random_codes((5, 4, 3), 30), (5, 4, 3), kind, seed=1)
    prompts = prompts_of(case, 2, 8, 5)
    seen: list[list[int]] = [[], case.below(case.leaves[0][:1]), [3, 4, 5, 11, 29]]
    found = case.decoder(beams, softmax).decode(prompts, seen=[np.array(s, dtype=np.int64) for s in seen])
    for row, prompt in enumerate(prompts):
        expected = case.beam_search(prompt, beams, softmax, seen[row])
        assert found.leaf[row].tolist() == [leaf for leaf, _ in expected]
        np.testing.assert_allclose(found.score[row], [score for _, score in expected], atol=1e-4)


@settings(max_examples=12, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    beams=st.integers(1, 9),
    share=st.floats(0.1, 1.0),
    unseen=st.floats(0.0, 1.0),
    seed=st.integers(0, 99),
)
def test_any_shape_of_trie_and_history_equals_the_plain_search(
    sizes: list[int], beams: int, share: float, unseen: float, seed: int
) -> None:
    total = int(np.prod(sizes))
    case = Case(random_codes(sizes, max(1, int(share * total)), seed), sizes, seed=seed)
    seen = np.flatnonzero(np.random.default_rng(seed).random(len(case.leaves)) > unseen)
    (prompt,) = prompts_of(case, 3)
    found = case.decoder(beams).decode([prompt], seen=[seen])
    expected = case.beam_search(prompt, beams, "trie", seen.tolist())
    returned = [leaf for leaf in found.leaf[0].tolist() if leaf >= 0]
    assert returned == [leaf for leaf, _ in expected]
    assert len(returned) == min(beams, len(case.leaves) - len(seen))
    assert found.leaf.shape == found.score.shape == (1, beams)
    assert found.score[0, len(returned) :].eq(-torch.inf).all()


def allowed_after(case: Case, length: int) -> Callable[[int, Tensor], list[int]]:
    return lambda _, tokens: case.children(tuple(tokens[length:].tolist())) or [0]


@pytest.mark.parametrize("softmax", SOFTMAXES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_generate_whatever_the_checkpoint_s_generation_config_says(kind: str, softmax: Softmax) -> None:
    case = Case(random_codes((6, 4, 3), 40), (6, 4, 3), kind, seed=2)
    beams = 4
    for prompt in prompts_of(case, 6, 2):
        generated = GenerationMixin.generate(
            case.lm,
            torch.from_numpy(prompt)[None],
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            prefix_allowed_tokens_fn=allowed_after(case, len(prompt)),
            renormalize_logits=softmax == "trie",
            num_beams=beams,
            num_return_sequences=beams,
            max_new_tokens=3,
            length_penalty=0.0,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        case.lm.generation_config.update(do_sample=True, temperature=3.0, num_beams=2, repetition_penalty=5.0)
        found = case.decoder(beams, softmax).decode([prompt])
        sequences = [tuple(row) for row in generated.sequences[:, len(prompt) :].tolist()]
        assert [case.leaves[leaf] for leaf in found.leaf[0].tolist()] == sequences
        torch.testing.assert_close(found.score[0], generated.sequences_scores, atol=1e-4, rtol=0)
        case.lm.generation_config = type(case.lm.generation_config)()


@pytest.mark.parametrize("softmax", SOFTMAXES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_target_s_log_likelihood_is_that_of_teacher_forcing(kind: str, softmax: Softmax) -> None:
    case = Case(random_codes((3, 4, 3), 14), (3, 4, 3), kind, seed=3)
    prompts = prompts_of(case, 1, 6, 11)
    leaves = [13, 0, 6]
    targets = torch.tensor([case.leaves[i] for i in leaves])
    expected = [case.leaf_scores(prompt, softmax)[leaf] for prompt, leaf in zip(prompts, leaves, strict=True)]
    # neither narrow beams nor a history that holds the target change it
    found = case.decoder(1, softmax).decode(prompts, targets, [np.array([leaf]) for leaf in leaves])
    np.testing.assert_allclose(found.target, expected, atol=1e-4)
    assert not set(leaves) & set(found.leaf.flatten().tolist())


def test_beams_stay_full_where_pruning_at_the_leaves_alone_would_leave_holes() -> None:
    case = Case(full_codes(8, 3), (8, 3), seed=4)
    (prompt,) = prompts_of(case, 4)
    first = case.next_log_p(prompt, (), "trie")
    best = sorted(first, key=lambda token: -first[token])[:4]  # all that 4 beams would keep of level 1
    seen = np.array(sorted(leaf for token in best for leaf in case.below((token,))))
    found = case.decoder(4).decode([prompt], seen=[seen]).leaf[0].tolist()
    assert min(found) >= 0
    assert len(set(found)) == 4
    assert not set(found) & set(seen.tolist())


def test_a_user_who_has_seen_everything_gets_nothing() -> None:
    case = Case(full_codes(4, 2), (4, 2))
    found = case.decoder(3).decode(prompts_of(case, 2, 2), seen=[np.arange(8), np.arange(7)])
    assert found.leaf.tolist() == [[-1, -1, -1], [7, -1, -1]]
    assert found.score[0].eq(-torch.inf).all()
    assert found.score[1].isfinite().tolist() == [True, False, False]


def test_places_without_a_leaf_are_minus_one_with_no_probability() -> None:
    case = Case(np.array([[0, 1], [2, 0]]), (3, 2))
    found = case.decoder(5).decode(prompts_of(case, 3))
    assert sorted(found.leaf[0, :2].tolist()) == [0, 1]
    assert found.leaf[0, 2:].tolist() == [-1, -1, -1]
    assert found.score[0, 2:].eq(-torch.inf).all()


@pytest.mark.parametrize("softmax", SOFTMAXES)
def test_a_wide_level_above_a_narrow_one(softmax: Softmax) -> None:
    # the catalogue uses a high code of level 1 and fewer codes than there are beams: level 2 has only two
    case = Case(np.array([[0, 0, 2], [5, 1, 0], [7, 0, 1], [7, 1, 1]]), (8, 2, 3))
    (prompt,) = prompts_of(case, 3)
    expected = case.beam_search(prompt, 6, softmax)
    found = case.decoder(6, softmax).decode([prompt])
    assert found.leaf[0, :4].tolist() == [leaf for leaf, _ in expected]
    np.testing.assert_allclose(found.score[0, :4], [score for _, score in expected], atol=1e-4)


def test_one_level_needs_no_second_pass() -> None:
    case = Case(full_codes(5), (5,))
    (prompt,) = prompts_of(case, 3)
    found = case.decoder(5).decode([prompt], torch.tensor([case.leaves[2]]))
    expected = case.leaf_scores(prompt, "trie")
    assert found.leaf[0].tolist() == np.argsort(-expected).tolist()
    assert found.target.item() == pytest.approx(expected[2], abs=1e-4)


def test_decoding_leaves_the_model_and_the_random_state_alone() -> None:
    case = Case(full_codes(3, 2), (3, 2))
    weights = {name: p.clone() for name, p in case.lm.named_parameters()}
    state = torch.get_rng_state()
    case.decoder(2).decode(prompts_of(case, 3))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, weights[name]) for name, p in case.lm.named_parameters())


def test_a_target_outside_the_catalogue_is_an_error_among_its_siblings_but_has_a_vocabulary_score() -> None:
    case = Case(np.array([[0, 0], [1, 1]]), (2, 2))
    prompts, target = prompts_of(case, 2), torch.tensor([case.tokens((0, 1))])
    assert case.decoder(2, "vocabulary").decode(prompts, target).target.isfinite().all()
    outside = Case(np.array([[0, 0]]), (2, 2))
    with pytest.raises(DataError, match="not in the catalogue"):
        outside.decoder(2).decode(prompts, torch.tensor([outside.tokens((1, 0))]))


def test_bad_widths_and_empty_prompts_are_refused() -> None:
    case = Case(full_codes(2, 2), (2, 2))
    for beams in (0, -3):
        with pytest.raises(ConfigError, match=f"beams={beams} is not a beam width.*use 1 or more"):
            case.decoder(beams)
    for prompts in ([], [np.array([1]), np.array([], dtype=np.int64)]):
        with pytest.raises(ConfigError, match=r"a prompt is empty.*bos token"):
            case.decoder(2).decode(prompts)


def test_left_padding() -> None:
    tokens, length = left_pad([np.array([5]), np.array([1, 2, 3])], 9, torch.device("cpu"))
    assert tokens.tolist() == [[9, 9, 5], [1, 2, 3]]
    assert length.tolist() == [1, 3]


@pytest.mark.parametrize("softmax", SOFTMAXES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_name_the_prompts_that_have_them(softmax: Softmax, value: float) -> None:
    case = Case(random_codes((3, 4, 3), 14), (3, 4, 3))
    prompts = [np.array([1, 2]), np.array([2, 2, 2]), np.array([2, 1])]
    with torch.no_grad():
        case.lm.get_input_embeddings().weight[1] = value
    with pytest.raises(ScoresNotFinite, match="scores are not finite, or too large to be compared") as error:
        case.decoder(5, softmax).decode(prompts)
    assert error.value.rows == (0, 2)  # token 1 occurs there
    targets = torch.tensor([case.leaves[0]])
    with pytest.raises(ScoresNotFinite):
        case.decoder(5, softmax).decode(prompts[:1], targets)
    case.decoder(5, softmax).decode(prompts[1:2], targets)


@pytest.mark.parametrize("softmax", SOFTMAXES)
def test_finite_weights_whose_scores_overflow_are_found(softmax: Softmax) -> None:
    case = Case(random_codes((3, 4, 3), 14), (3, 4, 3))
    with torch.no_grad():
        case.lm.get_output_embeddings().weight[int(case.levels[1][2])] = 3e38
    with pytest.raises(ScoresNotFinite):
        case.decoder(14, softmax).decode(prompts_of(case, 2, 3, 4))


def test_a_list_is_as_long_as_what_is_unseen_allows() -> None:
    case = Case(random_codes((3, 4, 3), 14), (3, 4, 3))
    seen = [np.arange(14), np.arange(12), np.array([], dtype=np.int64)]
    beams = case.decoder(5).decode(prompts_of(case, 2, 3, 4), seen=seen)
    assert (beams.leaf >= 0).sum(dim=1).tolist() == [0, 2, 5]


def test_the_tree_mask_shows_a_beam_the_history_its_ancestors_and_itself() -> None:
    users, beams, levels, closed = 3, 4, 3, 2
    generator = torch.Generator().manual_seed(0)
    history = torch.rand(users, 5, generator=generator) < 0.7
    tree = TreeMask(history, closed, beams, levels, torch.float32)
    paths: list[list[list[int]]] = [[[] for _ in range(beams)] for _ in range(users)]
    for level in range(levels):
        parent = torch.randint(beams, (users, beams), generator=generator)
        mask = tree.grow(parent)
        assert mask.shape == (users, 1, beams, 5 + closed + beams * (level + 1))
        for user in range(users):
            own = [5 + closed + level * beams + beam for beam in range(beams)]
            paths[user] = [[*paths[user][int(p)], column] for p, column in zip(parent[user], own, strict=True)]
            for beam in range(beams):
                seen = (mask[user, 0, beam] == 0).nonzero()[:, 0].tolist()
                assert seen == [*history[user].nonzero()[:, 0].tolist(), *paths[user][beam]]
    assert set(mask.unique().tolist()) == {0.0, torch.finfo(torch.float32).min}


@pytest.mark.parametrize(("softmax", "widest"), [("trie", 6), ("vocabulary", SPECIALS + 14)])
def test_a_step_multiplies_the_head_rows_of_its_level_alone(
    softmax: Softmax, widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(random_codes((6, 5, 3), 40), (6, 5, 3))
    weights = {len(module.weight) for module in case.lm.model.modules() if isinstance(module, torch.nn.Linear)}
    rows: list[int] = []
    multiply = torch.nn.functional.linear

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows.extend([len(weight)] * (len(weight) not in weights))
        return multiply(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    case.decoder(4, softmax).decode(prompts_of(case, 3, 5), torch.tensor([case.leaves[i] for i in (0, 30)]))
    assert max(rows) == widest
    if softmax == "trie":  # the target's three, then the beams' three
        assert rows == [6, 5, 3, 6, 5, 3]
