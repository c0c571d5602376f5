"""Runs in a guest: a program that writes files and says which are safe, and one that looks whether they are there.

``load.py write DIR TAG`` makes DIR/TAG-0, TAG-1, ... each written and fsynced, and prints its number when fsync has
said that it is durable; some a second, since the tests need the processors too. It ends with exit code 0 when told to
(SIGTERM), with 1 and the error when there is one. ``load.py check DIR TAG COUNT`` prints what is wrong with the first
COUNT of them.
"""

import os
import signal
import sys
import time

PACE_S = 0.1


def content(tag: str, number: int) -> bytes:
    """What is in file *number*: between one line and 40 KiB."""
    line = f"{tag} {number}\n".encode()
    return line * (1 + number * 37 % 3000)


def write(folder: str, tag: str) -> None:
    """Write until told to stop."""
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    number = 0
    while not stopped:
        try:
            with open(f"{folder}/{tag}-{number}", "wb") as file:
                file.write(content(tag, number))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            print(f"{time.time():.3f} {tag}-{number}: {error}", file=sys.stderr, flush=True)
            sys.exit(1)
        print(number, flush=True)
        number += 1
        time.sleep(PACE_S)


def check(folder: str, tag: str, count: int) -> None:
    """Compare the first *count* files with what they must hold."""
    bad = 0
    for number in range(count):
        try:
            with open(f"{folder}/{tag}-{number}", "rb") as file:
                found = file.read()
        except OSError as error:
            print(f"{tag}-{number}: {error}")
            bad += 1
            continue
        wanted = content(tag, number)
        if found != wanted:
            print(f"{tag}-{number}: {len(found)} bytes, {len(wanted)} were written; they begin with {found[:30]!r}")
            bad += 1
    print(f"checked {count}, bad {bad}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["write", folder, tag]:
            write(folder, tag)
        case ["check", folder, tag, count]:
            check(folder, tag, int(count))
        case _:
            sys.exit(__doc__)
