"""Tables in plain text."""

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[object]], indent: str = "  ") -> str:
    """Return aligned columns, numbers to the right; each line begins with *indent* and has no trailing blanks."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(line[at]) for line in [list(head), *cells]) for at in range(len(head))]
    right = [bool(rows) and all(isinstance(row[at], int) for row in rows) for at in range(len(head))]
    lines = []
    for line in [list(head), *cells]:
        words = [
            word.rjust(width) if to_right else word.ljust(width)
            for word, width, to_right in zip(line, widths, right, strict=True)
        ]
        lines.append((indent + "  ".join(words)).rstrip())
    return "\n".join(lines)
