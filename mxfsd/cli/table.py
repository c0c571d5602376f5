"""Tables in plain text."""

from collections.abc import Container, Sequence


def table(
    head: Sequence[str], rows: Sequence[Sequence[object]], indent: str = "  ", *, right: Container[int] = ()
) -> str:
    """Return aligned columns, to the right those of numbers and those in *right*; each begins with *indent* and has
    no trailing blanks."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(line[at]) for line in [list(head), *cells]) for at in range(len(head))]
    numbers = [at in right or (bool(rows) and all(isinstance(row[at], int) for row in rows)) for at in range(len(head))]
    lines = []
    for line in [list(head), *cells]:
        words = [
            word.rjust(width) if to_right else word.ljust(width)
            for word, width, to_right in zip(line, widths, numbers, strict=True)
        ]
        lines.append((indent + "  ".join(words)).rstrip())
    return "\n".join(lines)
