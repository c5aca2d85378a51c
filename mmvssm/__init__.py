"""MMVSSM: state-space (Mamba) backbones for dense prediction on OpenMMLab.

Importing this package registers its models and data generators under the scope ``mmvssm``, lets configs inherit ours as
``mmvssm::name.py`` and name published weights as ``mmvssm://name``, and changes nothing else. It needs torch, mmengine
and mmcv; mmdet and mmseg only for the configs and tools that use them. Without mmengine or mmcv, ``import mmvssm.ops``
still works: operators need torch alone. ``mmvssm.run``, what our tools do around mmengine, is imported by them, and by
configs that name one of its hooks.
"""

import warnings
from importlib import import_module
from importlib.util import find_spec

from .version import __version__

if find_spec("torch") is None:
    raise ImportError("mmvssm needs torch, which is not installed; see the README.")

import torch

# The first version that reads operators' signatures from string annotations and lets a context manager extend the
# safe loading of checkpoints.
_OLDEST_TORCH = (2, 5)
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _OLDEST_TORCH:
    raise ImportError(
        f"mmvssm needs torch {'.'.join(map(str, _OLDEST_TORCH))} or later; {torch.__version__} is installed "
        "here. Install a later one, and mmcv once more, whose operators are compiled for one torch."
    )

_ROOMS = ("datasets", "models", "ops")
_MISSING = " and ".join(
    f"{name} (or its fork onedl-{name})" for name in ("mmengine", "mmcv") if not find_spec(name)
)

__all__ = ["__version__", *_ROOMS]

if not _MISSING:
    for _name in _ROOMS:
        import_module(f".{_name}", __name__)
    import_module(".packaged_configs", __name__).register_configs()
    import_module(".models.weights", __name__).register_scheme()
    get_model = import_module(".models.get_model", __name__).get_model
    list_models = import_module(".models.weights_table", __name__).list_models
    __all__ += ["get_model", "list_models", "load"]
elif find_spec("mmengine"):
    # Warn, since a config may import this package for its models.
    warnings.warn(
        f"mmvssm: {_MISSING} is not installed here, so no model was registered; see the README.",
        stacklevel=2,
    )


def __getattr__(name: str) -> object:
    if name == "load" and not _MISSING:  # late, since mmvssm.run changes how checkpoints load
        return import_module(".run.prediction.loaded", __name__).load
    if name not in _ROOMS:
        raise AttributeError(f"module 'mmvssm' has no attribute {name!r}")
    if name != "ops" and _MISSING:
        raise ImportError(
            f"mmvssm.{name} needs {_MISSING}, which is not installed here; see the README."
        )
    return import_module(f".{name}", __name__)
