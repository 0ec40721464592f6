"""Decides which records are kept, with a reason for each rejection; only the duplicate filter has a state."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, replace

from PIL import Image

from data_prep.caption_language import other_language
from data_prep.images import ImageProblem, image_problems, open_image, upright_rgb
from data_prep.record import Record, Rejection
from data_prep.shard_members import safe_key, tidy
from data_prep.video.decoding import ClipLimits, check_clip

REASONS = {
    "empty_image": "the image file or response has zero bytes",
    "missing_image": "the named image file does not exist or is not a plain file",
    "image_bytes_too_large": "the encoded image is larger than --max-image-bytes; it was not read further",
    "not_an_image": "the bytes are no JPEG, PNG, WebP, GIF, BMP or TIFF (an HTML error page, for example)",
    "truncated_image": "the image ends before its last row",
    "undecodable_image": "the image has a valid header but its content cannot be decoded",
    "too_many_pixels": "the header announces more than --max-pixels; the image was refused before decoding",
    "too_many_scans": "a JPEG with so many scans that decoding it would take minutes",
    "too_many_parts": "a file of many tiny parts or tables, which no encoder writes; it was refused before decoding",
    "unsupported_pixel_format": "floating-point pixels, or a run-length coded BMP",
    "missing_video": "no file of the clip in the folders of videos",
    "empty_video": "the file of the clip has zero bytes",
    "video_bytes_too_large": "the encoded clip is larger than --max-video-bytes",
    "not_a_video": "the bytes are no MP4, QuickTime, WebM, Matroska or AVI (an HTML error page, for example)",
    "no_video_stream": "the clip holds sound, or other data, but no moving picture",
    "undecodable_video": "no frame of the clip can be decoded, or its codec is none of those that are read",
    "truncated_video": "decoding ends before half of the length that the clip announces",
    "too_many_frames": "more frames than --max-frames, or more pixels in all of them than four minutes of 1080p have",
    "no_image_in_sample": "a sample of another program's shard has no image, or not the one that --image-members names",
    "ambiguous_sample": "a sample of another program's shard has several images or texts; keys end at their first dot",
    "not_a_plain_member": "a sample with a link or device among its members",
    "no_key": "a file in another program's shard whose name has no key: no dot, or one at its beginning",
    "text_too_large": "a text or JSON member of another program's shard with more than 16 MiB",
    "needs_conversion": "an image that would have to be converted (GIF, BMP, TIFF): give --copy",
    "unreadable_shard": "a tar that can't be read up to its end, or with sparse members; counted once, not by row",
    "truncated_shard": "a sample that lies in part behind the end of its tar",
    "data_after_end": "bytes behind a tar's end mark, which nothing reads; counted once, not by row",
    "image_too_small": "a side is shorter than --min-side pixels",
    "aspect_ratio": "the longer side is more than --max-aspect times the shorter, or more than 100 times",
    "empty_caption": "the caption is missing or holds only white space",
    "nul_in_caption": "the caption holds a NUL character: a damaged or binary table",
    "invalid_utf8": "a text is not valid UTF-8",
    "too_few_words": "the caption has fewer words than --min-words",
    "too_many_words": "the caption has more words than --max-words",
    "other_language": "the caption is in none of the languages of --language, as far as that can be told",
    "duplicate_key": "another record has the same key (after its name was made safe for a tar)",
    "duplicate_pair": "the same image bytes came with the same caption before (--drop-duplicates)",
    "malformed_row": "the input row has the wrong number of cells, is no JSON object, or misses or mistypes a field",
    "answers_missing": "a question without annotation, or with another number of answers than ten",
    "question_missing": "an annotation of a question that is not in the file of questions",
    "captions_missing": "an image whose list of sentence ids names sentences that are not there",
    "other_image": "a question and its answers, or two statements about a pair, name different images",
    "duplicate_id": "an id that must be unique comes again; the earlier entry counts",
    "unknown_label": "a label other than those of the set",
    "unknown_split": "an entry of a split that the set does not have, or of another than the file's first entry",
    "unknown_video": "a caption of a video that the annotation files do not list",
    "held_out_image": "a further training row whose image is in a held-out split",
    "unsafe_image": "the table's score or label of unsafe content is beyond --max-punsafe or --nsfw, or is missing",
    "low_similarity": "the table's similarity of image and text is below --min-similarity, or is missing",
    "watermark": "the table's probability of a watermark is above --max-watermark, or is missing",
    "held_out_copy": "an image has the same bytes as a held-out one (`decontaminate`)",
    "near_held_out": "an image is a near-duplicate of a held-out one (`decontaminate`)",
    "duplicate_image": "its images have the same bytes as those of a sample that stays (`dedupe`)",
    "near_duplicate_image": "its images are near-duplicates of those of samples that stay (`dedupe`)",
    "repeated_image": "the same bytes came more than --max-image-repeats times (`dedupe`)",
    "bad_url": "the address is missing or not http(s)",
    "private_address": "the address leads to a private, local or reserved network (--allow-private-addresses takes it)",
    "http_NNN": "the server answered with status NNN",
    "timeout": "the server did not answer, or not completely, in time",
    "dns_failure": "the host name could not be resolved",
    "connection_failed": "no connection, or it broke off",
    "host_unavailable": "the host failed again and again and was left alone; it may be back later",
    "proxy_failed": "the proxy of the environment was not there, or refused",
    "tls_failure": "no encrypted connection: the certificate or the handshake failed",
    "bad_response": "what the server sent is not as HTTP wants it",
    "too_many_redirects": "more than 10 redirects, mostly a loop",
    "placeholder_image": "the server redirected to a picture like photo_unavailable.png",
    "html_page": "the server sent a web page in place of the image, and called that success",
    "disallowed_by_server": "the server's X-Robots-Tag (or TDM-Reservation) forbids the use",
    "download_failed": "any other failure of the download; `rejected.jsonl` has its text",
    "lost_by_downloader": "img2dataset reported nothing about this row",
    "damaged_shard": "`doctor` took the shard of these rows out of the split",
    "damaged_sample": "`doctor` took the sample out of the index: its members or texts can't be read",
}

_KEPT_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_JPEG_QUALITY = 92


@dataclass(frozen=True)
class Limits:
    """Bounds on what is kept. ``image_size``: shrink the shorter side to so many pixels; None keeps the bytes.
    ``image_format``: "jpg" or "png", what all images become; None keeps JPEG, PNG and WebP.

    Of captions: how many words, parted by white space, and in which languages (ISO 639-1 codes; none: any).
    """

    max_pixels: int = 50_000_000
    max_image_bytes: int = 50_000_000
    min_side: int = 16
    max_aspect: float | None = None
    image_size: int | None = None
    image_format: str | None = None
    min_words: int = 1
    max_words: int | None = None
    languages: tuple[str, ...] = ()


def check_record(record: Record, limits: Limits | ClipLimits) -> tuple[Record | None, list[Rejection]]:
    """The record as it will be written, or None, and the rejections of it or of its captions (counted in rows)."""
    name = safe_key(record.key)
    captions, rejections = _check_captions(name, record.captions, limits)
    if not captions:
        return None, rejections
    kept = replace(record.with_captions(captions), key=name)
    try:
        return _check_content(kept, limits), rejections
    except ImageProblem as error:
        rejections.append(Rejection(error.reason, name, error.detail, rows=len(captions)))
        return None, rejections


def _check_content(record: Record, limits: Limits | ClipLimits) -> Record:
    """The record with its images as they are stored, or its clip, whose bytes stay, and what decoding it found."""
    if record.video is not None:
        assert isinstance(limits, ClipLimits)
        found = check_clip(record.video, limits)
        facts = {"num_frames": found.num_frames, "seconds": found.seconds, "frame_size": [found.width, found.height]}
        return replace(record, extensions=(found.extension,), meta=record.meta | facts)
    checked = [check_image(image, limits) for image in record.images]
    images, extensions = zip(*checked) if checked else ((), ())
    return replace(record, images=images, extensions=extensions)


def _check_captions(
    name: str, captions: tuple[str, ...], limits: Limits | ClipLimits
) -> tuple[dict[int, str], list[Rejection]]:
    if not captions:
        return {}, [Rejection("empty_caption", name)]
    kept, rejections = {}, []
    for number, caption in enumerate(captions):
        reason = caption_problem(caption)
        if reason is None and isinstance(limits, Limits):
            reason = unwanted_caption(caption, limits)
        if reason is None:
            kept[number] = tidy(caption)
        else:
            rejections.append(Rejection(reason, name, ascii(caption[:80])))
    return kept, rejections


def unwanted_caption(caption: str, limits: Limits) -> str | None:
    """The reason why a sound caption is beyond the ``limits``, or None."""
    num_words = len(caption.split())
    if num_words < limits.min_words:
        return "too_few_words"
    if limits.max_words is not None and num_words > limits.max_words:
        return "too_many_words"
    return "other_language" if limits.languages and other_language(caption, limits.languages) else None


def caption_problem(caption: str | None) -> str | None:
    """The reason why a caption cannot be used, or None. Bytes that were no UTF-8 arrive as lone surrogates."""
    if caption is None or not caption.strip():
        return "empty_caption"
    if "\0" in caption:
        return "nul_in_caption"
    try:
        caption.encode()
    except UnicodeEncodeError:
        return "invalid_utf8"
    return None


def check_image(content: bytes, limits: Limits) -> tuple[bytes, str]:
    """Decode an image completely; returns the bytes to store and their extension.

    JPEG, PNG and WebP bytes are kept, whatever their colour mode; other formats become a JPEG of their first frame.
    With ``limits.image_format`` all become that one.
    Raises ImageProblem, by the header before any pixel is decoded.
    """
    if len(content) > limits.max_image_bytes:
        raise ImageProblem("image_bytes_too_large", f"{len(content)} bytes")
    with image_problems(), open_image(content, limits.max_pixels) as image:
        width, height = image.size
        if min(width, height) < limits.min_side:
            raise ImageProblem("image_too_small", f"{width}x{height}")
        if limits.max_aspect is not None and max(width, height) > limits.max_aspect * min(width, height):
            raise ImageProblem("aspect_ratio", f"{width}x{height}")
        extension, decoded = _KEPT_FORMATS.get(image.format or ""), upright_rgb(image)
        shrink = limits.image_size is not None and min(image.size) > limits.image_size
        if not shrink and extension is not None and limits.image_format in (None, extension):
            return content, extension
        extension = limits.image_format or "jpg"
        return _encoded(decoded, limits.image_size if shrink else None, extension), extension


def _encoded(image: Image.Image, shorter_side: int | None, extension: str) -> bytes:
    if shorter_side is not None:
        scale = shorter_side / min(image.size)
        image = image.resize(tuple(max(1, round(side * scale)) for side in image.size), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    if extension == "png":
        image.save(stream, "PNG")
    else:
        image.save(stream, "JPEG", quality=_JPEG_QUALITY)
    return stream.getvalue()


class DuplicateFilter:
    """Remembers keys, and on request (image, caption) pairs, as 16-byte digests."""

    def __init__(self, drop_pairs: bool) -> None:
        self._drop_pairs = drop_pairs
        self._keys: set[bytes] = set()
        self._pairs: set[bytes] = set()

    def __call__(self, record: Record) -> tuple[Record | None, list[Rejection]]:
        key = _digest(record.key.encode())
        if key in self._keys:
            return None, [Rejection("duplicate_key", record.key, rows=len(record.captions))]
        self._keys.add(key)
        if not self._drop_pairs:
            return record, []
        contents = record.images if record.video is None else (record.video,)
        image = b"".join(_digest(content) for content in contents)
        kept, rejections = {}, []
        for number, caption in enumerate(record.captions):
            pair = _digest(image + caption.encode())
            if pair in self._pairs:
                rejections.append(Rejection("duplicate_pair", record.key, caption[:80]))
            else:
                self._pairs.add(pair)
                kept[number] = caption
        return (record.with_captions(kept) if kept else None), rejections


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
