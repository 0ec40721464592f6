"""How URLs and redirects are read, against urllib's reading; which addresses are public, against other spellings."""

from __future__ import annotations

import ipaddress
import re
import socket
from email.message import Message
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import Request

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.downloading import addresses
from data_prep.downloading.addresses import FetchError, is_public, may_be_public, redirected, resolve, split_url, url_of
from data_prep.downloading.bounded_http import retry_after

HOSTS = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?(\.[a-z0-9]{1,10}){0,3}", fullmatch=True)
PLAIN = st.text("abcXYZ019-._~!$&'()*+,;=:@/%41", max_size=30)  # what a URL may hold as it is


@given(st.sampled_from(["http", "https"]), HOSTS, st.none() | st.integers(1, 65535), PLAIN, st.none() | PLAIN)
def test_plain_urls_are_read_as_urllib_reads_them(scheme: str, host: str, port, path: str, query) -> None:
    url = f"{scheme}://{host}{'' if port is None else f':{port}'}/{path}{'' if query is None else f'?{query}'}"
    found = split_url(url + "#fragment")
    request = Request(url)
    assert found[0] == request.type and found[3] == request.selector.removesuffix("?")
    assert found[1:3] == (host, port or {"http": 80, "https": 443}[scheme])
    assert split_url(url_of(*found)) == found  # a redirect to where we are


@given(st.text(max_size=60))
def test_whatever_stands_in_a_table_is_an_address_or_refused(text: str) -> None:
    for url in (text, f"http://{text}", f"http://a.test/{text}", f"http://a.test/?{text}"):
        try:
            scheme, host, port, target = split_url(url)
        except FetchError as error:
            assert str(error).startswith("address is not http(s)")
            continue
        assert scheme in ("http", "https") and host and host.isascii() and 0 < port < 65536
        assert re.fullmatch(r"/[!-~]*", target), "what would end the request line, or is no ASCII"
        assert not re.search(r"[\s\\%<>@/]", host)


@given(st.text(max_size=30))
def test_what_is_percent_encoded_is_what_was_written(path: str) -> None:
    url = f"http://a.test/{path}"
    try:
        target = split_url(url)[3]
    except FetchError:
        return
    written = urlsplit(url.strip())
    plain = written.path + (f"?{written.query}" if written.query else "")
    assert unquote(target) == unquote(plain)


@given(st.text(max_size=40))
def test_redirects_are_joined_as_urllib_joins_them(location: str) -> None:
    base = "http://a.test/b/c?d"
    try:
        expected = urljoin(base, location.strip())
    except ValueError:
        with pytest.raises(FetchError, match="not http"):
            redirected(base, location)
        return
    on_the_wire = location.encode("utf-8", "surrogatepass").decode("latin-1")
    if not any("\ud800" <= letter <= "\udfff" for letter in location):
        assert redirected(base, on_the_wire) == expected


def test_letters_of_a_location_are_utf8_or_else_latin1() -> None:
    for raw in ("/ü.jpg".encode(), "/ü.jpg".encode("latin-1")):
        assert split_url(redirected("http://a.test/", raw.decode("latin-1")))[3] == "/%C3%BC.jpg"


@pytest.mark.parametrize(
    ("base", "location", "expected"),
    [
        ("http://a.test/b/c", "d", "http://a.test/b/d"),
        ("http://a.test/b/c", "../d?e", "http://a.test/d?e"),
        ("http://a.test/b/c", "//c.test/d", "http://c.test/d"),
        ("https://a.test:8443/b", "?d", "https://a.test:8443/b?d"),
        ("http://a.test/b", "#d", "http://a.test/b#d"),
        ("http://a.test/b", "", "http://a.test/b"),
    ],
)
def test_relative_redirects(base: str, location: str, expected: str) -> None:
    assert redirected(base, location) == expected


@pytest.mark.parametrize(
    "url",
    ["http://h:0/", "http://h:65536/", "http://h:-1/", "http://[fe80::1%25eth0]/", "http://a%2fb/", "http://\ud800/x"],
)
def test_odd_hosts_and_ports_are_refused(url: str) -> None:
    with pytest.raises(FetchError, match="not http"):
        split_url(url)


def test_a_label_that_is_too_long_is_a_bad_address_and_not_the_resolvers_fault() -> None:
    for host in ("x" * 70 + ".test", "ü" * 70 + ".test"):
        with pytest.raises(FetchError, match="not http"):
            resolve(split_url(f"http://{host}/")[1], 80, 10.0, allow_private=False)


@given(st.integers(0, 2**32 - 1), st.sampled_from(["decimal", "hex", "octal", "dotted hex", "dotted octal", "short"]))
def test_other_spellings_of_an_address_are_judged_as_the_address(number: int, form: str) -> None:
    """A resolver takes 2130706433, 0x7f000001, 017700000001, 0x7f.0.0.1, 127.1: all of them 127.0.0.1."""
    octets = number.to_bytes(4)
    spelled = {
        "decimal": str(number),
        "hex": hex(number),
        "octal": f"0{number:o}",
        "dotted hex": ".".join(map(hex, octets)),
        "dotted octal": ".".join(f"0{octet:o}" for octet in octets),
        "short": f"{octets[0]}.{number & 0xFFFFFF}",
    }[form]
    address = str(ipaddress.IPv4Address(number))
    assert may_be_public(split_url(f"http://{spelled}/")[1]) == is_public(address)
    if not is_public(address):
        with pytest.raises(FetchError, match="private address"):
            resolve(split_url(f"http://{spelled}/")[1], 80, 10.0, allow_private=False)


@given(st.ip_addresses(v=4))
def test_an_address_within_another_is_judged_as_the_inner_one(inner: ipaddress.IPv4Address) -> None:
    for prefix in ("::ffff:0:0", "64:ff9b::"):  # mapped, NAT64
        outer = ipaddress.IPv6Address(int(ipaddress.IPv6Address(prefix)) + int(inner))
        assert is_public(str(outer)) == is_public(str(inner))
    assert is_public(str(ipaddress.IPv6Address((0x2002 << 112) + (int(inner) << 80)))) == is_public(str(inner))  # 6to4
    for prefix in ("::", "::ffff:0:0:0", "64:ff9b:1::", "fe80::", "fc00::", "fec0::", "ff02::"):  # routed by nobody
        assert not is_public(str(ipaddress.IPv6Address(int(ipaddress.IPv6Address(prefix)) + int(inner))))


@given(st.ip_addresses())
def test_a_public_address_is_one_that_python_calls_global(address) -> None:
    assert not is_public(str(address)) or address.is_global
    assert is_public(str(address)) == is_public(f"{address}%eth0")


@pytest.mark.parametrize("host", ["①②⑦.0.0.1", "127。0。0。1", "１２７.0.0.1", "localhost.", "LOCALHOST"])
def test_names_that_become_this_machine_are_refused(host: str) -> None:
    with pytest.raises(FetchError, match="private address"):
        resolve(split_url(f"http://{host}/")[1], 80, 10.0, allow_private=False)


def test_of_a_names_addresses_only_public_ones_are_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = ["10.0.0.1", "93.184.216.34", "169.254.169.254", "2606:2800:220:1::", "::1"]
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in answers]
    monkeypatch.setattr(addresses.socket, "getaddrinfo", lambda *_, **__: found)
    assert [one[4][0] for one in resolve("a.test", 80, 10.0, False)] == ["93.184.216.34", "2606:2800:220:1::"]
    assert len(resolve("a.test", 80, 10.0, allow_private=True)) == addresses.MAX_ADDRESSES


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("120", 120.0),
        (" 0 ", 0.0),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 7.0),
        ("Sun, 06 Nov 1994 08:49:00 GMT", 0.0),  # gone by
        ("9" * 400, 999_999_999.0),
        ("-5", None),
        ("1.5", None),
        ("soon", None),
        ("", None),
        ("٣", None),
    ],
)
def test_retry_after_is_a_number_or_a_date(value: str, seconds: float | None) -> None:
    headers = Message()
    headers["Retry-After"] = value
    assert retry_after(headers, 784111770.0) == seconds


def test_no_retry_after_is_none() -> None:
    assert retry_after(Message(), 0.0) is None
