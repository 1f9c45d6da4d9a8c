"""Thumbnails as data URIs: any usual form of an image, each distinct one once."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from dualhook.errors import DualHookError

__all__ = ["Pictures", "as_array"]

SIDE = 64  # pixels of a thumbnail at most
EXACT = 32  # up to this side images are kept to the pixel, as PNG; larger ones become JPEG
COLUMNS = ("image", "img", "pixel_values", "images")


class Pictures:
    """The pictures of a page: ``number(image)`` takes one in, ``uris`` lists them."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    @property
    def uris(self) -> list[str]:
        """Data URIs by number."""
        return list(self._numbers)

    def number(self, image: Any) -> int:
        """The number of an image's thumbnail."""
        return self._numbers.setdefault(_uri(as_array(image)), len(self._numbers))


def as_array(image: Any) -> np.ndarray:
    """An image as bytes, [h, w] or [h, w, 3].

    Takes tensors and arrays [h, w], [c, h, w] or [h, w, c], flat ones that are square, PIL images, and items of data
    sets that begin with one or hold one under a usual name. Numbers from 0 to 1 or 0 to 255 are taken as they are,
    others (normalised images) from their least to their largest.

    Raises:
        DualHookError: something else.
    """
    if isinstance(image, (tuple, list)) and len(image):
        image = image[0]
    if isinstance(image, Mapping):
        image = next((image[name] for name in COLUMNS if name in image), image)
    array = image.detach().cpu().float().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if array.dtype.kind not in "biuf" or not array.size:
        raise DualHookError(f"an image of type {type(image).__name__}: expected a tensor, an array or a PIL image")
    if array.ndim == 1 and round(array.size**0.5) ** 2 == array.size:
        array = array.reshape(round(array.size**0.5), -1)
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[2] in (1, 3, 4):
        array = array[..., 0] if array.shape[2] == 1 else array[..., :3]
    elif array.ndim != 2:
        raise DualHookError(f"an image of shape {list(array.shape)}: expected [h, w], [c, h, w] or [h, w, c]")
    return _as_bytes(array)


def _as_bytes(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    values = np.nan_to_num(array.astype(np.float64))
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 255:
        values = (values - low) / (high - low or 1.0)
    elif high > 1:
        values = values / 255
    return np.asarray((255 * values).round(), dtype=np.uint8)


def _uri(array: np.ndarray) -> str:
    try:
        from PIL import Image
    except ImportError as error:
        raise DualHookError(f'thumbnails need Pillow, and {error}: pip install "dualhook[plot]"') from error
    picture, written = Image.fromarray(array), io.BytesIO()
    if max(picture.size) <= EXACT:
        kind = "png"
        picture.save(written, "PNG", optimize=True)
    else:
        kind = "jpeg"
        picture.thumbnail((SIDE, SIDE))
        picture.save(written, "JPEG", quality=80, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(written.getvalue()).decode()}"
