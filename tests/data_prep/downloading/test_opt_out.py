"""Which headers of a server forbid the use of its images."""

from __future__ import annotations

from email.message import Message

import pytest

from data_prep.downloading.courtesy import DISALLOW, Courtesy
from data_prep.downloading.opt_out import disallowed_by

AGENT = "lab-crawler/2.0 (+https://lab.test/crawler)"


def headers(*values: str, name: str = "X-Robots-Tag") -> Message:
    message = Message()
    for value in values:
        message[name] = value
    return message


@pytest.mark.parametrize(
    ("values", "forbidden"),
    [
        (["noai"], True),
        (["NoAI , nosnippet"], True),
        (["nosnippet", "noimageai"], True),  # two headers
        (["none"], True),  # noindex, nofollow
        (["lab-crawler: noai"], True),
        (["Lab-Crawler:noindex,nofollow"], True),
        (["*: noindex"], True),
        (["max-image-preview: large, noai"], True),
        (["unavailable_after: 25 Jun 2030 15:00:00 PST, noindex"], True),
        (["unavailable_after: Wednesday, 03-Apr-30 15:00:00 GMT, noai"], True),
        (["otherbot: nofollow, lab-crawler: noai"], True),
        (["otherbot: noai, noindex"], False),
        (["lab-crawler: nosnippet, otherbot: noai"], False),
        (["nosnippet, notranslate"], False),
        (["max-snippet: -1, max-video-preview: -1"], False),
        (["", ":", ",,:,"], False),
        ([], False),
    ],
)
def test_directives_for_us_count(values: list[str], forbidden: bool) -> None:
    found = disallowed_by(headers(*values), DISALLOW, AGENT)
    assert found == ("X-Robots-Tag" if forbidden else None)
    assert disallowed_by(headers(*values), (), AGENT) is None


def test_the_reservation_of_text_and_data_mining_counts_where_it_is_asked_for() -> None:
    reserved = headers("1", name="tdm-reservation")
    assert disallowed_by(reserved, DISALLOW, AGENT) is None
    assert disallowed_by(reserved, ("TDM-Reservation",), AGENT) == "TDM-Reservation"
    assert disallowed_by(headers("0", name="tdm-reservation"), ("tdm-reservation",), AGENT) is None


def test_requests_say_who_asks_and_what_is_read() -> None:
    sent = Courtesy(user_agent=AGENT).headers()
    assert sent["User-Agent"] == AGENT and "image/webp" in sent["Accept"]
    assert "Mozilla" not in Courtesy().headers()["User-Agent"]
