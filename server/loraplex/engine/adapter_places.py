"""AdapterPlaces: which adapter stands in which place of the device pool. Bookkeeping only, no tensors.

digest <-> place is a bijection. The device tier is a subset of the RAM tier: what leaves RAM leaves its place. An
adapter that is being copied into its place has it already, and keeps it until the copy has ended.
"""

from collections import OrderedDict
from collections.abc import Collection


class AdapterPlaces:
    def __init__(self, num_places: int):
        self.num_places = num_places
        self._place_of: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._since: dict[str, int] = {}
        self._copying: set[str] = set()
        self._free = list(range(num_places - 1, -1, -1))

    def __contains__(self, digest: str) -> bool:
        return digest in self._place_of

    def __len__(self) -> int:
        return len(self._place_of)

    @property
    def digests(self) -> list[str]:
        return list(self._place_of)

    @property
    def arrived(self) -> list[str]:
        """The adapters that stand in their places."""
        return [digest for digest in self._place_of if digest not in self._copying]

    @property
    def copying(self) -> frozenset[str]:
        """Those that are being copied there."""
        return frozenset(self._copying)

    def has_arrived(self, digest: str) -> bool:
        return digest in self._place_of and digest not in self._copying

    def place_of(self, digest: str) -> int:
        return self._place_of[digest]

    def since(self, digest: str) -> int:
        """The step at which the adapter's present tenure began."""
        return self._since[digest]

    def can_hold(self, wanted: Collection[str], in_use: Collection[str]) -> bool:
        """Whether all `wanted` can stand beside all `in_use`."""
        return len(self._copying.union(wanted, in_use)) <= self.num_places

    def assign(self, digest: str, in_use: Collection[str], step: int) -> int:
        """Give `digest` a place, turning out the least recently used adapter that is not `in_use`."""
        if digest in self._place_of:
            self._place_of.move_to_end(digest)
            return self._place_of[digest]
        if not self._free:
            self.release(next(d for d in self._place_of if d not in in_use and d not in self._copying))
        place = self._free.pop()
        self._place_of[digest] = place
        self._since[digest] = step
        return place

    def renew(self, digest: str, step: int) -> None:
        """Begin a new tenure: the adapter had no running sequence and gets one now."""
        self._since[digest] = step
        self._place_of.move_to_end(digest)

    def begin_copy(self, digest: str) -> None:
        """What has just been assigned a place is on its way there."""
        self.place_of(digest)
        self._copying.add(digest)

    def end_copy(self, digest: str) -> None:
        self._copying.remove(digest)

    def release(self, digest: str) -> int | None:
        """Empty the place of `digest`; None when it had none. ValueError while it is being copied there."""
        if digest in self._copying:
            raise ValueError(f"adapter {digest} is being copied into its place")
        place = self._place_of.pop(digest, None)
        if place is not None:
            del self._since[digest]
            self._free.append(place)
        return place

    def check_integrity(self) -> None:
        places = sorted([*self._place_of.values(), *self._free])
        assert places == list(range(self.num_places)), "places and digests are not a bijection"
        assert set(self._since) == set(self._place_of), "a tenure belongs to no adapter"
        assert self._copying <= set(self._place_of), "a copy has no place to go to"
