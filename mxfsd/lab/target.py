"""A SCSI target for a lab: tgtd(8) in the bridge's namespace, whose one small unit takes the volume's reservations.

A machine's kernel may have no SCSI at all; so the volume stays on loop devices, and the nodes fence each other at this
target, over iSCSI (mount option ``prdev=``).
"""

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from mxfs_proto.errors import IoFailure
from mxfsd import procs

NAME = "iqn.2026-11.net.mxfs.lab:reservations"
LUN = 1
PORT = 3260
BYTES = 16 << 20
WAIT_S = 20.0


def url(host: str, port: int = PORT) -> str:
    """Return the address of the unit, as ``prdev=`` takes it."""
    return f"iscsi://{host}:{port}/{NAME}/{LUN}"


class Target:
    """One tgtd with one unit on *image*; *prefix* is put before its commands (to run them in a namespace)."""

    def __init__(
        self, image: Path, folder: Path, host: str, port: int = PORT, prefix: Sequence[str] = (), mark: str = ""
    ) -> None:
        self.image = image
        self._listen = f"portal={host}:{port}"
        self._prefix = tuple(prefix)
        self._log = folder / "tgtd.log"
        self._environment: Mapping[str, str] = {
            **os.environ,
            "TGT_IPC_SOCKET": f"{folder}/ipc",
            **dict([mark.split("=", 1)] if mark else []),
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start tgtd and define the unit; return when it can be logged in to. Raises IoFailure."""
        if not self.image.exists():
            with open(self.image, "wb") as file:
                file.truncate(BYTES)
        with open(self._log, "ab") as log:
            self.process = subprocess.Popen(
                [*self._prefix, "tgtd", "-f", "--iscsi", self._listen],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                self._adm("--op", "show", "--mode", "sys")
                break
            except IoFailure as error:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    last = (self._log.read_text(errors="replace").strip() or "it says nothing").splitlines()[-1]
                    raise IoFailure(f"tgtd does not run: {last}") from error
            time.sleep(0.02)
        unit = ("--mode", "logicalunit", "--tid", "1", "--lun", str(LUN))
        self._adm("--op", "new", "--mode", "target", "--tid", "1", "-T", NAME)
        self._adm("--op", "new", *unit, "-b", str(self.image))
        self._adm("--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL")

    def protect(self, user: str, secret: str) -> None:
        """From now on let only those log in who know the secret (CHAP). Raises IoFailure."""
        self._adm("--op", "new", "--mode", "account", "--user", user, "--password", secret)
        self._adm("--op", "bind", "--mode", "account", "--tid", "1", "--user", user)

    def kill(self) -> None:
        """End tgtd at once, as a loss of power would: what was registered is gone."""
        if self.process is not None:
            self.process.kill()  # it ignores SIGTERM while a target is defined
            self.process.wait(WAIT_S)
            self.process = None

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
            raise IoFailure(f"tgtadm {' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")


def end(mark: str) -> None:
    """End the tgtd that carries *mark* in its environment, if one runs."""
    for pid in procs.marked(mark):
        procs.send(pid, 9, lambda number: procs.has_mark(number, mark))
    procs.wait_until(lambda: not procs.marked(mark), WAIT_S)
