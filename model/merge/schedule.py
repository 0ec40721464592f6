"""How many tokens each layer merges: a constant number, or what a budget of tokens at the end asks for."""

from __future__ import annotations

from collections.abc import Sequence

from model.merge.plan import most_merges


def constant_merges(num_tokens: int, num_layers: int, num_merges: int, protect_first: bool = True) -> tuple[int, ...]:
    """``num_merges`` in each layer, fewer where a layer has not as many to merge."""
    merges = []
    for _ in range(num_layers):
        merges.append(min(num_merges, most_merges(num_tokens, protect_first)))
        num_tokens -= merges[-1]
    return tuple(merges)


def merges_to_budget(num_tokens: int, num_layers: int, budget: int, protect_first: bool = True) -> tuple[int, ...]:
    """As even numbers as can be that leave exactly ``budget`` tokens after the last layer.

    Raises:
        ValueError: so few can't be reached (a layer halves the tokens at most), or more than there are.
    """
    fewest = num_tokens - sum(constant_merges(num_tokens, num_layers, num_tokens, protect_first))
    if not fewest <= budget <= num_tokens:
        raise ValueError(
            f"{budget} tokens can't remain of {num_tokens} after {num_layers} layers; {fewest} can at least"
        )
    most_after = [budget]  # so many tokens may be left after a layer, for those behind it to reach the budget
    for _ in range(num_layers):
        most_after.append(_most_before(most_after[-1], protect_first))
    most_after.reverse()
    merges, left = [], num_tokens
    for layer in range(1, num_layers + 1):
        even = num_tokens - (num_tokens - budget) * layer // num_layers
        after = min(even, most_after[layer])
        merges.append(left - after)
        left = after
    return tuple(merges)


def tokens_after(num_tokens: int, merges: Sequence[int]) -> list[int]:
    """The numbers of tokens after each layer."""
    return [num_tokens := num_tokens - number for number in merges]


def _most_before(left: int, protect_first: bool) -> int:
    """The most tokens of which one merge can leave ``left``: t - most_merges(t) is ``left`` for it, not for t + 1."""
    return 2 * left - protect_first
