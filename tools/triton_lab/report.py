"""Print tables without other packages than torch."""

from collections.abc import Iterable, Sequence


def markdown(fields: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format a table in Markdown with aligned columns."""
    lines = [[str(cell) for cell in row] for row in (fields, *rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(fields))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
        for line in lines
    )
