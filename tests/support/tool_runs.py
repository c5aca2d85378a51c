"""Call the tools in this process, also with inputs that they reject."""

import io
import logging
import os
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType
from unittest import mock

import pytest
import torch
from mmengine.visualization import Visualizer

from mmvssm.errors import HINT, run_tool
from mmvssm.run.arguments import predict_parser, test_parser, train_parser
from mmvssm.run.predict import predict
from mmvssm.run.test import test
from mmvssm.run.train import train


def load_tool(name: str) -> ModuleType:
    """A file of ``tools`` as a module; the folder itself, which has a ``test.py``, stays off ``sys.path``."""
    spec = spec_from_file_location(name, Path(__file__).parents[2] / "tools" / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_BROWSE, _PLOT = load_tool("browse_dataset"), load_tool("plot_log")
TOOLS = {
    "train.py": (train, train_parser),
    "test.py": (test, test_parser),
    "browse_dataset.py": (_BROWSE.browse, _BROWSE.browse_parser),
    "plot_log.py": (_PLOT.plot_log, _PLOT.plot_log_parser),
    "predict.py": (predict, predict_parser),
}


def call(tool, *arguments):
    """Run a tool with command-line arguments."""
    _forget_visualizers(Visualizer)
    main, parser = TOOLS[tool]
    run_tool(lambda: main(parser().parse_args(list(map(str, arguments)))))


def run_here(file, *arguments):
    """Run a program in this process, which has imported already what a new one takes seconds for.

    Returns:
        What ``subprocess.run`` would.
    """
    _forget_visualizers(Visualizer)
    command, code = [str(file), *map(str, arguments)], 0
    out, err = io.StringIO(), io.StringIO()
    surroundings = (mock.patch.object(sys, "argv", command), mock.patch.dict(os.environ))
    with surroundings[0], surroundings[1], redirect_stdout(out), redirect_stderr(err):
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
            if isinstance(code, str):
                print(code, file=err)
                code = 1
    return CompletedProcess(command, code, out.getvalue(), err.getvalue())


def _forget_visualizers(kind):
    """One of the same name, which two runs in one second share, would write where the earlier run did."""
    kind._instance_dict.clear()
    for special in kind.__subclasses__():
        _forget_visualizers(special)


def files_in(folder):
    """Every file below ``folder`` with its content, every folder with None."""
    return {path: path.read_bytes() if path.is_file() else None for path in Path(folder).rglob("*")}


def undo_what_tools_set(monkeypatch):
    """Restore after the test what running a tool in this process changes for good."""
    # mmengine's logger keeps the stream that an earlier test's capture has closed.
    monkeypatch.setattr(logging, "raiseExceptions", False)
    for variable in ("LOCAL_RANK", "TORCH_FORCE_WEIGHTS_ONLY_LOAD"):
        monkeypatch.setenv(variable, "0")
    monkeypatch.delenv("MMVSSM_TRACEBACK", raising=False)
    leave_configs_as_they_are(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def leave_configs_as_they_are(monkeypatch):
    """Do not lay out the text of configs, which takes longer than a few iterations."""
    for place in ("mmengine.config.config", "yapf.yapflib.yapf_api"):  # upstream's, and the forks'
        monkeypatch.setattr(f"{place}.FormatCode", lambda text, **_: (text, True), raising=False)


def sentence_of_refusal(capsys, tool, *arguments):
    """Run a tool that must refuse and leave every file in the working directory as it is.

    Returns:
        Its one sentence.
    """
    before = files_in(".")
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        call(tool, *arguments)
    assert caught.value.code == 1
    sentence, *rest = capsys.readouterr().err.splitlines()
    assert sentence.startswith("error: ") and rest == [HINT]
    assert files_in(".") == before
    return sentence
