"""Check ties of fused ranks.

Of items with equal sums the one that was ranked first comes first, whatever the order of additions.
"""

from fractions import Fraction

import pytest

from polm_lab.integration.retrieval.passages import fuse_ranks


def exact(rankings, constant=60):
    """The rule with whole numbers: by the sum, then by the first place an item was seen.

    Rankings are read one after the other.
    """
    sums = {}
    for ranking in rankings:
        for rank, item in enumerate(ranking, 1):
            sums[item] = sums.get(item, 0) + Fraction(1, constant + rank)
    return sorted(sums, key=lambda item: -sums[item]), sums


@pytest.mark.parametrize(
    "rankings, expected",
    [
        ([[4, 9], [9, 4]], [4, 9]),  # 1/61 + 1/62 both: 4 was ranked first
        ([[9, 4], [4, 9]], [9, 4]),
        ([[1], [2], [3]], [1, 2, 3]),  # each once in the first place
        ([[3], [2], [1]], [3, 2, 1]),
        ([[7, 5], [5, 7], [8]], [7, 5, 8]),
        (
            [[1, 2, 3], [3, 1, 2], [2, 3, 1]],
            [1, 2, 3],
        ),  # three sums of the same numbers, added in three orders
        ([[3, 2, 1], [1, 3, 2], [2, 1, 3]], [3, 2, 1]),
    ],
)
def test_of_equals_the_first_that_was_ranked(rankings, expected):
    found = fuse_ranks(rankings)
    assert [item for item, _ in found] == expected == exact(rankings)[0]
    sums = exact(rankings)[1]
    assert all(score == pytest.approx(float(sums[item]), rel=1e-12) for item, score in found)


def test_no_sum_is_decided_by_rounding():
    """All ways in which three, four and five rankings can be rotations of one list.

    Every item has the same sum.
    """
    for size in (3, 4, 5, 7):
        items = list(range(size))
        rankings = [items[start:] + items[:start] for start in range(size)]
        found = fuse_ranks(rankings)
        assert [item for item, _ in found] == items, found
        assert len({score for _, score in found}) == 1, found
