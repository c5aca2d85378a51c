"""Installation: it never fails because of the compiled kernel, and never replaces torch."""

import ast
import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

ROOT = Path(__file__).resolve().parents[2]
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

    The kernel itself takes half a minute to compile; `make test` has done so before it comes
    here, and the tests of the operator use it.
    """
    folder = tmp_path / "source"
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("mmvssm", "configs", "tools", "requirements"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore, symlinks=True)
    for name in (
        "setup.py",
        "pyproject.toml",
        "MANIFEST.in",
        "model-index.yml",
        "README.md",
        "LICENSE",
    ):
        shutil.copy(ROOT / name, folder)
    kernels = list((folder / "mmvssm" / "ops").rglob("*.cpp"))
    for kernel in kernels:
        kernel.write_text(STAND_IN if kernel.stem == "scan_cpu" else "")
    assert len(kernels) == 7
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
@pytest.mark.slow
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
# The wheel, and the configs in it
# --------------------------------------------------------------------------------------------------


def build_wheel(folder, **environment):
    """Run ``python setup.py bdist_wheel``; return the wheel's path."""
    subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", "wheels"],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        check=True,
    )
    (wheel,) = (folder / "wheels").iterdir()
    return wheel


def contents(wheel):
    """Return ``{name: bytes}`` of the files in a wheel, and the lines of its WHEEL file."""
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    (about,) = (text for name, text in files.items() if name.endswith("dist-info/WHEEL"))
    return files, about.decode().splitlines()


@needs_compiler
def test_a_wheel_with_the_kernel_fits_this_platform_and_any_python(source):
    wheel = build_wheel(source, CXX="")
    files, about = contents(wheel)
    assert LIBRARY.as_posix() in files
    platform = re.sub(r"\W", "_", sysconfig.get_platform())
    assert wheel.stem.endswith(f"-py3-none-{platform}")
    assert f"Tag: py3-none-{platform}" in about
    assert "Root-Is-Purelib: false" in about


def test_a_wheel_without_the_kernel_fits_any_platform(source):
    wheel = build_wheel(source, CXX="/bin/false", CC="/bin/false")
    files, about = contents(wheel)
    assert not [name for name in files if name.endswith(".so")]
    assert wheel.stem.endswith("-py3-none-any")
    assert "Tag: py3-none-any" in about
    assert "Root-Is-Purelib: true" in about
    # What else there is in it.
    configs = {path.name: path.read_bytes() for path in (ROOT / "configs").rglob("*.*")}
    packed = {name: text for name, text in files.items() if "/.mim/configs/" in name}
    assert {Path(name).name: text for name, text in packed.items()} == configs
    tools = [*(ROOT / "tools").glob("*.*"), ROOT / "tools/analysis_tools/get_flops.py"]
    expected = {path.name: path.read_bytes() for path in tools if path.name != "web.py"}
    packed = {name: text for name, text in files.items() if "/.mim/tools/" in name}
    assert {Path(name).name: text for name, text in packed.items()} == expected
    (licence,) = (text for name, text in files.items() if name.endswith("/LICENSE"))
    assert licence == (ROOT / "LICENSE").read_bytes()


def install_beside_others(source, tmp_path, options):
    """Install into an environment that has the packages of this one, but for mmvssm.

    Returns:
        Its Python, and its folder of packages.
    """
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    scheme = {"base": str(environment), "platbase": str(environment)}
    kind = "venv" if "venv" in sysconfig.get_scheme_names() else "posix_prefix"
    packages = Path(sysconfig.get_path("purelib", kind, scheme))
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", environment / "bin" / "python"]
    without = ["--no-build-isolation", "--no-deps", "--no-index", "--ignore-installed"]
    subprocess.run(
        [*pip, "install", "-q", *without, *options, "."],
        cwd=source,
        env={**os.environ, "CXX": "/bin/false", "CC": "/bin/false"},
        check=True,
    )
    return environment / "bin" / "python", packages


def without_path():
    """The environment variables, without what would let Python find this checkout."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    others = [path for path in paths if path and Path(path).resolve() != ROOT]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(others)}


@pytest.mark.parametrize(
    "options", [[], pytest.param(["-e"], marks=pytest.mark.nightly)], ids=["wheel", "editable"]
)
@pytest.mark.slow
def test_configs_are_inherited_by_name_wherever_a_project_is(source, tmp_path, options):
    python, packages = install_beside_others(source, tmp_path, options)
    project = tmp_path / "project"
    project.mkdir()
    (project / "mine.py").write_text(
        "_base_ = 'mmvssm::groupmamba_small_maskrcnn_coco.py'\nmodel = dict(neck=dict(num_outs=6))\n"
    )
    code = (
        "import mmvssm; from mmengine.config import Config; model = Config.fromfile('mine.py').model;"
        "print(mmvssm.__path__[0], model.type, model.backbone.arch, model.neck.num_outs)"
    )
    said = subprocess.run(
        [python, "-c", code], cwd=project, env=without_path(), capture_output=True, text=True
    )
    assert said.returncode == 0, said.stderr
    installed = source / "mmvssm" if options else packages / "mmvssm"
    assert said.stdout.split() == [str(installed), "MaskRCNN", "small", "6"]


INDEX = """Import:
  - configs/metafile.yml
"""
METAFILE = """Models:
  - Name: groupmamba_maskrcnn_shapes
    Config: configs/groupmamba_maskrcnn_shapes.py
    In Collection: GroupMamba
    Weights: http://127.0.0.1:PORT/weights.pth
Collections:
  - Name: GroupMamba
    Paper: {URL: https://arxiv.org/abs/2407.13772, Title: GroupMamba}
"""


@pytest.mark.slow
def test_mim_finds_tools_and_weights_of_a_wheel(source, tmp_path):
    pytest.importorskip("mim", reason="openmim is not installed")
    (tmp_path / "weights.pth").write_bytes(b"weights")
    serve = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    server = ThreadingHTTPServer(("127.0.0.1", 0), serve)
    Thread(target=server.serve_forever, daemon=True).start()
    (source / "mmvssm/.mim/model-index.yml").write_text(INDEX)
    metafile = METAFILE.replace("PORT", str(server.server_port))
    (source / "configs/metafile.yml").write_text(metafile)
    python, _ = install_beside_others(source, tmp_path, [])

    def mim(*arguments):
        done = subprocess.run(
            [python, "-m", "mim", *arguments],
            cwd=tmp_path,
            env={**without_path(), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    name = "groupmamba_maskrcnn_shapes"
    assert name in mim("search", "mmvssm", "--valid-config")
    mim("download", "mmvssm", "--config", name, "--dest", "downloads")
    assert (tmp_path / "downloads" / "weights.pth").read_bytes() == b"weights"
    assert "mmvssm.GroupMamba" in (tmp_path / "downloads" / f"{name}.py").read_text()
    assert "finished successfully" in mim(
        "run", "mmvssm", "get_flops", "GroupMamba", "--shape", "64"
    )
    few = ("prepare_data.num_train=4", "prepare_data.num_val=2", "prepare_data.image_size=64")
    options = ("--epochs", "1", "--work-dir", "run", "--cfg-options", *few)
    mim("train", "mmvssm", f"{name}.py", *options)
    assert (tmp_path / "run" / "last_checkpoint").exists()
    server.shutdown()


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
    assert always == ["filelock", "numpy", "torch"]
    assert not [line for line in lines if line.startswith("Requires-Dist: torch") and "=" in line]
    assert [line for line in lines if re.search(r"mmdet==.*extra == .openmmlab", line)]
    assert [line for line in lines if re.search(r"onedl-mmdetection==.*extra == .onedl", line)]


@pytest.mark.parametrize("version", ["2.4.1", "1.13.1+cu117"])
def test_a_torch_that_is_too_old_is_one_sentence(monkeypatch, version):
    import torch

    monkeypatch.setattr(torch, "__version__", version)
    spec = importlib.util.spec_from_file_location("again", ROOT / "mmvssm" / "__init__.py")
    said = rf"^mmvssm needs torch 2\.5 or later; {re.escape(version)} is installed here\."
    monkeypatch.setitem(sys.modules, "again", importlib.util.module_from_spec(spec))
    with pytest.raises(ImportError, match=said):
        spec.loader.exec_module(sys.modules["again"])


def test_version_licence_and_readme_are_the_package_s(source):
    from mmvssm.version import __version__

    lines = metadata_of(source)
    assert f"Version: {__version__}" in lines
    assert {"License: Apache-2.0", "License-File: LICENSE"} <= set(lines)
    assert "# MMVSSM" in lines


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
    names = ("packages", "mmcv_operators", "environment", "pretraining")
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


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_each_python_has_one_tested_version_of_each_package(tools, version):
    from packaging.requirements import Requirement

    lines = [Requirement(line) for line in tools["packages"].requirement_lines("versions")]
    here = [r.name for r in lines if not r.marker or r.marker.evaluate({"python_version": version})]
    assert sorted(here) == sorted({requirement.name for requirement in lines})


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


def test_exec_in_a_function_writes_where_locals_reads(tools, tmp_path):
    """mmcv's setup.py relies on this, but Python 3.13 no longer does it."""
    (tmp_path / "sitecustomize.py").write_text("print('of this machine')\n")
    code = (
        "def version():\n  exec('__version__ = 1')\n  return locals()['__version__']\n"
        "exec('top = 2')\nspace = {}\nexec('named = 3', space)\n"
        "print(version(), top, space['named'], 'named' in globals())"
    )
    paths = [str(tools["mmcv_operators"].EXEC_INTO_CALLER), str(tmp_path)]
    printed = subprocess.check_output(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        text=True,
    )
    assert printed.splitlines() == ["of this machine", "1 2 3 False"]


@pytest.mark.parametrize("version", [(3, 12, 1), (3, 13, 0)])
def test_builds_are_given_that_exec_from_python_3_13_on(tools, monkeypatch, version):
    operators = tools["mmcv_operators"]
    monkeypatch.setattr(sys, "version_info", version)
    monkeypatch.setenv("PYTHONPATH", "mine")
    paths = operators.build_environment()["PYTHONPATH"].split(os.pathsep)
    assert paths == [str(operators.EXEC_INTO_CALLER), "mine"][version < (3, 13) :]


@pytest.mark.parametrize(
    ("outcomes", "calls"),
    [
        ([True], ["--only-binary"]),  # a wheel that loads
        ([False, True], ["--only-binary", "compile"]),
    ],
)
def test_mmcv_is_compiled_only_where_no_wheel_fits(tools, monkeypatch, tmp_path, outcomes, calls):
    operators = tools["mmcv_operators"]
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(operators, "installed_versions", lambda: {"setuptools": "79.0.1"})
    monkeypatch.setattr(operators, "setuptools_major", lambda: 79)
    monkeypatch.setattr(operators, "install_missing", lambda *_: None)
    monkeypatch.setattr(operators, "build_environment", lambda: {"MAX_JOBS": "1"})
    monkeypatch.setattr(operators, "builds_for_gpu", lambda _: False)
    monkeypatch.setattr(operators, "python_says", lambda *_: (True, ""))
    monkeypatch.setattr(operators, "compiler_flags", lambda: ["-O2"])
    monkeypatch.setattr(operators, "torch_include_paths", list)
    made = []

    def pip_install(arguments, environment, log):
        log.write_text("")
        made.append("--only-binary" if "--only-binary" in arguments else "compile")
        assert ("CFLAGS" in environment) == (made[-1] == "compile")
        return outcomes[len(made) - 1]

    monkeypatch.setattr(operators, "pip_install_with_progress", pip_install)
    operators.install_mmcv("mmcv==2.1.0")
    assert made == calls


def test_flags_of_the_user_come_after_all_others_instead_of_replacing_them(tools, monkeypatch):
    operators = tools["mmcv_operators"]
    monkeypatch.setattr(
        sysconfig, "get_config_var", {"CFLAGS": "-DNDEBUG -g -fwrapv -O3 -Wall"}.get
    )
    monkeypatch.setattr(operators, "python_says", lambda _: (True, "1"))
    monkeypatch.setenv("CFLAGS", "-march=native '-DNAME=two words'")
    assert operators.compiler_flags() == [
        *("-DNDEBUG", "-fwrapv", "-Wall", "-D_GLIBCXX_USE_CXX11_ABI=1", "-O2", "-g0"),
        *("-march=native", "-DNAME=two words"),
    ]


@pytest.fixture
def header(tools, monkeypatch, tmp_path):
    """`precompiled_header` for a stand-in of torch's headers, and the environment's folder."""
    operators, folder = tools["mmcv_operators"], tmp_path / "environment"
    (tmp_path / "include" / "torch").mkdir(parents=True)
    (tmp_path / "include" / "torch" / "types.h").write_text(
        "#pragma once\nnamespace at { struct Tensor {}; }\n"
    )
    folder.mkdir()
    monkeypatch.setattr(sys, "prefix", str(folder))
    monkeypatch.setattr(operators, "compiler_flags", lambda: ["-O2", "-g0"])
    monkeypatch.setattr(operators, "torch_include_paths", lambda: [str(tmp_path / "include")])
    return operators.precompiled_header, folder


@pytest.mark.skipif(not shutil.which("g++"), reason="no GCC")
def test_files_are_compiled_with_the_precompiled_header(header, tmp_path):
    precompiled_header, folder = header
    source = tmp_path / "operator.cpp"
    source.write_text("#include <torch/types.h>\nat::Tensor f() { return {}; }\n")
    with precompiled_header({**os.environ, "CXX": "g++"}) as flags:
        assert flags[:2] == ["-O2", "-g0"]
        # As torch's build helper calls the compiler; -H marks a precompiled header that is used.
        command = ["g++", *flags, "-H", "-fPIC", f"-I{tmp_path / 'include'}", "-c", source]
        command += ["-o", tmp_path / "operator.o", "-std=c++17", "-DTORCH_EXTENSION_NAME=_ext"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert [line for line in done.stderr.splitlines() if re.match(r"! .*\.gch$", line)]
    assert not list(folder.iterdir())


@pytest.mark.parametrize("compiler", ["g++ -D__clang__", "/bin/true", "/no/such/compiler"])
def test_other_compilers_do_without_a_precompiled_header(header, capsys, compiler):
    precompiled_header, folder = header
    (folder / "mmcv-header").mkdir()  # of a set-up that was killed
    with precompiled_header({**os.environ, "CXX": compiler}) as flags:
        assert flags == ["-O2", "-g0"]
    assert "cannot use a precompiled header" in capsys.readouterr().out
    assert not list(folder.iterdir())


@pytest.mark.slow
def test_versions_are_said_in_one_line(tools, capsys):
    import torch

    tools["environment"].print_versions()
    (line,) = capsys.readouterr().out.splitlines()
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    assert line.startswith(f"Python {sys.version.split()[0]}; torch {torch.__version__}, ")
    assert f"built for {build}" in line
    assert "mmengine" in line


# --------------------------------------------------------------------------------------------------
# Pre-training: torchvision and the torch that is there
# --------------------------------------------------------------------------------------------------


class Environment:
    """Fake installed packages and fake output of pip and Python.

    Args:
        here: Versions by name.
        pair_works: Whether torchvision loads.
    """

    def __init__(self, tools, monkeypatch, here, pair_works):
        self.here, self.calls, self.pair_works = dict(here), [], pair_works
        module = tools["pretraining"]
        monkeypatch.setattr(module, "installed_versions", lambda: self.here)
        monkeypatch.setattr(tools["environment"], "installed_versions", lambda: self.here)
        monkeypatch.setattr(module, "install_missing", self.install_missing)
        monkeypatch.setattr(module, "python_says", self.python_says)
        monkeypatch.setattr(module.subprocess, "run", self.run)

    def install_missing(self, requirements, what):
        for line in requirements:
            name, _, version = line.partition("==")
            if name not in self.here:
                self.calls.append(f"install {name}")
                self.here[name] = version or "1.0"

    def python_says(self, code):
        broken = "torchvision" in code and not self.pair_works
        return not broken, "operator torchvision::nms does not exist" if broken else ""

    def run(self, command, check):
        assert command[3] == "uninstall" and check
        self.calls.append(f"uninstall {command[-1]}")


@pytest.mark.parametrize(
    ("here", "mmpretrain"),
    [
        ({"torch": "2.13.0", "mmcv": "2.1.0"}, "mmpretrain"),
        ({"torch": "2.13.0", "onedl-mmcv": "2.3.6"}, "onedl-mmpretrain"),
    ],
)
def test_pretraining_shares_an_environment_whose_torchvision_loads(
    tools, monkeypatch, capsys, here, mmpretrain
):
    environment = Environment(tools, monkeypatch, here, pair_works=True)
    tools["pretraining"].set_up()
    expected = ["install torchvision", f"install {mmpretrain}", "install timm"]
    assert environment.calls == expected
    assert f"{mmpretrain} 1." in capsys.readouterr().out


@pytest.mark.parametrize("was_here", [True, False])
def test_a_torchvision_that_does_not_load_asks_for_another_environment(
    tools, monkeypatch, was_here
):
    here = {
        "torch": "2.13.0+cpu",
        "mmcv": "2.1.0",
        **({"torchvision": "0.28.0"} if was_here else {}),
    }
    environment = Environment(tools, monkeypatch, here, pair_works=False)
    with pytest.raises(SystemExit) as caught:
        tools["pretraining"].set_up()
    assert caught.value.code == tools["pretraining"].NO_PAIR
    # What this script had not installed itself stays as it is.
    assert environment.calls == (
        [] if was_here else ["install torchvision", "uninstall torchvision"]
    )
    assert f"-eq {caught.value.code} ]" in (ROOT / "Makefile").read_text()


def test_a_matching_pair_is_the_one_of_the_index(tools, monkeypatch):
    """Not the CPU build of the same version, which pip prefers if it sees it: "+cpu" counts as newer."""
    from packaging.specifiers import SpecifierSet

    module, asked = tools["pretraining"], []

    class Done:
        def wait(self):
            return 0

    monkeypatch.setattr(module, "installed_versions", lambda: {})
    monkeypatch.setattr(
        module, "start_pip_install", lambda lines, unpinned: asked.extend(lines) or Done()
    )
    module.install_pair()
    torch, torchvision = asked
    assert torchvision == "torchvision"  # each names the one torch that it goes with
    versions = list(SpecifierSet(torch.removeprefix("torch")).filter(["2.13.0", "2.13.0+cpu"]))
    assert versions == ["2.13.0"]
