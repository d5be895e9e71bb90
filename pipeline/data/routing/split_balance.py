"""Splits for groups of rows, so that every expert's rows come near to the shares that are asked
for."""

from collections import Counter, defaultdict
from collections.abc import Mapping


class SplitBalancer:
    """Shares of groups of rows by turns: after every group, each expert's rows are as near to the
    shares as may be."""

    def __init__(self, shares: Mapping[str, float]):
        whole = sum(shares.values())
        self.shares = {name: share / whole for name, share in shares.items()}
        # expert -> split -> rows
        self.given: defaultdict[int, Counter[str]] = defaultdict(Counter)

    def next_split(self, sizes: Mapping[int, int]) -> str:
        """Return the split for the next group, of sizes[expert] rows each."""
        # How many rows each split is short of its share, once these are given: the shortest gets
        # them. One group may have rows of several experts, whose shortages add up.
        lack = dict.fromkeys(self.shares, 0.0)
        for expert, size in sizes.items():
            given = self.given[expert]
            total = given.total() + size
            for name, share in self.shares.items():
                lack[name] += share * total - given[name]
        chosen = max(lack, key=lack.__getitem__)
        for expert, size in sizes.items():
            self.given[expert][chosen] += size
        return chosen
