"""Files with more than one picture in them: animations, and documents of several pages."""

from PIL import Image

# Of MPO the others are views or previews of one moment; of HEIF, one is said to be the picture.
_ONE_IS_MEANT = ("MPO", "HEIF")

# TIFF's note that a page is another one made smaller, or a mask of it.
_SUBFILE_TYPE = 254
_OF_ANOTHER = 0b101

_MOST_SMALLER_ONES = 32


def has_several(image: Image.Image) -> bool:
    """Whether a file that was just opened has more than one picture; it is at another one then."""
    if image.format in _ONE_IS_MEANT:
        return False
    for page in range(1, _MOST_SMALLER_ONES):
        try:
            image.seek(page)
        except EOFError:
            return False
        if image.format != "TIFF":
            return True
        if not image.tag_v2.get(_SUBFILE_TYPE, 0) & _OF_ANOTHER:  # type: ignore[attr-defined]
            return True
    return False
