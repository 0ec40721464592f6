"""The counted cost of EVLGen at the paper's size, against the paper's own figure."""

from __future__ import annotations

import pytest

from benchmarks.cost.connectors import costs


def test_the_releases_connector_costs_what_the_paper_says() -> None:
    """11.877 GMAC of its linear layers (specification, section 8), and its attention besides; 88,504,320 parameters."""
    found = costs(num_words=16)
    released = found["tomeformer, as released (19 merges a layer)"]
    assert released.parameters == 88_504_320 - 768  # BERT's second token type, which is never read
    assert released.tokens == 29
    assert 11.877e9 < released.connector / 6 < 1.1 * 11.877e9
    assert found["the same without merging"].tokens == 257
    assert released.step == released.connector + released.language + released.tower
    cached = costs(num_words=16, tower_cached=True)["tome"]
    assert cached.tower == 0 and cached.connector == found["tome"].connector
    assert found["tome"].language == pytest.approx(released.language, rel=1e-9)
