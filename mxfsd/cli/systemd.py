"""The daemon as a systemd service ``mxfsd@UUID.service``: started by mount.mxfs, one instance a volume.

Values reach the unit through an environment file in the run directory (systemd.exec(5), EnvironmentFile=). The unit is
of Type=notify: ``systemctl start`` returns when the daemon has said READY=1, or has ended; why it ended is the last
STATUS= that it sent (``mxfsd/io/servicemanager.py``).

When the host goes down the mount is unmounted first, then the daemon leaves the volume, then network and disk go. The
second order is in the unit file; the first names the mount's unit, so it is in a drop-in in ``RUNTIME_FOLDER``.
"""

import os
import subprocess
import sys
from collections.abc import Mapping

from mxfsd import spawn
from mxfsd.cli.mount import EXIT_SYSTEM, MountError
from mxfsd.options import DEFAULT_RUN_ROOT, MountOptions

UNIT = "mxfsd@.service"
UNIT_FOLDER = "/etc/systemd/system"
RUNTIME_FOLDER = "/run/systemd/system"
_FOLDERS = (UNIT_FOLDER, "/usr/local/lib/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")


def unit_for(uuid: str, options: MountOptions) -> str | None:
    """Return the instance's name if the unit is installed and the run root is the one that it names."""
    if options.run_root != DEFAULT_RUN_ROOT:
        return None
    if not any(os.path.exists(os.path.join(folder, UNIT)) for folder in _FOLDERS):
        return None
    return UNIT.replace("@", f"@{uuid}")


def environment_file(values: Mapping[str, str]) -> str:
    """Return the text of an environment file: double quotes, with backslashes before what is special in them."""
    lines = []
    for name, value in values.items():
        quoted = "".join(f"\\{char}" if char in '\\"$`' else char for char in value)
        lines.append(f'{name}="{quoted}"\n')
    return "".join(lines)


def mount_unit(mountpoint: str) -> str:
    """Return the name that systemd gives the mount unit of an absolute path (systemd.unit(5), string escaping)."""
    names = "/".join(part for part in mountpoint.split("/") if part)
    return "".join(_escaped(byte, first=not at) for at, byte in enumerate(os.fsencode(names))) + ".mount"


def _escaped(byte: int, *, first: bool) -> str:
    char = chr(byte)
    if char == "/":
        return "-"
    if byte < 128 and (char.isalnum() or char in ":_" or (char == "." and not first)):
        return char
    return f"\\x{byte:02x}"


def _order(unit: str, mountpoint: str) -> None:
    """Have the unit stopped after the mount when both are to stop."""
    folder = os.path.join(RUNTIME_FOLDER, f"{unit}.d")
    os.makedirs(folder, mode=0o755, exist_ok=True)
    with open(os.path.join(folder, "mount.conf"), "w", encoding="ascii") as file:
        file.write(f"[Unit]\nBefore={mount_unit(mountpoint)}\n")


def start_unit(unit: str, device: str, mountpoint: str, options: MountOptions, run_dir: str, ready_s: float) -> None:
    """Start the unit and wait until the daemon is ready; MountError with the reason, the unit stopped again."""
    values = {
        "MXFS_DEVICE": device,
        "MXFS_MOUNTPOINT": mountpoint,
        "MXFS_OPTIONS": options.to_string(),
        "MXFS_PYTHON": sys.executable,
    }
    path = os.path.join(run_dir, "mount.env")
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "w", encoding="utf-8") as file:
        file.write(environment_file(values))
    _order(unit, mountpoint)
    log_path = os.path.join(run_dir, "daemon.log")
    try:
        complaint = _systemctl("start", unit, timeout_s=ready_s)
        if complaint:
            raise _failure(unit, complaint, log_path)
    except subprocess.TimeoutExpired:
        _end(unit)
        raise MountError(spawn.not_ready(ready_s, log_path)) from None
    except BaseException:
        _end(unit)
        raise


def _failure(unit: str, complaint: str, log_path: str) -> MountError:
    """Return why the unit did not start: the daemon's own word, else its last line, else systemd's complaint."""
    status = _show(unit, "StatusText")
    if status.startswith("error: "):
        return MountError(status.removeprefix("error: "))
    if os.path.exists(log_path):
        return MountError(spawn.ended_early(log_path))
    return MountError(f"systemctl start {unit}: {complaint}", EXIT_SYSTEM)


def _end(unit: str) -> None:
    _systemctl("stop", unit)
    # The failure has been told; the unit is not to stand in the list of failed ones.
    _systemctl("reset-failed", unit)


def _show(unit: str, name: str) -> str:
    done = _run("show", "--value", "-p", name, unit)
    return done.stdout.strip()


def _systemctl(*words: str, timeout_s: float | None = None) -> str:
    """Run systemctl; return the empty string, or its complaint in one line. Raises subprocess.TimeoutExpired."""
    done = _run(*words, timeout_s=timeout_s)
    if done.returncode == 0:
        return ""
    lines = done.stderr.strip().splitlines()
    return lines[0] if lines else f"exit code {done.returncode}"


def _run(*words: str, timeout_s: float | None = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["systemctl", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
    )
