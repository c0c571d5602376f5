"""``mxfs install``: what mount(8) and systemd look for outside the virtual environment, as links to it."""

import os
import sys
from pathlib import Path

from mxfs_proto.errors import IoFailure, MisuseError

# mount(8) runs /sbin/mount.TYPE; mkfs(8) and fsck(8) find mkfs.TYPE and fsck.TYPE on a path of their own with /sbin.
LINKS = {"mount.mxfs": "sbin", "mkfs.mxfs": "sbin", "fsck.mxfs": "sbin", "mxfs": "usr/local/bin"}
UNIT = "mxfsd@.service"
UNIT_FOLDER = "etc/systemd/system"


def commands_folder() -> Path:
    """Return the folder of the installed commands: that of this interpreter."""
    return Path(sys.executable).parent


def unit_source() -> Path:
    """Return the unit file in the source tree (it may be absent where only the wheel is installed)."""
    return Path(__file__).resolve().parents[2] / "systemd" / UNIT


def install(root: Path = Path("/")) -> list[str]:
    """Make the links and the unit below *root*; return a line for each. What is not ours is never replaced."""
    _need_root()
    done = []
    try:
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
        if unit_source().exists():
            place = root / UNIT_FOLDER / UNIT
            place.parent.mkdir(parents=True, exist_ok=True)
            part = _part(place)
            part.write_bytes(unit_source().read_bytes())
            os.replace(part, place)
            done.append(str(place))
            _reload(root)
    except OSError as error:
        raise IoFailure(f"install: {error}", error.errno) from error
    return done


def uninstall(root: Path = Path("/")) -> list[str]:
    """Remove the links that lead to a file of their name, and the unit; return a line for each."""
    _need_root()
    done = []
    try:
        for name, folder in LINKS.items():
            place = root / folder / name
            if place.is_symlink() and Path(os.readlink(place)).name == name:
                place.unlink()
                done.append(f"removed {place}")
        unit = root / UNIT_FOLDER / UNIT
        if unit.exists():
            unit.unlink()
            done.append(f"removed {unit}")
            _reload(root)
    except OSError as error:
        raise IoFailure(f"uninstall: {error}", error.errno) from error
    return done


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
