"""How many more mappings a process can take."""

from __future__ import annotations

from pathlib import Path

from sksm.linux import maps

MAX_MAP_COUNT = Path("/proc/sys/vm/max_map_count")
_RECOUNT = 256  # granted before the kernel is asked again: counting reads all maps


class Allowance:
    """Grants mappings up to a quarter of `vm.max_map_count`, counted now and then.

    Between two counts the program may map on; the quarter leaves room for it.
    """

    def __init__(self, pid: int | str) -> None:
        self._pid = pid
        self._left = 0

    def grant(self, wanted: int) -> int:
        """Grant up to `wanted` more mappings; what is granted counts as used."""
        if wanted > self._left:
            limit = int(MAX_MAP_COUNT.read_text()) // 4
            room = max(0, limit - maps.count(self._pid))
            self._left = min(room, max(wanted, _RECOUNT))
        granted = min(wanted, self._left)
        self._left -= granted
        return granted
