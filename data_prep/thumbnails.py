"""Small pictures of images, for the pages that show some."""

from __future__ import annotations

import base64
import io

from PIL import Image

from data_prep.filters import Limits
from data_prep.images import ImageProblem, image_problems, open_image, upright_rgb

THUMBNAIL_PX = 176
_QUALITY = 72


def thumbnail(content: bytes | Image.Image | None) -> str:
    """A JPEG as a data URI, its longer side at most THUMBNAIL_PX; "" where the bytes can't be decoded."""
    if content is None:
        return ""
    try:
        with image_problems():
            if isinstance(content, bytes):
                with open_image(content, Limits.max_pixels) as image:
                    image.draft("RGB", (2 * THUMBNAIL_PX, 2 * THUMBNAIL_PX))
                    small = upright_rgb(image)
            else:
                small = content.convert("RGB")
            small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
            stream = io.BytesIO()
            small.save(stream, "JPEG", quality=_QUALITY)
    except ImageProblem:
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
