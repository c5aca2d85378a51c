"""List imports and lines of each folder ("room") of the package; exit with 1 if an import goes up.

python tools/analysis_tools/rooms.py
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
ROOMS = ("run", "export", "analysis", "pretraining", "datasets", "models", "ops", "ground floor")
"""Rooms from the top down; the ground floor is the modules ``mmvssm/*.py``, less ``COMMANDS``."""

COMMANDS = ("convert",)
"""Modules beside the rooms that are commands, for ``python -m mmvssm.NAME``, and so belong to the annex."""

TOOLS = ("experiments", "benchmark", "triton_lab", "analysis_tools", "install")
"""Folders of ``tools`` from the top down; all may import ``mmvssm``, none may import ``tests``."""


class Import(NamedTuple):
    """One import statement.

    Attributes:
        file: Source file.
        line: Line in the file.
        source: Room of the file.
        target: Room of the imported module.
        module: Imported module.
    """

    file: Path
    line: int
    source: str
    target: str
    module: str


def room_of(module: str) -> str:
    """Return the room of one of our modules, such as ``"models"`` for ``"mmvssm.models.pruning"``."""
    names = module.split(".")
    if len(names) > 1 and names[1] in COMMANDS:
        return "run"
    return names[1] if len(names) > 1 and names[1] in ROOMS else "ground floor"


def imports_of(root: Path = REPOSITORY) -> Iterator[Import]:
    """Yield every import between our modules, including those in functions.

    Args:
        root: The checkout.
    """
    package = root / "mmvssm"
    for file in sorted(package.rglob("*.py")):
        names = file.relative_to(root).with_suffix("").parts
        folder = list(names[:-1])
        source = room_of(".".join(names[:-1] if names[-1] == "__init__" else names))
        for line, module in named_modules(ast.parse(file.read_text()), folder):
            if module.split(".")[0] == "mmvssm":
                yield Import(file, line, source, room_of(module), module)


def named_modules(tree: ast.AST, folder: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Yield line and full name of each module in a source file's imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name
        elif isinstance(node, ast.ImportFrom):
            base = list(folder[: len(folder) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            for name in node.names:  # a name may be a module, as in "from ..models import pruning"
                yield node.lineno, ".".join([*base, name.name])


def upward(imports: Sequence[Import]) -> list[Import]:
    """Return imports of a room above their own; for operators, which need only torch, of any other room."""
    level = {room: -number for number, room in enumerate(ROOMS)}
    return [
        one
        for one in imports
        if level[one.target] > level[one.source] or (one.source == "ops" and one.target != "ops")
    ]


def circle(imports: Sequence[Import], root: Path = REPOSITORY) -> list[str]:
    """Return the first circle of files that import each other; empty if there is none."""

    def file_of(module: str) -> Path:
        path = root.joinpath(*module.split("."))
        if path.with_suffix(".py").is_file():
            return path.with_suffix(".py")
        return path / "__init__.py" if path.is_dir() else file_of(module.rpartition(".")[0])

    sorter: TopologicalSorter = TopologicalSorter()
    for one in imports:
        sorter.add(one.file, file_of(one.module))
    try:
        sorter.prepare()
    except CycleError as error:
        return [str(file.relative_to(root)) for file in error.args[1]]
    return []


def tools_that_import_upwards(root: Path = REPOSITORY) -> list[str]:
    """List places in ``tools`` that import tests, or a folder of tools above their own."""
    folder_of = {
        file.stem: file.parent.name
        for name in TOOLS
        for file in (root / "tools" / name).glob("*.py")
    }
    level = {name: -number for number, name in enumerate(TOOLS)}
    tests = {path.stem for path in (root / "tests").iterdir()} | {"tests"}
    found = []
    for file in sorted((root / "tools").rglob("*.py")):
        own = level.get(file.parent.name, 1)
        for line, module in named_modules(ast.parse(file.read_text()), []):
            name = module.split(".")[0]
            place = f"{file.relative_to(root)}:{line} imports {name}"
            if (name in tests and name != "run") or level.get(folder_of.get(name), own) > own:
                found.append(place)
    return found


def lines_of(root: Path = REPOSITORY) -> dict[str, int]:
    """Count lines of Python and C++ in each room, in tools and in tests."""

    def count(folder: Path, deep: bool = True) -> int:
        files = folder.rglob("*") if deep else folder.glob("*")
        return sum(
            len(file.read_text().splitlines())
            for file in files
            if file.suffix in (".py", ".cpp", ".h")
        )

    lines = {room: count(root / "mmvssm" / room) for room in ROOMS[:-1]}
    lines[ROOMS[-1]] = count(root / "mmvssm", deep=False)
    for name in ("tools", "web", "tests", "configs"):
        lines[name] = count(root / name)
    return lines


def main() -> None:
    """Print the table; exit with 1 if an import goes up."""
    imports = list(imports_of())
    lines = lines_of()
    print("| room | lines | imports, with how many statements |\n|---|---|---|")
    for room in ROOMS:
        targets = [one.target for one in imports if one.source == room and one.target != room]
        named = ", ".join(f"{name} ({targets.count(name)})" for name in ROOMS if name in targets)
        print(f"| {room} | {lines[room]:,} | {named or '-'} |")
    for name in ("tools", "web", "tests", "configs"):
        print(f"| {name} | {lines[name]:,} | |")
    wrong = [
        f"{one.file.relative_to(REPOSITORY)}:{one.line} imports {one.module}, which is above it"
        for one in upward(imports)
    ] + tools_that_import_upwards()
    files = circle(imports)
    if files:
        wrong.append("imports in a circle: " + " -> ".join(files))
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
