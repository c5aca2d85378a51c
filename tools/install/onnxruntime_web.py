"""Fetch onnxruntime-web, which runs models in the web page, with npm: ``python onnxruntime_web.py FOLDER``.

We install nothing and run no script of the package: we fetch its archive, compare its digest with the known one, and
unpack the files that the page needs.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from packages import fail, print_line

# The newest release; the tests compare it with Python's onnxruntime 1.31, which has no release for browsers yet.
VERSION = "1.30.0"
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
# The build for CPUs with threads, which every browser runs; the builds with GPU support are larger.
FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
_MADE_OF = "version.txt"


def fetch(folder: Path) -> None:
    """Put the files into a folder, ``version.txt`` last.

    Args:
        folder: The folder; created if missing.

    Raises:
        SystemExit: npm is missing or failed, or the archive has another digest.
    """
    if _version_in(folder) == VERSION:
        return
    npm = shutil.which("npm")
    if npm is None:
        fail(
            "npm was not found, which fetches onnxruntime-web for the web page: install Node.js (on Debian and Ubuntu "
            "the packages nodejs and npm)"
        )
    print_line(f"onnxruntime-web {VERSION}: fetching it with npm (some tens of MB, once)")
    with tempfile.TemporaryDirectory() as download:
        result = subprocess.run(
            [npm, "pack", f"onnxruntime-web@{VERSION}", "--ignore-scripts"],
            cwd=download,
            capture_output=True,
            text=True,
        )
        archives = list(Path(download).glob("*.tgz"))
        if result.returncode != 0 or not archives:
            said = [line for line in result.stderr.splitlines() if "error" in line.lower()]
            fail(
                f"npm could not fetch onnxruntime-web {VERSION}: {(said or ['it says nothing'])[0]}"
            )
        _check(archives[0])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MADE_OF).unlink(missing_ok=True)
        with tarfile.open(archives[0]) as archive:
            for name in FILES:
                content = archive.extractfile(f"package/dist/{name}")
                with (folder / name).open("wb") as file:
                    shutil.copyfileobj(content, file)
    (folder / _MADE_OF).write_text(VERSION + "\n")


def _version_in(folder: Path) -> str:
    file = folder / _MADE_OF
    return file.read_text().strip() if file.is_file() else ""


def _check(archive: Path) -> None:
    digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if digest != SHA512:
        fail(
            f"the archive of onnxruntime-web {VERSION} that npm fetched is not the one that was published: its SHA-512 "
            f"is {digest}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0].partition(":")[0] + ".")
    parser.add_argument("folder", type=Path, help="where its files are put")
    fetch(parser.parse_args().folder)
