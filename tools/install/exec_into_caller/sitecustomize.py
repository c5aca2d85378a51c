"""Make ``exec(code)`` in a function write where ``locals()`` reads, for builds on Python 3.13 and later.

The setup.py of mmcv 2.1.0, its last version that mmdet 3.3.0 accepts, reads its version by ``exec(code)`` and
``locals()['__version__']`` in one function. Since Python 3.13 (PEP 667) each gets its own copy of the function's
variables, and the build raises ``KeyError: '__version__'``. Python imports a module of this name at its start if the
folder is in ``PYTHONPATH``; we then pass a bare ``exec`` its caller's frame. So pip can use the published source.
"""

import builtins
import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

_exec = builtins.exec


def _exec_into_caller(source, globals=None, locals=None, **closure):
    if globals is None and locals is None:
        caller = sys._getframe(1)
        globals, locals = caller.f_globals, caller.f_locals
    _exec(source, globals, locals, **closure)


builtins.exec = _exec_into_caller

# Also run the machine's own sitecustomize, which this one hides.
_here = os.path.dirname(os.path.abspath(__file__))
_hidden = PathFinder.find_spec(
    "sitecustomize", [path for path in sys.path if os.path.abspath(path) != _here]
)
if _hidden is not None:
    _hidden.loader.exec_module(module_from_spec(_hidden))
