"""Tables, for tools that run where torch is all there is."""

from collections.abc import Iterable, Sequence


def markdown(fields: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown, its columns aligned."""
    lines = [[str(cell) for cell in row] for row in (fields, *rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(fields))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
        for line in lines
    )
