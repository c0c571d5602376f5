"""``python -m tests.soak.probe PATH BLOCK``: looks at a file whose map has just ended a load with SIGBUS."""

import mmap
import os
import sys

from tests.soak.load import STATIC_BLOCKS
from tests.soak.oracle import BLOCK


def main() -> None:
    """Say what each way of reading it gives; the map comes last, as it may end this process too."""
    path, block = sys.argv[1:]
    print(f"{path}, block {block} of its map was bad")
    try:
        fd = os.open(path, os.O_RDONLY)
        found = os.fstat(fd)
        print(f"inode {found.st_ino}, {found.st_size} bytes, {found.st_nlink} links; its end: {os.lseek(fd, 0, 2)}")
        for at in range(STATIC_BLOCKS):
            try:
                print(f"block {at}: {len(os.pread(fd, BLOCK, at * BLOCK))} bytes read")
            except OSError as exc:
                print(f"block {at}: {exc}")
        with mmap.mmap(fd, STATIC_BLOCKS * BLOCK, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
            for at in range(STATIC_BLOCKS):
                print(f"block {at}, mapped", end=": ", flush=True)
                print(mapped[at * BLOCK : at * BLOCK + 16], flush=True)
    except OSError as exc:
        print(exc)


if __name__ == "__main__":
    main()
