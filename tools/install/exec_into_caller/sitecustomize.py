"""For builds on Python 3.13 and later: ``exec(code)`` in a function writes where ``locals()`` reads.

The setup.py of mmcv 2.1.0, its last version that mmdet 3.3.0 accepts, reads its version by
``exec(code)`` and ``locals()['__version__']`` in one function. Since Python 3.13 (PEP 667) both get
a copy of the function's variables of their own, and the build ends in ``KeyError: '__version__'``.
With this file's folder in ``PYTHONPATH``, Python imports it as it starts, hence its name, and a
bare ``exec`` is given its caller's frame instead. That leaves the source as it was published,
where pip finds, checks and caches it as ever.
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

# A machine may have a sitecustomize of its own, which this one hides.
_here = os.path.dirname(os.path.abspath(__file__))
_hidden = PathFinder.find_spec(
    "sitecustomize", [path for path in sys.path if os.path.abspath(path) != _here]
)
if _hidden is not None:
    _hidden.loader.exec_module(module_from_spec(_hidden))
