"""Packs: every row can be read back from its nodes, and nothing stands twice that need not."""

from __future__ import annotations

import math
from itertools import pairwise

from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sheily_train.core.training.data import IGNORED, TokenRow
from sheily_train.core.training.packing import pack

ROW = st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=9).map(
    lambda pairs: TokenRow(
        tuple(token for token, _learned in pairs), tuple(token if learned else IGNORED for token, learned in pairs), "x"
    )
)
GROUPS = st.lists(st.lists(ROW, min_size=1, max_size=5), min_size=1, max_size=4)


@hypothesis_settings(deadline=None)
@given(GROUPS, st.booleans())
def test_rows_can_be_read_back_from_their_nodes(groups: list[list[TokenRow]], share: bool) -> None:
    """Tokens, positions, answers and groups: all that the padded batch says is in the pack."""
    packed = pack(groups, share=share)
    rows = [row for group in groups for row in group]
    for row, nodes in zip(rows, packed.nodes_BT.tolist(), strict=True):
        path = nodes[: len(row.ids)]
        assert packed.ids_N[path].tolist() == list(row.ids)
        assert packed.positions_N[path].tolist() == list(range(len(row.ids)))
    answers = [
        (packed.nodes_BT[index, position].item(), label)
        for index, row in enumerate(rows)
        for position, label in enumerate(row.labels[1:])
        if label != IGNORED
    ]
    assert list(zip(packed.sources_A.tolist(), packed.targets_A.tolist(), strict=True)) == answers
    own = packed.nodes_BT.max() + 1
    assert packed.nodes_BT.flatten()[packed.places_N[:own]].tolist() == list(range(own))
    known = -1
    for nodes, first, length in zip(packed.nodes_BT.tolist(), packed.firsts_B, packed.lengths_B, strict=True):
        assert all(node <= known for node in nodes[:first])
        assert nodes[first:length] == list(range(known + 1, known + 1 + length - first))
        known = max(known, *nodes[:length])
    assert packed.answers == tuple(
        sum(label != IGNORED for row in group for label in row.labels[1:]) for group in groups
    )
    for group, (start, stop) in zip(groups, pairwise(packed.node_bounds), strict=True):
        assert min(stop, own) - start <= sum(len(row.ids) for row in group)


@hypothesis_settings(deadline=None)
@given(GROUPS)
def test_each_beginning_stands_once_in_its_group(groups: list[list[TokenRow]]) -> None:
    """There are as many nodes as different beginnings, and as many as tokens when nothing is shared."""
    beginnings = [{row.ids[:stop] for row in group for stop in range(1, len(row.ids) + 1)} for group in groups]
    different = sum(map(len, beginnings))
    tokens = sum(len(row.ids) for group in groups for row in group)
    for packed, count in ((pack(groups), different), (pack(groups, share=False), tokens)):
        assert packed.nodes_BT.max() + 1 == count
        assert (packed.lengths_B - packed.firsts_B).sum() == count
        assert len(packed.ids_N) == packed.node_bounds[-1] == math.ceil(count / 32) * 32
