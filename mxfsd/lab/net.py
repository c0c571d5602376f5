"""The lab's network: one bridge in a namespace of its own, one namespace a node, joined by veth pairs.

Nothing is added to the host's own network namespace, so a lab neither needs nor disturbs the host's addresses. Every
node has ``eth0`` with 10.77.1.N/24, and multicast and broadcast reach all nodes. Uses ip(8).
"""

import subprocess
from collections.abc import Sequence

from mxfs_proto.errors import IoFailure
from mxfsd import procs

NETNS_FOLDER = "/run/netns"
SUBNET = "10.77.1"
BRIDGE_ADDRESS = f"{SUBNET}.254"
"""Of the bridge itself: the lab's SCSI target listens there."""
LINK_S = 5.0


def namespace(lab_id: str, name: str) -> str:
    """Return the name of a namespace of the lab: *name* is ``n3`` or, for the bridge's, ``br``."""
    return f"mxfs-{lab_id}-{name}"


def path_of(name: str) -> str:
    """Return the file that setns(2) wants for a named namespace."""
    return f"{NETNS_FOLDER}/{name}"


def address(number: int) -> str:
    """Return node *number*'s address, inside its own namespace."""
    return f"{SUBNET}.{number}"


def existing(lab_id: str) -> list[str]:
    """Return the names of the lab's namespaces that there are."""
    listed = _ip("netns", "list").splitlines()
    names = [line.split()[0] for line in listed if line.strip()]
    return sorted(name for name in names if name.startswith(f"mxfs-{lab_id}-"))


def build(lab_id: str, count: int) -> None:
    """Make the bridge and the namespaces of nodes 1 to *count*. IoFailure leaves the caller to call ``remove``."""
    bridge = namespace(lab_id, "br")
    _ip("netns", "add", bridge)
    # No snooping: there is no multicast router to ask for members, and a lab is small. No forward delay: no loops.
    _batch(
        bridge,
        [
            "link set lo up",
            "link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
            "link set br0 up",
            f"addr add {BRIDGE_ADDRESS}/24 dev br0",
        ],
    )
    for number in range(1, count + 1):
        node = namespace(lab_id, f"n{number}")
        _ip("netns", "add", node)
        _batch(
            bridge,
            [
                f"link add n{number} type veth peer name eth0 netns {node}",
                f"link set n{number} master br0 up",
            ],
        )
        _batch(
            node,
            [
                "link set lo up",
                f"addr add {address(number)}/24 brd + dev eth0",
                "link set eth0 up",
                "route add 224.0.0.0/4 dev eth0",
            ],
        )
    for number in range(1, count + 1):
        if not procs.wait_until(lambda number=number: link_is_up(lab_id, number), LINK_S):  # type: ignore[misc]
            raise IoFailure(f"the link of n{number} did not come up within {LINK_S:g} s")


def remove(lab_id: str) -> None:
    """Remove every namespace of the lab, and with them its bridge and links."""
    for name in existing(lab_id):
        _ip("netns", "delete", name)


def set_link(lab_id: str, number: int, up: bool) -> None:
    """Cut node *number* off from the bridge, or join it again; returns when the link is so."""
    _ip("-n", namespace(lab_id, "br"), "link", "set", f"n{number}", "up" if up else "down")
    if not procs.wait_until(lambda: link_is_up(lab_id, number) is up, LINK_S):
        raise IoFailure(f"the link of n{number} did not go {'up' if up else 'down'} within {LINK_S:g} s")


def link_is_up(lab_id: str, number: int) -> bool:
    """Whether node *number*'s end of its link has a carrier and forwards."""
    inside = _ip("-n", namespace(lab_id, f"n{number}"), "-o", "link", "show", "dev", "eth0")
    bridge = _ip("-n", namespace(lab_id, "br"), "-d", "-o", "link", "show", "dev", f"n{number}")
    return "state UP" in inside and "state forwarding" in bridge


def _ip(*words: str) -> str:
    return _run(["ip", *words])


def _batch(name: str, lines: Sequence[str]) -> str:
    return _run(["ip", "-n", name, "-batch", "-"], "\n".join(lines) + "\n")


def _run(argv: Sequence[str], text: str = "") -> str:
    done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[0]
        raise IoFailure(f"{' '.join(argv)}: {reason}")
    return done.stdout
