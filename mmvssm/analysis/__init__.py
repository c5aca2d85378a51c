"""Measure and draw models, their pruning, their data sets and their logs."""

from pathlib import Path

from matplotlib.backend_bases import FigureCanvasBase

from ..errors import UserError


def picture_file(out: str) -> Path:
    """Check the ``--out`` of a tool that draws one figure, before it does any work.

    Args:
        out: The path as given.

    Raises:
        UserError: If matplotlib cannot write files of that suffix, or the folder does not exist.
    """
    file = Path(out)
    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if file.suffix[1:].lower() not in known:
        raise UserError(f"--out {out}: the name must end in .png, or another of {', '.join(known)}")
    if not file.parent.is_dir():
        raise UserError(f"the folder {file.parent} for the picture does not exist")
    return file
