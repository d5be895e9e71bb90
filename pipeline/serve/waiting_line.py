"""Who has a row next: first come, first served, but a client with many running waits behind one
with few, and of clients with equally many they take turns."""

from collections import deque
from collections.abc import Callable, Mapping
from itertools import count
from typing import Generic, Protocol, TypeVar

# Times the places that are left that one client may have. Alone it has three quarters of all; two
# that go on asking come to have three sevenths each.
SHARE = 3


def has_room(own: int, waiting: int, room: int) -> bool:
    """Whether a client with `own` of all that wait has a place for another one, of `room` places:
    a threshold that moves with what is left (Choudhury and Hahne, 1998), so that one client leaves
    places for those that have none waiting."""
    return own < SHARE * (room - waiting)


def most_of_one(room: int) -> int:
    """Return how many of `room` places a client has that is alone."""
    return -(-SHARE * room // (SHARE + 1))


class _Waiting(Protocol):
    @property
    def client(self) -> str: ...


W = TypeVar("W", bound=_Waiting)


class WaitingLine(Generic[W]):
    """What waits, of every client in the order that it came."""

    def __init__(self) -> None:
        self._by_client: dict[str, deque[tuple[int, W]]] = {}
        # turns that a client had while it waited; who comes begins where the others are
        self._turns: dict[str, int] = {}
        self._numbers = count()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def of(self, client: str) -> int:
        """Return how many of a client wait."""
        return len(self._by_client.get(client, ()))

    def add(self, waiting: W) -> None:
        """Put one at the end."""
        client = waiting.client
        if client not in self._by_client:
            self._turns[client] = min(self._turns.values(), default=0)
            self._by_client[client] = deque()
        self._by_client[client].append((next(self._numbers), waiting))
        self._length += 1

    def first(self, running: Mapping[str, int]) -> W | None:
        """Return whose turn it is, by how many of each client run; None where nobody waits."""
        best: tuple[int, int, int] | None = None
        found = None
        for client, own in self._by_client.items():
            number, waiting = own[0]
            rank = (running.get(client, 0), self._turns[client], number)
            if best is None or rank < best:
                best = rank
                found = waiting
        return found

    def remove(self, waiting: W) -> None:
        """Take away one that is the first of its client."""
        own = self._by_client[waiting.client]
        own.popleft()
        self._length -= 1
        self._turns[waiting.client] += 1
        if not own:
            self._forget(waiting.client)

    def take(self, wanted: Callable[[W], bool]) -> list[W]:
        """Take away and return all that are wanted."""
        taken = []
        for client, own in list(self._by_client.items()):
            kept: deque[tuple[int, W]] = deque()
            for number, waiting in own:
                if wanted(waiting):
                    taken.append(waiting)
                else:
                    kept.append((number, waiting))
            self._by_client[client] = kept
            if not kept:
                self._forget(client)
        self._length -= len(taken)
        return taken

    def _forget(self, client: str) -> None:
        """Let go of a client that has nothing waiting."""
        del self._by_client[client]
        del self._turns[client]
