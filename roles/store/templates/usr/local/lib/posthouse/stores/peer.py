"""A primary's view of one replica: how far it is behind, and how it becomes one that may take over."""

import subprocess
import time

from stores.replication import Lag, Watch

# s before a comparison that failed is tried again.
AGAIN = 3


class Peer:
    """A replica, while this node is the primary.

    One that is not in sync is compared whole with the primary (unless its copy lacks nothing but what the log has),
    then brought up to the present, then `required`: from then on acknowledgements wait for it. Once it has all that
    happened before that moment, it is `confirmed`: whatever was or will be acknowledged, it has.
    """

    def __init__(self, place, name):
        self.place, self.name = place, name
        self.lag = Lag(place.backlog(name))
        self._watch = Watch(place.backlog(name))
        self._comparing = None
        self._compared_copy = None
        self._not_before = 0.0
        self._forget()
        self.based = None

    def _forget(self):
        self._mark = None
        self.required = False
        self.confirmed = False

    def step(self, in_sync, copy, complete):
        """Does what is next. copy: the one that the node says it has, or None; complete: known to be so."""
        if in_sync or copy is None:
            self._forget()
        elif not complete and self.based != copy:
            self._forget()
            self._compare(copy)
        else:
            self._catch_up()

    def _compare(self, copy):
        if self._comparing is None:
            if time.monotonic() < self._not_before:
                return
            self._compared_copy = copy
            self._comparing = subprocess.Popen(
                [
                    "/sbin/runuser",
                    "-u",
                    "cyrus",
                    "-g",
                    "mail",
                    "--",
                    "/usr/lib/cyrus/bin/sync_client",
                    "-C",
                    f"{self.place.now}/sync.conf",
                    "-A",
                    "-n",
                    self.name,
                    "-o",
                ],
                stdin=subprocess.DEVNULL,
            )
        status = self._comparing.poll()
        if status is None:
            return
        self._comparing = None
        if status == 0:
            self.based = self._compared_copy
            print(f"{self.name}: compared whole", flush=True)
        else:
            print(f"{self.name}: cannot be compared yet (sync_client: {status})", flush=True)
            self._not_before = time.monotonic() + AGAIN

    def _catch_up(self):
        if self._mark is None:
            self._mark = self._watch.mark()
        if not self._mark.passed():
            return
        if not self.required:
            self.required = True
            self._mark = self._watch.mark()
        else:
            self.confirmed = True

    def close(self):
        """Ends what was begun."""
        if self._comparing is not None:
            self._comparing.kill()
            self._comparing.wait()
