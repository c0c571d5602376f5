"""Mount options: the ``-o`` string of mount(8) parsed into one frozen record.

Three kinds of option meet here: MXFS's own, those of the kernel's VFS that are handed on to the FUSE mount
(mount(8), "FILESYSTEM-INDEPENDENT MOUNT OPTIONS"), and those that only mount(8), fstab(5) or systemd read, which
are accepted and dropped. Imported by ``mount.mxfs`` before the daemon runs, so this module imports little.
"""

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NoReturn

from mxfs_proto.errors import MisuseError

if TYPE_CHECKING:
    from ipaddress import IPv4Address, IPv6Address

DEFAULT_RUN_ROOT = "/run/mxfs"
RUN_ROOT_ENV = "MXFS_RUN_ROOT"
LOOPBACK = "127.0.0.1"
TIMEOUT_NAMES = ("fast", "default", "patient")
LOG_LEVELS = ("debug", "info", "warning", "error")

FENCING_NAMES = ("auto", "pr", "lease")
CHANNEL_NAMES = ("native", "pyfuse3")

_OWN = (
    "iface",
    "port",
    "multicast",
    "broadcast",
    "peer",
    "timeouts",
    "fencing",
    "prdev",
    "watchdog",
    "metrics",
    "node",
    "state",
    "channel",
    "log",
)

_KERNEL_FLAGS = {
    "nodev": ("nodev", "dev"),
    "nosuid": ("nosuid", "suid"),
    "noexec": ("noexec", "exec"),
    "noatime": ("noatime", "atime"),
    "nodiratime": ("nodiratime", "diratime"),
    "relatime": ("relatime", "norelatime"),
    "strictatime": ("strictatime", "nostrictatime"),
    "sync": ("sync", "async"),
    "dirsync": ("dirsync", ""),
    "lazytime": ("lazytime", "nolazytime"),
}
"""Option handed on to the kernel: itself, and the word that takes it back."""

_TAKES_BACK = {off: on for on, (_, off) in _KERNEL_FLAGS.items() if off}

_DROPPED = frozenset(
    (
        "defaults",
        "auto",
        "noauto",
        "user",
        "nouser",
        "users",
        "nousers",
        "owner",
        "noowner",
        "group",
        "nogroup",
        "_netdev",
        "nofail",
        "silent",
        "loud",
        "iversion",
        "noiversion",
        "mand",
        "nomand",
        "comment",
    )
)
"""Accepted and not acted on: they speak to mount(8), fstab(5) or systemd, or are the default."""

STATE_MAX = 107 - len("/00000000-0000-0000-0000-000000000000/control.sock")
"""Bytes of a run root: the socket UUID/control.sock below it must fit into an address of 108 with its NUL (unix(7))."""
_IFACE_MAX = 15  # IFNAMSIZ - 1, <linux/if.h>
_NODE_NAME_MAX = 64  # bytes of a slot's name field


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What ``-o`` asked for; every field has the value that an empty option string gives."""

    read_only: bool = False
    iface: str | None = None
    port: int | None = None
    multicast: str | None = None
    broadcast: str | None = None
    peers: tuple[str, ...] = ()
    timeouts: str = "default"
    fencing: str = "auto"
    """How dead nodes are kept from the disk: ``pr``, ``lease``, or what the disk can do (docs/fencing.md)."""
    pr_device: str | None = None
    """Where the disk's persistent reservations are asked for, if not at the device itself: a path or an iscsi URL."""
    node: str | None = None
    watchdog: str | None = None
    """A watchdog device that resets this host when it is home and its heartbeats stop (docs/timeouts.md)."""
    metrics: tuple[str, int] | None = None
    """Where Prometheus metrics are served over HTTP: address and port (docs/metrics.md)."""
    state: str | None = None
    local_flocks: bool = False
    """File locks are kept by the kernel of each node, which knows those of its own processes only."""
    channel: str = ""
    """How the FUSE layer talks to the kernel (mxfs_fuse/channel); empty: native where the kernel is new enough."""
    passthrough: bool = False
    """While this node is home its kernel reads and writes files by itself (docs/architecture.md, "Passthrough")."""
    log: str = "info"
    kernel: tuple[str, ...] = ()

    @property
    def run_root(self) -> str:
        """The folder that holds one run directory a volume: ``state=``, else MXFS_RUN_ROOT, else /run/mxfs."""
        return self.state or os.environ.get(RUN_ROOT_ENV) or DEFAULT_RUN_ROOT

    def run_dir(self, volume_uuid: str) -> str:
        """The run directory of the volume with that uuid (lower-case text form)."""
        return os.path.join(self.run_root, volume_uuid)

    def to_string(self) -> str:
        """Return an option string that parses to this record again."""
        words = ["ro" if self.read_only else "rw"]
        for name, value in (
            ("iface", self.iface),
            ("port", self.port),
            ("multicast", self.multicast),
            ("broadcast", self.broadcast),
            ("prdev", self.pr_device),
            ("watchdog", self.watchdog),
            ("metrics", host_port(*self.metrics) if self.metrics is not None else None),
            ("node", self.node),
            ("state", self.state),
        ):
            if value is not None:
                words.append(f"{name}={value}")
        words.extend(f"peer={peer}" for peer in self.peers)
        words.append(f"timeouts={self.timeouts}")
        words.append(f"fencing={self.fencing}")
        if self.local_flocks:
            words.append("localflocks")
        if self.channel:
            words.append(f"channel={self.channel}")
        if self.passthrough:
            words.append("passthrough")
        words.append(f"log={self.log}")
        words.extend(self.kernel)
        return ",".join(words)


def host_port(host: str, port: int) -> str:
    """Return ``ADDR:PORT``, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def known_options() -> str:
    """Return the options of our own, for messages."""
    return "ro, rw, localflocks, passthrough, " + ", ".join(f"{name}=" for name in _OWN)


def parse(text: str, *, sloppy: bool = False) -> MountOptions:
    """Parse the argument of ``-o``. As in mount(8), a later option overrides an earlier one.

    With *sloppy* (mount -s) unknown options are ignored. Raises MisuseError with a one-line message that names
    the option at fault.
    """
    values: dict[str, str] = {}
    peers: list[str] = []
    kernel: dict[str, None] = {}
    read_only = local_flocks = passthrough = False
    last = ""
    for word in (part.strip() for part in text.split(",")):
        name, equals, value = word.partition("=")
        if name in ("ro", "rw") and not equals:
            read_only = name == "ro"
        elif name == "localflocks" and not equals:
            local_flocks = True
        elif name == "passthrough" and not equals:
            passthrough = True
        elif name in _OWN:
            if not value:
                _refuse(f"option {name} needs a value: {name}=VALUE")
            if name == "peer":
                peers.append(value)
            values[name] = value
        elif last == "peer" and not equals and _is_address(word):
            # peer=A,B: mount(8) joins options with commas too, so the second address comes as a word of its own.
            peers.append(word)
            continue
        elif name in _KERNEL_FLAGS and not equals:
            kernel[name] = None
        elif name in _TAKES_BACK and not equals:
            kernel.pop(_TAKES_BACK[name], None)
        elif word and name not in _DROPPED and not name.startswith(("x-", "X-")) and not sloppy:
            _refuse(f"unknown option {word}; known are {known_options()} and those of mount(8)")
        last = name
    options = _checked(values, tuple(peers), read_only, local_flocks, tuple(kernel))
    if passthrough and options.channel == "pyfuse3":
        _refuse("passthrough needs a channel of our own, not channel=pyfuse3")
    return replace(options, passthrough=passthrough)


def _checked(
    values: dict[str, str], peers: tuple[str, ...], read_only: bool, local_flocks: bool, kernel: tuple[str, ...]
) -> MountOptions:
    ways = [name for name in ("multicast", "broadcast", "peer") if name in values]
    if len(ways) > 1:
        _refuse(f"options {' and '.join(ways)} exclude each other: nodes find each other in one way")
    iface = values.get("iface")
    if iface is not None and (len(iface) > _IFACE_MAX or "/" in iface):
        _refuse(f"iface={iface}: not the name of a network interface (at most {_IFACE_MAX} characters)")
    node = values.get("node")
    if node is not None and (len(node.encode()) > _NODE_NAME_MAX or not node.isprintable() or "/" in node):
        _refuse(f"node={node}: a node's name is printable, without '/', of at most {_NODE_NAME_MAX} bytes")
    watchdog = values.get("watchdog")
    if watchdog is not None and not watchdog.startswith("/"):
        _refuse(f"watchdog={watchdog}: must be the absolute path of a watchdog device, such as /dev/watchdog")
    state = values.get("state")
    if state is not None and not state.startswith("/"):
        _refuse(f"state={state}: must be an absolute path")
    if state is not None and len(os.fsencode(state)) > STATE_MAX:
        _refuse(f"state={state}: longer than {STATE_MAX} bytes, so that the sockets below it have names that fit")
    if values.get("channel") == "pyfuse3" and not local_flocks:
        _refuse("channel=pyfuse3 keeps file locks on each node alone: say localflocks too where that is enough")
    for peer in peers:
        _check_address("peer", peer)
    multicast = values.get("multicast")
    if multicast is not None and not _check_address("multicast", multicast).is_multicast:
        _refuse(f"multicast={multicast}: not a multicast address (224.0.0.0/4 or ff00::/8)")
    broadcast = values.get("broadcast")
    if broadcast is not None and _check_address("broadcast", broadcast).version != 4:
        _refuse(f"broadcast={broadcast}: only IPv4 has broadcast addresses")
    return MountOptions(
        read_only=read_only,
        iface=iface,
        port=_port("port", values["port"]) if "port" in values else None,
        multicast=multicast,
        broadcast=broadcast,
        peers=peers,
        timeouts=_one_of("timeouts", values.get("timeouts", "default"), TIMEOUT_NAMES),
        fencing=_one_of("fencing", values.get("fencing", "auto"), FENCING_NAMES),
        pr_device=values.get("prdev"),
        watchdog=watchdog,
        metrics=_metrics(values["metrics"]) if "metrics" in values else None,
        node=node,
        state=state,
        local_flocks=local_flocks,
        channel=_one_of("channel", values["channel"], CHANNEL_NAMES) if "channel" in values else "",
        log=_one_of("log", values.get("log", "info"), LOG_LEVELS),
        kernel=kernel,
    )


def _is_address(text: str) -> bool:
    from ipaddress import ip_address

    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _check_address(option: str, text: str) -> "IPv4Address | IPv6Address":
    from ipaddress import ip_address

    try:
        return ip_address(text)
    except ValueError:
        _refuse(f"{option}={text}: not an IPv4 or IPv6 address")


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65535


def _port(option: str, text: str) -> int:
    if not _is_port(text):
        _refuse(f"{option}={text}: must be a number from 1 to 65535")
    return int(text)


def _metrics(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not _is_port(port):
        _refuse(f"metrics={text}: must be PORT or ADDR:PORT, with a port from 1 to 65535")
    if not colon:
        return LOOPBACK, int(port)
    bare = host.removeprefix("[").removesuffix("]")
    if not _is_address(bare):
        _refuse(f"metrics={text}: {host or 'nothing'} is not an IPv4 address, nor an IPv6 address in brackets")
    if (":" in bare) != (host == f"[{bare}]"):
        _refuse(f"metrics={text}: an IPv6 address, and no other, stands in brackets: metrics=[::1]:9100")
    return str(_check_address("metrics", bare)), int(port)


def _one_of(option: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        _refuse(f"{option}={value}: must be one of {', '.join(known)}")
    return value


def _refuse(message: str) -> NoReturn:
    raise MisuseError(message)
