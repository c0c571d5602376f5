"""A real iSCSI target on loopback (``mxfsd.lab.target``), with a control socket and a port of its own."""

import contextlib
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mxfsd.lab.target import Target, url
from mxfsd.pr.iscsi import Iscsi

HOST = "127.0.0.1"


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class Tgt:
    """One tgtd with one logical unit on *image*. Sessions opened with ``initiator`` are closed by ``close``."""

    def __init__(self, image: Path) -> None:
        """Start it. Raises IoFailure."""
        self.image = image
        self.port = free_port()
        # The path of a Unix socket is short, those of temporary folders of tests are not.
        self._folder = tempfile.mkdtemp(prefix="mxfs-tgt-")
        self._target = Target(image, Path(self._folder), HOST, self.port)
        self._sessions: list[Iscsi] = []
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """Address of the logical unit."""
        return url(HOST, self.port)

    def initiator(self, name: str, *, timeout_ms: int = 10_000) -> Iscsi:
        """Log in as an initiator of that name."""
        session = Iscsi(self.url, initiator=f"iqn.2026-11.net.mxfs.test:{name}", timeout_ms=timeout_ms)
        self._sessions.append(session)
        return session

    def start(self) -> None:
        """Start tgtd and define the target; return when it can be logged in to."""
        self._target.start()

    def protect(self, user: str, secret: str) -> None:
        """From now on let only those log in who know the secret (CHAP)."""
        self._target.protect(user, secret)

    def kill(self) -> None:
        """End tgtd at once, as a loss of power would: what it had registered is gone."""
        self._target.kill()

    def restart(self) -> None:
        """Lose all registrations."""
        self.kill()
        self.start()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Let it not answer for a while."""
        assert self._target.process is not None
        self._target.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._target.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Log everybody out, end tgtd, remove its files."""
        for session in self._sessions:
            with contextlib.suppress(Exception):
                session.close()
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)
