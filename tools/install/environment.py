"""Set up the Python environment that this script is run with: torch, OpenMMLab, test tools.

We install only missing packages and replace none: every installed version is a constraint for pip, so
pip fails if a package needs another torch. ``make`` calls this; it sets up everything but mmvssm itself.

    python tools/install/environment.py                    # the installed family, else upstream
    python tools/install/environment.py --openmmlab onedl  # the onedl-* forks
    python tools/install/environment.py --print-run-env    # see print_run_environment()
    python tools/install/environment.py --print-versions   # the versions that tests run with
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from mmcv_operators import install_mmcv
from packages import (
    fail,
    install_missing,
    installed_versions,
    print_line,
    python_says,
    read_requirements,
)

# Import name -> the distributions that provide it, by family. Families must not be mixed: they write to the same
# folders of site-packages.
PROVIDERS = {
    "mmengine": {"openmmlab": "mmengine", "onedl": "onedl-mmengine"},
    "mmcv": {"openmmlab": "mmcv", "onedl": "onedl-mmcv"},
    "mmdet": {"openmmlab": "mmdet", "onedl": "onedl-mmdetection"},
    "mmseg": {"openmmlab": "mmsegmentation", "onedl": "onedl-mmsegmentation"},
}
# mmcv imports cv2, and either of these provides it.
OPENCV, OPENCV_HEADLESS = "opencv-python", "opencv-python-headless"


def set_up(wanted_family: str) -> None:
    """Install everything that is missing, then check that it works together.

    Args:
        wanted_family: "auto", "openmmlab" or "onedl", see :func:`choose_family`.

    Raises:
        SystemExit: something could not be installed or does not work.
    """
    # torch's CUDA builds pin the version of triton.
    install_missing(["torch"], "torch (hundreds of MB; with CUDA some GB)", unpinned=["triton"])
    torch_before = torch_version()
    print_line(f"torch {torch_before}, Python {sys.version.split()[0]}, in {sys.prefix}")

    family = choose_family(wanted_family)
    openmmlab = read_requirements(family)
    # Testing mmcv's operators needs mmengine and OpenCV.
    has_opencv = not {OPENCV, OPENCV_HEADLESS}.isdisjoint(installed_versions())
    mmengine = openmmlab.pop(PROVIDERS["mmengine"][family])
    install_missing(["numpy", mmengine, *([] if has_opencv else [OPENCV])], "mmengine")
    repair_opencv()
    install_mmcv(openmmlab.pop(PROVIDERS["mmcv"][family]))
    install_missing(openmmlab.values(), "OpenMMLab")
    install_missing(read_requirements("tests").values(), "test tools")
    repair_opencv()  # again, since any of them may have installed the other build

    if torch_version() != torch_before:
        fail(
            f"torch was {torch_before} and is now {torch_version()}: a package replaced it. "
            f"Put it back with `pip install torch=={torch_before}` and report this."
        )
    for module in ("mmengine", "mmcv.ops", "mmdet.models", "mmseg.models"):
        works, why = python_says(f"import {module}")
        if not works:
            fail(f"`import {module}` fails in {sys.prefix}: {why}")
    here = installed_versions()
    names = [provider[family] for provider in PROVIDERS.values()]
    print_line("ready: " + ", ".join(f"{name} {here[name]}" for name in names))


def torch_version() -> str:
    """Return torch's full version, with the +cpu or +cu130 that its metadata may lack."""
    works, answer = python_says("import torch; print(torch.__version__)")
    if not works:
        fail(f"torch is installed in {sys.prefix} but does not import ({answer}): reinstall it.")
    return answer


def choose_family(wanted: str) -> str:
    """Return the family to install: the installed one, else the wanted one.

    Args:
        wanted: "openmmlab", "onedl", or "auto" for the installed one, if any, else openmmlab.

    Raises:
        SystemExit: both families are installed, or another one than the wanted one.
    """
    here = installed_versions()
    found = {
        family: sorted(names[family] for names in PROVIDERS.values() if names[family] in here)
        for family in ("openmmlab", "onedl")
    }
    if found["openmmlab"] and found["onedl"]:
        fail(
            f"{', '.join(found['openmmlab'])} and {', '.join(found['onedl'])} are both installed "
            f"in {sys.prefix}, but they overwrite each other's files: remove one family with "
            "`pip uninstall` and run this again."
        )
    present = next((family for family in found if found[family]), None)
    if wanted == "auto":
        return present or "openmmlab"
    if present and present != wanted:
        fail(
            f"OPENMMLAB={wanted} was asked for, but {', '.join(found[present])} of the other "
            f"family is installed in {sys.prefix}: use a new environment "
            f"(make VENV=.venv-{wanted} OPENMMLAB={wanted} ...)."
        )
    return wanted


def repair_opencv() -> None:
    """Install OpenCV's headless build if the other build lacks a graphics library of the system.

    Raises:
        SystemExit: OpenCV does not import for another reason.
    """
    works, why = python_says("import cv2")
    if works:
        return
    version = installed_versions().get(OPENCV)
    if version is None or ".so" not in why:
        fail(f"OpenCV does not import ({why}): reinstall {OPENCV} or {OPENCV_HEADLESS}.")
    print_line(f"{OPENCV} does not load on this machine ({why}): using its headless build instead")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "uninstall", "-q", "-y", OPENCV], check=True)
    # Both builds write the folder `cv2`; --no-deps keeps all other packages.
    headless = f"{OPENCV_HEADLESS}=={version}"
    subprocess.run([*pip, "install", "-q", "--no-deps", "--force-reinstall", headless], check=True)
    works, why = python_says("import cv2")
    if not works:
        fail(f"{headless} does not import either: {why}")


def print_run_environment() -> None:
    """Print the variables that a training run needs here, for ``env $(...) python ...``.

    A detector cannot train on a GPU if mmcv's operators were compiled for the CPU only. We then hide the GPU and
    print a note on standard error.
    """
    works, answer = python_says(
        "import torch; from mmcv.ops import get_compiling_cuda_version as version;"
        "print(torch.cuda.is_available() and version() == 'not available')"
    )
    if works and answer == "True":
        print(
            "[set-up] mmcv's operators were compiled for the CPU only, so this runs on the CPU "
            "although there is a GPU. To compile them again, install the CUDA toolkit of torch's "
            "CUDA version and run `pip uninstall mmcv` and `make setup`.",
            file=sys.stderr,
        )
        print("CUDA_VISIBLE_DEVICES=")


def print_versions() -> None:
    """Print the Python, build of torch and Triton of this environment on one line."""
    works, build = python_says(
        "import torch; print(f'torch {torch.__version__}, built for', 'CUDA ' + torch.version.cuda"
        " if torch.version.cuda else 'the CPU', 'with a GPU here' if torch.cuda.is_available() else"
        " 'and no GPU here')"
    )
    here = installed_versions()
    triton = f"Triton {here['triton']}" if "triton" in here else "no Triton"
    families = (name for names in PROVIDERS.values() for name in names.values())
    openmmlab = [f"{name} {here[name]}" for name in families if name in here]
    python = f"Python {sys.version.split()[0]}"
    print("; ".join([python, build if works else f"no torch ({build})", triton, *openmmlab]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--openmmlab", choices=("auto", "openmmlab", "onedl"), default="auto")
    parser.add_argument("--print-run-env", action="store_true", help="print variables for a run")
    parser.add_argument("--print-versions", action="store_true", help="print what is installed")
    arguments = parser.parse_args()
    if arguments.print_run_env:
        print_run_environment()
    elif arguments.print_versions:
        print_versions()
    else:
        set_up(arguments.openmmlab)
