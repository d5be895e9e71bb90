"""Pictures of requests: opened from data: URIs, or fetched where that was allowed, and what was
made of them, kept for a while; under bounds of memory over all requests."""

import ctypes
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from weakref import finalize

from PIL import Image

from ..config.task_data import ImageLimitsConfig
from ..data.images.images import BadImage, decoding_bytes, open_checked, resized
from ..data.images.inline import bytes_in
from ..errors import DataError
from ..protocols import POLL_S, check_wanted
from .fetching import Fetcher

# Of one picture, by what its header says.
PICTURE_PIXELS = 64_000_000
# Of what all that are being decoded take: one of the largest JPEG or PNG, or some tens of photos of
# a phone.
DECODING_BYTES = 640 << 20
# Of those that are opened, until nobody needs them: 170 of a megapixel. Not of the same room, in
# which a large one could never be decoded beside them.
OPENED_BYTES = 512 << 20
# What may stay with the C library, which keeps what was freed for each thread anew: of eight
# threads that decoded 64 Mpx each, twice what they took together.
KEPT_BYTES = 32 << 20
# Of what encoders made of pictures: of a base of 2 B four to forty pictures, by their size.
FEATURE_BYTES = 128 << 20


class DecodingRoom:
    """How much memory pictures take while they are decoded and while they wait to be read, and what
    was made of them after that, over all requests; and where they may come from."""

    def __init__(self, most_bytes: int = DECODING_BYTES, fetcher: Fetcher | None = None):
        self.most_bytes = most_bytes
        self.fetcher = fetcher or Fetcher()
        self._free = most_bytes
        self._changed = threading.Condition()
        # what was made of a picture, and its bytes; that which was asked for last at the end
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self.kept_bytes = 0
        self.opened_bytes = 0

    def kept(self, key: Hashable) -> Any | None:
        """Return what was kept under a key; None where nothing is any more."""
        with self._changed:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def keep(self, key: Hashable, made: Any, count: int) -> None:
        """Keep something of so many bytes until what is newer, or a picture, needs its room."""
        with self._changed:
            if key in self._kept or count > min(FEATURE_BYTES, self._free + self.kept_bytes):
                return
            while self._free < count or self.kept_bytes + count > FEATURE_BYTES:
                self._drop_oldest()
            self._kept[key] = (made, count)
            self.kept_bytes += count
            self._free -= count

    def _drop_oldest(self) -> None:
        _, (_, count) = self._kept.popitem(last=False)
        self.kept_bytes -= count
        self._free += count

    @contextmanager
    def taken(self, count: int, until: float) -> Iterator[None]:
        """Have room for so many bytes. Raises TimeoutError where there is none by `until`, on the
        monotonic clock, BadImage where there never is, and Abandoned."""
        if count > self.most_bytes:
            raise BadImage(
                "too large a picture",
                f"a picture takes {count >> 20} MiB to decode, and {self.most_bytes >> 20} are "
                "taken at most. Make it smaller, or save it as a JPEG",
            )
        with self._changed:
            while self._free < count:
                if self._kept:
                    self._drop_oldest()
                    continue
                check_wanted()
                if time.monotonic() > until:
                    raise TimeoutError("too many large pictures at once; try again in a moment")
                self._changed.wait(POLL_S)
            self._free -= count
        try:
            yield
        finally:
            if count > KEPT_BYTES:
                _give_back()
            with self._changed:
                self._free += count
                self._changed.notify_all()

    def hold(self, image: Image.Image) -> Image.Image:
        """Return a picture, which counts as opened for as long as it is there. Raises TimeoutError
        where those of other requests leave no room for it."""
        count = image.width * image.height * len(image.getbands())
        with self._changed:
            # at once: a request that held some and waited for more could wait for ever
            if self.opened_bytes + count > OPENED_BYTES:
                raise TimeoutError("too many pictures wait to be read; try again in a moment")
            self.opened_bytes += count
        finalize(image, self._let_go, count).atexit = False
        return image

    def _let_go(self, count: int) -> None:
        # it may be called in the middle of anything, also of what holds this lock
        with self._changed:
            self.opened_bytes -= count


def _give_back() -> None:
    """Give memory that was freed back to the system, where the C library can be told to."""
    if sys.platform == "linux":
        # other libraries than glibc have no such function, and keep less
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)


def opened(url: str, limits: ImageLimitsConfig, room: DecodingRoom, until: float) -> Image.Image:
    """Return the picture at a data: URI or an address, checked and resized as in training, and
    counted as opened. Raises DataError, TimeoutError where there is no room for it by `until`,
    Abandoned."""
    data = _content(url, room.fetcher, until)
    most = limits.max_pixels
    # One picture at a time: a request that held room and waited for more could wait for ever.
    with room.taken(decoding_bytes(data, most, PICTURE_PIXELS), until):
        image = open_checked(data, max_pixels=PICTURE_PIXELS, area_px=most)
        return room.hold(resized(image, limits.min_pixels, most))


def _content(url: str, fetcher: Fetcher, until: float) -> bytes:
    # Whatever kind it says: what it is, is read from its bytes.
    if url[:5].lower() != "data:":
        return fetcher.fetch(url, until)
    try:
        return bytes_in(url) or b""
    except ValueError as error:
        raise DataError(f"image_url is not base64: {error}") from None
