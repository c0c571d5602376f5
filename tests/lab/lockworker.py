"""One process that locks: a line of JSON in, what came of it out. Started by the tests of file locks."""

import fcntl
import json
import os
import struct
import sys

_FLOCK = struct.Struct("hhqqi4x")  # l_type, l_whence, l_start, l_len, l_pid (struct flock of fcntl(2))
_TYPES = {"r": fcntl.F_RDLCK, "w": fcntl.F_WRLCK, "u": fcntl.F_UNLCK}


def main() -> None:
    """Serve until standard input ends."""
    fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o666)
    for line in sys.stdin:
        what, kind, start, length = json.loads(line)
        try:
            if what == "flock":
                mode = {"r": fcntl.LOCK_SH, "w": fcntl.LOCK_EX, "u": fcntl.LOCK_UN}[kind]
                fcntl.flock(fd, mode | (0 if start else fcntl.LOCK_NB))
                answer: object = "ok"
            elif what == "get":
                found = fcntl.fcntl(fd, fcntl.F_GETLK, _FLOCK.pack(_TYPES[kind], 0, start, length, 0))
                l_type, _, l_start, l_len, _ = _FLOCK.unpack(found)
                answer = "free" if l_type == fcntl.F_UNLCK else [l_type == fcntl.F_WRLCK, l_start, l_len]
            else:
                command = fcntl.F_SETLKW if what == "wait" else fcntl.F_SETLK
                fcntl.fcntl(fd, command, _FLOCK.pack(_TYPES[kind], 0, start, length, 0))
                answer = "ok"
        except OSError as exc:
            answer = exc.errno
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
