"""Blueprints: a model and its test pipeline as text in a checkpoint, from which the model is built again.

A checkpoint may come from anyone, so its blueprint is data: JSON with names from registries, numbers and words. We
evaluate and import nothing that it names. mmengine, mmcv and the libraries build from a config by more than registries:
they import dotted types, ``eval`` some words, and open files. :func:`check_blueprint` therefore refuses all of a
blueprint that is not a registered name, a plain word or a number of reasonable size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from importlib import import_module
from math import prod
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, TASK_UTILS, TRANSFORMS, DefaultScope, Registry
from torch import Tensor
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode

from ..errors import UserError, brief, one_line, shown

BLUEPRINT = "mmvssm_blueprint"
"""Key of the blueprint in a checkpoint's ``meta``."""

SCOPES = ("mmdet", "mmseg", "mmpretrain")
_SCOPES_OF_TYPES = (*SCOPES, "mmengine", "mmcv", "mmvssm")
# Settings that only training reads, though a constructor may require them.
_AT_TEST = {"train_cfg": None, "batch_augments": None, "teacher": {}}
# Keys, and parts of keys, whose values the libraries would open or download; a blueprint is written without them.
_OF_FILES = {"init_cfg", "backend_args", "load_from", "name"}
_WORDS_OF_FILES = {
    *(
        "path",
        "file",
        "filename",
        "ckpt",
        "checkpoint",
        "config",
        "url",
        "dir",
        "root",
        "pretrained",
    ),
    *("remote", "tokenizer"),
}
_KEY = re.compile(r"[A-Za-z]\w*")
_WORD = re.compile(r"[\w +-]{0,64}")  # no dot, slash or bracket: neither a file nor code
_PICKLE = re.compile(r".*(pkl|pickle)")  # which mmengine's loader takes for a suffix
_TYPE = re.compile(r"(?:(\w+)\.)?([\w/]+)")
_OF_MMCV_OPS = ("nms", "soft_nms", "RoIAlign", "RoIPool")  # which are not registered
_PLACES_OF_MMCV_OPS = (".nms", ".roi_layer")
_LONGEST, _DEEPEST, _MOST_VALUES = 1_000_000, 40, 50_000
_LARGEST = 1 << 17  # of a size or count
_INFINITY = 1e8  # the libraries' own, a float; no float can be a size or count
_LARGEST_SIDE = 1 << 14  # pixels, in what prepares images
_SPARE = 50_000_000  # numbers that a model may compute with besides its weights while it is built
_TUPLE, _PAIRS = "()", "{}"


# ---------------------------------------------------------------------------------------- writing


def write_blueprint(cfg: Config) -> str:
    """Write what rebuilds a config's model for testing.

    Args:
        cfg: A detection, segmentation or classification config; it is not changed.

    Returns:
        JSON. Settings for training and names of files are left out.

    Raises:
        TypeError: If the config holds a value that is neither text, number nor container, such as a class.
    """
    model = dict(cfg.model)
    if cfg.get("data_preprocessor"):  # as mmengine's runner does
        model.setdefault("data_preprocessor", cfg.data_preprocessor)
    loader = cfg.get("test_dataloader") or cfg.get("val_dataloader") or {}
    dataset = loader.get("dataset") or {}
    while "pipeline" not in dataset and (dataset.get("dataset") or dataset.get("datasets")):
        dataset = dataset.get("dataset") or dataset["datasets"][0]
    training = cfg.get("train_cfg") or {}
    return json.dumps(
        _encode(
            {
                "default_scope": cfg.get("default_scope"),
                "model": model,
                "pipeline": dataset.get("pipeline", []),
                "schedule": {k: training[k] for k in ("max_epochs", "max_iters") if k in training},
                "batch_size": (cfg.get("train_dataloader") or {}).get("batch_size"),
            }
        )
    )


def _encode(value: Any) -> Any:
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {k: _encode(_AT_TEST.get(k, v)) for k, v in value.items() if not _names_files(k)}
        return {_PAIRS: [[_encode(k), _encode(v)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_encode(item) for item in value]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be written as text: {brief(value)}")


def _names_files(key: str) -> bool:
    words = key.lower().replace("drop_path", "").split("_")
    return key in _OF_FILES or not _WORDS_OF_FILES.isdisjoint(words)


# ---------------------------------------------------------------------------------------- reading


def read_blueprint(text: Any) -> dict[str, Any]:
    """Read a blueprint as plain data; nothing of it was checked then but its size.

    Raises:
        UserError: If it is no blueprint, or too large or too deep.
    """
    if not isinstance(text, str) or len(text) > _LONGEST:
        raise UserError("it is no text of reasonable length")
    try:
        found = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"it is not readable as JSON ({brief(one_line(error))})") from error
    count = iter(range(_MOST_VALUES))
    content = _decode(found, _DEEPEST, count)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError("it describes no model")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _decode(value: Any, depth: int, count: Iterator[int]) -> Any:
    if not depth or next(count, None) is None:
        raise UserError("it is nested too deep or holds too much")
    if isinstance(value, list):
        return [_decode(item, depth - 1, count) for item in value]
    if not isinstance(value, dict):
        return value
    (only,) = value if len(value) == 1 else ("",)
    items = value.get(only)
    if only == _TUPLE and isinstance(items, list):
        return tuple(_decode(items, depth, count))
    if only == _PAIRS and isinstance(items, list):
        if not all(isinstance(x, list) and len(x) == 2 and type(x[0]) in (str, int) for x in items):
            raise UserError("it holds pairs that are none")
        return {key: _decode(item, depth - 1, count) for key, item in items}
    return {key: _decode(item, depth - 1, count) for key, item in value.items()}


# --------------------------------------------------------------------------------------- checking


def check_scope(blueprint: Mapping[str, Any]) -> str:
    """Return a blueprint's library, one of :data:`SCOPES`, with all its types registered.

    Raises:
        UserError: If it names another, or the library does not load.
    """
    scope = blueprint.get("default_scope")
    if scope not in SCOPES:
        raise UserError(f"its default_scope is {brief(scope)}, not {' or '.join(SCOPES)}")
    register_library(scope)
    return scope


def check_blueprint(blueprint: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
    """Check that building from a blueprint runs no foreign code, opens no file and takes little memory.

    Args:
        blueprint: From :func:`read_blueprint`.
        weights: The tensors in the file, by name.

    Raises:
        UserError: If it holds anything else than registered types, plain words and numbers of reasonable size; or if
            a weight of the model that it describes is not in the file, with its shape.
    """
    scope = check_scope(blueprint)
    for registry in (MODELS, TASK_UTILS, TRANSFORMS):
        for name in (scope, "mmvssm"):
            if name in registry.children:
                registry.children[name].import_from_location()
    _check_part(blueprint["model"], "model", scope, (MODELS, TASK_UTILS), _LARGEST)
    pipeline = blueprint.get("pipeline")
    if not isinstance(pipeline, list) or not all(isinstance(step, dict) for step in pipeline):
        raise UserError("its pipeline is no list of transforms")
    _check_part(pipeline, "pipeline", scope, (TRANSFORMS,), _LARGEST_SIDE)
    _check_weights(blueprint["model"], scope, weights)


def _check_part(
    node: Any, path: str, scope: str, registries: tuple[Registry, ...], largest: int
) -> None:
    if isinstance(node, dict):
        scope = node.get("_scope_", scope)
        if scope not in _SCOPES_OF_TYPES:
            raise UserError(f"{path} is of the scope {brief(scope)}, which we do not know")
        for key, value in node.items():
            where = f"{path}.{brief(key)}"
            if key == "type":
                of_mmcv = value in _OF_MMCV_OPS and path.endswith(_PLACES_OF_MMCV_OPS)
                if not of_mmcv and not _is_registered(value, scope, registries):
                    raise UserError(f"{path}.type is {brief(value)}, which is not registered")
            elif isinstance(key, str) and key != "_scope_":
                if not _KEY.fullmatch(key) or "__" in key or _names_files(key):
                    raise UserError(f"it sets {where}, which a model from a checkpoint may not")
                _check_part(
                    value,
                    where,
                    scope,
                    registries,
                    _LARGEST_SIDE if key == "data_preprocessor" else largest,
                )
            else:
                _check_part(value, where, scope, registries, largest)
    elif isinstance(node, (list, tuple)):
        for index, item in enumerate(node):
            _check_part(item, f"{path}.{index}", scope, registries, largest)
    elif isinstance(node, str):
        if not _WORD.fullmatch(node) or "__" in node or _PICKLE.fullmatch(node):
            raise UserError(f"{path} is {brief(node)!r}, which is not a plain word")
    elif isinstance(node, (int, float)) and not abs(node) <= _limit(node, largest):
        raise UserError(f"{path} is {brief(node)}, which is too large")


def _limit(number: float, largest: int) -> float:
    return _INFINITY if isinstance(number, float) and largest == _LARGEST else largest


def _is_registered(name: Any, scope: str, registries: tuple[Registry, ...]) -> bool:
    """Whether a type is in a registry itself; ``Registry.get`` would also import what a dotted name says."""
    found = _TYPE.fullmatch(name) if isinstance(name, str) else None
    if found is None or (found[1] or scope) not in _SCOPES_OF_TYPES:
        return False
    child = found[1] or scope
    tables = [r.children[child] for r in registries if child in r.children]
    if found[1] in (None, "mmengine", "mmcv"):
        tables += registries
    return any(found[2] in table.module_dict for table in tables)


def _check_weights(model: dict[str, Any], scope: str, weights: Mapping[str, Any]) -> None:
    """Build a model without memory, and compare its weights with those of a file."""
    shapes = {k: tuple(v.shape) for k, v in weights.items() if isinstance(v, Tensor)}
    largest = _SPARE + 2 * sum(map(prod, shapes.values()))
    try:
        with ExitStack() as stack:
            stack.enter_context(DefaultScope.overwrite_default_scope(scope))
            stack.enter_context(torch.device("meta"))
            stack.enter_context(_Limits(largest))
            stack.enter_context(_limited_parts(1_000 + 20 * len(shapes)))
            built = MODELS.build(ConfigDict(deepcopy(model)))
    except Exception as error:  # a constructor may raise anything
        raise UserError(
            f"the model that it describes cannot be built ({one_line(error):.200})"
        ) from error
    own = {k: v.shape for k, v in built.state_dict().items() if "num_batches_tracked" not in k}
    wrong = [name for name, shape in own.items() if shapes.get(name) != tuple(shape)]
    if wrong:
        raise UserError(
            f"{len(wrong)} weights of the model that it describes are not in the file, or of another shape "
            f"({shown(wrong)})"
        )


class _Limits(TorchFunctionMode):
    """Refuses tensors of more than ``largest`` numbers; on the meta device they take no memory yet."""

    def __init__(self, largest: int) -> None:
        self._largest = largest

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.linspace and "device" not in kwargs:
            # Backbones read their rates of stochastic depth from it, number by number.
            steps = kwargs["steps"] if "steps" in kwargs else args[2]
            if steps > 10_000:
                raise UserError(f"it has {steps} layers")
            kwargs["device"] = "cpu"
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.numel() > self._largest:
            raise UserError(
                f"a tensor of the shape {tuple(result.shape)} is far larger than the file"
            )
        return result


@contextmanager
def _limited_parts(most: int) -> Iterator[None]:
    """Refuse, inside the context, more than ``most`` modules, parameters and buffers."""
    count = iter(range(most))

    def check(*_: Any) -> None:
        if next(count, None) is None:
            raise UserError(f"it has more than {most} parts, and the file far fewer weights")

    handles = [
        getattr(torch_module, f"register_module_{part}_registration_hook")(check)
        for part in ("module", "parameter", "buffer")
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def register_library(scope: str) -> None:
    """Import all of a library's registered types.

    Args:
        scope: One of :data:`SCOPES`.

    Raises:
        UserError: If the library is not installed or does not load.
    """
    try:
        import_module(f"{scope}.utils").register_all_modules(init_default_scope=False)
    except ImportError as error:
        raise UserError(f"this model needs {scope}, which does not load here ({error})") from error
