"""A real iSCSI target on loopback: tgtd in the foreground, with a control socket and a port of its own."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mxfsd.pr.iscsi import Iscsi

TARGET = "iqn.2026-11.net.mxfs.test:disk"
LUN = 1
WAIT_S = 20.0


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class TgtError(Exception):
    """tgtd or tgtadm failed; the text has their output."""


class Tgt:
    """One tgtd with one logical unit on *image*. Sessions opened with ``initiator`` are closed by ``close``."""

    def __init__(self, image: Path) -> None:
        """Start it. Raises TgtError."""
        self.image = image
        self.port = free_port()
        # The path of a Unix socket is short, those of temporary folders of tests are not.
        self._folder = tempfile.mkdtemp(prefix="mxfs-tgt-")
        self._environment = {**os.environ, "TGT_IPC_SOCKET": f"{self._folder}/ipc"}
        self._log = Path(self._folder, "log")
        self._sessions: list[Iscsi] = []
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """Address of the logical unit."""
        return f"iscsi://127.0.0.1:{self.port}/{TARGET}/{LUN}"

    def initiator(self, name: str, *, timeout_ms: int = 10_000) -> Iscsi:
        """Log in as an initiator of that name."""
        session = Iscsi(self.url, initiator=f"iqn.2026-11.net.mxfs.test:{name}", timeout_ms=timeout_ms)
        self._sessions.append(session)
        return session

    def start(self) -> None:
        """Start tgtd and define the target; return when it can be logged in to."""
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                ["tgtd", "-f", "--iscsi", f"portal=127.0.0.1:{self.port}"],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                self._adm("--op", "show", "--mode", "sys")
                break
            except TgtError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise TgtError(f"tgtd does not run: {error}\n{self._log.read_text()}") from error
            time.sleep(0.02)
        self._adm("--op", "new", "--mode", "target", "--tid", "1", "-T", TARGET)
        unit = ("--mode", "logicalunit", "--tid", "1", "--lun", str(LUN))
        self._adm("--op", "new", *unit, "-b", str(self.image))
        self._adm("--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL")

    def kill(self) -> None:
        """End tgtd at once, as a loss of power would: what it had registered is gone."""
        if self._process is not None:
            self._process.kill()  # SIGTERM is ignored while a target is defined
            self._process.wait(WAIT_S)
            self._process = None

    def restart(self) -> None:
        """Lose all registrations."""
        self.kill()
        self.start()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Let it not answer for a while."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Log everybody out, end tgtd, remove its files."""
        for session in self._sessions:
            with contextlib.suppress(Exception):
                session.close()
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _adm(self, *words: str) -> None:
        done = subprocess.run(
            ["tgtadm", "--lld", "iscsi", *words],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
        if done.returncode:
            raise TgtError(f"tgtadm {' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")
