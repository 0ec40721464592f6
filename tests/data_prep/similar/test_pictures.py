"""What a hash is of, which images have none, which copies it finds."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_prep.similar import pictures
from data_prep.similar.pictures import (
    GREY_BYTES,
    MIN_CORRELATION,
    SIDE,
    Look,
    correlations,
    hashes_of,
    looks,
    picture_of,
    same_colours,
    tells_enough,
)
from tests.data_prep.similar.photos import cropped, jpeg, photo, png

MAX_PIXELS = 10**7


def picture(image, encode=png):
    return picture_of(encode(image), MAX_PIXELS)[None]


def is_like(one, other, views, distance=8):
    """Whether ``other`` is found as a copy of ``one``."""
    target = hashes_of(other)
    return any(
        int(np.bitwise_count(hashes_of(one, view) ^ target)[0]) <= distance
        and correlations(one, other, view)[0] >= MIN_CORRELATION
        and same_colours(one, other, view)[0]
        for view in views
    )


def test_the_hash_is_the_signs_of_the_lowest_frequencies():
    """Against the transform summed term by term, in the order of rising frequency; the first is the highest bit."""
    shown = picture(photo(1))
    grey = shown[0, :GREY_BYTES].reshape(SIDE, SIDE).astype(float)
    place = np.arange(SIDE)
    pairs = sorted(((u, v) for u in range(SIDE) for v in range(SIDE)), key=lambda pair: (sum(pair), pair[0]))[1:65]
    expected = 0
    for u, v in pairs:
        along = np.cos(np.pi * (2 * place + 1) * u / 64)[:, None] * np.cos(np.pi * (2 * place + 1) * v / 64)
        value = (grey * along).sum()
        assert abs(value) > 32 * 32 * 255 / 2**11 / 4  # far from what rounding the cosines changes
        expected = expected * 2 + int(value > 0)
    assert int(hashes_of(shown)[0]) == expected


def test_a_hash_is_of_whole_numbers():
    """imagehash's values vary with the platform; ours are sums of whole numbers that a float64 holds exactly."""
    extremes = np.zeros((2, 1152), np.uint8)
    extremes[0, :GREY_BYTES] = 255
    extremes[1, :GREY_BYTES].reshape(SIDE, SIDE)[::2] = 255
    for view in looks(crops=True, mirrored=True):
        levels = pictures._looked_at(extremes, view)
        assert np.array_equal(levels, np.round(levels))
        assert levels.max() * SIDE**2 * pictures._COSINE_SCALE**2 < 2**53


@pytest.mark.parametrize("view", looks(crops=True, mirrored=True)[1::5])
def test_a_look_is_the_window_of_the_picture(view):
    shown = picture(photo(2))
    fine = np.kron(shown[0, :GREY_BYTES].reshape(SIDE, SIDE).astype(float), np.ones((40, 40)))
    fine = fine[:, ::-1] if view.mirrored else fine
    padded = np.pad(fine, SIDE * 4, mode="edge")
    (top, bottom), (left, right) = ((SIDE * (4 + end) for end in window) for window in (view.rows, view.columns))
    window = padded[top:bottom, left:right]
    expected = window.reshape(SIDE, (bottom - top) // SIDE, SIDE, (right - left) // SIDE).sum(axis=(1, 3))
    assert np.array_equal(pictures._looked_at(shown, view)[0], expected)


def drawings():
    """Images of which all have the same look to a hash."""
    flat = Image.new("RGB", (300, 200), (12, 80, 160))
    half = Image.new("L", (300, 200), 20)
    half.paste(230, (150, 0, 300, 200))
    text = Image.new("L", (300, 200), 255)
    ImageDraw.Draw(text).text((60, 90), "This photo is no longer available", fill=0)
    disc = Image.new("L", (300, 300), 255)
    ImageDraw.Draw(disc).ellipse((80, 80, 220, 220), fill=0)
    board = Image.fromarray(np.kron(np.indices((8, 8)).sum(axis=0) % 2 * 255, np.ones((32, 32))).astype(np.uint8))
    sky = Image.linear_gradient("L").resize((320, 240))
    return {"flat": flat, "half": half, "text": text, "disc": disc, "board": board, "sky": sky}


@pytest.mark.parametrize("name", drawings())
@pytest.mark.parametrize("encode", [png, jpeg])
def test_flat_and_two_tone_images_have_no_hash(name, encode):
    """czkawka, sourcelibrary: they collide at distance 0."""
    assert not tells_enough(picture(drawings()[name].convert("RGB"), encode))[0]


def test_photographs_have_a_hash():
    assert all(tells_enough(picture(photo(seed)))[0] for seed in range(20))


COPIES = {
    "the same": lambda image: jpeg(image, 95),
    "quality 30": lambda image: jpeg(image, 30),
    "half the size": lambda image: jpeg(image.resize((160, 120))),
    "square of 224": lambda image: jpeg(image.resize((224, 224))),
    "left 5 % off": lambda image: jpeg(cropped(image, left=0.05)),
    "a corner's 5 % off": lambda image: jpeg(cropped(image, left=0.05, bottom=0.05), 60),
    "5 % of each side off": lambda image: jpeg(cropped(image, 0.05, 0.05, 0.05, 0.05), 60),
    "somewhere in it": lambda image: jpeg(cropped(image, 0.01, 0.04, 0.035, 0.005).resize((280, 200)), 45),
}


@pytest.mark.parametrize("kind", COPIES)
def test_copies_are_found(kind):
    """imagededup: crops are missed. Here a copy with 5 % cut off is looked for as such."""
    views = looks(crops=True, mirrored=False)
    for seed in range(10):
        copy = picture_of(COPIES[kind](photo(seed)), MAX_PIXELS)[None]
        assert is_like(picture(photo(seed), jpeg), copy, views), seed


def test_the_larger_of_two_copies_may_be_the_one_to_check():
    views = looks(crops=True, mirrored=False)
    found = [is_like(picture(cropped(photo(seed), left=0.05)), picture(photo(seed)), views) for seed in range(20)]
    assert sum(found) >= 18


def test_mirrored_copies_are_found_if_asked():
    original, mirrored = photo(3), photo(3).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert not is_like(picture(original), picture(mirrored, jpeg), looks(crops=True, mirrored=False))
    assert is_like(picture(original), picture(mirrored, jpeg), looks(crops=True, mirrored=True))
    off = cropped(mirrored, right=0.05)
    assert is_like(picture(original), picture(off, jpeg), looks(crops=True, mirrored=True))


def test_unlike_photographs_are_not_alike():
    views = looks(crops=True, mirrored=True)
    shown = [picture(photo(seed)) for seed in range(6)]
    assert not any(is_like(one, other, views) for one in shown for other in shown if one is not other)


def test_other_colours_are_another_image_and_grey_is_any():
    image = photo(4)
    turned = Image.merge("RGB", image.split()[::-1])
    strong = [Image.blend(image, Image.new("RGB", image.size, tint), 0.3) for tint in ("red", "blue")]
    assert same_colours(picture(image), picture(image.convert("L")))[0]
    assert not same_colours(picture(strong[0]), picture(strong[1]))[0]
    assert correlations(picture(image), picture(turned))[0] > 0.3


def test_a_picture_is_of_the_upright_image():
    turned = photo(5).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 270 degrees
    stream = io.BytesIO()
    turned.save(stream, "JPEG", quality=95, exif=exif)
    shown = picture_of(stream.getvalue(), MAX_PIXELS)[None]
    assert is_like(picture(photo(5)), shown, [Look()], distance=2)
