"""``mxfs``: the operator's command. Each subcommand imports what it needs, so that none waits for the others.

``status``, ``top``, ``locks``, ``home move``, ``evict`` and ``sync`` talk to the daemons of this host through the
control sockets under the run root: ``--run-dir``, else the environment variable MXFS_RUN_ROOT, else /run/mxfs.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mxfs_proto.errors import MisuseError, MxfsError
from mxfsd.options import DEFAULT_RUN_ROOT, RUN_ROOT_ENV

STATUS_S = 10.0
MOVE_S = 90.0
SYNC_S = 600.0


def parser() -> argparse.ArgumentParser:
    """Return the parser; ``lab``, ``info``, ``pr``, ``grow``, ``adopt`` and ``fsck`` have parsers of their own."""
    top = argparse.ArgumentParser(prog="mxfs", description="Look after MXFS volumes.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    def with_volume(command: argparse.ArgumentParser) -> None:
        command.add_argument("--json", action="store_true", help="as JSON")
        command.add_argument("--run-dir", metavar="DIR", help="where the run directories are (default /run/mxfs)")

    status = add("status", "show home, epoch, nodes, locks and operations of the volumes mounted here")
    status.add_argument("volume", nargs="?", help="uuid, label, device or mount point (default: all)")
    with_volume(status)
    live = add("top", "show again and again what a volume does: rates, latencies, busiest operations")
    live.add_argument("volume", nargs="?", help="uuid, label, device or mount point (needed if there are several)")
    live.add_argument("--interval", default="2", metavar="S", help="seconds from one look to the next (default 2)")
    live.add_argument("--count", metavar="N", help="end after so many intervals (default: at q or Ctrl-C)")
    with_volume(live)
    locks = add("locks", "show each resource with holders, modes, waiters and ages")
    locks.add_argument("volume", nargs="?", help="uuid, label, device or mount point (default: all)")
    with_volume(locks)
    add("info", "show a device's lockspace: mxfs info DEVICE [--json]")
    add("pr", "show who is registered at the disk, its persistent reservations: mxfs pr DEVICE [--json]")
    add("grow", "give a volume that no node has the new room of its device: mxfs grow DEVICE")
    add("adopt", "make a volume of an XFS whose device has grown: mxfs adopt DEVICE [-f]")
    add("fsck", "check and repair a volume that no node has: mxfs fsck DEVICE [-n] [--json]")
    home = add("home", "move the home of a volume: mxfs home move NODE")
    actions = home.add_subparsers(dest="action", required=True, metavar="move")
    move = actions.add_parser("move", help="move it to a node")
    move.add_argument("node", metavar="NODE", help="name or slot number")
    move.add_argument("--volume", help="uuid, label, device or mount point (needed if several are mounted here)")
    move.add_argument("--run-dir", metavar="DIR", help="where the run directories are (default /run/mxfs)")
    evict = add("evict", "put a node out by hand: fence it and give its locks to others (mount again there)")
    evict.add_argument("node", metavar="NODE", help="name or slot number")
    evict.add_argument("--volume", help="uuid, label, device or mount point (needed if several are mounted here)")
    evict.add_argument("--run-dir", metavar="DIR", help="where the run directories are (default /run/mxfs)")
    sync = add("sync", "make durable what was written on this node: sync(1) does not reach the volume")
    sync.add_argument("volume", nargs="?", help="uuid, label, device or mount point (default: all)")
    sync.add_argument("--run-dir", metavar="DIR", help="where the run directories are (default /run/mxfs)")
    add("lab", "a cluster on this machine, to try things out: mxfs lab --help")
    install = add("install", "link the commands into the system, install systemd unit, man pages, completion")
    uninstall = add("uninstall", "remove what mxfs install made")
    for command in (install, uninstall):
        command.add_argument("--root", default="/", help="another root folder than /")
    add("version", "print the version")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0, or 1 with a one-line reason on standard error, or 2 for usage."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        return _dispatch(words)
    except MxfsError as error:
        print(f"mxfs: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("mxfs: interrupted", file=sys.stderr)
    except BrokenPipeError:
        # The reader (head, say) has seen enough; nothing may be flushed into the pipe at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 1


def _dispatch(words: list[str]) -> int:
    if words[:1] == ["lab"]:
        from mxfsd.lab.cli import main as lab_main

        return lab_main(words[1:])
    if words[:1] == ["info"]:
        from mxfsd.info import main_info

        return main_info(words[1:])
    if words[:1] == ["pr"]:
        from mxfsd.cli.pr import main_pr

        return main_pr(words[1:])
    if words[:1] == ["fsck"]:
        from mxfsd.cli.fsck import main_fsck

        return main_fsck(words[1:])
    if words[:1] == ["grow"]:
        from mxfsd.cli.grow import main_grow

        return main_grow(words[1:])
    if words[:1] == ["adopt"]:
        from mxfsd.cli.adopt import main_adopt

        return main_adopt(words[1:])
    arguments = parser().parse_args(words)
    match arguments.command:
        case "status":
            return _status(arguments)
        case "top":
            return _top(arguments)
        case "locks":
            return _locks(arguments)
        case "home":
            return _move(arguments)
        case "evict":
            return _evict(arguments)
        case "sync":
            return _sync(arguments)
        case "install" | "uninstall":
            from mxfsd.cli import install

            act = install.install if arguments.command == "install" else install.uninstall
            for line in act(Path(arguments.root)):
                print(line)
            return 0
        case _:
            from importlib.metadata import version

            print(f"mxfs {version('mxfs')}")
            return 0


def _run_root(arguments: argparse.Namespace) -> str:
    return str(arguments.run_dir or os.environ.get(RUN_ROOT_ENV) or DEFAULT_RUN_ROOT)


def _views(arguments: argparse.Namespace) -> list[tuple[Path, dict[str, Any]]]:
    """Ask every daemon of this host for its status; keep those of the volume asked for.

    A daemon that does not answer is reported on standard error. Raises MisuseError when nothing is left.
    """
    from mxfsd import control

    root = _run_root(arguments)
    views: list[tuple[Path, dict[str, Any]]] = []
    silent = 0
    for path in control.find_sockets(root):
        try:
            views.append((path, control.request(path, "status", STATUS_S)))
        except control.NotRunning:
            continue  # left over from a daemon that died
        except MxfsError as error:
            print(f"mxfs: {error}", file=sys.stderr)
            silent += 1
    if not views:
        if silent:
            raise MisuseError("no daemon of this host answered")
        raise MisuseError(f"no volume is mounted here (no daemon has its socket under {root}); mount -t mxfs first")
    wanted = arguments.volume
    if wanted is None:
        return views
    kept = [view for view in views if _is_volume(view[1], wanted)]
    if not kept:
        known = ", ".join(f"{view['volume']} at {view['mountpoint']}" for _, view in views)
        raise MisuseError(f"{wanted}: no such volume is mounted here; there are {known}")
    return kept


def _is_volume(view: dict[str, Any], wanted: str) -> bool:
    if wanted in (view["volume"], view.get("label") or None, view["device"], view["mountpoint"]):
        return True
    return os.path.realpath(wanted) in (os.path.realpath(view["device"]), view["mountpoint"])


def _status(arguments: argparse.Namespace) -> int:
    views = [view for _, view in _views(arguments)]
    if arguments.json:
        print(_json([_without_ok(view) for view in views]))
        return 0
    from mxfsd.cli.render import status_text

    print("\n\n".join(status_text(view) for view in views))
    return 0


def _locks(arguments: argparse.Namespace) -> int:
    from mxfsd import control

    replies = []
    for path, view in _views(arguments):
        reply = control.request(path, "locks", STATUS_S)
        replies.append({"volume": view["volume"], "mountpoint": view["mountpoint"], **_without_ok(reply)})
    if arguments.json:
        print(_json(replies))
        return 0
    from mxfsd.cli.render import locks_text

    print("\n\n".join(locks_text(reply) for reply in replies))
    return 0


def _top(arguments: argparse.Namespace) -> int:
    from mxfsd.cli import top

    interval_s, count = top.interval_of(arguments.interval), top.count_of(arguments.count)
    path, _view = _one_view(arguments, "name one of them")
    return top.run(path, interval_s, count, arguments.json)


def _one_view(arguments: argparse.Namespace, how: str = "say --volume") -> tuple[Path, dict[str, Any]]:
    """The daemon of the one volume that is meant. Raises MisuseError where there are several."""
    views = _views(arguments)
    if len(views) > 1:
        known = ", ".join(f"{view['volume']} at {view['mountpoint']}" for _, view in views)
        raise MisuseError(f"several volumes are mounted here: {how}; there are {known}")
    return views[0]


def _move(arguments: argparse.Namespace) -> int:
    from mxfsd import control

    path, view = _one_view(arguments)
    reply = control.request(path, "home-move", MOVE_S, node=arguments.node)
    print(f"{view['volume']}: home {reply.get('home', arguments.node)}, epoch {reply.get('epoch', '?')}")
    return 0


def _evict(arguments: argparse.Namespace) -> int:
    from mxfsd import control

    path, view = _one_view(arguments)
    reply = control.request(path, "evict", MOVE_S, node=arguments.node)
    print(f"{view['volume']}: {reply['node']} (slot {reply['slot']}, incarnation {reply['incarnation']}) is put out")
    return 0


def _sync(arguments: argparse.Namespace) -> int:
    from mxfsd import control

    for path, view in _views(arguments):
        control.request(path, "sync", SYNC_S)
        print(f"{view['volume']}: what was written on {view['node']} is durable")
    return 0


def _without_ok(reply: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in reply.items() if key != "ok"}


def _json(value: object) -> str:
    import json

    return json.dumps(value, indent=1)


if __name__ == "__main__":
    sys.exit(main())
