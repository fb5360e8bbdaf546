"""Vectors by a pretrained model: mean pooling text by text, what a directory must hold, and the cache on disk."""

import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from cladapt.artifacts import read_json, write_json
from cladapt.errors import DataError
from cladapt.tokens import language
from cladapt.tokens.embed import embed, fit_embedding, load_embedding
from cladapt.tokens.language import _batches
from cladapt.tokens.vector_cache import Cached, cache_folder, model_identity

TEXTS = ["the item", "next item of the list, which is long", "", "list", "the next of the next of the next", "item"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder()


@pytest.fixture(scope="module")
def causal(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("llama"))


def one_by_one(folder: Path, texts: list[str]) -> np.ndarray:
    """Means of the last hidden states in float64, each text alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        if ids.numel():
            with torch.no_grad():
                rows.append(model(ids, output_hidden_states=True).hidden_states[-1][0].mean(dim=0).numpy())
        else:
            rows.append(np.zeros(model.config.hidden_size))
    return np.stack(rows)


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_a_causal_lm_gives_the_mean_of_its_states(
    batch_tokens: int, causal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language, "BATCH_TOKENS", batch_tokens)
    found = fit_embedding(TEXTS, str(causal), 64, 0).vectors(TEXTS)
    expected = one_by_one(causal, TEXTS)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_long_texts_are_cut_and_counted(causal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "MOST_TOKENS", 3)
    model = language._CausalLM(str(causal))
    with pytest.warns(UserWarning, match="2 of 3 texts are cut to their first 3 tokens"):
        found = model(["abcdef", "abcxyz", "a"])
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)


def test_batches_are_of_like_length_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "BATCH_TOKENS", 12)
    lengths = [3, 0, 7, 2, 2, 20, 5, 1, 0]
    batches = list(_batches(lengths))
    assert sorted(row for batch in batches for row in batch) == [0, 2, 3, 4, 5, 6, 7]
    assert all(len(batch) == 1 or len(batch) * lengths[batch[0]] <= 12 for batch in batches)
    ordered = [lengths[row] for batch in batches for row in batch]
    assert ordered == sorted(ordered, reverse=True)


def fails(*_: object) -> np.ndarray:
    raise AssertionError("the model was asked")


def test_what_was_computed_is_taken_from_the_cache(
    causal: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = fit_embedding(TEXTS, str(causal), 64, 0)
    first = embed(made, TEXTS)
    np.testing.assert_array_equal(embed(made, TEXTS), first)  # a process does not count its own
    made.save(tmp_path)
    monkeypatch.setattr(language._CausalLM, "__call__", fails)
    with pytest.warns(UserWarning, match=f"of texts are taken from {cache}") as caught:
        np.testing.assert_array_equal(embed(load_embedding(tmp_path, str(causal)), TEXTS), first)
    counts = [str(warning.message).split(" vectors")[0] for warning in caught]
    assert counts == ["6 of 6"]
    again = load_embedding(tmp_path, str(causal))
    with pytest.raises(AssertionError, match="the model was asked"):
        embed(again, ["another"])


def test_another_model_in_the_same_place_is_noticed(
    checkpoint: Callable[..., Path], causal: Path, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path / "model")
    assert model_identity(folder) == model_identity(causal)
    made = fit_embedding(TEXTS, str(folder), 64, 0)
    made.save(tmp_path / "kept")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(-2)
    model.save_pretrained(folder)
    assert model_identity(folder) != model_identity(causal)
    fit_embedding(TEXTS, str(folder), 64, 0).vectors(TEXTS)  # its vectors are in the cache too
    back = load_embedding(tmp_path / "kept", str(folder))
    with pytest.raises(DataError, match="gives other vectors than when the IDs were built"):
        back.vectors(TEXTS)


def lengths(texts: list[str]) -> np.ndarray:
    return np.array([[len(text), 1.0] for text in texts], dtype=np.float32)


def test_equal_texts_are_computed_once(cache: Path) -> None:
    asked: list[list[str]] = []
    cached = Cached(lambda texts: (asked.append(list(texts)), lengths(list(texts)))[1], "m")
    np.testing.assert_array_equal(cached(["ab", "c", "ab"]), lengths(["ab", "c", "ab"]))
    np.testing.assert_array_equal(cached(["d", "c"]), lengths(["d", "c"]))
    assert asked == [["ab", "c"], ["d"]]
    assert len(list((cache / "m").iterdir())) == 2


def test_a_damaged_cache_is_computed_anew(cache: Path) -> None:
    Cached(lengths, "m")(["ab"])
    (file,) = (cache / "m").iterdir()
    file.write_bytes(b"PAR1")
    with pytest.warns(UserWarning, match=rf"the cache of vectors is not read: {file}: not a readable parquet file"):
        np.testing.assert_array_equal(Cached(lengths, "m")(["ab"]), lengths(["ab"]))
    with pytest.warns(UserWarning, match="1 of 1 vectors of texts are taken from"):
        np.testing.assert_array_equal(Cached(fails, "m")(["ab"]), lengths(["ab"]))


def test_a_cache_that_cannot_be_written_is_done_without(cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file")
    with pytest.warns(UserWarning, match="the vectors of 2 texts are not kept: cannot write"):
        np.testing.assert_array_equal(Cached(lengths, "m")(["ab", "c"]), lengths(["ab", "c"]))


WORKER = """
import sys, warnings
import numpy as np
from cladapt.tokens.vector_cache import Cached
warnings.simplefilter("ignore")
cached = Cached(lambda texts: np.array([[len(t), int(t)] for t in texts], dtype=np.float32), "m")
for start in range(0, 100, 10):
    texts = [str(10 ** 6 + number) for number in range(start, start + 30)]
    assert (cached(texts)[:, 1] == [float(t) for t in texts]).all()
"""


def test_two_processes_share_a_cache(cache: Path) -> None:
    both = [subprocess.Popen([sys.executable, "-c", WORKER]) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    with pytest.warns(UserWarning, match="120 of 120 vectors"):
        found = Cached(fails, "m")([str(10**6 + number) for number in range(120)])
    np.testing.assert_array_equal(found[:, 1], 10**6 + np.arange(120))
    assert [path for path in (cache / "m").iterdir() if path.suffix != ".parquet"] == []


@pytest.fixture
def fake_package(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        def __init__(self, name: str) -> None: ...

        def encode(self, sentences: list[str], **_: object) -> np.ndarray:
            return lengths(sentences)

    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = Fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)


@pytest.mark.usefixtures("fake_package")
def test_modules_json_makes_it_sentence_transformers(causal: Path, tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "st"
    folder.mkdir()
    (folder / "config.json").write_bytes((causal / "config.json").read_bytes())
    (folder / "modules.json").write_text("[]")
    np.testing.assert_array_equal(fit_embedding(["abc"], str(folder), 64, 0).vectors(["abc"]), [[3.0, 1.0]])
    assert len(list(cache.iterdir())) == 1


def test_a_directory_without_a_model_says_what_is_there(causal: Path, tmp_path: Path) -> None:
    def refused(folder: Path) -> str:
        with pytest.raises(DataError) as caught:
            fit_embedding(["a"], str(folder), 64, 0)
        assert "modules.json" in caught.value.hint
        return caught.value.message

    empty = tmp_path / "model"
    empty.mkdir()
    assert refused(empty).endswith("holds no model: found nothing")
    (empty / "weights.bin").touch()
    assert refused(empty).endswith("holds no model: found weights.bin")
    config = read_json(causal / "config.json")
    write_json(empty / "config.json", {**config, "architectures": ["BertModel"]})
    assert refused(empty).endswith("is a model of BertModel")
    write_json(empty / "config.json", {})
    assert refused(empty).endswith("is a model of no named architecture")
    (empty / "config.json").write_text("[")
    assert "config.json is not a model's" in refused(empty)
    assert refused(empty / "config.json").endswith("config.json' is a file")


@pytest.mark.parametrize(("gone", "text"), [("model.safetensors", "cannot load"), ("tokenizer.json", "cannot load")])
def test_a_causal_lm_that_is_not_whole_is_named(
    gone: str, text: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path / "model")
    (folder / gone).unlink()
    with pytest.raises(DataError, match=f"{text} the causal LM '{folder}'"):
        fit_embedding(["a"], str(folder), 64, 0)
