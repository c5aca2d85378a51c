"""MMVSSM: state-space (Mamba) backbones for dense prediction on OpenMMLab.

Importing this package registers its models, hooks and data generators under the scope ``mmvssm``. It needs torch,
mmengine and mmcv; mmdet and mmseg only for the configs and tools that use them.
"""

from importlib.util import find_spec

for _package, _names in {
    "torch": "torch",
    "mmengine": "mmengine (or its fork onedl-mmengine)",
    "mmcv": "mmcv (or its fork onedl-mmcv)",
}.items():
    if find_spec(_package) is None:
        raise ImportError(f"mmvssm needs {_names}, which is not installed here; see the README.")

from . import datasets, engine, models, ops  # noqa: E402
from .version import __version__  # noqa: E402

__all__ = ["__version__", "datasets", "engine", "models", "ops"]
