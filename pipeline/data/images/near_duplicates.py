"""Pictures that are the same photo to the eye: compressed anew, resized, in another format.

Two must have nearly the same perceptual hash and nearly the same thumbnail: the hash finds them
among many, the thumbnail tells them from pictures that only resemble each other, such as two pages
of one form.

N pictures, P pairs.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

# Bits of 64 that the hashes of two may differ in: of 18 parts of photos and 6 pages, JPEG of
# quality 40, WebP of 60 and half the size changed 2, a third of the size 4; others differed in 12.
MAX_BITS = 4

# Hashes that differ in up to MAX_BITS are equal in one of so many parts of them.
_BANDS = MAX_BITS + 1

# Largest difference of two thumbnails in any of their cells, of 255: the same changes made 10, and
# other digits in the same form at least 20.
MAX_DIFFERENCE = 14

# Pictures that one is compared with, of those with a part of the hash in common, and of these the
# ones whose thumbnails are: a thousand blank pages would have half a million pairs.
_WINDOW = 512
_MOST_COMPARED = 16

_GRAY_SIDE = 64
_COLOR_SIDE = 8
_THUMBNAIL_BYTES = _GRAY_SIDE**2 + 3 * _COLOR_SIDE**2
_HASH_BYTES = 8
LOOK_BYTES = _HASH_BYTES + _THUMBNAIL_BYTES

_BLOCK = 1 << 12  # pairs whose thumbnails are in memory at once


def look(image: Image.Image) -> bytes:
    """Return what near duplicates of an RGB picture have nearly in common, LOOK_BYTES bytes."""
    import imagehash

    # BICUBIC weighs pixels at the edges of cells, so that another size of the picture gives the
    # same cells within 10; with BOX they were up to 81 apart.
    small = image.resize((_GRAY_SIDE, _GRAY_SIDE), Image.Resampling.BICUBIC)
    gray = small.convert("L")
    color = small.resize((_COLOR_SIDE, _COLOR_SIDE), Image.Resampling.BICUBIC)
    bits = imagehash.phash(gray).hash
    return np.packbits(bits).tobytes() + gray.tobytes() + color.tobytes()


class Looks:
    """The looks of many pictures: hashes in memory, 8 bytes each, thumbnails in a file."""

    def __init__(self, file: Path):
        self._file = file
        self._hashes = bytearray()
        self.keys: list[str] = []

    def add(self, key: str, found: bytes) -> None:
        """Note the look of the picture that is called key."""
        self.keys.append(key)
        self._hashes += found[:_HASH_BYTES]
        # Opened each time, for a preparation may end in an error at any row.
        with self._file.open("ab") as thumbnails:
            thumbnails.write(found[_HASH_BYTES:])

    def close(self) -> None:
        """Remove the file."""
        self._file.unlink(missing_ok=True)

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Yield pairs of keys whose pictures are near duplicates; of a large set of equal ones not
        every pair, and enough to join them all."""
        if len(self.keys) < 2:
            return
        shape = (len(self.keys), _THUMBNAIL_BYTES)
        thumbnails = np.memmap(self._file, np.uint8, "r", shape=shape)
        pairs_P2 = near_hashes(np.frombuffer(bytes(self._hashes), ">u8").astype(np.uint64))
        for start in range(0, len(pairs_P2), _BLOCK):
            block_P2 = pairs_P2[start : start + _BLOCK]
            one = thumbnails[block_P2[:, 0]].astype(np.int16)
            other = thumbnails[block_P2[:, 1]].astype(np.int16)
            same_P = np.abs(one - other).max(1) <= MAX_DIFFERENCE
            for i, j in block_P2[same_P].tolist():
                yield self.keys[i], self.keys[j]


def near_hashes(hashes_N: np.ndarray) -> np.ndarray:
    """Return pairs of places [P, 2], the smaller first and in order, of hashes that differ in at
    most MAX_BITS bits."""
    found = []
    taken_N = np.zeros(len(hashes_N), np.int64)
    width = 64 // _BANDS
    for band in range(_BANDS):
        part_N = (hashes_N >> np.uint64(band * width)) & np.uint64(2**width - 1)
        # Equal hashes beside each other, so that they meet within the window.
        order_N = np.lexsort((hashes_N, part_N))
        sorted_N = hashes_N[order_N]
        part_N = part_N[order_N]
        for apart in range(1, min(_WINDOW, len(hashes_N) - 1) + 1):
            same = part_N[apart:] == part_N[:-apart]
            if not same.any():
                break
            bits = np.bitwise_count(sorted_N[apart:] ^ sorted_N[:-apart])
            places = np.flatnonzero(same & (bits <= MAX_BITS))
            one = order_N[places]
            other = order_N[places + apart]
            few = taken_N[one] < _MOST_COMPARED
            np.add.at(taken_N, one[few], 1)
            found.append(np.stack([one[few], other[few]], 1))
    if not found:
        return np.zeros((0, 2), np.int64)
    return np.unique(np.sort(np.concatenate(found), 1), axis=0)
