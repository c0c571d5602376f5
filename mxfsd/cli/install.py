"""``mxfs install``: what mount(8), systemd, man(1) and bash look for outside the virtual environment.

The commands are links to it; the unit, the man pages and the completion are copies of files in the source tree, which
may be absent where only the wheel is installed. Each of them says in one of its first lines that it belongs to MXFS.
"""

import os
import sys
from pathlib import Path

from mxfs_proto.errors import IoFailure, MisuseError

# mount(8) runs /sbin/mount.TYPE; mkfs(8) and fsck(8) find mkfs.TYPE and fsck.TYPE on a path of their own with /sbin.
LINKS = {"mount.mxfs": "sbin", "mkfs.mxfs": "sbin", "fsck.mxfs": "sbin", "mxfs": "usr/local/bin"}
UNIT = "mxfsd@.service"
UNIT_FOLDER = "etc/systemd/system"
MAN_FOLDER = "usr/local/share/man/man8"
COMPLETION_FOLDER = "usr/local/share/bash-completion/completions"
COMPLETED = ("mxfs", "mkfs.mxfs", "fsck.mxfs")
"""The commands that ``completion/mxfs.bash`` completes: bash looks for a file of the command's name."""
_MARKS = (b"Part of MXFS; put in place by mxfs install", b"The daemon of one MXFS volume")
"""What the pages and the completion begin with, and what the unit does. One of them is in every file of ours."""
_MARK_WITHIN = 200


def commands_folder() -> Path:
    """Return the folder of the installed commands: that of this interpreter."""
    return Path(sys.executable).parent


def source_tree() -> Path:
    """Return the root of the source tree."""
    return Path(__file__).resolve().parents[2]


def unit_source() -> Path:
    """Return the unit file in the source tree."""
    return source_tree() / "systemd" / UNIT


def files() -> dict[str, Path]:
    """Return the places, relative to the root, of the files that are copied, each with its source, if it is there."""
    found = {f"{UNIT_FOLDER}/{UNIT}": unit_source()}
    found |= {f"{MAN_FOLDER}/{page.name}": page for page in sorted((source_tree() / "man").glob("*.8"))}
    completion = source_tree() / "completion" / "mxfs.bash"
    found |= {f"{COMPLETION_FOLDER}/{command}": completion for command in COMPLETED}
    return {place: source for place, source in found.items() if source.exists()}


def install(root: Path = Path("/")) -> list[str]:
    """Make the links and the files below *root*; return a line for each. What is not ours is never replaced."""
    _need_root()
    done = []
    try:
        for place in (root / name for name in files()):
            if _exists(place) and not _is_ours(place):
                raise MisuseError(f"{place} exists and is not ours: remove it first")
        for name, folder in LINKS.items():
            source = commands_folder() / name
            if not source.exists():
                raise MisuseError(f"{source} is not there: run make install in the checkout first")
            place = root / folder / name
            if place.exists() and not place.is_symlink():
                raise MisuseError(f"{place} exists and is no link of ours: remove it first")
            place.parent.mkdir(parents=True, exist_ok=True)
            part = _part(place)
            part.symlink_to(source)
            os.replace(part, place)
            done.append(f"{place} -> {source}")
        for name, source in files().items():
            place = root / name
            place.parent.mkdir(parents=True, exist_ok=True)
            part = _part(place)
            part.write_bytes(source.read_bytes())
            os.replace(part, place)
            done.append(str(place))
        _reload(root)
    except OSError as error:
        raise IoFailure(f"install: {error}", error.errno) from error
    return done


def uninstall(root: Path = Path("/")) -> list[str]:
    """Remove the links that lead to a file of their name, and the files that are ours; return a line for each."""
    _need_root()
    done = []
    try:
        for name, folder in LINKS.items():
            place = root / folder / name
            if place.is_symlink() and Path(os.readlink(place)).name == name:
                place.unlink()
                done.append(f"removed {place}")
        for place in (root / name for name in files()):
            if _exists(place) and _is_ours(place):
                place.unlink()
                done.append(f"removed {place}")
        if done:
            _reload(root)
    except OSError as error:
        raise IoFailure(f"uninstall: {error}", error.errno) from error
    return done


def _exists(place: Path) -> bool:
    return place.exists() or place.is_symlink()


def _is_ours(place: Path) -> bool:
    """Whether a file says that it belongs to MXFS. A link was not made here."""
    if place.is_symlink() or not place.is_file():
        return False
    with open(place, "rb") as file:
        beginning = file.read(_MARK_WITHIN)
    return any(mark in beginning for mark in _MARKS)


def _part(place: Path) -> Path:
    """Return a free name beside *place*, from which it is replaced in one step."""
    part = place.with_name(f".{place.name}.new")
    part.unlink(missing_ok=True)
    return part


def _need_root() -> None:
    if os.geteuid() != 0:
        raise MisuseError("only root can install into the system")


def _reload(root: Path) -> None:
    if root == Path("/") and os.path.isdir("/run/systemd/system"):
        import subprocess

        subprocess.run(["systemctl", "daemon-reload"], check=False)
