"""Install mmcv with its operators, the only package of the set-up that may need compiling."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from packages import (
    distribution_of,
    fail,
    install_missing,
    installed_versions,
    print_line,
    python_says,
    setuptools_major,
    start_pip_install,
)

GIBIBYTE = 1 << 30
EXEC_INTO_CALLER = Path(__file__).with_name("exec_into_caller")


def install_mmcv(requirement: str) -> None:
    """Install mmcv from a wheel that fits the installed torch if pip finds one, else build it.

    Args:
        requirement: the requirement line of mmcv or of its fork.

    Raises:
        SystemExit: the installed mmcv has no working operators, or the build failed.
    """
    name = distribution_of(requirement)
    here = installed_versions()
    if name in here:
        works, why = python_says("import mmcv.ops")
        if not works:
            fail(
                f"{name} {here[name]} is installed in {sys.prefix} but its operators do not load "
                f"({why}): remove it with `pip uninstall {name}` and run this again, and it is "
                "built for the torch that is installed."
            )
        return
    for other in ("mmcv-lite", "mmcv-full"):
        if other in here:
            fail(
                f"{other} is installed in {sys.prefix} and {name} would overwrite its files: "
                f"remove it with `pip uninstall {other}` and run this again."
            )

    # mmcv is built in this environment, since its setup.py imports torch; so install its build tools.
    if setuptools_major() >= 80:
        print_line("setuptools < 80 is needed to build mmcv: its setup.py imports pkg_resources")
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "setuptools<80"], check=True)
    install_missing(["setuptools", "wheel", "ninja"], "what mmcv is built with")

    log = Path(sys.prefix) / "mmcv.log"
    print_line(f"mmcv: installing {requirement} (the whole output is in {log})")
    environment = build_environment()
    done = pip_install_with_progress([requirement, "--only-binary", name], environment, log)
    if done and not python_says("import mmcv.ops")[0]:
        print_line("mmcv: the wheel that pip found was built for another torch, so we compile mmcv")
        # Not from pip's cache, which may hold that wheel.
        fresh = ["--force-reinstall", "--no-deps", "--no-binary", name, "--no-cache-dir"]
        done = build_mmcv([*fresh, requirement], environment, log)
    elif not done:
        print_line("mmcv: no wheel fits, so we compile it")
        done = build_mmcv([requirement], environment, log)
    if not done:
        lines = log.read_text(errors="replace").splitlines()
        print("\n".join([line for line in lines if re.search(r"\berror\b|Error:", line)][-15:]))
        hint = "" if shutil.which(os.environ.get("CXX", "c++")) else " There is no C++ compiler."
        fail(f"{requirement} could not be installed.{hint} The whole output of pip is in {log}.")


def build_mmcv(arguments: list[str], environment: dict[str, str], log: Path) -> bool:
    """Build mmcv with pip, for the CPU only if its CUDA operators do not compile.

    Args:
        arguments: requirement lines and options of ``pip install``.
        environment: variables from :func:`build_environment`.
        log: file for the output.

    Returns:
        Whether pip succeeded.
    """
    if builds_for_gpu(environment) and not has_nvcc(environment):
        environment = add_nvcc(environment)
    with precompiled_header(environment) as flags:
        precompiled = "-include" in flags
        minutes = "2 to 4" if precompiled else "5 to 10"
        print_line(
            f"mmcv: this takes {minutes} minutes on 2 cores, and more for a GPU "
            f"(MAX_JOBS={environment['MAX_JOBS']})"
        )
        environment = {**environment, "CFLAGS": shlex.join(flags)}
        done = pip_install_with_progress(arguments, environment, log)
        if not done and builds_for_gpu(environment):
            print_line(
                "mmcv: its CUDA operators failed to compile, so it gets those for the CPU only"
            )
            shutil.copy(log, log.with_name("mmcv-cuda.log"))
            environment["CUDA_VISIBLE_DEVICES"] = ""
            done = pip_install_with_progress(arguments, environment, log)
    if precompiled and "[-Winvalid-pch]" in log.read_text(errors="replace"):
        print_line("mmcv: the precompiled header did not fit every file; those took longer")
    return done


# --------------------------------------------------------------------------------------------------
# Settings of the build


def build_environment() -> dict[str, str]:
    """Return the environment variables for building mmcv's operators on this machine."""
    environment = {
        **os.environ,
        "MMCV_WITH_OPS": "1",
        # ninja, from this environment, compiles several files at once and reports its progress.
        "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", ""),
        "PYTHONUNBUFFERED": "1",
    }
    environment.setdefault("MAX_JOBS", str(build_jobs()))
    if sys.version_info >= (3, 13):
        paths = [str(EXEC_INTO_CALLER), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return environment


def compiler_flags() -> list[str]:
    """Return all flags for CFLAGS, since setuptools replaces Python's own flags by it.

    They are Python's own, without ``-g`` (it doubles the time) and with ``-O2``, then the user's, which prevail.
    """
    flags = shlex.split(sysconfig.get_config_var("CFLAGS") or "")
    flags = [flag for flag in flags if not flag.startswith(("-O", "-g"))]
    # Older versions of torch add it to every file, so the precompiled header needs it too.
    works, abi = python_says("import torch; print(int(torch._C._GLIBCXX_USE_CXX11_ABI))")
    if works:
        flags.append(f"-D_GLIBCXX_USE_CXX11_ABI={abi}")
    return [*flags, "-O2", "-g0", *shlex.split(os.environ.get("CFLAGS", ""))]


@contextmanager
def precompiled_header(environment: dict[str, str]) -> Iterator[list[str]]:
    """Compile torch's headers once for all files of mmcv, which contain little else.

    `roi_align.cpp` then takes a quarter of its time. The header takes about 430 MB of disk inside the context.

    Args:
        environment: environment variables for the compiler.

    Yields:
        The flags to compile with. They name no header if the compiler cannot use its own, or is Clang, which raises
        an error for a header that does not fit, where GCC ignores it.
    """
    flags = compiler_flags()
    compiler = shlex.split(environment.get("CXX") or "c++")  # as torch's build helper does
    folder = Path(sys.prefix) / "mmcv-header"
    shutil.rmtree(folder, ignore_errors=True)  # left by a set-up that was killed
    header, source = folder / "torch_types.h", folder / "tensor.cpp"
    # All files of an extension get these flags; most files of mmcv include `types.h`.
    every = [*flags, "-fPIC", "-std=c++17"]
    defines = ["-DTORCH_API_INCLUDE_EXTENSION_H", "-DTORCH_EXTENSION_NAME=_ext"]
    with_header = ["-Winvalid-pch", "-include", str(header)]

    def compiles(*arguments: str) -> bool:
        try:
            result = subprocess.run(
                [*compiler, *every, *arguments], env=environment, capture_output=True
            )
        except OSError:  # there is no such compiler; the build itself will report it
            return False
        return result.returncode == 0

    try:
        folder.mkdir()
        header.write_text("#include <torch/types.h>\n")
        source.write_text(
            "#ifdef __clang__\n#error\n#endif\n#include <torch/types.h>\nat::Tensor tensor;\n"
        )
        includes = [f"-I{path}" for path in torch_include_paths()]
        precompiled = ["-x", "c++-header", str(header), "-o", f"{header}.gch"]
        strict = [*with_header, "-Werror=invalid-pch", *includes, *defines]
        fits = (
            compiles(*precompiled, *includes)
            and compiles(*strict, "-c", str(source), "-o", f"{source}.o")
            and Path(f"{header}.gch").exists()
        )
        if not fits:
            print_line("mmcv: this compiler cannot use a precompiled header, so it takes longer")
        yield [*flags, *with_header] if fits else flags
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def torch_include_paths() -> list[str]:
    """Return the folders of torch's headers."""
    works, paths = python_says(
        "import os; from torch.utils.cpp_extension import include_paths;"
        "print(os.pathsep.join(include_paths()))"
    )
    return paths.split(os.pathsep) if works else []


def build_jobs() -> int:
    """Return the number of files to compile at once: one per core and 2 GiB of memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        memory = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        memory = None
    available = int(memory.group(1)) * 1024 if memory else 4 * GIBIBYTE
    return max(1, min(cores or 1, available // (2 * GIBIBYTE)))


def builds_for_gpu(environment: dict[str, str]) -> bool:
    """Whether mmcv's setup.py would compile its CUDA operators, because torch sees a GPU."""
    return python_says("import torch; print(torch.cuda.is_available())", environment)[1] == "True"


def has_nvcc(environment: dict[str, str]) -> bool:
    """Whether torch's build helper finds a CUDA toolkit with its compiler."""
    code = "from torch.utils.cpp_extension import CUDA_HOME; print(CUDA_HOME or '')"
    works, home = python_says(code, environment)
    return works and bool(home) and (Path(home) / "bin" / "nvcc").exists()


def add_nvcc(environment: dict[str, str]) -> dict[str, str]:
    """Install the CUDA compiler that matches torch, or else build for the CPU only.

    torch's CUDA builds depend on a version of the distribution ``cuda-toolkit``; its extras name the matching versions
    of the compiler's parts.

    Returns:
        The environment variables with CUDA_HOME set, or with the GPU hidden.
    """
    if "cuda-toolkit" in installed_versions():
        print_line(
            "mmcv: there is a GPU but no CUDA compiler: installing the one that matches torch"
        )
        parts = start_pip_install(["cuda-toolkit[nvcc,crt,nvvm,cccl]"]).wait()
        compilers = [
            Path(file.locate()).resolve()
            for file in (metadata.files("nvidia-cuda-nvcc") or [] if parts == 0 else [])
            if file.name == "nvcc"
        ]
        if compilers:
            home = compilers[0].parents[1]
            # The linker looks for libcudart.so, but the package has only libcudart.so.13.
            links = Path(sys.prefix) / "cuda-links"
            links.mkdir(exist_ok=True)
            for library in (home / "lib").glob("libcudart.so.*"):
                link = links / "libcudart.so"
                link.unlink(missing_ok=True)
                link.symlink_to(library)
            paths = [str(links), environment.get("LIBRARY_PATH", "")]
            library_path = os.pathsep.join(filter(None, paths))
            return {**environment, "CUDA_HOME": str(home), "LIBRARY_PATH": library_path}
    print_line(
        "mmcv: there is a GPU but no CUDA compiler (nvcc), so we build its operators for the CPU "
        "only. For the GPU, install the CUDA toolkit of torch's CUDA version, remove mmcv with "
        "`pip uninstall` and run this again."
    )
    return {**environment, "CUDA_VISIBLE_DEVICES": ""}


# --------------------------------------------------------------------------------------------------
# The build itself


def pip_install_with_progress(
    arguments: list[str], environment: dict[str, str], log: Path, every: float = 20.0
) -> bool:
    """Run pip with its output in a file, and print the progress of the compilation.

    Args:
        arguments: requirement lines and options of ``pip install``.
        environment: its environment variables.
        log: the file; printed lines begin with its name.
        every: seconds between two lines; on a terminal we rewrite one line every second.

    Returns:
        Whether pip succeeded.
    """
    terminal = sys.stdout.isatty()
    start = shown = time.monotonic()
    with open(log, "w") as output:
        process = start_pip_install(
            ["--no-build-isolation", "-v", *arguments], environment=environment, output=output
        )
        while process.poll() is None:
            time.sleep(1)
            now = time.monotonic()
            if terminal or now - shown >= every:
                shown = now
                line = f"{log.stem}: {compiled_so_far(log)} ({(now - start) / 60:.1f} min)"
                print(
                    f"\r[set-up] {line}\033[K" if terminal else f"[set-up] {line}",
                    flush=True,
                    end="" if terminal else "\n",
                )
    if terminal:
        print()
    return process.returncode == 0


def compiled_so_far(log: Path) -> str:
    """Describe the progress of a build, from the ``[34/96]`` at the beginning of ninja's lines."""
    steps = re.findall(r"^\s*\[(\d+)/(\d+)\]", log.read_text(errors="replace"), re.MULTILINE)
    return f"compiled {steps[-1][0]} of {steps[-1][1]} files" if steps else "preparing"
