"""List the test files that a change reaches, one a line, for ``make test-changed``.

python tools/analysis_tools/changed_tests.py [BASE]

A change is the difference between the working tree and the commit BASE (HEAD). It reaches the files that import a
changed file, tests and configs that name one in a string, and all files that import or name these. We do not follow
registries: a test reaches a model if it imports the model's folder, ``mmvssm`` itself or ``mmvssm.run``.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from rooms import REPOSITORY, named_modules

IMPORT_ROOTS = ("", "tests/", "web/", "tools/benchmark/", "tools/experiments/", "tools/install/")
IMPORT_ROOTS += ("tools/triton_lab/", "tools/analysis_tools/")
EVERYTHING = ("pyproject.toml", "setup.py", "requirements/", "tests/conftest.py")
"""Files and a folder on which every test depends."""

READ_ALL_SOURCES = {"tests/core/test_rooms.py"}
NAMES_FILES = ("tests/", "configs/", "web/", "tools/dist_")
"""Folders in which a string with a file's name means its use; elsewhere it may be a hint in a message."""

LAB = re.compile(r"tests/(lab|support)/|tools/(triton_lab|benchmark)/|mmvssm/ops/.*triton")
"""``tests/lab`` runs if one of these changed, whatever else it imports."""


def changed_files(base: str, root: Path = REPOSITORY) -> set[str]:
    """List the files that differ from a commit, including deleted and new ones."""
    differing = ["git", "diff", "--name-only", "--no-renames", base, "--"]
    untracked = ["git", "ls-files", "--others", "--exclude-standard"]
    return {
        line
        for command in (differing, untracked)
        for line in subprocess.check_output(command, cwd=root, text=True).splitlines()
    }


def tracked_files(root: Path = REPOSITORY) -> set[str]:
    """List the files that git tracks."""
    return set(subprocess.check_output(["git", "ls-files"], cwd=root, text=True).splitlines())


def users_of(files: set[str], root: Path = REPOSITORY) -> dict[str, set[str]]:
    """Map each file to the files that import or name it directly.

    Args:
        files: All files of the repository and the deleted ones, as paths from ``root``.
        root: The checkout.
    """
    by_name, users = defaultdict(set), defaultdict(set)
    for file in files:
        path = Path(file)
        names = {file, path.name, *([path.stem] if path.parts[0] == "configs" else [])}
        if path.suffix != ".py" or path.parts[0] in ("configs", "docs"):
            names |= {"/".join(path.parts[:count]) for count in range(1, len(path.parts))}
            names |= set(path.parts[1:-1])
        for name in names - {"__init__.py", "mmvssm", "tests", "tools", "web"}:
            by_name[name].add(file)
    for file in files:
        path = root / file
        if path.suffix in (".py", ".sh") and path.is_file():
            for used in _used_by(file, path.read_text(), files, by_name) - {file}:
                users[used].add(file)
        if path.name == "conftest.py" and path.is_file():  # used by files that name its fixtures
            fixtures = re.compile(
                "|".join(rf"\b{n}\b" for n in re.findall(r"def (\w+)", path.read_text()))
            )
            users[file] |= {
                one
                for one in files
                if one.startswith(f"{Path(file).parent}/")
                and (root / one).suffix == ".py"
                and (root / one).is_file()
                and fixtures.search((root / one).read_text())
            }
        if file.startswith("mmvssm/") and path.suffix != ".py":  # such as C++ sources
            users[file] |= {one for one in files if Path(one).parent == Path(file).parents[1]}
    return users


def _used_by(file: str, text: str, files: set[str], by_name: dict[str, set[str]]) -> set[str]:
    used: set[str] = set()
    if file.endswith(".py"):
        tree = ast.parse(text)
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        text = "\n".join(
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docstrings
        )
        modules = [module for _, module in named_modules(tree, Path(file).parts[:-1])]
        modules += re.findall(r"mmvssm(?:\.\w+)+", text)
        if file == "mmvssm/__init__.py":  # imports its folders by name
            modules += [f"mmvssm.{word}" for word in text.split()]
        for module in modules:
            used |= _files_of_module(module, files)
    if file.startswith(NAMES_FILES):
        for word in set(re.findall(r"[\w./-]+", text)):
            word = word.removeprefix("./")
            used |= by_name.get(word, set()) | by_name.get(Path(word).name, set())
            if word in ("configs", "docs") and file.startswith("tests/support/"):
                used -= by_name[word]
    return used


def _files_of_module(module: str, files: set[str]) -> set[str]:
    """Find the file of a module, or of the module that defines this name."""
    path = module.replace(".", "/")
    for name in (path, path.rpartition("/")[0]):
        for root in IMPORT_ROOTS if name else ():
            found = {f"{root}{name}.py", f"{root}{name}/__init__.py"} & files
            if found:
                return found
    return set()


def reached(changed: Iterable[str], users: dict[str, set[str]]) -> set[str]:
    """Return the changed files and all that use them, directly or through others."""
    found, left = set(), list(changed)
    while left:
        file = left.pop()
        if file not in found:
            found.add(file)
            left += users.get(file, ())
    return found


def tests_of(changed: set[str], files: set[str], root: Path = REPOSITORY) -> list[str]:
    """List the test files that a change reaches.

    Args:
        changed: The changed files, as paths from ``root``.
        files: All files.
        root: The checkout.
    """
    tests = {file for file in files | changed if re.fullmatch(r"tests/.*/test_\w+\.py", file)}
    tests = {file for file in tests if (root / file).is_file()}
    if any(file.startswith(EVERYTHING) for file in changed):
        return sorted(tests)
    found = reached(changed, users_of(files | changed, root))
    if not any(LAB.match(file) for file in changed):
        found = {file for file in found if not file.startswith("tests/lab/")}
    return sorted(tests & (found | (READ_ALL_SOURCES if changed else set())))


def main() -> None:
    """Print the test files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", nargs="?", default="HEAD", help="a commit (default: %(default)s)")
    changed = changed_files(parser.parse_args().base)
    print("\n".join(tests_of(changed, tracked_files())))


if __name__ == "__main__":
    main()
