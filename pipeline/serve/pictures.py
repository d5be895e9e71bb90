"""Pictures that come inside a request: opened from data: URIs under one bound of memory, over all
requests."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from ..config.task_data import ImageLimitsConfig
from ..data.images.images import claimed_size, open_checked, resized
from ..data.images.inline import bytes_in
from ..errors import DataError
from ..protocols import POLL_S, check_wanted

# Of one picture before it is resized, and of all that are being decoded. Pillow keeps 4 bytes of a
# pixel, and up to five copies while it turns one and puts it over white: 1.3 GB.
PICTURE_PIXELS = 64_000_000


class PixelRoom:
    """How many pixels may be decoded at once, over all requests."""

    def __init__(self, pixels: int = PICTURE_PIXELS):
        self.pixels = pixels
        self._free = pixels
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, pixels: int, until: float) -> Iterator[None]:
        """Have room for so many pixels, at most all there is. Raises TimeoutError where there is
        none by `until`, on the monotonic clock, and Abandoned."""
        with self._changed:
            while self._free < pixels:
                check_wanted()
                if time.monotonic() > until:
                    raise TimeoutError("too many large pictures at once; try again in a moment")
                self._changed.wait(POLL_S)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


def opened(url: str, limits: ImageLimitsConfig, room: PixelRoom, until: float) -> Image.Image:
    """Return the picture in a data: URI, checked and resized as in training. Raises DataError,
    TimeoutError where there is no room for it by `until`."""
    # Whatever kind it says: what it is, is read from its bytes.
    if url[:5].lower() != "data:":
        raise DataError(
            "image_url must be a data: URI (data:image/png;base64,...), "
            f"not {url[:40]!r}: this server fetches nothing"
        )
    try:
        data = bytes_in(url) or b""
    except ValueError as error:
        raise DataError(f"image_url is not base64: {error}") from None
    width, height = claimed_size(data, PICTURE_PIXELS)
    # One picture at a time: a request that held room and waited for more could wait for ever.
    with room.taken(width * height, until):
        image = open_checked(data, max_pixels=PICTURE_PIXELS)
        return resized(image, limits.min_pixels, limits.max_pixels)
