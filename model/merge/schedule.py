"""How many tokens each layer merges: given numbers, those on a slope, or what a budget of tokens at the end needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from model.merge.plan import most_merges


def clamped_merges(num_tokens: int, wanted: Iterable[int], protect_first: bool = True) -> tuple[int, ...]:
    """As many merges in each layer as are ``wanted``, fewer where a layer has not as many to merge."""
    merges = []
    for number in wanted:
        merges.append(min(number, most_merges(num_tokens, protect_first)))
        num_tokens -= merges[-1]
    return tuple(merges)


def sloped_merges(num_layers: int, mean: int, slope: float) -> tuple[int, ...]:
    """``mean`` merges a layer on average, in even steps from ``mean * (1 - slope)`` in the first, rounded down.

    A slope of -1 begins with twice the mean and ends with none, 1 the other way round; a single layer is the first.
    """
    first, steps = int(mean * (1 - slope)), max(num_layers - 1, 1)
    return tuple(first + 2 * (mean - first) * layer // steps for layer in range(num_layers))


def merges_to_budget(num_tokens: int, num_layers: int, budget: int, protect_first: bool = True) -> tuple[int, ...]:
    """As even numbers as can be that leave exactly ``budget`` tokens after the last layer.

    Raises:
        ValueError: so few can't be reached (a layer halves the tokens at most), or more than there are.
    """
    fewest = num_tokens - sum(clamped_merges(num_tokens, [num_tokens] * num_layers, protect_first))
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
