"""Installing: the compiled kernel never stands in the way, and torch is never replaced."""

import ast
import ctypes
import importlib
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = Path("mmvssm") / "ops" / "_kernels.so"
STAND_IN = """
#ifdef _OPENMP
#include <omp.h>
extern "C" int threads() { return omp_get_max_threads(); }
#else
extern "C" int threads() { return 0; }
#endif
"""
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
)


@pytest.fixture
def source(tmp_path):
    """A copy of what mmvssm is installed from, with a stand-in for the kernel.

    The kernel itself takes most of a minute to compile; `make test` has done so before it comes
    here, and the tests of the operator use it.
    """
    folder = tmp_path / "source"
    shutil.copytree(
        ROOT / "mmvssm", folder / "mmvssm", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    shutil.copytree(ROOT / "requirements", folder / "requirements")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    kernels = list((folder / "mmvssm" / "ops").rglob("*.cpp"))
    for kernel in kernels:
        kernel.write_text(STAND_IN if kernel.stem == "scan_cpu" else "")
    assert len(kernels) == 2
    return folder


def build_in_place(folder, **environment):
    """Run ``python setup.py build_ext --inplace``; return its output."""
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def install(folder, target, **environment):
    """Run ``pip install .`` into a folder of its own, without network."""
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--target", target]
    result = subprocess.run(
        [sys.executable, "-m", "pip", "install", "-v", *options, "."],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


# --------------------------------------------------------------------------------------------------
# The compiled kernel
# --------------------------------------------------------------------------------------------------


@needs_compiler
def test_a_compiler_gives_a_library_that_needs_neither_python_nor_torch(source):
    output = build_in_place(source, CXX="")
    assert "was not compiled" not in output
    library = ctypes.CDLL(str(source / LIBRARY), mode=os.RTLD_NOW)  # now: every symbol is resolved
    assert library.threads() >= 0
    if shutil.which("ldd"):
        needed = subprocess.check_output(["ldd", source / LIBRARY], text=True)
        assert not re.search(r"lib(python|torch|c10)", needed)  # addresses hold any hex digits


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "/bin/false", "CC": "/bin/false"}, "/bin/false ended with status 1"),
        ({"CXX": "", "PATH": ""}, "no C++ compiler was found"),
        ({"CXX": "/no/such/compiler"}, "/no/such/compiler"),
        # A compiler that claims success and writes nothing.
        ({"CXX": "/bin/true"}, "/bin/true ended with status 0"),
    ],
)
def test_without_a_working_compiler_the_build_succeeds_and_says_so_once(
    source, environment, reason
):
    # What an earlier build left would otherwise be taken for the library of this source.
    (source / LIBRARY).write_bytes(b"the library of an earlier build")
    output = build_in_place(source, **environment)
    said = [line for line in output.splitlines() if "the CPU kernel was not compiled" in line]
    assert len(said) == 1
    assert reason in said[0]
    assert not (source / LIBRARY).exists()


@needs_compiler
def test_torch_s_number_of_threads_holds_for_the_library(source):
    build_in_place(source, CXX="")
    code = (
        "import ctypes, torch;"  # in the order in which mmvssm loads them
        f"library = ctypes.CDLL({str(source / LIBRARY)!r}); torch.set_num_threads(3);"
        "print(library.threads())"
    )
    threads = int(subprocess.check_output([sys.executable, "-c", code], text=True))
    assert threads in (0, 3)  # 0: the compiler has no OpenMP


@needs_compiler
def test_the_first_error_of_the_compiler_is_passed_on(source):
    kernel = source / "mmvssm" / "ops" / "selective_scan" / "csrc" / "scan_cpu.cpp"
    kernel.write_text("int f() { return undeclared_name; }\n")
    assert "undeclared_name" in build_in_place(source, CXX="")


@pytest.mark.slow
@needs_compiler
def test_pip_installs_with_and_without_a_compiler(source, tmp_path):
    with_kernel, without = tmp_path / "with", tmp_path / "without"
    install(source, with_kernel, CXX="")
    assert (with_kernel / LIBRARY).exists()
    # From the same folder: nothing of the build before may be packed.
    output = install(source, without, CXX="/bin/false", CC="/bin/false")
    assert output.count("the CPU kernel was not compiled") == 1
    assert not (without / LIBRARY).exists()
    for target in (with_kernel, without):
        code = "import mmvssm; print(mmvssm.__file__)"
        found = subprocess.check_output(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(target)},
            text=True,
        )
        assert found.strip().splitlines()[-1] == str(target / "mmvssm" / "__init__.py")


# --------------------------------------------------------------------------------------------------
# What the package declares
# --------------------------------------------------------------------------------------------------


def metadata_of(folder):
    """Return the lines of the metadata that ``setup.py`` writes."""
    subprocess.check_output([sys.executable, "setup.py", "-q", "egg_info"], cwd=folder)
    return (folder / "mmvssm.egg-info" / "PKG-INFO").read_text().splitlines()


def test_torch_has_no_bounds_and_openmmlab_is_optional(source):
    lines = [line for line in metadata_of(source) if line.startswith("Requires-Dist: ")]
    always = sorted(line.split(": ")[1] for line in lines if "extra ==" not in line)
    assert always == ["numpy", "torch"]
    assert not [line for line in lines if line.startswith("Requires-Dist: torch") and "=" in line]
    assert [line for line in lines if re.search(r"mmdet==.*extra == .openmmlab", line)]
    assert [line for line in lines if re.search(r"onedl-mmdetection==.*extra == .onedl", line)]


def test_version_is_the_package_s(source):
    from mmvssm.version import __version__

    assert f"Version: {__version__}" in metadata_of(source)


def test_the_syntax_is_that_of_the_oldest_python_declared():
    oldest = re.search(r'python_requires=">=3\.(\d+)"', (ROOT / "setup.py").read_text())
    files = [*(ROOT / "mmvssm").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    assert files
    for file in files:
        tree = ast.parse(file.read_text(), str(file), feature_version=(3, int(oldest.group(1))))
        assert tree.body or file.name == "__init__.py"


# --------------------------------------------------------------------------------------------------
# The environment that `make` sets up
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def tools(monkeypatch):
    """The modules of tools/install, by name."""
    monkeypatch.syspath_prepend(ROOT / "tools" / "install")
    names = ("packages", "mmcv_operators", "environment")
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
        sys.modules.pop(name, None)


def write_wheel(folder, name, version, requires=()):
    """Write an empty but valid wheel."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        required = "".join(f"Requires-Dist: {line}\n" for line in requires)
        wheel.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{required}",
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.mark.slow
def test_a_package_that_wants_another_torch_fails_instead_of_replacing_it(tmp_path):
    wheels, venv = tmp_path / "wheels", tmp_path / "venv"
    write_wheel(wheels, "torch", "1.0")
    write_wheel(wheels, "torch", "2.0")
    write_wheel(wheels, "greedy", "1.0", requires=["torch>=2.0"])
    write_wheel(wheels, "modest", "1.0", requires=["torch"])
    subprocess.check_call([sys.executable, "-m", "venv", venv])
    python = venv / "bin" / "python"
    environment = {
        **os.environ,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "PYTHONPATH": str(ROOT / "tools" / "install"),
    }

    def run(code):
        return subprocess.run([python, "-c", code], env=environment, capture_output=True, text=True)

    assert (
        run(
            "import subprocess, sys; sys.exit(subprocess.call("
            "[sys.executable, '-m', 'pip', 'install', 'torch==1.0']))"
        ).returncode
        == 0
    )
    version = "from packages import installed_versions; print(installed_versions()['torch'])"
    install_one = "from packages import install_missing; install_missing(['{}'], 'it')"

    assert run(install_one.format("modest")).returncode == 0
    failed = run(install_one.format("greedy"))
    assert failed.returncode == 1
    assert "pip could not install it" in failed.stderr
    assert run(version).stdout.strip() == "1.0"
    # What is there in any version is not touched, whatever version is asked for.
    assert run(install_one.format("torch==2.0")).returncode == 0
    assert run(version).stdout.strip() == "1.0"


def test_constraints_hold_what_is_installed_and_pin_what_is_not(tools, monkeypatch):
    packages = tools["packages"]
    here = {"torch": "2.9.0+cu128", "setuptools": "65.5.0"}
    monkeypatch.setattr(packages, "installed_versions", lambda: dict(here))
    lines = packages.constraints()
    assert "torch==2.9.0+cu128" in lines
    assert len([line for line in lines if line.startswith("torch==")]) == 1
    assert "setuptools<80" in lines  # may be updated, up to where mmcv still builds
    assert [line for line in lines if line.startswith("triton==")]
    assert not [line for line in packages.constraints(["triton"]) if line.startswith("triton")]
    here["setuptools"] = "82.0.1"
    assert "setuptools==82.0.1" in packages.constraints()


@pytest.mark.parametrize(
    ("installed", "wanted", "family"),
    [
        ([], "auto", "openmmlab"),
        ([], "onedl", "onedl"),
        (["mmengine"], "auto", "openmmlab"),
        (["onedl-mmengine", "onedl-mmcv"], "auto", "onedl"),
        (["onedl-mmcv"], "onedl", "onedl"),
    ],
)
def test_the_family_that_is_installed_is_used(tools, monkeypatch, installed, wanted, family):
    environment = tools["environment"]
    here = dict.fromkeys(installed, "1.0")
    monkeypatch.setattr(environment, "installed_versions", lambda: here)
    assert environment.choose_family(wanted) == family


@pytest.mark.parametrize(
    ("installed", "wanted", "message"),
    [
        (["mmcv", "onedl-mmengine"], "auto", "overwrite each other's files"),
        (["mmcv"], "onedl", "OPENMMLAB=onedl was asked for"),
        (["onedl-mmcv"], "openmmlab", "OPENMMLAB=openmmlab was asked for"),
    ],
)
def test_families_are_never_mixed(tools, monkeypatch, installed, wanted, message):
    environment = tools["environment"]
    here = dict.fromkeys(installed, "1.0")
    monkeypatch.setattr(environment, "installed_versions", lambda: here)
    with pytest.raises(SystemExit, match=message):
        environment.choose_family(wanted)


def test_progress_of_a_build_is_printed_while_it_runs(tools, monkeypatch, tmp_path, capsys):
    operators = tools["mmcv_operators"]
    ninja = "import time\nfor i in range(1, 5): print(f'[{i}/4] c++', flush=True); time.sleep(0.8)"

    def start_pip_install(arguments, *, environment, output):
        return subprocess.Popen([sys.executable, "-c", ninja], env=environment, stdout=output)

    monkeypatch.setattr(operators, "start_pip_install", start_pip_install)
    start = time.monotonic()
    log = tmp_path / "mmcv.log"
    assert operators.pip_install_with_progress(["mmcv"], dict(os.environ), log, every=1.0)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) >= 2
    assert any(
        re.search(r"mmcv: compiled [123] of 4 files \(0\.\d min\)", line) for line in printed
    )
    assert time.monotonic() - start < 30


def test_jobs_of_a_build_fit_the_machine(tools):
    assert 1 <= tools["mmcv_operators"].build_jobs() <= os.cpu_count()
