"""What the kernel still serves of a mount whose FUSE layer is dead or stuck, and how that ends in time.

Tried on Linux 6.18 (docs/fencing.md): after the FUSE server was killed, mapped pages can be read for ever, and cached
pages by read(2) until the attribute timeout; while somebody else holds /dev/fuse, everything else hangs. With that
descriptor: abort the connection, which ends every request and unlocks its folios; then invalidate the pages, which
works on an aborted connection and waits for nobody. A mapping then gives SIGBUS, read(2) ENOTCONN.

Used by the heartbeat process, from its main thread; what may take long runs in a thread of its own.
"""

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from mxfs_fuse.kernel import KernelNotifier
from mxfs_proto.errors import MediaError, MisuseError
from mxfsd.io.cachelist import is_dropped, read_list

DESCRIPTORS = 3
"""What the FUSE layer hands over: /dev/fuse, its list of cached inodes, the ``abort`` file of its connection."""
_POLL_S = 0.01
_WORK_MS = 2000


class CacheGuard:
    """Ends the caches of one mount.

    *margin_ms* before the lease ends, a FUSE layer that has not dropped its caches is taken to be stuck, and it is done
    for it; what that does not bring about within *slack_ms* more, an abort of the connection does.
    """

    def __init__(self, margin_ms: int, slack_ms: int, clock: Callable[[], int]) -> None:
        self._margin_ms = margin_ms
        self._slack_ms = slack_ms
        self._clock = clock
        self._fuse = self._list = self._abort = self._stat = -1
        self.pidfd = -1
        """Readable when the FUSE process has ended; -1 where none is watched (any more)."""
        self.until_ms = 0
        """End of the lease under which the kernel caches, as the daemon told it last."""
        self._work: threading.Thread | None = None
        self._done = False
        """The work has been through since the lease was renewed last."""
        self._aborted = False
        self._begun_ms = 0

    def watch(self, pid: int, fds: Sequence[int]) -> None:
        """Watch the FUSE process *pid*; *fds* (see DESCRIPTORS) are ours to close. Raises MisuseError."""
        if len(fds) != DESCRIPTORS or self._fuse >= 0:
            for fd in fds:
                os.close(fd)
            raise MisuseError("a mount's caches are watched already" if self._fuse >= 0 else "descriptors are missing")
        self._fuse, self._list, self._abort = fds
        try:
            self.pidfd = os.pidfd_open(pid)
            self._stat = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        except (ProcessLookupError, FileNotFoundError):
            self.fuse_ended()

    def tell(self, until_ms: int) -> None:
        """The lease was renewed."""
        if until_ms > self.until_ms:
            self.until_ms = until_ms
            self._done = self._aborted

    def fuse_ended(self) -> None:
        """The FUSE process is dead: nobody serves this mount again. End it at once, lease or no lease."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
        self._end()

    @property
    def due_ms(self) -> int | None:
        """When ``check`` has something to do, None: not before the lease is renewed, or something is heard."""
        if self._fuse < 0 or self._aborted or self.settled:
            return None
        if self._work is not None and self._work.is_alive():
            return max(self.until_ms, self._begun_ms) + self._slack_ms
        return self.until_ms - self._margin_ms

    @property
    def settled(self) -> bool:
        """Whether nothing that is cached can be read any more."""
        if self._aborted:
            return self._done
        return self._fuse < 0 or self._done or self._dropped()

    def check(self) -> None:
        """Look at the time: a live FUSE layer drops its caches itself before the lease ends. If it did not, we do."""
        now = self._clock()
        if self._fuse >= 0 and not self._aborted and self._is_dying():
            self.fuse_ended()
        if self._fuse < 0 or self._aborted or now < self.until_ms - self._margin_ms or self.settled:
            return
        if self._work is None or not self._work.is_alive():
            self._begin()
        elif now >= max(self.until_ms, self._begun_ms) + self._slack_ms:
            # It waits for folios of requests that are not answered, and has not come to those behind them.
            self._end()

    def settle(self) -> bool:
        """Wait for ``settled``: until the lease ends, and for the time that the work may take. Return whether it is."""
        deadline = max(self.until_ms, self._clock()) + self._slack_ms + _WORK_MS
        while not self.settled and self._clock() < deadline:
            self.check()
            time.sleep(_POLL_S)
        return self.settled

    def _is_dying(self) -> bool:
        """Whether the FUSE process was killed, but has threads that cannot end (its pidfd says nothing then).

        Seen: a thread whose invalidation waits for the folio of a READ, which only this process could have answered.
        """
        try:
            return os.pread(self._stat, 512, 0).rpartition(b")")[2].split()[0] in (b"Z", b"X")
        except (OSError, IndexError):
            return True

    def _dropped(self) -> bool:
        """Whether the FUSE layer has said so. It takes that back when it hears of the next lease, perhaps before we do:
        where the lease was at its end by then, this one is done with all the same."""
        try:
            found = is_dropped(self._list)
        except (OSError, MediaError):
            return False
        if found and self._clock() >= self.until_ms - self._margin_ms:
            self._done = True
        return found

    def _end(self) -> None:
        """End the connection, and with it every request that holds a folio."""
        if self._fuse < 0 or self._aborted:
            return
        self._aborted = True
        self._done = False
        with suppress(OSError):  # where it is unmounted there is no connection
            os.write(self._abort, b"1")
        self._begin()

    def _begin(self) -> None:
        aborted = self._aborted
        self._begun_ms = self._clock()

        def work() -> None:
            kernel = KernelNotifier(self._fuse)
            for nodeid in read_list(self._list):
                kernel.inval_pages(nodeid, 0, 0)
            kernel.inc_epoch()
            # What was begun before the abort may have come to its end by it: the folios of these requests are to do.
            if aborted == self._aborted:
                self._done = True

        self._work = threading.Thread(target=work, name="caches", daemon=True)
        self._work.start()
