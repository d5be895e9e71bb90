"""What an address says of itself: the stage, the item where that has several jobs, and a hash."""

import re

# Names of stages have no hyphen, those of items may
ADDRESS = re.compile(r"(?P<stage>[a-z]\w*)(-(?P<item>.+))?-(?P<digest>[0-9a-f]{12})")


def job_of(address: str) -> tuple[str, str | None]:
    """Return the stage and the item that an address is of; the whole name of what is no address."""
    parted = ADDRESS.fullmatch(address)
    if not parted:
        return address, None
    return parted["stage"], parted["item"]
