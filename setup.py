import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

HERE = Path(__file__).resolve().parent

# A plain shared library for ctypes and onnxruntime: it knows neither Python nor torch nor headers of
# onnxruntime, so none of them need be there when it is compiled and one build serves every version
# of each. What it uses of a CPU beyond the baseline is decided when it runs, hence no -march.
CPU_KERNEL = Extension(
    "mmvssm.ops._kernels",
    [
        "mmvssm/ops/selective_scan/csrc/scan_avx2.cpp",  # those that take longest come first
        "mmvssm/ops/selective_scan/csrc/scan_avx512.cpp",
        "mmvssm/ops/sparse_depthwise_conv/csrc/sparse_depthwise_conv_cpu.cpp",
        "mmvssm/ops/conv_act/csrc/conv_act_cpu.cpp",
        "mmvssm/ops/selective_scan/csrc/scan_baseline.cpp",
        "mmvssm/ops/selective_scan/csrc/scan_cpu.cpp",
        "mmvssm/ops/selective_scan/csrc/scan_onnxruntime.cpp",
    ],
    optional=True,
)
# With -O2 (GCC 12), a training step of the scan with one state takes 1.3 times as long.
COMPILE_FLAGS = ["-O3", "-std=c++17", "-fPIC"]


class BuildFailed(Exception):
    """Why there is no compiled kernel, in a few words."""


class BuildKernel(build_ext):
    """Compile the CPU kernel where that works; where it does not, say so and go on without."""

    def get_ext_filename(self, fullname):
        # Without Python's ABI tag: the loader asks for this very name.
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext):
        library = Path(self.get_ext_fullpath(ext.name))
        # A library of an earlier build must not survive a failure: it would be packed in silence.
        library.unlink(missing_ok=True)
        try:
            library.parent.mkdir(parents=True, exist_ok=True)
            compile_kernel([HERE / source for source in ext.sources], library)
        except Exception as error:  # whatever it is, mmvssm works without the kernel
            # Past distutils' log, which is silent at its usual level.
            print(
                f"mmvssm: the CPU kernel was not compiled ({error}); everything works without it, "
                "but scans and sparse convolutions on a CPU are several times slower, and onnxruntime "
                "has no native scan. With g++ there, installing mmvssm again adds it.",
                file=sys.stderr,
            )

    def copy_extensions_to_source(self):
        # Called for editable installations and --inplace: the same holds for the source folder.
        for ext in self.extensions:
            name = self.get_ext_filename(ext.name)
            (HERE / name).unlink(missing_ok=True)
            if Path(self.build_lib, name).exists():
                copy_whole(Path(self.build_lib, name), HERE / name)


class TagWheel(bdist_wheel):
    """Tag a wheel by what is in it: the kernel fits one platform, and any Python."""

    def get_tag(self):
        built = self.get_finalized_command("build_ext")
        self.root_is_pure = not any(Path(path).exists() for path in built.get_outputs())
        _, _, platform = super().get_tag()
        return "py3", "none", platform


def compile_kernel(sources, library):
    """Compile and link ``sources`` into ``library``, with OpenMP if the compiler has it."""
    if os.environ.get("CXX"):
        compilers = [os.environ["CXX"]]
    else:
        found = filter(None, map(shutil.which, ("c++", "g++", "clang++")))
        compilers = list({os.path.realpath(path): path for path in found}.values())
    missing = [source.name for source in sources if not source.exists()]
    if missing:
        raise BuildFailed(f"{missing[0]} is missing")
    if not compilers:
        raise BuildFailed("no C++ compiler was found")
    user_flags = os.environ.get("CXXFLAGS", "").split()
    link_flags = os.environ.get("LDFLAGS", "").split()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [Path(folder, f"{source.stem}.o") for source in sources]
        built = Path(folder, library.name)
        for openmp in (["-fopenmp"], []):
            for compiler in compilers:
                command = [*compiler.split(), *COMPILE_FLAGS, *openmp, *user_flags]
                units = [[*command, "-c", unit, "-o", to] for unit, to in zip(sources, objects)]
                link = [*command, "-shared", *objects, *link_flags, "-o", built]
                fault = next(filter(None, pool.map(run, units)), None) or run(link)
                if built.exists():
                    copy_whole(built, library)
                    print(f"mmvssm: compiled the CPU kernel with {' '.join(command)}")
                    return
    raise BuildFailed(fault or f"{compiler} ended with status 0")


def run(command):
    """Run a compiler; return None, or the first error that it reports."""
    result = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if result.returncode == 0:
        return None
    errors = (line.strip() for line in result.stderr.splitlines() if "error:" in line)
    return next(errors, f"{command[0]} ended with status {result.returncode}")


def copy_whole(source, target):
    """Copy a file so that ``target`` is never there in part: Python would die loading half a library."""
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        shutil.copyfile(source, partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def version():
    """Read the version without importing the package, which would need torch."""
    return re.search(r'"(.+)"', (HERE / "mmvssm" / "version.py").read_text().split("=")[1]).group(1)


def requirements(name):
    lines = (HERE / "requirements" / f"{name}.txt").read_text().splitlines()
    return [line for line in (line.split("#")[0].strip() for line in lines) if line]


setup(
    name="mmvssm",
    version=version(),
    description="State-space (Mamba) backbones for dense prediction on OpenMMLab",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["mmvssm", "mmvssm.*"]),
    # Where OpenMMLab's packages have their configs and tools; the folders are links to ours.
    package_data={
        "mmvssm": [
            *(".mim/model-index.yml", ".mim/configs/*.*", ".mim/configs/_base_/*.py"),
            *(f".mim/tools/{files}" for files in ("*.py", "*.sh", "analysis_tools/get_flops.py")),
        ]
    },
    exclude_package_data={"mmvssm": [".mim/tools/web.py"]},  # what it needs is in the checkout
    ext_modules=[CPU_KERNEL],
    cmdclass={"build_ext": BuildKernel, "bdist_wheel": TagWheel},
    python_requires=">=3.9",  # the oldest whose syntax suffices; tests/test_install.py checks it
    install_requires=[
        # No bounds: with one, pip might replace the torch that matches a machine's driver, and the
        # OpenMMLab packages compiled against it. `import mmvssm` says if it is older than 2.5.
        "torch",
        "numpy",
        "filelock",  # torch needs it too
        # mmengine, mmcv, mmdet and mmseg are needed too, but come from one of two families with the
        # same import names (openmmlab or onedl): required by name, pip would install the one beside
        # the other. `import mmvssm` says what is missing; the extras below install it.
    ],
    extras_require={
        # Both compile mmcv's operators against the torch that is there, so that has to be installed
        # first, and pip needs --no-build-isolation. `make` does all of it.
        "openmmlab": requirements("openmmlab"),
        "onedl": requirements("onedl"),
        "onnx": requirements("onnx"),
        "tests": requirements("tests"),
    },
    zip_safe=False,  # the kernel is a file
)
