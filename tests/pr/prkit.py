"""The disks that the tests of reservations run on, and how an initiator reaches them."""

import os
import secrets
from typing import Protocol

from tgt import Tgt

from mxfsd.pr.nexus import Nexus
from mxfsd.pr.reservations import Reservations
from mxfsd.pr.scsi import ScsiNexus
from mxfsd.pr.sgio import SgIo

DEVICES = [name for name in os.environ.get("MXFS_TEST_PR_DEVICES", "").split(",") if name]


class TestDisk(Protocol):
    """One disk that several initiators reach."""

    __test__ = False

    def nexus(self, name: str) -> ScsiNexus:
        """Return the path of initiator a, b or c; the same one each time."""
        ...


class TgtDisk:
    """A logical unit of tgtd, over libiscsi."""

    def __init__(self, tgt: Tgt) -> None:
        self.tgt = tgt
        self._open: dict[str, ScsiNexus] = {}

    def nexus(self, name: str) -> ScsiNexus:
        if name not in self._open:
            self._open[name] = ScsiNexus(self.tgt.initiator(name))
        return self._open[name]


class SgDisk:
    """Devices of this kernel, over SG_IO."""

    def __init__(self) -> None:
        assert len(DEVICES) == 3, "MXFS_TEST_PR_DEVICES names three devices"
        self._open = {name: ScsiNexus(SgIo(path)) for name, path in zip("abc", DEVICES, strict=True)}

    def nexus(self, name: str) -> ScsiNexus:
        return self._open[name]

    def close(self) -> None:
        path: Nexus = self._open["a"]
        Reservations("disk", [path]).clear(secrets.randbits(40) | 1)
        for opened in self._open.values():
            opened.close()
