"""The choice of tests by ``make test-changed``."""

import functools

import changed_tests
import pytest

FILES = {
    str(path.relative_to(changed_tests.REPOSITORY))
    for name in ("mmvssm", "tests", "tools", "configs", "docs", "web")
    for path in (changed_tests.REPOSITORY / name).rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
} | {"README.md", "setup.py"}


@pytest.fixture(autouse=True)
def each_set_of_files_is_read_once(monkeypatch):
    monkeypatch.setattr(changed_tests, "users_of", lambda files, root: users_of(frozenset(files)))


users_of = functools.cache(changed_tests.users_of)


@pytest.mark.parametrize(
    ("changed", "run", "not_run"),
    [
        # Imported by the tests, by what they import, or by a fixture that they use.
        ("mmvssm/analysis/flops.py", "core/models/test_plain_mamba.py", "core/test_files.py"),
        ("mmvssm/ops/backend.py", "core/models/test_group_mamba.py", "core/test_files.py"),
        ("mmvssm/run/train.py", "run/test_errors.py", "core/models/test_group_mamba.py"),
        ("tests/support/browser.py", "whole/web/test_page.py", "core/test_configs.py"),
        # Named.
        ("README.md", "core/test_docs.py", "core/models/test_group_mamba.py"),
        ("configs/groupmamba_upernet_shapes.py", "core/test_configs.py", "core/test_files.py"),
        ("mmvssm/ops/selective_scan/csrc/scan_cpu.cpp", "core/ops/test_scan_cpu.py", "core/test_files.py"),
        # The laboratory of GPU kernels runs for these alone.
        ("mmvssm/ops/selective_scan/triton_launch.py", "lab/test_scan_emulated.py", "core/test_files.py"),
        ("mmvssm/ops/selective_scan/naive.py", "core/ops/test_selective_scan.py", "lab/test_scan_emulated.py"),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_files_that_a_change_reaches(changed, run, not_run):
    assert changed in FILES
    tests = changed_tests.tests_of({changed}, FILES)
    assert f"tests/{run}" in tests
    assert f"tests/{not_run}" not in tests


def test_requirements_reach_every_test():
    tests = changed_tests.tests_of({"requirements/versions.txt"}, FILES)
    assert {"tests/core/test_files.py", "tests/lab/test_scan_emulated.py"} <= set(tests)
    assert changed_tests.tests_of(set(), FILES) == []


@pytest.mark.slow
def test_a_deleted_file_reaches_those_that_still_name_it():
    tests = changed_tests.tests_of({"mmvssm/files.py"}, FILES - {"mmvssm/files.py"})
    assert "tests/core/test_files.py" in tests
