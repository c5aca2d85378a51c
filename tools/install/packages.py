"""List the packages of this Python environment, and run pip so that it replaces none."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, NoReturn, Optional

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements"


def print_line(message: str) -> None:
    """Print one line and flush it."""
    print(f"[set-up] {message}", flush=True)


def fail(message: str) -> NoReturn:
    """End the set-up with a one-line message: the cause and what to do."""
    sys.exit(f"[set-up] {message}")


def python_says(code: str, environment: Optional[Mapping[str, str]] = None) -> tuple[bool, str]:
    """Run a line of Python in a separate process.

    Returns:
        Whether it succeeded, and the last line that it printed (of its error, if it failed).
    """
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    lines = (result.stdout if result.returncode == 0 else result.stderr).strip().splitlines()
    return result.returncode == 0, lines[-1] if lines else ""


def canonical(name: str) -> str:
    """Return a distribution's normalised name, as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_versions() -> dict[str, str]:
    """Return ``{distribution: version}`` of everything that this interpreter can import."""
    versions: dict[str, str] = {}
    for dist in metadata.distributions():
        name = dist.metadata["Name"]
        if name:  # a half-deleted package leaves a folder without a name
            versions.setdefault(canonical(name), dist.version)
    return versions


def setuptools_major() -> int:
    """Return the major version of setuptools, 0 if it is not installed."""
    return int(installed_versions().get("setuptools", "0").split(".")[0])


def distribution_of(requirement: str) -> str:
    """Return the canonical name in a requirement, without version and markers."""
    return canonical(re.match(r"[A-Za-z0-9._-]+", requirement).group())


def requirement_lines(name: str) -> list[str]:
    """Return the requirement lines of ``requirements/{name}.txt``."""
    text = (REQUIREMENTS / f"{name}.txt").read_text()
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def read_requirements(name: str) -> dict[str, str]:
    """Return ``{distribution: requirement line}`` of ``requirements/{name}.txt``."""
    return {distribution_of(line): line for line in requirement_lines(name)}


def constraints(unpinned: Collection[str] = ()) -> list[str]:
    """Return pip's constraints: installed packages at their version, others at the tested versions.

    Args:
        unpinned: distributions that pip may choose freely if they are not installed.
    """
    kept = installed_versions()
    if setuptools_major() < 80:
        # A new environment's setuptools may be older than torch wants; versions.txt bounds it.
        kept.pop("setuptools", None)
    # By line, not by name: one package may have two lines with markers, between which pip chooses.
    return [f"{name}=={version}" for name, version in kept.items()] + [
        line
        for line in requirement_lines("versions")
        if distribution_of(line) not in kept and distribution_of(line) not in unpinned
    ]


def start_pip_install(
    requirements: Iterable[str],
    *,
    unpinned: Collection[str] = (),
    environment: Optional[Mapping[str, str]] = None,
    output: Optional[IO[str]] = None,
) -> subprocess.Popen:
    """Start a ``pip install`` that fails instead of replacing an installed package.

    Args:
        requirements: requirement lines and options.
        unpinned: see :func:`constraints`.
        environment: environment variables instead of this process's.
        output: file for pip's output, instead of this process's output.
    """
    file = Path(sys.prefix) / "constraints.txt"
    file.write_text("\n".join(constraints(unpinned)) + "\n")
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    return subprocess.Popen(
        [*command, "-c", str(file), *requirements],
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
        env=environment or os.environ,
    )


def install_missing(requirements: Iterable[str], what: str, unpinned: Collection[str] = ()) -> None:
    """Install the requirements whose distribution is not installed in any version.

    Args:
        requirements: requirement lines.
        what: their description, for messages.
        unpinned: see :func:`constraints`.

    Raises:
        SystemExit: pip failed.
    """
    here = installed_versions()
    missing = [line for line in requirements if distribution_of(line) not in here]
    if not missing:
        return
    print_line(f"{what}: installing {', '.join(missing)}")
    if start_pip_install(missing, unpinned=unpinned).wait() != 0:
        fail(
            f"pip could not install {what}; its message is above. If it reports conflicting "
            "versions, they conflict with an installed package: use a new environment "
            "(make VENV=DIR ...)."
        )
