"""``mxfs lab``: the command line of the lab."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from mxfs_proto.errors import MxfsError
from mxfsd.lab.disk import parse_size
from mxfsd.lab.lab import Lab


def parser() -> argparse.ArgumentParser:
    """Return the parser of everything behind ``mxfs lab``."""
    top = argparse.ArgumentParser(
        prog="mxfs lab",
        description="A cluster on this machine: nodes with networks, loop devices and daemons of their own that share "
        "DIR/disk.img and mount it at DIR/n1, DIR/n2, ... Every command returns when the thing has happened.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, *, node: bool = False) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("dir", metavar="DIR", help="the lab's folder")
        if node:
            command.add_argument("node", metavar="NODE", help="n1, n2, ...")
        return command

    up = add("up", "make the disk, the networks and the nodes, and mount the volume on each")
    up.add_argument("--nodes", type=int, default=3, metavar="N", help="how many (default 3)")
    up.add_argument("--size", default="2G", help="of the shared disk (default 2G; sparse)")
    up.add_argument("--timeouts", default="fast", choices=("fast", "default", "patient"))
    up.add_argument("--fencing", default="lease", choices=("lease", "pr"), help="pr: with a SCSI target (tgtd)")
    up.add_argument("-o", "--options", default="", help="more mount options for every node")
    status = add("status", "show home, epoch and nodes")
    status.add_argument("--json", action="store_true", help="as JSON")
    execute = add("exec", "run a command on a node: in its network, with its mount as work folder", node=True)
    execute.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- CMD ...", help="the command")
    add("stop", "unmount a node's volume, as umount does", node=True)
    start = add("start", "mount the volume on a node that was stopped or killed", node=True)
    start.add_argument("-o", "--options", default="", help="more mount options")
    add("kill", "crash a node: its XFS goes down without log flush, its processes are killed", node=True)
    crash = add("crash", "kill one process of a node, and nothing else", node=True)
    crash.add_argument("--process", required=True, choices=("daemon", "fuse", "heartbeat"))
    add("partition", "cut a node off from the network; it keeps the disk", node=True)
    add("heal", "join a node to the network again", node=True)
    add("move-home", "move the volume's home to a node", node=True)
    down = add("down", "stop everything, check the volume with xfs_repair -n; disk.img stays")
    down.add_argument("--force", action="store_true", help="kill nodes that are busy")
    down.add_argument("--purge", action="store_true", help="remove disk.img too")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0, or 1 with a one-line reason on standard error."""
    arguments = parser().parse_args(argv)
    try:
        return _run(arguments)
    except MxfsError as error:
        print(f"mxfs lab: {error}", file=sys.stderr)
    except OSError as error:
        print(f"mxfs lab: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("mxfs lab: interrupted", file=sys.stderr)
    return 1


def _run(arguments: argparse.Namespace) -> int:
    lab = Lab(arguments.dir, say=lambda line: print(line, flush=True))
    match arguments.command:
        case "up":
            size = parse_size(arguments.size)
            lab.up(arguments.nodes, size, arguments.timeouts, arguments.options, arguments.fencing)
        case "status":
            status = lab.status()
            print(json.dumps(status, indent=1) if arguments.json else render(status))
        case "exec":
            return _execute(lab, arguments)
        case "start":
            lab.start(arguments.node, arguments.options)
        case "stop":
            lab.stop(arguments.node)
        case "kill":
            lab.kill(arguments.node)
        case "crash":
            pid = lab.crash_process(arguments.node, arguments.process)
            print(f"{arguments.process} of {arguments.node} (pid {pid}) is killed")
        case "partition":
            lab.partition(arguments.node)
        case "heal":
            lab.heal(arguments.node)
        case "move-home":
            lab.move_home(arguments.node)
        case "down":
            lab.down(force=arguments.force, purge=arguments.purge)
    return 0


def _execute(lab: Lab, arguments: argparse.Namespace) -> int:
    argv = arguments.argv[1:] if arguments.argv[:1] == ["--"] else arguments.argv
    if not argv:
        print("mxfs lab exec: no command; write mxfs lab exec DIR NODE -- CMD ...", file=sys.stderr)
        return 2
    try:
        lab.execute(arguments.node, argv)
    except FileNotFoundError as error:
        # As a shell: 127 for a command that is not there.
        print(f"mxfs lab exec: {argv[0]}: {error.strerror}", file=sys.stderr)
        return 127


def render(status: dict[str, Any]) -> str:
    """Return the status as text: one line on the volume, then a table of the nodes."""
    from mxfsd.cli.table import table

    home = status["home"] or "none"
    lines = [f"{status['dir']}: volume {status['volume'] or 'not made'}, home {home}, epoch {status['epoch']}"]
    rows = []
    for node in status["nodes"]:
        state = node["state"] + (", partitioned" if node["partitioned"] else "")
        role = "home" if node["home"] else ""
        rows.append([node["name"], state, role, node["address"], node["loop"], node["mountpoint"]])
    lines.append(table(["node", "state", "role", "address", "device", "mounted at"], rows))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
