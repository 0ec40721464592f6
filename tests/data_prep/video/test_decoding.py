"""Clips against frames known by construction: which frame is which, how many there are, and what is refused why."""

from __future__ import annotations

import random
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from data_prep.images import ImageProblem
from data_prep.video import decoding
from data_prep.video.containers import container_of
from data_prep.video.decoding import ClipLimits, DecoderMissing, check_clip, read_frames
from tests.numbered_clips import CODECS, HEIGHT, WIDTH, clip, number_of, turned

VARIABLE = [0, 10, 20, 30, 1000, 1010, 1020, 3000, 3010, 3020, 3030, 5000]  # ms: 2.2 frames a second on average


def numbers(data: bytes, wanted: list[int] | None = None, counted: int | None = None) -> list[int]:
    return [number_of(one) for one in read_frames(data, lambda n: range(n) if wanted is None else wanted, counted)]


def reason(data: bytes, **limits: int) -> str:
    with pytest.raises(ImageProblem) as refused:
        check_clip(data, ClipLimits(**limits))
    return refused.value.reason


@pytest.mark.parametrize(("container", "extension"), [*zip(CODECS, ("mp4", "mov", "webm", "mkv", "avi"))])
def test_every_frame_of_every_container(container: str, extension: str) -> None:
    """WebM and Matroska do not say how many frames they hold; nobody is asked."""
    data = clip(30, container)
    assert check_clip(data, ClipLimits()) == (extension, 30, WIDTH, HEIGHT, 3.0)
    assert numbers(data) == list(range(30))
    assert numbers(data, [29, 3, 3, 17]) == [29, 3, 3, 17]


@pytest.mark.parametrize("container", ["mp4", "webm"])
def test_frames_of_variable_rate_are_counted_not_timed(container: str) -> None:
    data = clip(12, container, times=VARIABLE)
    assert check_clip(data, ClipLimits()).num_frames == 12
    assert numbers(data, [0, 4, 7, 11]) == [0, 4, 7, 11]


def test_one_frame_is_a_clip() -> None:
    data = clip(1)
    assert check_clip(data, ClipLimits()).num_frames == 1
    assert numbers(data, [0, 0, 0, 0]) == [0, 0, 0, 0]


def test_a_wrong_count_is_noticed() -> None:
    """Where the clip has fewer frames than was said, those that it has are chosen from."""
    chosen = []
    data = clip(6)
    found = read_frames(data, lambda n: chosen.append(n) or [n - 1], num_frames=9)
    assert [number_of(one) for one in found] == [5] and chosen == [9, 6]
    assert numbers(data, None, 10**15) == list(range(6)), "a number that no clip may have is not asked about"


def test_rotation_is_applied() -> None:
    """By a quarter turn clockwise the left column becomes the top row."""
    data = turned(clip(3))
    assert check_clip(data, ClipLimits())[2:4] == (HEIGHT, WIDTH)
    for number, image in enumerate(read_frames(data, lambda n: range(n))):
        assert image.size == (HEIGHT, WIDTH) and image.mode == "RGB"
        assert number_of(image.transpose(Image.Transpose.ROTATE_90)) == number, "turned back it is upright"


def test_a_clip_is_used_as_far_as_it_decodes(tmp_path: Path) -> None:
    """Down to half of the announced length; what is left are the first frames; H.264 may lose some of the last."""
    data = clip(60, beginning=tmp_path / "a.mp4")
    media = data.index(b"mdat")
    reached = {}
    for share in (0.2, 0.4, 0.8, 0.95):
        cut = data[: media + int(share * (len(data) - media))]
        try:
            reached[share] = check_clip(cut, ClipLimits()).num_frames
            found = numbers(cut)
            assert found[:20] == list(range(20)) and found == sorted(set(found)), "frames between others may be lost"
        except ImageProblem as error:
            reached[share] = error.reason
    assert reached[0.2] in ("truncated_video", "undecodable_video")
    assert 30 <= reached[0.8] < reached[0.95] < 60


def test_a_cut_webm_is_measured_by_the_length_of_the_whole() -> None:
    data = clip(60, "webm")
    assert reason(data[: len(data) // 4]) in ("truncated_video", "undecodable_video")
    assert 30 <= check_clip(data[: int(0.9 * len(data))], ClipLimits()).num_frames < 60


def test_damage_in_the_middle_costs_the_frames_that_it_hits() -> None:
    data = bytearray(clip(40, "avi"))
    for place in range(len(data) // 2, len(data) // 2 + 60):
        data[place] ^= 0xA5
    found = check_clip(bytes(data), ClipLimits()).num_frames
    assert 30 <= found <= 40


def test_what_is_no_clip() -> None:
    whole = clip(8)
    assert reason(b"") == "empty_video"
    assert reason(b"<html><title>404 Not Found</title></html>") == "not_a_video"
    assert reason(b"#EXTM3U\nhttp://127.0.0.1/other.mp4\n") == "not_a_video", "playlists name further files"
    assert reason(clip(0, sound_seconds=1)) == "no_video_stream"
    assert reason(whole[: len(whole) // 2]) in ("undecodable_video", "no_video_stream"), "its tables stood at the end"
    assert reason(clip(8, "webm")[:200]) == "undecodable_video"
    assert check_clip(clip(8, sound_seconds=1), ClipLimits()).num_frames == 8


def test_bounds() -> None:
    data = clip(12)
    assert reason(data, max_video_bytes=len(data) - 1) == "video_bytes_too_large"
    assert reason(data, max_pixels=WIDTH * HEIGHT - 1) == "too_many_pixels"
    assert reason(data, max_frames=11) == "too_many_frames"
    assert reason(data, min_side=49) == "image_too_small"
    exact = ClipLimits(WIDTH * HEIGHT, len(data), 12, 48)
    assert check_clip(data, exact).num_frames == 12
    with pytest.raises(ImageProblem, match="too_many_pixels"):
        read_frames(data, lambda n: [0], max_pixels=WIDTH * HEIGHT - 1)


def test_pixels_of_all_frames_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_CLIP_PIXELS", 5 * WIDTH * HEIGHT)
    assert reason(clip(6)) == "too_many_frames"
    assert check_clip(clip(5), ClipLimits()).num_frames == 5


def test_packets_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_PACKETS", 5)
    assert reason(clip(12)) == "too_many_frames"


def test_tables_that_announce_too_much_are_refused_unread() -> None:
    """Four bytes say how many frames there are, and the demuxer would take memory for each."""
    data = clip(8)
    place = data.index(b"stsz") + 12
    assert int.from_bytes(data[place : place + 4], "big") == 8
    assert reason(data[:place] + (1 << 31).to_bytes(4, "big") + data[place + 4 :]) == "too_many_frames"
    run = b"\0\0\0\0" + (1 << 31).to_bytes(4, "big")
    fragment = _box(b"moof", _box(b"traf", _box(b"trun", run)))
    assert reason(data + fragment) == "too_many_frames"
    assert reason(_box(b"ftyp", b"isom") + _box(b"moov", _box(b"cmov", b"")) + data) == "undecodable_video"
    assert reason(data[:40] + _box(b"free", b"") * 100_001) == "too_many_parts"


def _box(kind: bytes, content: bytes) -> bytes:
    return (8 + len(content)).to_bytes(4, "big") + kind + content


def test_pixels_that_become_no_image_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where FFmpeg can't convert a frame, preparing and training say so alike."""
    import av

    data = clip(4)
    monkeypatch.setattr(decoding, "require_decoder", lambda: _Refusing(av))
    assert reason(data) == "undecodable_video"
    with pytest.raises(ImageProblem, match="pixels of format yuv420p"):
        read_frames(data, lambda n: [0], 4)


class _Refusing:
    """PyAV, whose frames refuse to become images."""

    def __init__(self, av: object) -> None:
        self.error, self.stream, self._av = av.error, av.stream, av

    @contextmanager
    def open(self, *arguments: object, **options: object):
        with self._av.open(*arguments, **options) as container:
            yield _Container(container)


class _Container:
    def __init__(self, container: object) -> None:
        self.streams, self.duration, self._container = container.streams, container.duration, container

    def demux(self, stream: object):
        for packet in self._container.demux(stream):
            yield SimpleNamespace(decode=lambda packet=packet: [_frame(one) for one in packet.decode()])


def _frame(frame: object) -> SimpleNamespace:
    def refuse() -> None:
        raise ValueError("no conversion")

    names = ("width", "height", "pts", "time_base", "duration", "rotation", "format")
    return SimpleNamespace(**{name: getattr(frame, name) for name in names}, to_image=refuse)


def test_containers_are_told_by_their_first_bytes() -> None:
    assert [container_of(clip(1, one))[1] for one in CODECS] == ["mp4", "mov", "webm", "mkv", "avi"]
    assert container_of(b"\xff\xd8\xff\xe0 a JPEG") is None


@pytest.mark.slow
@pytest.mark.parametrize("container", list(CODECS))
def test_damage_anywhere_is_a_clip_or_a_reason(container: str) -> None:
    data, generator = clip(8, container), random.Random(0)
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(generator.randrange(1, 12)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        for work in (lambda d: check_clip(d, ClipLimits()), lambda d: read_frames(d, lambda n: [0, n - 1], 8)):
            try:
                work(bytes(damaged))
            except ImageProblem as error:
                assert "\n" not in str(error)


def test_without_a_decoder_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = clip(1)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DecoderMissing, match="needs PyAV, which is not here; run: pip install av=="):
        check_clip(data, ClipLimits())
