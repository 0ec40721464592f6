"""Clips whose frames show their own number, for tests of which frame was decoded."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

BITS, WIDTH, HEIGHT = 8, 64, 48
CODECS = {  # container -> encoder, pixel format
    "mp4": ("libx264", "yuv420p"),
    "mov": ("mjpeg", "yuvj420p"),
    "webm": ("libvpx", "yuv420p"),
    "matroska": ("libx264", "yuv420p"),
    "avi": ("mpeg4", "yuv420p"),
}
MILLISECOND = Fraction(1, 1000)


def picture(number: int) -> np.ndarray:
    """uint8 [48, 64, 3]: the bits of ``number`` as stripes from the left, the lowest first, white for 1."""
    bits = [255 * (number >> bit & 1) for bit in range(BITS)]
    return np.repeat(np.repeat(np.uint8(bits), WIDTH // BITS)[None, :, None], HEIGHT, 0).repeat(3, 2)


def number_of(image: Image.Image) -> int:
    """What ``picture`` the image shows."""
    middle = [image.getpixel((WIDTH // BITS * bit + WIDTH // BITS // 2, HEIGHT // 2))[0] for bit in range(BITS)]
    return sum((level > 127) << bit for bit, level in enumerate(middle))


def clip(
    count: int = 12,
    container: str = "mp4",
    times: Sequence[int] | None = None,
    sound_seconds: float = 0,
    beginning: Path | None = None,
    first: int = 0,
) -> bytes:
    """``count`` frames from number ``first`` on, 100 ms each or shown at ``times`` in ms, and so much silence (MP4).

    The tables of an MP4 stand at its end, or where it is written to the file ``beginning`` at its beginning.
    """
    codec, pixel_format = CODECS[container]
    stream = io.BytesIO()
    options = {"fflags": "+bitexact"} | ({"movflags": "+faststart"} if beginning else {})  # no random numbers in WebM
    with av.open(str(beginning) if beginning else stream, "w", format=container, options=options) as writer:
        if count:
            video = writer.add_stream(codec, rate=10)
            video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, pixel_format
            video.codec_context.thread_count = 1
            if times is not None:
                video.codec_context.time_base = MILLISECOND
        if sound_seconds:
            sound = writer.add_stream("aac", rate=16000)
            for start in range(0, int(16000 * sound_seconds), 1024):
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
                silence.sample_rate, silence.pts = 16000, start
                writer.mux(sound.encode(silence))
            writer.mux(sound.encode())
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(picture(first + number), format="rgb24")
            frame.pts = number if times is None else times[number]
            if times is not None:
                frame.time_base = MILLISECOND
            writer.mux(video.encode(frame))
        if count:
            writer.mux(video.encode())
    return beginning.read_bytes() if beginning else stream.getvalue()


def turned(data: bytes) -> bytes:
    """An MP4 whose track header asks for a quarter turn clockwise: (p, q) is shown at (-q, p). ISO 14496-12, 8.3.2."""
    place = data.index(b"tkhd") + 4
    place += 40 if data[place] == 0 else 52  # version 1 has times of 64 bits
    matrix = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    return data[:place] + matrix + data[place + 36 :]
