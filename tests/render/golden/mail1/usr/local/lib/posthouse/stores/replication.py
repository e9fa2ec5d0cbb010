"""Whether a replica has everything up to now, seen from what Cyrus's replication leaves in its folder.

Every change is noted in sync/NODE/log before it is acknowledged. sync_client renames that to log-run, brings all of it
to the replica and then removes it; if that fails, it stays and is done again. So a replica has everything that happened
before now once the files that are there now are gone. A file that is open keeps its number, so that a new one cannot be
taken for it.
"""

import os
import time


class Mark:
    """What lay before a replica at one moment. `passed` once it has it all."""

    def __init__(self, files):
        self.since = time.monotonic()
        self._files = files

    def passed(self):
        """Whether the replica has everything from before the mark."""
        self._files = [file for file in self._files if not file.gone()]
        return not self._files


class Watch:
    """One replica's folder."""

    def __init__(self, folder):
        self.folder = folder
        self._open = {}

    def mark(self):
        """A mark on everything until now."""
        # In this order: what is renamed between the two looks is seen by the second.
        found = [file for file in (self._look("log"), self._look("log-run")) if file]
        return Mark(list(dict.fromkeys(found)))

    def _look(self, name):
        self._open = {key: file for key, file in self._open.items() if not file.gone()}
        try:
            handle = os.open(f"{self.folder}/{name}", os.O_RDONLY)
        except FileNotFoundError:
            return None
        status = os.fstat(handle)
        if not status.st_nlink:
            os.close(handle)
            return None
        key = status.st_dev, status.st_ino
        if key in self._open:
            os.close(handle)
        else:
            self._open[key] = _File(handle)
        return self._open[key]


class _File:
    def __init__(self, handle):
        self._handle = handle

    def gone(self):
        """Whether nothing in the folder has this file any more."""
        if self._handle >= 0 and os.fstat(self._handle).st_nlink == 0:
            os.close(self._handle)
            self._handle = -1
        return self._handle < 0

    def __del__(self):
        if self._handle >= 0:
            os.close(self._handle)


class Lag:
    """How long a replica has been behind."""

    def __init__(self, folder):
        self._watch = Watch(folder)
        self._mark = self._watch.mark()

    def seconds(self):
        """At least this long ago is the oldest change that the replica does not have. 0: it has all that there was."""
        if not self._mark.passed():
            return time.monotonic() - self._mark.since
        self._mark = self._watch.mark()
        return 0.0
