"""Every deadline of MXFS, named with its unit and derived from a few base values (pure).

``docs/timeouts.md`` has the second-by-second timeline that these values lead to.
"""

from dataclasses import dataclass
from typing import Self

from mxfs_proto.errors import MisuseError


@dataclass(frozen=True, slots=True)
class Timeouts:
    """The deadlines of one volume on one node, all in milliseconds.

    All nodes of a volume must run the same set: a node's promise to stop after ``self_fence_ms`` only helps
    others that wait ``node_dead_ms``. Slots carry the values, so that a joiner with others is refused.
    """

    heartbeat_ms: int
    """Period at which the heartbeat process writes its slot."""
    renewal_ms: int
    """Period at which the home renews its lease (and a client its locks)."""
    lease_ms: int
    """Length of the home lease and of a cached lock, from the start of the last renewal."""
    fence_margin_ms: int
    """A home shuts its XFS down this long before its lease ends: so late may the process that does it be."""
    watchdog_ms: int
    """A hardware watchdog resets a home this long after the last good beat."""
    node_dead_ms: int
    """A counter that did not move for this long on the observer's clock belongs to a dead node."""
    self_fence_ms: int
    """A node that could not write its slot for this long no longer trusts that the slot is its own."""
    lock_wait_ms: int
    """A lock request without an answer is logged and asked again after this."""
    bast_ms: int
    """A holder that is silent for this long after a blocking AST is suspected."""
    min_hold_ms: int
    """A granted lock is kept this long before a blocking AST takes it away."""
    kernel_cache_ms: int
    """Attribute and entry timeout given to the kernel; ends before the lease does."""
    claim_wait_ms: int
    """Between the write of a claim and the read that decides it."""
    claim_bound_ms: int
    """A claim whose read and write together took longer than this is given up."""
    io_timeout_ms: int
    """The longest a single I/O on the shared disk may take before it counts as failed."""
    grace_ms: int
    """After a failover the new home waits this long for the survivors' reclaims."""
    restart_ms: int
    """A FUSE layer that has no daemon waits this long for the next one; then its mount is dead (EIO)."""
    ready_ms: int
    """``mount.mxfs`` waits this long for the daemon."""
    announce_ms: int
    """Period of the discovery announcements."""

    def __post_init__(self) -> None:
        """Refuse a set that breaks an order which safety needs. Raises MisuseError."""
        rules = (
            (min(getattr(self, name) for name in self.__slots__) > 0, "every deadline is positive"),
            (self.heartbeat_ms <= self.renewal_ms, "heartbeat_ms <= renewal_ms"),
            (
                2 * self.renewal_ms + self.fence_margin_ms <= self.lease_ms,
                "2 * renewal_ms + fence_margin_ms <= lease_ms (one renewal may be lost)",
            ),
            # A watchdog is fed until the lease ends at the latest, and not before the home has had its chance.
            (self.lease_ms <= self.watchdog_ms, "lease_ms <= watchdog_ms"),
            (self.lease_ms + self.watchdog_ms <= self.node_dead_ms, "lease_ms + watchdog_ms <= node_dead_ms"),
            # Without persistent reservations: what a home had given to the disk when it shut down is through.
            (self.lease_ms + self.io_timeout_ms <= self.node_dead_ms, "lease_ms + io_timeout_ms <= node_dead_ms"),
            (self.kernel_cache_ms < self.lease_ms - self.renewal_ms, "kernel_cache_ms < lease - renewal"),
            (self.lease_ms <= self.self_fence_ms, "lease_ms <= self_fence_ms"),
            (
                self.self_fence_ms < self.node_dead_ms - 2 * self.heartbeat_ms,
                "self_fence_ms < node_dead_ms - 2 * heartbeat_ms",
            ),
            (3 * self.claim_bound_ms <= 2 * self.claim_wait_ms, "claim_bound_ms <= 2/3 claim_wait_ms"),
            (self.claim_wait_ms < self.lease_ms, "claim_wait_ms < lease_ms"),
            (self.io_timeout_ms <= self.lease_ms, "io_timeout_ms <= lease_ms"),
            (self.node_dead_ms < self.lock_wait_ms, "node_dead_ms < lock_wait_ms"),
        )
        for holds, rule in rules:
            if not holds:
                raise MisuseError(f"timeouts break the rule {rule}")

    @classmethod
    def derive(
        cls,
        *,
        heartbeat_ms: int = 1000,
        lease_ms: int = 5000,
        node_dead_ms: int = 15000,
        claim_wait_ms: int = 300,
    ) -> Self:
        """Return the whole set for these base values (ms). Raises MisuseError if they contradict."""
        renewal_ms = 2 * heartbeat_ms
        return cls(
            heartbeat_ms=heartbeat_ms,
            renewal_ms=renewal_ms,
            lease_ms=lease_ms,
            fence_margin_ms=lease_ms // 10,
            watchdog_ms=lease_ms,
            node_dead_ms=node_dead_ms,
            self_fence_ms=lease_ms + (node_dead_ms - lease_ms) // 3,
            lock_wait_ms=2 * node_dead_ms,
            bast_ms=2 * lease_ms,
            min_hold_ms=1,
            kernel_cache_ms=(lease_ms - renewal_ms) * 2 // 3,
            claim_wait_ms=claim_wait_ms,
            claim_bound_ms=claim_wait_ms * 2 // 3,
            io_timeout_ms=lease_ms,
            grace_ms=node_dead_ms,
            restart_ms=4 * node_dead_ms,
            ready_ms=2 * max(node_dead_ms, 15000),
            announce_ms=heartbeat_ms,
        )

    @classmethod
    def named(cls, name: str) -> Self:
        """Return the set that the mount option ``timeouts=NAME`` means. Raises MisuseError."""
        if name == "fast":
            return cls.derive(heartbeat_ms=250, lease_ms=2000, node_dead_ms=4000)
        if name == "default":
            return cls.derive()
        if name == "patient":
            return cls.derive(heartbeat_ms=4000, lease_ms=20000, node_dead_ms=60000, claim_wait_ms=3000)
        raise MisuseError(f"unknown timeouts {name!r}: use fast, default or patient")
