"""Decodes untrusted clips frame by frame: one guard for preparing and for training, which keep the same clips.

A clip is used as far as it decodes: damaged packets are passed over as players do. Frames are counted by decoding them,
in the order in which they are shown, and never by a frame rate or by what the container announces.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from data_prep.images import ImageProblem, check_size
from data_prep.video.containers import check_tables, container_of

if TYPE_CHECKING:
    import av

INSTALL = "pip install av==16.1.0"
MAX_FRAME_PIXELS = 4096 * 2304
MAX_FRAMES = 20_000
MAX_CLIP_PIXELS = 30_000_000_000  # of all frames together: four minutes of 1080p at 60 frames a second
MAX_PACKETS = 2 * MAX_FRAMES  # some hold no frame
MAX_STREAMS = 32
LEAST_SHARE = 0.5  # of the length that the file announces
DECODERS = (
    *("h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg1video", "mpeg2video", "mpeg4", "h263", "mjpeg"),
    *("msmpeg4v1", "msmpeg4v2", "msmpeg4", "wmv1", "wmv2", "ffv1", "rawvideo"),
)
_UPRIGHT = {  # counter-clockwise turn of a frame in degrees that its container asks for
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}

Choose = Callable[[int], Sequence[int]]  # from the number of frames of a clip to the numbers of those that are wanted


class DecoderMissing(ValueError):
    """PyAV is not installed; the message is one line for the user."""


@dataclass(frozen=True)
class ClipLimits:
    """Bounds on the clips that are kept; ``max_pixels`` are of a frame."""

    max_pixels: int = MAX_FRAME_PIXELS
    max_video_bytes: int = 256 * 2**20
    max_frames: int = MAX_FRAMES
    min_side: int = 16


class ClipFacts(NamedTuple):
    """What decoding a clip found: ``extension`` it is stored with, upright ``width`` and ``height`` of its first frame,
    ``seconds`` from its first frame to the end of its last."""

    extension: str
    num_frames: int
    width: int
    height: int
    seconds: float


def require_decoder() -> Any:
    """The module PyAV; raises DecoderMissing with the command that installs it."""
    try:
        import av
    except ImportError:
        raise DecoderMissing(f"decoding videos needs PyAV, which is not here; run: {INSTALL}") from None
    return av


def is_video(data: bytes) -> bool:
    """Whether bytes begin as one of the containers that are read here do."""
    return container_of(data) is not None


def check_clip(data: bytes, limits: ClipLimits) -> ClipFacts:
    """Decode a clip completely and say what it holds.

    Raises ImageProblem with one of the reasons "empty_video", "video_bytes_too_large", "not_a_video",
    "no_video_stream", "undecodable_video", "truncated_video", "too_many_frames", "too_many_parts", "too_many_pixels",
    "image_too_small", "aspect_ratio".
    """
    if len(data) > limits.max_video_bytes:
        raise ImageProblem("video_bytes_too_large", f"{len(data)} bytes")
    decoder = _Decoder(data, limits.max_pixels, limits.max_frames)
    width = height = 0
    for frame in decoder.frames():
        if not width:
            decoder.upright(frame)  # which a pixel format of its own may not let be
            turned = frame.rotation % 180 == 90
            width, height = (frame.height, frame.width) if turned else (frame.width, frame.height)
            if min(width, height) < limits.min_side:
                raise ImageProblem("image_too_small", f"{width}x{height}")
    decoder.check_length()
    assert decoder.extension is not None
    return ClipFacts(decoder.extension, decoder.num_frames, width, height, round(decoder.seconds, 3))


def read_frames(
    data: bytes, choose: Choose, num_frames: int | None = None, max_pixels: int = MAX_FRAME_PIXELS
) -> list[Image.Image]:
    """The frames of a clip that ``choose`` names, in its order, each upright and in mode RGB.

    ``num_frames`` is what decoding found once, or None: then the clip is decoded twice, to count and to take. Where it
    has fewer frames than that, those that it has are counted and chosen from. Raises ImageProblem as ``check_clip``
    does, but for the limits of preparing.
    """
    max_pixels = min(max_pixels, MAX_FRAME_PIXELS)
    if num_frames is not None and num_frames <= MAX_FRAMES:
        found = _taken(data, choose(num_frames), max_pixels)
        if found is not None:
            return found
    decoder = _Decoder(data, max_pixels)
    for _ in decoder.frames():
        pass
    decoder.check_length()
    found = _taken(data, choose(decoder.num_frames), max_pixels)
    if found is None:
        raise ImageProblem("undecodable_video", "decoding it twice gives different frames")
    return found


def _taken(data: bytes, numbers: Sequence[int], max_pixels: int) -> list[Image.Image] | None:
    """The frames ``numbers`` of a clip; None where it has no such frame."""
    wanted, images, decoder = set(numbers), {}, _Decoder(data, max_pixels)
    for number, frame in enumerate(decoder.frames()):
        if number in wanted:
            images[number] = decoder.upright(frame)
            if len(images) == len(wanted):
                return [images[number] for number in numbers]
    return None


class _Decoder:
    """One pass over a clip; counts what it decodes, and ends it at the bounds of this file."""

    def __init__(self, data: bytes, max_pixels: int, max_frames: int = MAX_FRAMES) -> None:
        self._data, self._max_pixels, self._max_frames = data, max_pixels, min(max_frames, MAX_FRAMES)
        self._av = require_decoder()
        self._first = self._end = self._announced = 0.0
        self.num_frames = 0
        self.extension: str | None = None

    @property
    def seconds(self) -> float:
        """From the first frame to the end of the last that was decoded."""
        return max(0.0, self._end - self._first)

    def frames(self) -> Iterator[av.VideoFrame]:
        """The frames in the order in which they are shown; raises ImageProblem, also where there is none."""
        if not self._data:
            raise ImageProblem("empty_video")
        found = container_of(self._data)
        if found is None:
            raise ImageProblem("not_a_video", f"starts with {self._data[:12]!r}")
        demuxer, self.extension = found
        if demuxer == "mov":
            check_tables(self._data)
        options = {"codec_whitelist": ",".join(DECODERS), "max_streams": str(MAX_STREAMS)}
        options["max_pixels"] = str(self._max_pixels)
        try:
            with self._av.open(
                io.BytesIO(self._data), format=demuxer, options=options, metadata_errors="replace"
            ) as clip:
                yield from self._of_stream(clip, self._stream(clip))
        except self._av.error.FFmpegError as error:
            raise ImageProblem("undecodable_video", error.strerror or type(error).__name__) from error
        except (ValueError, MemoryError, ArithmeticError, UnicodeError) as error:  # of PyAV's own, on odd headers
            if isinstance(error, ImageProblem):
                raise
            raise ImageProblem("undecodable_video", " ".join(str(error).split())) from error
        if not self.num_frames:
            raise ImageProblem("undecodable_video", "no frame decodes")

    def upright(self, frame: av.VideoFrame) -> Image.Image:
        """A frame in mode RGB, turned as its container says; turns by other angles than right ones are left out."""
        try:
            image = frame.to_image()
        except (self._av.error.FFmpegError, ValueError, MemoryError) as error:
            raise ImageProblem("undecodable_video", f"pixels of format {frame.format.name}: {error}") from error
        turn = _UPRIGHT.get(frame.rotation % 360)
        return image if turn is None else image.transpose(turn)

    def check_length(self) -> None:
        """Refuse a clip that decodes to less than half of what its video stream, or else its container, announces."""
        if self.seconds < LEAST_SHARE * self._announced:
            raise ImageProblem("truncated_video", f"ends after {self.seconds:.1f} of {self._announced:.1f} s")

    def _stream(self, clip: Any) -> Any:
        covers = self._av.stream.Disposition.attached_pic
        stream = next((one for one in clip.streams.video if not one.disposition & covers), None)
        if stream is None:
            # what kinds they are is not asked: for one that FFmpeg does not know PyAV ends the process
            raise ImageProblem("no_video_stream", f"holds {len(clip.streams)} other streams")
        context = stream.codec_context
        if context is None or context.codec.name not in DECODERS:
            raise ImageProblem("undecodable_video", f"coded as {'?' if context is None else context.codec.name}")
        if context.width and context.height:  # else the first frame says
            check_size(context.width, context.height, self._max_pixels)
        context.thread_count = 1
        context.options = {"max_pixels": str(self._max_pixels)}
        if stream.duration and stream.time_base:
            self._announced = float(stream.duration * stream.time_base)
        elif clip.duration:  # Matroska has one length for all streams, in microseconds here
            self._announced = clip.duration / 1e6
        return stream

    def _of_stream(self, clip: Any, stream: Any) -> Iterator[av.VideoFrame]:
        pixels = 0
        for number, packet in enumerate(self._packets(clip, stream)):
            if number > MAX_PACKETS:
                raise ImageProblem("too_many_frames", f"more than {MAX_PACKETS} packets")
            try:
                frames = packet.decode()
            except self._av.error.FFmpegError:
                continue  # a damaged packet; what comes after it may decode
            for frame in frames:
                check_size(frame.width, frame.height, self._max_pixels)
                pixels += frame.width * frame.height
                self.num_frames += 1
                if self.num_frames > self._max_frames or pixels > MAX_CLIP_PIXELS:
                    raise ImageProblem(
                        "too_many_frames", f"more than {self.num_frames - 1} of {frame.width}x{frame.height}"
                    )
                self._note_time(frame)
                yield frame

    def _packets(self, clip: Any, stream: Any) -> Iterator[Any]:
        """The packets of a stream up to where the file can be read, the empty one that ends the decoder last."""
        try:
            yield from clip.demux(stream)
        except self._av.error.FFmpegError:
            return

    def _note_time(self, frame: av.VideoFrame) -> None:
        if frame.pts is None or frame.time_base is None:
            return
        begin = float(frame.pts * frame.time_base)
        if self.num_frames == 1:
            self._first = begin
        self._end = max(self._end, begin + float((frame.duration or 0) * frame.time_base))
