"""The daemon as a systemd service ``mxfsd@UUID.service``: started by mount.mxfs, one instance a volume.

The service's standard streams are systemd's, so the daemon's answer comes through a FIFO in the run directory that
the unit opens as descriptor 3. Values reach the unit through an environment file there (systemd.exec(5),
EnvironmentFile=).
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping

from mxfsd import spawn
from mxfsd.cli.mount import EXIT_SYSTEM, MountError
from mxfsd.options import DEFAULT_RUN_ROOT, MountOptions

UNIT = "mxfsd@.service"
UNIT_FOLDER = "/etc/systemd/system"
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


def start_unit(unit: str, device: str, mountpoint: str, options: MountOptions, run_dir: str, ready_s: float) -> None:
    """Start the unit and wait for the daemon's line; MountError with the reason, the unit stopped again."""
    fifo = os.path.join(run_dir, "ready")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(fifo)
    os.mkfifo(fifo, 0o600)
    # The reader comes first, or the unit's open would wait; and no write end of ours, or a daemon that dies would look
    # like one that is slow. Until its first writer comes, poll(2) on such a FIFO reports no hang-up (pipe(7)).
    ready_fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
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
        started = _systemctl("start", unit)
        if started:
            raise MountError(f"systemctl start {unit}: {started}", EXIT_SYSTEM)
        try:
            spawn.wait_ready(ready_fd, ready_s, os.path.join(run_dir, "daemon.log"))
        except BaseException as error:
            _systemctl("stop", unit)
            if isinstance(error, spawn.DaemonFailed):
                raise MountError(str(error)) from None
            raise
    finally:
        os.close(ready_fd)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(fifo)


def _systemctl(*words: str) -> str:
    """Run systemctl; return the empty string, or its complaint in one line."""
    done = subprocess.run(["systemctl", *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    lines = done.stderr.strip().splitlines()
    return lines[0] if lines else f"exit code {done.returncode}"
