"""The page in a real browser: a picture is dropped, captioned, asked about, searched for, on a desk and on a phone.

With OPENFLM_SCREENSHOTS=DIR pictures of the page are kept there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="serving needs its packages: pip install '.[serve]'")
pytest.importorskip("fastapi", reason="serving needs its packages: pip install '.[serve]'")

from tests.browser.chromium import Chromium, browser  # noqa: E402
from tests.pipeline.serving.serving import Served, picture, served  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        browser() is None, reason="no Chromium: apt-get install chromium (scripts/setup.sh --test-tools)"
    ),
]
TOKEN = "0123456789abcdef"
CAPTION = "a red thing on a quiet background"
TEXT = "document.getElementById({!r}).innerText.trim()"
PRESSED = "document.getElementById('merges').getAttribute('aria-pressed')"
OVERLAY = "document.getElementById('overlay').classList.contains('shown')"
SHOWN_RESULTS = "[...document.querySelectorAll('#results img')].filter(one => one.naturalWidth > 0).length"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number, colour in enumerate(("red", "green", "blue")):
        (folder / f"{number}.png").write_bytes(picture(colour, (400, 300)))
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, files: Path) -> Iterator[Served]:
    run = tmp_path_factory.mktemp("run")
    with served(run, "--search", str(files), environment={"SECONDS_A_WORD": "0.05"}) as one:
        yield one


@pytest.fixture
def page(tmp_path: Path, server: Served) -> Iterator[Chromium]:
    """The page as the server shows it; afterwards: no error in the console, nothing asked of another host."""
    chromium = Chromium(browser(), tmp_path / "profile")
    try:
        chromium.resize(1200, 900)
        visit(chromium, server)
        yield chromium
        assert chromium.errors == []
        ours = (f"http://127.0.0.1:{server.port}/", f"blob:http://127.0.0.1:{server.port}/", "data:", "about:")
        assert [one for one in chromium.requests if not one.startswith(ours)] == []
    finally:
        chromium.close()


def visit(chromium: Chromium, server: Served) -> None:
    chromium.visit(f"http://127.0.0.1:{server.port}/")
    chromium.wait("!document.getElementById('desk').hidden || !document.getElementById('entry').hidden")


def keep(chromium: Chromium, name: str) -> None:
    if folder := os.environ.get("OPENFLM_SCREENSHOTS"):
        Path(folder).mkdir(exist_ok=True)
        chromium.photograph(Path(folder, f"{name}.png"))


def overflow(chromium: Chromium) -> int:
    """Pixels by which the page is wider than its window."""
    return chromium.run("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def test_a_dropped_picture_is_captioned_and_its_words_point_into_it(page: Chromium, files: Path) -> None:
    page.run(
        "window.seen = []; new MutationObserver(() => seen.push(document.getElementById('caption').innerText))"
        ".observe(document.getElementById('caption'), {childList: true, subtree: true, characterData: true})"
    )
    page.drop(files / "0.png", "#stage")
    page.wait("document.querySelectorAll('#caption button').length === 7")
    assert page.run(TEXT.format("caption")) == page.run(TEXT.format("spoken")) == CAPTION
    seen = page.run("seen")
    assert {"a", "a red", "a red thing"} <= set(seen), seen  # word by word
    keep(page, "caption")
    page.point("#caption button:nth-of-type(3)")
    page.wait(OVERLAY)
    dark = "document.getElementById('overlay').getContext('2d').getImageData({}, {}, 1, 1).data[3]"
    page.wait(f"{dark.format(5, 5)} > 150")  # outside of the square that the model sees
    shades = [
        page.run(dark.format(f"overlay.width * {x}", f"overlay.height * {y}")) for x, y in ((0.35, 0.4), (0.8, 0.9))
    ]
    assert shades[0] < shades[1]  # the third word looked at places 6 of 0 to 15, row by row
    keep(page, "word")
    page.point("h1")
    page.wait(f"!{OVERLAY}")


def test_a_question_a_search_and_merged_patches(page: Chromium, files: Path) -> None:
    page.drop(files / "0.png", "#stage")
    page.wait("document.querySelectorAll('#caption button').length === 7")
    page.click("#question")
    page.write("What colour is it?")
    page.press("Enter", 13, "\r")
    page.wait("!!document.querySelector('#answers dd')")
    assert page.run(TEXT.format("answers")).split("\n") == ["What colour is it?", "red75 %"]
    page.click("#merges")
    page.wait(f"{OVERLAY} && {PRESSED} === 'true'")
    assert page.run(TEXT.format("merged")) == "16 patches became 6"
    page.wait(f"{TEXT.format('indexed')} === '3 pictures'")
    page.click("#sentence")
    page.write("something blue")
    page.press("Enter", 13, "\r")
    page.wait(f"{SHOWN_RESULTS} === 3")
    keep(page, "all")
    page.prefer(prefers_color_scheme="dark")
    keep(page, "dark")
    assert page.run("document.querySelector('#results button').title") == "2.png"
    page.click("#results button")
    page.wait(f"{TEXT.format('caption')} === 'a blue thing on a quiet background'")
    assert page.run(PRESSED) == "false" and page.run(TEXT.format("answers")) == ""


def test_by_keyboard_alone(page: Chromium) -> None:
    """Everything that can be used is reached by Tab, shows that it has the focus, and has a name."""
    reached = []
    for _ in range(5):
        page.press("Tab", 9)
        name, is_outlined = page.run(
            "(() => { const one = document.activeElement, { outlineStyle, outlineWidth } = getComputedStyle(one);"
            " return [one.id || one.textContent.trim(), outlineStyle !== 'none' && outlineWidth !== '0px']; })()"
        )
        reached.append(name)
        assert is_outlined, f"{name} does not show the focus"
    assert reached == ["choose", "question", "sentence", "Search", "Endpoints for programs"]
    nameless = page.run(
        "[...document.querySelectorAll('input:not([hidden]), button')].filter(one => !(one.labels && one.labels.length)"
        " && !one.textContent.trim() && !one.getAttribute('aria-label')).map(one => one.outerHTML)"
    )
    assert nameless == []


def test_words_by_keyboard(page: Chromium, files: Path) -> None:
    page.drop(files / "1.png", "#stage")
    page.wait("document.querySelectorAll('#caption button').length === 7")
    page.run("document.querySelector('#replace').focus()")
    page.press("Tab", 9)
    assert page.run("document.activeElement.textContent") == "a"
    page.wait(OVERLAY)
    page.press("Escape", 27)
    page.wait(f"!{OVERLAY}")
    page.run("document.getElementById('merges').focus()")
    page.press(" ", 32, " ")
    page.wait(f"{PRESSED} === 'true'")


def test_a_phone_of_400_px_shows_all_of_it(page: Chromium, server: Served, files: Path) -> None:
    page.resize(400, 800, is_phone=True)
    visit(page, server)
    assert overflow(page) == 0
    keep(page, "phone_empty")
    page.drop(files / "0.png", "#stage")
    page.wait("document.querySelectorAll('#caption button').length === 7")
    page.run(
        "document.getElementById('sentence').value = 'green'; document.querySelector('#search-form button').click()"
    )
    page.wait(f"{SHOWN_RESULTS} === 3")
    keep(page, "phone")
    small = page.run(
        "[...document.querySelectorAll('button, input')].filter(one => one.offsetParent && !one.closest('#caption')"
        " && one.getBoundingClientRect().height < 40).map(one => one.outerHTML)"
    )
    assert overflow(page) == 0 and small == []  # large enough for a finger
    page.visit(f"http://127.0.0.1:{server.port}/docs")
    assert overflow(page) == 0


def test_what_is_no_picture_is_said_in_plain_words(page: Chromium, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("no picture")
    page.drop(tmp_path / "x.txt", "#stage")
    page.wait(f"{TEXT.format('error')} === 'This file is no picture that a browser can show.'")


def test_a_token_is_asked_for_once(tmp_path: Path, files: Path) -> None:
    with served(tmp_path, "--token", TOKEN, "--search", str(files)) as server:
        chromium = Chromium(browser(), tmp_path / "profile")
        try:
            visit(chromium, server)
            chromium.click("#token")
            chromium.write(TOKEN)
            chromium.press("Enter", 13, "\r")
            chromium.wait("!document.getElementById('desk').hidden")
            chromium.drop(files / "0.png", "#stage")
            chromium.wait(f"{TEXT.format('caption')} === {CAPTION!r}")
            chromium.run(
                "document.getElementById('sentence').value = 'x'; document.querySelector('#search-form button').click()"
            )
            chromium.wait(f"{SHOWN_RESULTS} === 3")
        finally:
            chromium.close()
