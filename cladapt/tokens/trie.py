"""The catalogue's semantic IDs as a trie in CSR form, on any device, walked without a Python loop over nodes."""

from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from cladapt.errors import DataError


@dataclass(frozen=True, eq=False)
class Trie:
    """Prefixes of the distinct code tuples, numbered level by level and ascending inside a level; the root is 0.

    The children of node v are the edges child_start[v] : child_start[v + 1], ascending by code. Leaf l, the l-th
    distinct tuple in ascending order, is node first_leaf + l. All tensors are int64.
    """

    child_start: Tensor  # [n_nodes + 1]
    child_code: Tensor  # [n_edges]
    child_node: Tensor  # [n_edges]
    leaf_items: Tensor  # [n_leaves] rows that share the leaf
    leaf_of_row: Tensor  # [n]
    levels: int

    @classmethod
    def build(cls, codes: np.ndarray) -> "Trie":
        """The trie of the rows of `codes`, non-negative integers [n, levels]; equal rows share a leaf."""
        if codes.ndim != 2 or not codes.size:
            raise DataError(f"a trie of codes of shape {codes.shape} has no leaf", "give at least one item and level")
        if codes.min() < 0:
            raise DataError(f"a code is {codes.min()}", "codes start at 0")
        rows, leaf_of_row, leaf_items = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
        parent, child_code = [], []
        differs = np.zeros(len(rows), dtype=bool)
        differs[0] = True
        node, n_nodes = np.zeros(len(rows), dtype=np.int64), 1
        for level in range(rows.shape[1]):
            differs[1:] |= rows[1:, level] != rows[:-1, level]
            parent.append(node[differs])
            child_code.append(rows[differs, level])
            node = n_nodes - 1 + np.cumsum(differs)
            n_nodes += int(differs.sum())
        degree = np.bincount(np.concatenate(parent), minlength=n_nodes)
        return cls(
            child_start=torch.from_numpy(np.concatenate([[0], np.cumsum(degree)]).astype(np.int64)),
            child_code=torch.from_numpy(np.concatenate(child_code).astype(np.int64)),
            child_node=torch.arange(1, n_nodes),  # edges and nodes are in the same order
            leaf_items=torch.from_numpy(leaf_items.astype(np.int64)),
            leaf_of_row=torch.from_numpy(leaf_of_row.reshape(-1).astype(np.int64)),
            levels=rows.shape[1],
        )

    @property
    def n_nodes(self) -> int:
        return len(self.child_start) - 1

    @property
    def n_leaves(self) -> int:
        return len(self.leaf_items)

    @property
    def first_leaf(self) -> int:
        """Node of leaf 0."""
        return self.n_nodes - self.n_leaves

    @cached_property
    def parent(self) -> Tensor:
        """Parent of every node, the root its own: int64 [n_nodes]."""
        parent = torch.zeros_like(self.child_start[1:])
        above = torch.arange(self.n_nodes, device=parent.device)
        parent[self.child_node] = torch.repeat_interleave(above, self.child_start.diff())
        return parent

    def to(self, device: torch.device | str) -> "Trie":
        """The same trie with its tensors on `device`."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "levels"}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})

    def children(self, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All children of `nodes` int64 [m]: (place in `nodes`, code, child), each int64 [e], by place, then code."""
        start = self.child_start[nodes]
        degree = self.child_start[nodes + 1] - start
        row = torch.repeat_interleave(torch.arange(len(nodes), device=nodes.device), degree)
        before = degree.cumsum(0) - degree
        edge = torch.arange(len(row), device=nodes.device) + (start - before)[row]
        return row, self.child_code[edge], self.child_node[edge]

    def step(self, node: Tensor, code: Tensor) -> Tensor:
        """The child of each node by code, same shape; -1 where there is none or the node is -1."""
        key = node * self._width + code
        place = torch.searchsorted(self._edge, key).clamp_max(len(self._edge) - 1)
        found = (node >= 0) & (code >= 0) & (code < self._width) & (self._edge[place] == key)
        return torch.where(found, self.child_node[place], -1)

    def lookup(self, codes: Tensor) -> Tensor:
        """Leaf of each code tuple, int64 [..., levels] -> [...]; -1 for a tuple that is not in the trie."""
        if codes.shape[-1] != self.levels:
            raise DataError(f"a code tuple has {codes.shape[-1]} levels", f"the trie has {self.levels}")
        node = torch.zeros(codes.shape[:-1], dtype=torch.int64, device=codes.device)
        for level in range(self.levels):
            node = self.step(node, codes[..., level].contiguous())
        return torch.where(node >= 0, node - self.first_leaf, -1)

    @cached_property
    def _width(self) -> int:
        return int(self.child_code.max()) + 1

    @cached_property
    def _edge(self) -> Tensor:
        """One key per edge, ascending: parent and code in one integer."""
        return self.parent[self.child_node] * self._width + self.child_code
