"""Install mmpretrain and timm, for pre-training, into the Python environment that runs this script.

Both need torchvision, whose compiled part loads only with the build of torch that it was made for. pip compares only
versions: to a torch for the CPU it may add a torchvision for CUDA, which does not load. ``make setup-pretrain`` calls
this; if it exits with status 3, a matching pair needs a separate environment.

    python tools/install/pretraining.py          # check that torchvision works, then install the rest
    python tools/install/pretraining.py --pair   # in a new environment: torch and torchvision from the index
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from environment import choose_family
from packages import (
    distribution_of,
    fail,
    install_missing,
    installed_versions,
    print_line,
    python_says,
    read_requirements,
    requirement_lines,
    start_pip_install,
)

NO_PAIR = 3
"""Exit status: torchvision does not load with the installed torch."""


def install_pair() -> None:
    """Install torch and a matching torchvision into a new environment.

    Raises:
        SystemExit: pip failed.
    """
    if "torch" in installed_versions():
        return
    line = next(line for line in requirement_lines("versions") if distribution_of(line) == "torch")
    # With three signs no version with a suffix counts, such as 2.13.0+cpu, which pip would prefer where it sees one.
    torch = line.replace("==", "===")
    print_line(f"{torch} and its torchvision, as the package index serves them (with CUDA some GB)")
    if start_pip_install([torch, "torchvision"], unpinned=["torch", "triton"]).wait() != 0:
        fail(f"pip could not install {torch} and torchvision; its message is above.")


def set_up() -> None:
    """Install missing packages, then check that they work together.

    Raises:
        SystemExit: with status :data:`NO_PAIR` if torchvision does not load; one that we installed is removed again.
            With a message if something could not be installed or does not work.
    """
    was_here = "torchvision" in installed_versions()
    # Each torchvision requires the one torch that it was made for, so pip finds the matching version.
    install_missing(["torchvision"], "torchvision")
    works, why = python_says("import torchvision; torchvision.ops.nms")
    if not works:
        print_line(
            f"torchvision does not load with the torch that is installed in {sys.prefix} ({why})"
        )
        if not was_here:
            uninstall = [sys.executable, "-m", "pip", "uninstall", "-q", "-y", "torchvision"]
            subprocess.run(uninstall, check=True)
        sys.exit(NO_PAIR)
    name = {"openmmlab": "pretraining", "onedl": "pretraining-onedl"}[choose_family("auto")]
    requirements = read_requirements(name)
    install_missing(requirements.values(), "mmpretrain")
    for module in ("mmpretrain.models", "timm"):
        works, why = python_says(f"import {module}")
        if not works:
            fail(f"`import {module}` fails in {sys.prefix}: {why}")
    here = installed_versions()
    found = [f"{part} {here[part]}" for part in ("torch", "torchvision", *requirements)]
    print_line(f"ready for pre-training: {', '.join(found)}")
    print_line(f"use it by `source {sys.prefix}/bin/activate`")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pair", action="store_true", help="install torch and a torchvision that goes with it"
    )
    if parser.parse_args().pair:
        install_pair()
    else:
        set_up()
