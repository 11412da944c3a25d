"""Rows of tokens as one sequence without padding, in which what rows begin with in common stands once.

In a causal decoder a token's hidden states depend on the tokens before it alone, so rows that begin alike have alike
states there: the rows of a batch are laid over each other as a prefix tree, and every layer but attention sees its
nodes only. Gradients are those of the padded batch, for a sum over rows is a sum over nodes.

Shapes: N nodes, B rows, T tokens of the longest row, A answer tokens, as suffixes of tensor names.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from sheily_train.core.training.data import IGNORED, TokenRow

_NODES_MULTIPLE = 32
"""Packs hold a multiple of so many nodes: matrix products like whole tiles, and take time to prepare for a new size."""


class Pack(NamedTuple):
    """Groups of rows as nodes; a group's nodes, rows and answer tokens each stand together, in the order of groups.

    Attributes:
        ids_N, positions_N: token and place in its row of each node.
        nodes_BT: the node of each row's token; padding repeats node 0.
        firsts_B, lengths_B: each row's first place whose node no row before it has, and how many it has.
        places_N: where a node stands in ``nodes_BT``, flattened; the first place of a shared one.
        sources_A, targets_A: the node after which an answer token is foretold, and that token.
        node_bounds: the first node of each group, and N; the last group ends with nodes that no row has.
        answers: answer tokens of each group.
    """

    ids_N: torch.Tensor
    positions_N: torch.Tensor
    nodes_BT: torch.Tensor
    firsts_B: torch.Tensor
    lengths_B: torch.Tensor
    places_N: torch.Tensor
    sources_A: torch.Tensor
    targets_A: torch.Tensor
    node_bounds: tuple[int, ...]
    answers: tuple[int, ...]


def pack(groups: Sequence[Sequence[TokenRow]], device: str | torch.device = "cpu", *, share: bool = True) -> Pack:
    """Lay rows over each other, within their group only.

    Args:
        groups: rows; those of a group pass through the same weights.
        device: where the tensors go.
        share: whether equal beginnings stand once; ``False`` where every row draws random numbers of its own (dropout).
    """
    ids: list[int] = []
    positions: list[int] = []
    first_rows: list[int] = []
    firsts: list[int] = []
    paths: list[list[int]] = []
    sources: list[int] = []
    targets: list[int] = []
    bounds = [0]
    answer_bounds = [0]
    for rows in groups:
        children: dict[tuple[int, int], int] = {}
        for row in rows:
            path: list[int] = []
            known = len(ids)
            parent = -1
            for position, token in enumerate(row.ids):
                node = children.setdefault((parent, token), len(ids))
                if node == len(ids):
                    ids.append(token)
                    positions.append(position)
                    first_rows.append(len(paths))
                path.append(node)
                parent = node
            for position, label in enumerate(row.labels[1:]):
                if label != IGNORED:
                    sources.append(path[position])
                    targets.append(label)
            firsts.append(sum(node < known for node in path))
            paths.append(path)
            if not share:
                children.clear()
        bounds.append(len(ids))
        answer_bounds.append(len(targets))
    filler = -len(ids) % _NODES_MULTIPLE
    ids += [0] * filler
    positions += [0] * filler
    first_rows += [0] * filler
    bounds[-1] += filler
    longest = max(map(len, paths))

    def tensor(values: Sequence[int] | Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    answers = tuple(stop - start for start, stop in pairwise(answer_bounds))
    return Pack(
        tensor(ids),
        tensor(positions),
        tensor([[*path, *[0] * (longest - len(path))] for path in paths]),
        tensor(firsts),
        tensor([len(path) for path in paths]),
        tensor([row * longest + position for row, position in zip(first_rows, positions, strict=True)]),
        tensor(sources),
        tensor(targets),
        tuple(bounds),
        answers,
    )
