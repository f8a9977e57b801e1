"""Which prompts go through the model together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# What one more forward pass costs, in tokens of prefill: reading the weights and launching the layers. Measured on a
# CPU (a 135 M model: one token 56 ms, each further one 3 ms); an accelerator needs hundreds of tokens to fill up.
PASS_COST = {"cpu": 16}
ACCELERATOR_PASS_COST = 512
# Most tokens of one prefill pass: bounds the activations, [tokens, intermediate size] at their widest.
PREFILL_TOKENS = 16384


def pass_cost(device: torch.device) -> int:
    """Tokens of prefill that one more forward pass on the device is worth."""
    return PASS_COST.get(device.type, ACCELERATOR_PASS_COST)


def longest_first(lengths: Sequence[int]) -> list[int]:
    """Row numbers by falling length; equal lengths in their order."""
    return sorted(range(len(lengths)), key=lambda row: -lengths[row])


def prefill_groups(lengths: Sequence[int], *, cost: int, most_tokens: int = PREFILL_TOKENS) -> list[tuple[int, int]]:
    """Cuts rows of falling length into groups [first, last) that are prefilled together, each padded to its longest.

    Minimises padded tokens + cost × groups, exactly: best[last] is the least over the place of the last cut.

    Args:
        lengths: prompt lengths, not rising.
        cost: tokens that a pass is worth.
        most_tokens: of one group; a single row may exceed it.
    """
    best, cut = [0], [0]
    for last in range(1, len(lengths) + 1):
        totals = {}
        for first in range(last - 1, -1, -1):
            tokens = (last - first) * lengths[first]
            if tokens > most_tokens and first < last - 1:
                break  # longer rows and more of them only add tokens
            totals[first] = best[first] + tokens + cost
        first = min(totals, key=lambda start: totals[start])
        best.append(totals[first])
        cut.append(first)
    groups, last = [], len(lengths)
    while last > 0:
        groups.append((cut[last], last))
        last = cut[last]
    return groups[::-1]


def equal_length_groups(lengths: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Cuts rows of falling length into groups [first, last) of one length and at most `most` rows."""
    groups: list[tuple[int, int]] = []
    for row, length in enumerate(lengths):
        if groups and lengths[groups[-1][0]] == length and row - groups[-1][0] < most:
            groups[-1] = (groups[-1][0], row + 1)
        else:
            groups.append((row, row + 1))
    return groups
