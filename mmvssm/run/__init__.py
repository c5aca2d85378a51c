"""Train, test, predict and export: our tools' code around mmengine. No other folder imports it.

Importing it makes every checkpoint of this process load with ``weights_only=True`` and without the config text that
mmengine and the libraries' inferencers would execute; see :func:`mmvssm.safe_checkpoint.guard_checkpoint_loader`. A
published model's file loads under our names, training settings beside its weights or not. YAML files with tags that run
code are refused.
"""

from ..models.weights import with_published
from ..safe_checkpoint import guard_checkpoint_loader, register_safe_globals
from . import hooks, safe_yaml

register_safe_globals()
guard_checkpoint_loader(with_published)

__all__ = ["hooks", "safe_yaml"]
