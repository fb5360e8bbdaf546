"""IDs of a stream that grows: equal to those of the whole stream, from texts and from an index."""

import json
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from cladapt.config import TokensConfig
from cladapt.data.schema import INTERACTIONS, ITEMS, Stream
from cladapt.errors import ConfigError, DataError
from cladapt.tokens.build import load_sids, save_index, save_sids
from cladapt.tokens.encoder import Fit
from cladapt.tokens.extend import Extension, _warn_of_drift, extend_sids, extend_with_index
from cladapt.tokens.sids import SidTable

CONFIG = TokensConfig(dimensions=4, levels=2, codes=4, capacity=4)
WORDS = ("river", "stone", "night", "garden", "engine", "winter")
BLOCKS, ITEMS_OF_A_BLOCK = 5, 12


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Few words and small blocks: drift and items without a word are beside the point of most tests here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the quantisation error|.* of the new items|.* items have no text")
        yield


def make(texts: list[list[str]]) -> Stream:
    """A stream whose block t has the items with `texts[t - 1]`, each used once."""
    rows = [(f"i{t}-{k}", text, t) for t, block in enumerate(texts, start=1) for k, text in enumerate(block)]
    items = pl.DataFrame(rows, schema=ITEMS, orient="row")
    events = [("u", item, None, position, t) for position, (item, _, t) in enumerate(rows)]
    return Stream(pl.DataFrame(events, schema=INTERACTIONS, orient="row"), items, {"config": {}})


def whole_stream() -> Stream:
    rng = np.random.default_rng(1)
    return make(
        [
            [" ".join(rng.choice([*WORDS, f"new{t}"], 2)) if k else "" for k in range(ITEMS_OF_A_BLOCK)]
            for t in range(BLOCKS)
        ]
    )


def grown(folder: Path, stream: Stream, cuts: tuple[int, ...], config: TokensConfig) -> list[Extension]:
    """The stream as its first block with IDs, then every append of the blocks up to a cut, extended each time."""
    stream.prefix(cuts[0]).save(folder)
    save_sids(folder, Stream.load(folder), config)
    done = []
    for known, block in pairwise(cuts):
        replace(stream.prefix(block), manifest=Stream.load(folder).manifest).save_after(folder, known)
        done.append(extend_sids(folder, Stream.load(folder)))
    return done


@pytest.mark.parametrize("config", [CONFIG, CONFIG.model_copy(update={"deduplicate": False})], ids=["numbers", "plain"])
@pytest.mark.parametrize("cuts", [(5,), (1, 5), (2, 3, 5), (1, 2, 3, 4, 5)])
def test_a_stream_that_has_grown_has_the_ids_of_the_whole_one(
    cuts: tuple[int, ...], config: TokensConfig, tmp_path: Path
) -> None:
    stream = whole_stream()
    stream.save(tmp_path / "whole")
    table = save_sids(tmp_path / "whole", stream, config)
    done = grown(tmp_path / "grown", stream, cuts, config)
    assert sum(step.new for step in done) == ITEMS_OF_A_BLOCK * (BLOCKS - cuts[0])
    assert {p.name for p in (tmp_path / "grown").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}
    for path in sorted(p for p in (tmp_path / "whole").rglob("*") if p.is_file() and p.name != "manifest.json"):
        assert path.read_bytes() == (tmp_path / "grown" / path.relative_to(tmp_path / "whole")).read_bytes(), path
    assert load_sids(tmp_path / "grown", Stream.load(tmp_path / "grown")).fingerprint == table.fingerprint
    assert table.sizes == (4, 4, 4)[: table.levels]


def test_new_items_are_counted(tmp_path: Path) -> None:
    (done,) = grown(tmp_path, whole_stream(), (1, 5), CONFIG)
    codes = [tuple(row) for row in done.table.codes.tolist()]
    assert done.sharing == sum(codes.count(row) > 1 for row in codes[ITEMS_OF_A_BLOCK:]) > 0
    assert done.without == {"text": BLOCKS - 1}
    short = [row[:2] for row in codes]
    first, later = short[:ITEMS_OF_A_BLOCK], short[ITEMS_OF_A_BLOCK:]
    assert done.drift["block 1"].collisions == pytest.approx(np.mean([first.count(row) > 1 for row in first]))
    assert done.drift["new items"].collisions == pytest.approx(np.mean([short.count(row) > 1 for row in later]))
    assert done.drift["block 1"].quantisation_error is not None
    assert done.drift["new items"].quantisation_error is not None


def test_nothing_to_do_changes_no_file(tmp_path: Path) -> None:
    grown(tmp_path, whole_stream(), (1, 3), CONFIG)
    before = (tmp_path / "sids.parquet").stat()
    again = extend_sids(tmp_path, Stream.load(tmp_path))
    assert (again.new, again.drift) == (0, {})
    after = (tmp_path / "sids.parquet").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_items_without_an_id_say_how_to_give_them_one(tmp_path: Path) -> None:
    stream = whole_stream()
    stream.prefix(2).save(tmp_path)
    save_sids(tmp_path, stream.prefix(2), CONFIG)
    assert load_sids(tmp_path, stream.prefix(1)).items == tuple(stream.prefix(1).items["item"])
    with pytest.raises(DataError, match="36 of 60 items have no semantic ID: 'i3-0'") as caught:
        load_sids(tmp_path, stream)
    assert caught.value.hint == f"give the new items semantic IDs: cladapt tokens extend {tmp_path}"


class Batchwise:
    """A sentence-transformers model whose vectors depend on what is encoded with them, as padding makes them do."""

    def __init__(self, name: str) -> None: ...

    def encode(self, texts: list[str], **_: object) -> np.ndarray:
        longest = max(map(len, texts))
        return np.array([[len(t) + 1, t.count("r") + 1, longest * (t != "") + 1] for t in texts], dtype=np.float32)


def test_texts_are_encoded_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = Batchwise  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    config = CONFIG.model_copy(update={"embedding": "some/model"})
    stream = whole_stream()
    stream.save(tmp_path / "whole")
    save_sids(tmp_path / "whole", stream, config)
    for cuts in ((1, 2, 5), (2, 3, 4, 5)):
        grown(tmp_path / str(cuts), stream, cuts, config)
        for name in ("sids.parquet", "tokens.json", "embedding.safetensors"):
            assert (tmp_path / str(cuts) / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


INDEX = {f"i{t}-{k}": [f"<a_{t}>", f"<b_{k}>"] for t in range(1, 4) for k in range(3)}


def indexed(folder: Path, blocks: int) -> Stream:
    """A stream of three blocks whose first ones got their IDs from `INDEX`."""
    stream = make([[""] * 3] * 3)
    stream.save(folder)
    table = SidTable.from_index(INDEX)
    save_index(folder, stream.prefix(blocks), table, TokensConfig(codes=4, capacity=8))
    return Stream.load(folder)


def test_new_items_get_the_rows_of_an_index(tmp_path: Path) -> None:
    whole, short = indexed(tmp_path / "whole", 3), indexed(tmp_path / "short", 1)
    done = extend_with_index(tmp_path / "short", short, SidTable.from_index(INDEX))
    assert (done.new, done.sharing, done.drift, done.table.sizes) == (6, 0, {}, (4, 8))
    assert (tmp_path / "short" / "sids.parquet").read_bytes() == (tmp_path / "whole" / "sids.parquet").read_bytes()
    assert extend_with_index(tmp_path / "whole", whole, SidTable.from_index(INDEX)).new == 0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"i3-2": ["<a_3>", "<b_8>"]}, "item 'i3-2' has the code 8 at level 2, whose capacity is 8"),
        ({"i3-2": ["<a_4>", "<b_0>"]}, "item 'i3-2' has the code 4 at level 1, whose capacity is 4"),
        ({"i1-1": ["<a_0>", "<b_0>"]}, "the index has the ID <a_0><b_0> for item 'i1-1', the stream has <a_1><b_1>"),
        ({"i3-2": None}, "1 of 6 items have no semantic ID: 'i3-2'"),
    ],
)
def test_an_index_that_does_not_go_on_with_the_ids_changes_nothing(
    change: dict[str, list[str] | None], text: str, tmp_path: Path
) -> None:
    stream = indexed(tmp_path, 1)
    before = (tmp_path / "sids.parquet").read_bytes()
    index = {item: row for item, row in {**INDEX, **change}.items() if row is not None}
    with pytest.raises(DataError, match=text):
        extend_with_index(tmp_path, stream, SidTable.from_index(index))
    assert (tmp_path / "sids.parquet").read_bytes() == before


def test_an_index_with_other_levels_is_refused(tmp_path: Path) -> None:
    stream = indexed(tmp_path, 1)
    new = {item: [*row, "<c_0>"] for item, row in INDEX.items() if not item.startswith("i1")}
    with pytest.raises(DataError, match="the index has 3 levels, the IDs of the stream have 2"):
        extend_with_index(tmp_path, stream, SidTable.from_index(new))


def test_ids_of_an_index_need_its_rows(tmp_path: Path) -> None:
    stream = indexed(tmp_path, 1)
    with pytest.raises(ConfigError, match=r"6 items of .* came from an index \(there is no tokens\.json\)") as caught:
        extend_sids(tmp_path, stream)
    assert caught.value.hint.endswith(f"cladapt tokens extend {tmp_path} --index FILE")


def test_codebooks_take_rows_of_an_index_too(tmp_path: Path) -> None:
    stream = whole_stream()
    stream.save(tmp_path)
    save_sids(tmp_path, stream.prefix(4), CONFIG)
    rows = {item: ["<a_0>", "<b_1>", f"<c_{k % 4}>"] for k, item in enumerate(stream.items["item"][-12:])}
    (tmp_path / "index.json").write_text(json.dumps(rows))
    done = extend_with_index(tmp_path, stream, SidTable.from_index(rows))
    assert done.table.codes[-12:].tolist() == [[0, 1, k % 4] for k in range(12)]


def test_ids_of_other_sizes_than_the_encoders_are_refused(tmp_path: Path) -> None:
    stream = whole_stream()
    stream.save(tmp_path)
    table = save_sids(tmp_path, stream.prefix(4), CONFIG)
    SidTable(table.items, table.codes, (4, 4, 9)).save(tmp_path / "sids.parquet")
    with pytest.raises(DataError, match=r"levels of \[4, 4, 9\] codes, tokens\.json was written for \[4, 4, 4\]"):
        extend_sids(tmp_path, stream)


def fit(error: float | None, collisions: float) -> Fit:
    return Fit(quantisation_error=error, collisions=collisions)


@pytest.mark.parametrize(
    ("new", "text"),
    [
        (fit(0.16, 0.1), "the quantisation error of the new items is 0.160, more than 1.5 times block 1's 0.100"),
        (fit(0.1, 0.31), "31% of the new items have the codes of another item, more than 20% above block 1's 10%"),
    ],
)
def test_drift_beyond_its_range_is_warned_of(new: Fit, text: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _warn_of_drift(fit(0.1, 0.1), new)
        _warn_of_drift(fit(0.1, 0.1), fit(0.15, 0.3))
        _warn_of_drift(fit(0.1, 0.1), fit(None, 0.1))
    (warning,) = caught
    assert str(warning.message).startswith(text)
