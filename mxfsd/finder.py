"""How a node finds the home sooner than through the slots on the disk: announcements, sent and heard.

They only save time. The lease on the disk says who is home, and TLS proves it; without announcements (no multicast, a
firewall) nodes read each other's addresses in the slots.
"""

import asyncio
import errno
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import structlog

from mxfs_proto.discovery import Announcement
from mxfs_proto.errors import IoFailure, MisuseError, MxfsError
from mxfs_proto.ondisk import Address
from mxfsd.io.addresses import own_interfaces
from mxfsd.io.certs import VolumeKeys
from mxfsd.io.discovery import GROUP, PORT, Discovery, DiscoveryConfig
from mxfsd.options import MountOptions

log = structlog.get_logger(__name__)


def config_of(options: MountOptions) -> DiscoveryConfig:
    """Return what the mount options mean for announcements. Raises MisuseError (an IPv6 address, say)."""
    return DiscoveryConfig(
        port=options.port or PORT,
        multicast=options.multicast or GROUP,
        broadcast=options.broadcast,
        peers=options.peers,
        iface=options.iface,
    )


@dataclass(frozen=True, slots=True)
class Heard:
    """The newest announcement of a slot, and the address that it came from."""

    said: Announcement
    sender: str


class Finder:
    """Announces this node and remembers what the others announce.

    *describe* returns our announcement as it is now. *on_home(slot, epoch)* is called when a home announces itself
    for the first time, or for a new epoch or address.
    """

    def __init__(
        self,
        options: MountOptions,
        keys: VolumeKeys,
        period_ms: int,
        describe: Callable[[], Announcement],
        on_home: Callable[[int, int], None],
    ) -> None:
        self._options = options
        self._keys = keys
        self._period_s = period_ms / 1000
        self._describe = describe
        self._on_home = on_home
        self._discovery: Discovery | None = None
        self._heard: dict[int, Heard] = {}
        self._home: tuple[int, int, int, str, int] | None = None
        self._news = asyncio.Event()
        self._due = asyncio.Event()
        self._off = "not started"

    async def start(self) -> None:
        """Open the socket. What fails is logged, never raised: the slots on the disk are enough."""
        try:
            self._discovery = await self._open(config_of(self._options))
            self._off = ""
        except (MxfsError, OSError) as err:
            self._off = str(err)
            log.warning("announcements are off, nodes are found through the disk only", reason=self._off)

    async def _open(self, config: DiscoveryConfig) -> Discovery:
        discovery = Discovery(config, self._keys, self._on_announce)
        try:
            await discovery.start()
            return discovery
        except IoFailure as err:
            if config.mode != "multicast" or config.iface is not None or err.errno != errno.ENODEV:
                raise
        # No route says which interface multicast belongs to: take our first one.
        discovery = Discovery(replace(config, iface=own_interfaces()[0][0]), self._keys, self._on_announce)
        await discovery.start()
        return discovery

    async def run(self) -> None:
        """Announce this node in each period, and at once after `announce_soon`; until cancelled."""
        while self._discovery is not None:
            self._due.clear()
            try:
                await self._discovery.announce(self._describe())
            except MisuseError as err:
                log.error("this node cannot be announced", reason=str(err))
            try:
                async with asyncio.timeout(self._period_s):
                    await self._due.wait()
            except TimeoutError:
                pass

    def announce_soon(self) -> None:
        """Do not wait for the next period: something has changed."""
        self._due.set()

    async def pause(self, seconds: float) -> None:
        """Wait so long, or until a home announces itself that had not (also when it did so since the last pause)."""
        try:
            async with asyncio.timeout(seconds):
                await self._news.wait()
        except TimeoutError:
            pass
        self._news.clear()

    def addresses(self, slot: int, incarnation: int) -> list[Address]:
        """Return where that node can be reached as it announced itself; nothing when it was not heard."""
        heard = self._heard.get(slot)
        if heard is None or heard.said.incarnation != incarnation:
            return []
        hosts = dict.fromkeys((heard.said.address, heard.sender))
        return [Address(host, heard.said.port) for host in hosts]

    def _on_announce(self, said: Announcement, sender: str) -> None:
        before = self._heard.get(said.slot)
        if before is not None and before.said.incarnation > said.incarnation:
            return  # the slot has another owner since
        self._heard[said.slot] = Heard(said, sender)
        ours = self._describe()
        if said.home_slot == 0 and ours.home_slot == ours.slot:
            self.announce_soon()  # it looks for the home, and that is us
        home = (said.epoch, said.slot, said.incarnation, said.address, said.port)
        if said.slot == said.home_slot and home != self._home and (self._home is None or said.epoch >= self._home[0]):
            self._home = home
            self._news.set()
            self._on_home(said.slot, said.epoch)

    def report(self) -> dict[str, Any]:
        """Return what ``mxfs status`` shows: whether announcements are on, and what became of those received."""
        counts = dict(self._discovery.counts) if self._discovery is not None else {}
        return {"on": not self._off, "reason": self._off, "heard": sorted(self._heard), "counts": counts}

    async def close(self) -> None:
        """Stop to listen. Can be repeated; `run` must have been cancelled."""
        discovery, self._discovery = self._discovery, None
        if discovery is not None:
            await discovery.close()
