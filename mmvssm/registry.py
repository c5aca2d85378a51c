"""Registries of the ``mmvssm`` scope.

Each is a child of mmengine's root registry of the same name, so ``type='mmvssm.GroupMamba'`` resolves in the config of
any mm* project after ``custom_imports = dict(imports=['mmvssm'])``.
"""

from mmengine import registry as root

MODELS = root.Registry("model", parent=root.MODELS, scope="mmvssm", locations=["mmvssm.models"])
HOOKS = root.Registry(
    "hook", parent=root.HOOKS, scope="mmvssm", locations=["mmvssm.models", "mmvssm.run.hooks"]
)
DATA_SAMPLERS = root.Registry(
    "data sampler", parent=root.DATA_SAMPLERS, scope="mmvssm", locations=["mmvssm.run.hooks"]
)
FUNCTIONS = root.Registry(
    "function", parent=root.FUNCTIONS, scope="mmvssm", locations=["mmvssm.run.hooks"]
)
LOOPS = root.Registry("loop", parent=root.LOOPS, scope="mmvssm", locations=["mmvssm.run.hooks"])
OPTIM_WRAPPERS = root.Registry(
    "optimizer wrapper", parent=root.OPTIM_WRAPPERS, scope="mmvssm", locations=["mmvssm.run.hooks"]
)
OPTIM_WRAPPER_CONSTRUCTORS = root.Registry(
    "optimizer wrapper constructor",
    parent=root.OPTIM_WRAPPER_CONSTRUCTORS,
    scope="mmvssm",
    locations=["mmvssm.models"],
)
TASK_UTILS = root.Registry(
    "task util", parent=root.TASK_UTILS, scope="mmvssm", locations=["mmvssm.datasets"]
)
