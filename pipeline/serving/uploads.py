"""Reads what clients send, bounded in bytes, seconds and number at once: bodies, their fields, the picture in them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import HTTPException
from PIL import Image
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from data_prep.images import TRAINING_FORMATS, ImageProblem, image_problems, open_image, upright_rgb

KEPT_PIXELS = 1 << 20  # of a picture while it waits: larger ones are shrunk to about that, which is 3 MiB
MAX_FIELDS = 40
MAX_FIELD_BYTES = 1 << 16
MAX_TEXT_BYTES = 1 << 16  # of a body that holds no picture
OVERHEAD_BYTES = 1 << 14  # of a multipart body around its picture
UPLOADS = 8  # bodies that are read at once; others wait, unread, in their connections
DECODERS = 2  # pictures that are decoded at once

Decoded = TypeVar("Decoded")
_WORDS = {
    "empty_image": "the picture is empty",
    "not_an_image": f"this is no picture; expected {', '.join(TRAINING_FORMATS)}",
    "too_many_pixels": "the picture has too many pixels",
    "truncated_image": "the picture ends too early; send it again",
    "aspect_ratio": "the picture is too narrow",
}


@dataclass(frozen=True)
class Limits:
    """``bytes`` and ``pixels`` of a picture; ``seconds`` for its upload, and as many again for the answer;
    ``requests`` that are taken in at once."""

    bytes: int
    pixels: int
    seconds: float
    requests: int


@dataclass(frozen=True)
class Upload:
    """The picture of a request and the texts that came with it; of a field that stands twice all values."""

    picture: Image.Image
    fields: Mapping[str, list[str]]


class Uploads:
    """Takes requests in, as many at once as its limits say."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.taken = 0
        self._slots = asyncio.Semaphore(UPLOADS)
        self._decoders = asyncio.Semaphore(DECODERS)

    def admit(self) -> None:
        """Count a request in; ``release`` counts it out. Raises HTTPException 429 when there is no room."""
        if self.taken >= self.limits.requests:
            raise HTTPException(429, "too many requests at once; try again in a second", {"Retry-After": "1"})
        self.taken += 1

    def release(self) -> None:
        self.taken -= 1

    @asynccontextmanager
    async def room(self) -> AsyncIterator[None]:
        self.admit()
        try:
            yield
        finally:
            self.release()

    async def read(self, request: Request) -> Upload:
        """The picture, in mode RGB, and the other fields: of a multipart body, or of a body that is the picture and the
        query.

        Raises:
            HTTPException: 400 for a body that is not whole or not well-formed, 408 too slow, 413 too large, 415 of
                another kind, 422 no usable picture, 503 no turn in time.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        is_form = kind == "multipart/form-data"
        if not (is_form or kind.startswith("image/") or kind == "application/octet-stream"):
            raise HTTPException(415, f"found {kind[:100] or 'no'} content type; send multipart/form-data, or image/*")
        most = self.limits.bytes + (OVERHEAD_BYTES if is_form else 0)
        async with self._turn(self._slots):
            data = await self.read_body(request, most)
            fields: dict[str, list[str]] = {}
            for name, value in request.query_params.multi_items():
                fields.setdefault(name, []).append(value)
            if is_form:
                data, texts = await _parse_form(request, data)
                fields.update(texts)
            if len(data) > self.limits.bytes:
                raise self._too_large()
            picture = await self.decoded(decode, data, self.limits.pixels)
        return Upload(picture, fields)

    async def decoded(self, function: Callable[..., Decoded], *arguments: Any) -> Decoded:
        """What a function gives that decodes a picture, called in a thread when it is its turn."""
        async with self._turn(self._decoders):
            return await asyncio.to_thread(function, *arguments)

    async def read_body(self, request: Request, most: int = MAX_TEXT_BYTES) -> bytes:
        """The whole body of at most ``most`` bytes; never holds more. Raises HTTPException as ``read`` does."""
        announced = request.headers.get("content-length", "0")
        if announced.isdecimal() and (len(announced) > 18 or int(announced) > most):
            raise self._too_large(most)
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.seconds):
                async for piece in request.stream():
                    if len(body) + len(piece) > most:
                        raise self._too_large(most)
                    body += piece
        except TimeoutError:
            seconds = f"{self.limits.seconds:g}"
            raise HTTPException(408, f"the upload took longer than {seconds} s; send a smaller picture") from None
        except ClientDisconnect:
            raise HTTPException(400, "the upload ended before its end; send it again") from None
        return bytes(body)

    def _too_large(self, most: int | None = None) -> HTTPException:
        return HTTPException(413, f"larger than {most or self.limits.bytes:,} bytes; send a smaller picture")

    @asynccontextmanager
    async def _turn(self, slots: asyncio.Semaphore) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self.limits.seconds):
                await slots.acquire()
        except TimeoutError:
            raise HTTPException(503, "other uploads took too long; try again", {"Retry-After": "5"}) from None
        try:
            yield
        finally:
            slots.release()


async def _parse_form(request: Request, data: bytes) -> tuple[bytes, dict[str, list[str]]]:
    """The bytes of the field ``image``, and the texts of all others by name."""

    async def body() -> AsyncIterator[bytes]:
        yield data

    parser = MultiPartParser(request.headers, body(), max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES)
    parser.spool_max_size = len(data) + 1  # never on the disk
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        reason = getattr(error, "message", None) or "it has no boundary, or no end"
        raise HTTPException(400, f"not a well-formed multipart body: {reason}"[:200]) from None
    async with _closing(form):
        file, texts = form.get("image"), {}
        if not isinstance(file, UploadFile):
            raise HTTPException(422, 'no picture; send it as the file "image"')
        for name, value in form.multi_items():
            if isinstance(value, str):
                texts.setdefault(name, []).append(value)
        return await file.read(), texts


@asynccontextmanager
async def _closing(form: Any) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await form.close()


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """The picture upright in mode RGB, shrunk to about KEPT_PIXELS if it is larger.

    Raises:
        HTTPException: 422, why it can't be used, in words for its owner.
    """
    try:
        with image_problems():
            image = open_image(data, max_pixels, TRAINING_FORMATS)
            shrunk = math.sqrt(KEPT_PIXELS / (image.width * image.height))
            if shrunk < 1:
                image.draft("RGB", (int(2 * shrunk * image.width), int(2 * shrunk * image.height)))
            picture = upright_rgb(image)
            shrunk = math.sqrt(KEPT_PIXELS / (picture.width * picture.height))
            if shrunk < 1:
                size = max(1, round(shrunk * picture.width)), max(1, round(shrunk * picture.height))
                picture = picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
            return picture
    except ImageProblem as error:
        reason = _WORDS.get(error.reason, "the picture is damaged or of an unusual kind")
        if error.reason == "too_many_pixels":
            reason += f"; at most {max_pixels:,} are taken"
        raise HTTPException(422, reason) from error


def first(fields: Mapping[str, list[str]], name: str, default: str = "", most: int = 1000) -> str:
    """The text of a field. Raises HTTPException 422 for one of more than ``most`` characters."""
    text = fields.get(name, [default])[0].strip()
    if len(text) > most:
        raise HTTPException(422, f"{name} has {len(text)} characters; at most {most} are taken")
    return text


def whole(fields: Mapping[str, list[str]], name: str, default: int | None, most: int) -> int | None:
    """The number of a field, 1 to ``most``. Raises HTTPException 422 for anything else."""
    text = first(fields, name, "" if default is None else str(default))
    if not text:
        return default
    if not (text.isascii() and text.isdecimal() and 1 <= int(text[:9]) <= most):
        raise HTTPException(422, f"found {name} {text[:20]!r}; expected a whole number from 1 to {most}")
    return int(text)
