"""Fetching onnxruntime-web, with a stand-in for npm."""

import base64
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

INSTALL = Path(__file__).resolve().parents[2] / "tools" / "install"
PACK = """#!/bin/sh
mkdir -p package/dist
for name in ort.wasm.min.mjs ort-wasm-simd-threaded.mjs ort-wasm-simd-threaded.wasm other; do
    echo $name > package/dist/$name
done
tar --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 -cf - package | gzip -n > onnxruntime-web.tgz
"""


@pytest.fixture
def fetch(tmp_path, monkeypatch):
    """Runs the script with such an npm."""
    (tmp_path / "bin").mkdir()
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"

    def call(npm, sha512=None):
        if npm:
            (tmp_path / "bin" / "npm").write_text(npm)
            (tmp_path / "bin" / "npm").chmod(0o755)
        change = f"onnxruntime_web.SHA512 = {sha512!r};" if sha512 else ""
        code = f"import sys, pathlib, onnxruntime_web; {change} onnxruntime_web.fetch(pathlib.Path('out'))"
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={"PYTHONPATH": str(INSTALL), "PATH": path if npm else str(tmp_path / "bin")},
            capture_output=True,
            text=True,
        )

    return call


def digest_of(npm, folder):
    subprocess.run(["sh", "-c", npm], cwd=folder, check=True)
    content = (folder / "onnxruntime-web.tgz").read_bytes()
    return base64.b64encode(hashlib.sha512(content).digest()).decode()


def test_takes_out_what_the_page_needs_once(fetch, tmp_path):
    (tmp_path / "other").mkdir()
    digest = digest_of(PACK, tmp_path / "other")
    result = fetch(PACK, digest)
    assert result.returncode == 0, result.stderr
    files = {path.name: path.read_text().strip() for path in (tmp_path / "out").iterdir()}
    version = files.pop("version.txt")
    assert set(files) == {
        *("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
    }
    assert all(name == content for name, content in files.items())
    assert f"onnxruntime-web {version}: fetching" in result.stdout
    again = fetch("#!/bin/sh\nexit 1\n", digest)
    assert (again.returncode, again.stdout) == (0, "")


@pytest.mark.parametrize(
    ("npm", "words"),
    [
        ("", "npm was not found, which fetches onnxruntime-web for the web page: install Node.js"),
        ("#!/bin/sh\necho 'npm error code ENOTFOUND' >&2; exit 1\n", "npm error code ENOTFOUND"),
        ("#!/bin/sh\nexit 0\n", "npm could not fetch onnxruntime-web"),
        (PACK, "is not the one that was published: its SHA-512 is"),
    ],
    ids=["missing", "no network", "silent", "another archive"],
)
def test_one_sentence_and_nothing_written(fetch, tmp_path, npm, words):
    result = fetch(npm)
    assert result.returncode == 1 and words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--help"], []], ids=["help", "no folder"])
def test_usage_fetches_nothing(tmp_path, arguments):
    (tmp_path / "npm").write_text("#!/bin/sh\ntouch called\n")
    (tmp_path / "npm").chmod(0o755)
    script = [sys.executable, INSTALL / "onnxruntime_web.py", *arguments]
    env = {"PATH": str(tmp_path)}
    result = subprocess.run(script, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "usage" in result.stdout + result.stderr and len(list(tmp_path.iterdir())) == 1
    assert (result.returncode == 0) == bool(arguments)
