"""The trie against brute-force sets of prefixes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cladapt.errors import DataError
from cladapt.tokens.trie import Trie


@st.composite
def code_tables(draw: st.DrawFn) -> np.ndarray:
    levels = draw(st.integers(1, 4))
    row = st.tuples(*[st.integers(0, 4)] * levels)
    return np.array(draw(st.lists(row, min_size=1, max_size=25)), dtype=np.int32)


def prefixes(codes: np.ndarray) -> list[tuple[int, ...]]:
    """All prefixes in the order of the trie's nodes: by length, then ascending."""
    rows = [tuple(row) for row in codes.tolist()]
    return sorted({row[:n] for row in rows for n in range(codes.shape[1] + 1)}, key=lambda p: (len(p), p))


@settings(max_examples=80)
@given(code_tables())
def test_nodes_edges_and_leaves_are_the_prefixes(codes: np.ndarray) -> None:
    trie, nodes = Trie.build(codes), prefixes(codes)
    leaves = sorted({tuple(row) for row in codes.tolist()})
    assert (trie.n_nodes, trie.n_leaves, trie.levels) == (len(nodes), len(leaves), codes.shape[1])
    assert nodes[trie.first_leaf :] == leaves
    for v, prefix in enumerate(nodes):
        edges = range(int(trie.child_start[v]), int(trie.child_start[v + 1]))
        found = [(int(trie.child_code[e]), nodes[int(trie.child_node[e])]) for e in edges]
        assert found == [(p[-1], p) for p in nodes if p and p[:-1] == prefix]
        if prefix:
            assert nodes[int(trie.parent[v])] == prefix[:-1]
    assert int(trie.parent[0]) == 0
    assert [leaves[i] for i in trie.leaf_of_row.tolist()] == [tuple(row) for row in codes.tolist()]
    assert trie.leaf_items.tolist() == [codes.tolist().count(list(leaf)) for leaf in leaves]


@settings(max_examples=80)
@given(code_tables(), st.data())
def test_children_expands_any_list_of_nodes(codes: np.ndarray, data: st.DataObject) -> None:
    trie = Trie.build(codes)
    chosen = data.draw(st.lists(st.integers(0, trie.n_nodes - 1), max_size=12))
    row, code, node = trie.children(torch.tensor(chosen, dtype=torch.int64))
    expected = [
        (place, int(trie.child_code[e]), int(trie.child_node[e]))
        for place, v in enumerate(chosen)
        for e in range(int(trie.child_start[v]), int(trie.child_start[v + 1]))
    ]
    assert list(zip(row.tolist(), code.tolist(), node.tolist(), strict=True)) == expected


@settings(max_examples=80)
@given(code_tables(), st.data())
def test_lookup_finds_the_leaf_or_says_minus_one(codes: np.ndarray, data: st.DataObject) -> None:
    trie = Trie.build(codes)
    leaves = sorted({tuple(row) for row in codes.tolist()})
    # codes below zero or beyond the largest must not alias another node's edge
    row = st.tuples(*[st.integers(-2, 7)] * codes.shape[1])
    asked = [*data.draw(st.lists(row, max_size=20)), *leaves]
    expected = [leaves.index(a) if a in leaves else -1 for a in asked]
    assert trie.lookup(torch.tensor(asked)).tolist() == expected


def test_lookup_keeps_leading_shapes_and_step_keeps_dead_nodes_dead() -> None:
    trie = Trie.build(np.array([[0, 1], [2, 0]]))
    assert trie.lookup(torch.tensor([[[0, 1], [0, 0]], [[2, 0], [1, 1]]])).tolist() == [[0, -1], [1, -1]]
    assert trie.step(torch.tensor([-1, 0, 0]), torch.tensor([0, 2, 1])).tolist() == [-1, 2, -1]


def test_tensors_are_int64_and_move_together() -> None:
    trie = Trie.build(np.array([[3, 1]], dtype=np.int32)).to("meta")
    tensors = (trie.child_start, trie.child_code, trie.child_node, trie.leaf_items, trie.leaf_of_row)
    assert {(t.dtype, t.device.type) for t in tensors} == {(torch.int64, "meta")}
    assert trie.levels == 2


@pytest.mark.parametrize(
    ("codes", "text"),
    [
        (np.empty((0, 3), dtype=int), r"shape \(0, 3\) has no leaf"),
        (np.zeros(3, dtype=int), r"shape \(3,\)"),
        (np.array([[0, -2]]), "a code is -2"),
    ],
)
def test_codes_without_a_trie_are_refused(codes: np.ndarray, text: str) -> None:
    with pytest.raises(DataError, match=text):
        Trie.build(codes)


def test_lookup_of_another_depth_is_refused() -> None:
    with pytest.raises(DataError, match="a code tuple has 3 levels"):
        Trie.build(np.array([[0, 1]])).lookup(torch.tensor([[0, 1, 0]]))
