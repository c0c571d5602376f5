"""What operators ask of a daemon: the commands of the control socket, for ``mxfs status``, ``locks`` and so on."""

import asyncio
import errno
from typing import TYPE_CHECKING, Any

import structlog

from mxfs_proto.errors import IoFailure, MisuseError
from mxfs_proto.ondisk import SlotState
from mxfsd.control import Handler
from mxfsd.io.clock import now_ms
from mxfsd.io.heartbeat_client import SlotView
from mxfsd.report import full_report, locks_report, status_report

if TYPE_CHECKING:
    from mxfsd.daemon import Daemon

log = structlog.get_logger(__name__)

_LOOK_S = 0.01
_TAKES_PART = frozenset({SlotState.JOINING, SlotState.ACTIVE, SlotState.RESTARTING})


class Operators:
    """The commands, each a coroutine from the request to the fields of its reply. Raises MisuseError, IoFailure."""

    def __init__(self, daemon: "Daemon") -> None:
        self._daemon = daemon

    def handlers(self) -> dict[str, Handler]:
        """Return the commands by name."""
        return {
            "status": self._status,
            "locks": self._locks,
            "home-move": self._move,
            "evict": self._evict,
            "sync": self._sync,
            "stop": self._stop,
            "crash-lower": self._crash,
        }

    async def _status(self, request: dict[str, Any]) -> dict[str, Any]:
        """The state; with ``figures`` also what was counted, which is longer."""
        return full_report(self._daemon) if request.get("figures") else status_report(self._daemon)

    async def _locks(self, _request: dict[str, Any]) -> dict[str, Any]:
        return locks_report(self._daemon)

    def _slot(self, wanted: str, states: frozenset[SlotState], what: str) -> SlotView:
        """The slot of the node that is called so, or has this number."""
        heartbeat = self._daemon.heartbeat
        assert heartbeat is not None and heartbeat.report is not None
        for view in heartbeat.report.slots.values():
            if wanted in (view.name, str(view.slot)) and view.state in states:
                return view
        raise MisuseError(f"no {what} {wanted!r} in this volume: see mxfs status")

    async def _move(self, request: dict[str, Any]) -> dict[str, Any]:
        """Move the home to the node named; returns when the new home serves."""
        daemon = self._daemon
        wanted = str(request.get("node", ""))
        target = self._slot(wanted, frozenset({SlotState.ACTIVE}), "active node")
        if target.slot == daemon.home_slot:
            return {"home": target.name, "epoch": daemon.epoch}
        before = daemon.epoch
        if daemon.home is not None:
            if not await daemon.move_home(target.slot):
                raise IoFailure(f"called off: {daemon.held_by}", errno.EBUSY)
        elif daemon.client is not None:
            daemon.client.ask_move(target.slot)
        deadline = now_ms() + daemon.timeouts.lock_wait_ms
        while not (daemon.serving and daemon.epoch > before and daemon.home_slot == target.slot):
            if now_ms() > deadline:
                raise IoFailure(f"the home did not arrive at {wanted}: see the log", errno.ETIMEDOUT)
            await asyncio.sleep(_LOOK_S)
        return {"home": target.name, "epoch": daemon.epoch}

    async def _evict(self, request: dict[str, Any]) -> dict[str, Any]:
        """Put a node out, heard or not; returns when it is fenced and its slot is taken from it."""
        daemon = self._daemon
        wanted = str(request.get("node", ""))
        victim = self._slot(wanted, _TAKES_PART, "node that takes part")
        if victim.slot == daemon.slot:
            raise MisuseError(f"{victim.name} is the node you are on: unmount the volume instead")
        if victim.slot == daemon.home_slot:
            raise MisuseError(
                f"{victim.name} is the home: move it first (mxfs home move NODE); a dead home is replaced without help"
            )
        log.warning("an operator puts a node out", peer=victim.slot, name=victim.name, incarnation=victim.incarnation)
        if daemon.members is not None and daemon.serving:
            daemon.members.evict(victim.slot, victim.incarnation)
        elif daemon.client is not None:
            daemon.client.ask_evict(victim.slot, victim.incarnation)
        else:
            raise IoFailure("there is no home just now that could do it: try again", errno.EAGAIN)
        deadline = now_ms() + daemon.timeouts.lock_wait_ms
        while self._takes_part(victim):
            if now_ms() > deadline:
                raise IoFailure(f"{victim.name} could not be fenced yet: see the home's log", errno.ETIMEDOUT)
            await asyncio.sleep(_LOOK_S)
        return {"node": victim.name, "slot": victim.slot, "incarnation": victim.incarnation}

    async def _sync(self, _request: dict[str, Any]) -> dict[str, Any]:
        """Returns when what was written on this node is durable."""
        fuse = self._daemon.fuse
        assert fuse is not None
        try:
            await fuse.sync()
        except OSError as exc:
            raise IoFailure(f"not everything written here is durable: {exc.strerror}", exc.errno) from exc
        return {}

    def _takes_part(self, victim: SlotView) -> bool:
        """Whether the slots, as they were read last, still have this incarnation."""
        heartbeat = self._daemon.heartbeat
        assert heartbeat is not None and heartbeat.report is not None
        view = heartbeat.report.slots.get(victim.slot)
        return view is not None and view.incarnation == victim.incarnation and view.state in _TAKES_PART

    async def _stop(self, _request: dict[str, Any]) -> dict[str, Any]:
        self._daemon.stop("asked to stop")
        return {}

    async def _crash(self, _request: dict[str, Any]) -> dict[str, Any]:
        return {"crashed": self._daemon.crash_lower()}
