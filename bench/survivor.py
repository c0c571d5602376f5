"""A program on one node while homes die: holds files open and cached, and writes without end (run with ``python -I``).

Arguments: folder, node, number of nodes, files in the volume's ``files`` folder, file for the log of what was
acknowledged. A line of that log: monotonic seconds, milliseconds that it took, what was done, its name. Any error, or
any content that is not what it must be, ends it with a line that begins with ``ERROR``.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path


def content(number: int) -> bytes:
    """What file *number* holds."""
    return f"file {number:06d}\n".encode()


def hold(folder: Path, mine: range) -> list[tuple[int, int]]:
    """Open every other of these files, look at the others; return (number, descriptor)."""
    held = []
    for number in mine:
        path = folder / f"f{number:06d}"
        if number % 2:
            fd = os.open(path, os.O_RDONLY)
            check(os.pread(fd, 64, 0), number)
            held.append((number, fd))
        else:
            os.stat(path)
            check(path.read_bytes(), number)
    return held


def check(found: bytes, number: int) -> None:
    """Raise ValueError where the content of a file is not its own."""
    if found != content(number):
        raise ValueError(f"file {number} reads {found!r}")


def main() -> None:
    """Hold, then change the name space and write, one operation after the other, until killed."""
    folder, node, nodes, files, log_path = Path(sys.argv[1]), *map(int, sys.argv[2:5]), sys.argv[5]
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    share = range(files * (node - 1) // nodes, files * node // nodes)

    def say(began: float, what: str, name: str) -> None:
        now = time.monotonic()
        os.write(log, f"{now:.6f} {(now - began) * 1000:.3f} {what} {name}\n".encode())

    try:
        held = hold(folder / "files", share)
        say(time.monotonic(), "ready", str(len(share)))
        turn = 0
        own = folder / f"n{node}-{os.getpid()}"
        began = time.monotonic()
        own.mkdir()
        say(began, "mkdir", own.name)
        while True:
            turn += 1
            path = own / f"w{turn}"
            began = time.monotonic()
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            say(began, "create", f"{own.name}/{path.name}")
            began = time.monotonic()
            os.write(fd, json.dumps([node, turn]).encode())
            os.fsync(fd)
            say(began, "fsync", f"{own.name}/{path.name}")
            os.close(fd)
            if turn % 3 == 0:
                began = time.monotonic()
                os.rename(path, own / f"r{turn}")
                say(began, "rename", f"{own.name}/{path.name} {own.name}/r{turn}")
            if turn % 5 == 0:
                began = time.monotonic()
                victim = own / (f"r{turn}" if turn % 3 == 0 else f"w{turn}")
                os.unlink(victim)
                say(began, "unlink", f"{own.name}/{victim.name}")
            number, fd = held[turn % len(held)]
            began = time.monotonic()
            check(os.pread(fd, 64, 0), number)
            say(began, "read", str(number))
    except (OSError, ValueError) as error:
        os.write(log, f"ERROR {type(error).__name__}: {error}\n".encode())
        sys.exit(1)


if __name__ == "__main__":
    main()
