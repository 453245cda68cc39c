"""Which worker of pytest-xdist runs which test."""

import json

from xdist.scheduler import LoadScopeScheduling


class Scheduling(LoadScopeScheduling):
    """Gives each worker one test after the other; all that need the machine go to one.

    So none of these waits for another. The group that `--dist loadgroup` goes by is
    appended to a test's nodeid, which pytest 9.2 does not allow any more (pytest-xdist
    3.8).

    Args:
        folder: where each worker has written down which tests need the machine.
    """

    def __init__(self, config, log, folder):
        super().__init__(config, log)
        self._folder, self._machine = folder, frozenset()

    def schedule(self):
        for path in self._folder.glob("*.machine"):
            self._machine = frozenset(json.loads(path.read_text()))
        super().schedule()

    def _split_scope(self, nodeid):
        return "machine" if nodeid in self._machine else nodeid

    def _assign_work_unit(self, node):
        """Give a worker a test; and another, or word that there is none.

        It begins with one when it knows that. Who takes the place of a worker that was
        killed is given work once only.
        """
        super()._assign_work_unit(node)
        if self._pending_of(self.assigned_work[node]) < 2:
            if self.workqueue:
                self._assign_work_unit(node)
            else:
                node.shutdown()

    def remove_node(self, node):
        """Return the test that took a worker along: it has failed, and is over."""
        units = self.assigned_work[node].values()
        left = [(unit, nodeid) for unit in units for nodeid in unit if not unit[nodeid]]
        if not left:
            return super().remove_node(node)
        unit, fatal = left[0]
        unit[fatal] = True
        super().remove_node(node)
        return fatal
