"""Settings that nothing would read, said before anything is written.

mmengine takes any key from ``--cfg-options``; one that is misspelt is saved with the config and has
no effect. Here a new key has to be one that something takes: the runner, or the constructor of the
class that the ``type`` beside it names.
"""

import argparse
import difflib
import inspect
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Optional

import mmengine.registry
from mmengine.config import Config, DictAction
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import DefaultScope, Registry, init_default_scope
from mmengine.runner import Runner, set_random_seed
from torch.utils.data import DataLoader

from ..errors import UserError, user_mistakes

_CONFIGS = Path(__file__).resolve().parents[2] / "configs"
_DELETE = "_delete_"  # mmengine's word for: replace, do not merge
_PLACES_SHOWN = 3

# What mmengine and the tools read from the top of a config besides the runner's arguments.
_TOP_LEVEL = {
    *("runner_type", "model_wrapper_cfg", "sync_bn", "find_unused_parameters", "compile"),
    *("activation_checkpointing", "efficient_conv_bn_eval", "custom_imports", "work_dir"),
    *("prepare_data", "check_data", "tta_model", "tta_pipeline", "strategy"),
}
_DATALOADER = {"dataset", "num_batch_per_epoch"}
# The classes of parts whose ``type`` may be left out.
_IMPLIED = {
    "train_cfg": ("EpochBasedTrainLoop", "IterBasedTrainLoop"),
    "val_cfg": ("ValLoop",),
    "test_cfg": ("TestLoop",),
    "optim_wrapper": ("OptimWrapper",),
}
_PARAMWISE = "optim_wrapper.paramwise_cfg"
_FIXED = {
    "randomness": set(inspect.signature(set_random_seed).parameters)
    | {"seed", "diff_rank_seed", "deterministic"},
    "auto_scale_lr": {"enable", "base_batch_size"},
    "env_cfg": {"cudnn_benchmark", "mp_cfg", "dist_cfg", "resource_limit"},
    "env_cfg.mp_cfg": {"mp_start_method", "opencv_num_threads"},
    _PARAMWISE: {
        *("lr_mult", "decay_mult", "bias_lr_mult", "bias_decay_mult", "norm_decay_mult"),
        *("flat_decay_mult", "dwconv_decay_mult", "dcn_offset_lr_mult", "bypass_duplicate"),
        *("custom_keys", "num_layers", "decay_rate", "decay_type"),
    },
}
_FREE = ("paramwise_cfg.custom_keys", "env_cfg.dist_cfg", "backend_args")
# What mmengine takes out of a part's settings before it builds the class of its ``type``.
_TAKEN_OUT = {
    re.compile(r"(default|custom)_hooks\.\w+"): {"priority"},
    re.compile(r"param_scheduler\.\d+"): {"convert_to_iter_based"},
}
_OPTIM_WRAPPER = {"type", "constructor", "paramwise_cfg", "optimizer", "clip_grad"}
# The parts of a config that a registry builds, whatever class reads them. What a ``type`` elsewhere
# stands for, such as in a model's test_cfg or in clip_grad, only the class knows that is given it.
_BUILT = re.compile(
    "|".join(
        (
            r"(tta_)?model(\.module)?(\.(backbone|neck|data_preprocessor))?",
            r"(train|val|test)_dataloader\.(sampler|batch_sampler|collate_fn|worker_init_fn)",
            r"(train|val|test)_dataloader(\.dataset|\.datasets\.\d+)+(PIPELINE)?",
            r"tta_(PIPELINE)",
            r"(train|val|test)_cfg|strategy|log_processor|prepare_data",
            r"(val|test)_evaluator(\.\d+)?(\.metrics\.\d+)?",
            r"optim_wrapper(\.optimizer)?|param_scheduler(\.\d+)?",
            r"(default|custom)_hooks\.\w+|visualizer(\.vis_backends\.\d+)?",
        )
    ).replace("PIPELINE", r"\.?pipeline\.\d+(\.transforms(\.\d+)*)*")
)
_LACKING = re.compile(r"(\S+) is not in the \S+ registry")  # mmengine's words
_AT_LEAST = {"batch_size": 1, "num_workers": 0, "max_epochs": 1, "max_iters": 1, "val_interval": 1}
# Dicts, and lists with one in them, which mmengine would take apart at their commas; "{:05}.png" is none.
_DICT = re.compile(r"""[\[(](.*[\[(,])?(\{|dict\()|\{["'}]|dict\(""")


class SettingsAction(DictAction):
    """Reads ``--cfg-options``; what cannot be read is one sentence.

    Values are read as mmengine does, which drops spaces and makes lists of what has commas; but a path that exists
    stays as it is.
    """

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        """Read the options.

        Raises:
            UserError: If one has no ``=`` or brackets that do not match, or is a dict.
        """
        found = dict(getattr(namespace, self.dest, None) or {})
        for text in values or []:
            if "=" not in text or text.startswith("="):
                raise UserError(f"--cfg-options {text}: options are KEY=VALUE, without spaces")
            key, value = text.split("=", 1)
            if set(" ,") & set(value) and os.path.exists(value):
                found[key] = value
                continue
            if _DICT.match(value.replace(" ", "")):
                raise UserError(
                    f"--cfg-options {text}: a dict cannot be given here; set one of its values with {key}.NAME=VALUE, "
                    "or write it in a config file that has this one as its _base_"
                )
            one = argparse.Namespace()
            try:
                super().__call__(parser, one, [text], option_string)
            except (AssertionError, ValueError) as error:
                raise UserError(
                    f"--cfg-options {text}: the value cannot be read; lists are "
                    'key="[a,b]" or key=a,b, without spaces and with matching brackets'
                ) from error
            found.update(getattr(one, self.dest))
        setattr(namespace, self.dest, found)


def check_config_file(path: str) -> None:
    """Check that a config file exists.

    Raises:
        UserError: If not: the nearest name beside it or among the configs that come along.
    """
    if os.path.isfile(path):
        return
    folder = Path(path).parent
    known: dict[str, str] = {}
    for place in (_CONFIGS, Path("configs"), folder):
        if place.is_dir():
            known.update({file.stem: os.path.relpath(file) for file in place.glob("*.py")})
    near = difflib.get_close_matches(Path(path).stem, known, n=1)
    raise UserError(
        f"there is no config file {path}" + (f"; {known[near[0]]} is one" if near else "")
    )


def check_options(cfg: Config, options: dict[str, Any], amp: bool = False) -> list[str]:
    """Check that something reads every key of ``--cfg-options``.

    Args:
        cfg: The config before they are applied.
        options: Values by dotted key.
        amp: Whether mixed precision is turned on later, whose settings are then read, too.

    Returns:
        Keys that are taken although nothing says what reads them.

    Raises:
        UserError: On a key that nothing reads, with the nearest right one, or a value of the wrong kind.
    """
    init_default_scope(cfg.get("default_scope", "mmengine"))
    unsure = []
    of_amp = _arguments(AmpOptimWrapper)[0] if amp else ()
    taken = {f"optim_wrapper.{name}" for name in of_amp}
    for key, value in options.items():
        parts = key.split(".")
        node: Any = cfg._cfg_dict
        for depth, part in enumerate(parts):
            path = ".".join(parts[:depth])
            if part == _DELETE:
                break
            if isinstance(node, (list, tuple)):
                node = _item(node, part, path)
            elif not isinstance(node, dict):
                if f"{path}.{_DELETE}" in options:
                    break
                raise UserError(
                    f"--cfg-options {key}: {path} is {node!r} in the config, which has no settings; to "
                    f"put some in its place add {path}.{_DELETE}=True"
                )
            elif part in node:
                if depth == 0:
                    _check_read(part, cfg)
                node = node[part]
            elif (
                f"{path}.{_DELETE}" in options or path.endswith(_FREE) or f"{path}.{part}" in taken
            ):
                break
            else:
                if not _accepts(node, part, path, parts, cfg, options):
                    unsure.append(key)
                break
        else:
            _check_kind(key, node, value)
    return unsure


def _item(node: Sequence, part: str, path: str) -> Any:
    """The element of a list that a key names by its number."""
    if not len(node):
        raise UserError(f"--cfg-options {path}.{part}: {path} is an empty list; give all of it")
    if not part.isdigit() or int(part) >= len(node):
        raise UserError(
            f"--cfg-options {path}.{part}: {path} is a list of {len(node)}, whose elements are called "
            f"{path}.0 to {path}.{len(node) - 1}"
        )
    if isinstance(node, tuple):
        raise UserError(
            f"--cfg-options {path}.{part}: {path} is a tuple, {node!r:.80}; give all of it"
        )
    return node[int(part)]


def _check_read(name: str, cfg: Config) -> None:
    """Refuse a variable of the config file, which has done its work when the file was read."""
    if name in _top_level():
        return
    places = list(_places(cfg._cfg_dict, name))[:_PLACES_SHOWN]
    remedy = f"set {' or '.join(places)}" if places else "set what it was used for"
    raise UserError(
        f"--cfg-options {name} has no effect: it is a variable of the config file, used when that was "
        f"read; {remedy}"
    )


def _places(node: Any, name: str, path: str = "") -> Iterator[str]:
    """Where in the parts of a config that are read there is a setting called ``name``."""
    if isinstance(node, dict):
        for key, value in node.items():
            if not path and key not in _top_level():
                continue
            where = f"{path}.{key}" if path else key
            if key == name and path:
                yield where
            yield from _places(value, name, where)


def _top_level() -> set[str]:
    return set(inspect.signature(Runner.__init__).parameters) - {"self", "cfg"} | _TOP_LEVEL


def _accepts(
    node: dict, part: str, path: str, parts: Sequence[str], cfg: Config, options: dict[str, Any]
) -> bool:
    """Whether something is known to read a new setting ``part`` of ``path``.

    Raises:
        UserError: If it is known that nothing does.
    """
    known, open_ended = _known_settings(node, path, cfg, options)
    if part in known:
        return True
    candidates = {*known, *node} - {"self", "runner", "dataloader"} if path else known
    near = difflib.get_close_matches(part, sorted(candidates), n=1, cutoff=0.6)
    if open_ended:
        near = [name for name in sorted(candidates) if _is_slip(part, name)]
        if not near:
            return False
    where = f"{path}." if path else ""
    elsewhere = [place for place in _places(cfg._cfg_dict, part) if place.endswith(f".{part}")]
    right = f"{where}{near[0]}" if near else ""
    if not near and elsewhere:
        right = ".".join([elsewhere[0], *parts[len(where.split(".")) :]])
    hint = f"; the nearest is {right}" if right else f"; there are {_listed(candidates, where)}"
    raise UserError(f"--cfg-options {where}{part}: nothing reads a setting of that name{hint}")


def _is_slip(written: str, meant: str) -> bool:
    """Whether two names differ by a slip of the finger: a letter left out, doubled, added or exchanged.

    Names that belong side by side, such as stage1 and stage2 or img_path and img_path2, do not.
    """
    if len(written) == len(meant):
        apart = [i for i, pair in enumerate(zip(written, meant)) if pair[0] != pair[1]]
        exchanged = len(apart) == 2 and apart[1] == apart[0] + 1
        return (
            exchanged and written[apart[0]] + written[apart[1]] == meant[apart[1]] + meant[apart[0]]
        )
    short, long = sorted((written, meant), key=len)
    return len(long) == len(short) + 1 and any(
        long[:i] + long[i + 1 :] == short and not letter.isdigit() for i, letter in enumerate(long)
    )


def _listed(names: Iterable[str], where: str) -> str:
    return ", ".join(f"{where}{name}" for name in sorted(names)[:8]) + ", ..." * (
        len(set(names)) > 8
    )


def _known_settings(
    node: dict, path: str, cfg: Config, options: dict[str, Any]
) -> tuple[set[str], bool]:
    """The settings that a part of a config takes, and whether it may take others as well."""
    if not path:
        return _top_level(), False
    if path in _FIXED:
        # A constructor of the user's or the library's own may read more of paramwise_cfg.
        is_own = path == _PARAMWISE and "constructor" in (cfg.get("optim_wrapper") or {})
        return _FIXED[path], is_own or "optim_wrapper.constructor" in options
    if path.endswith("_dataloader") and "." not in path:
        return set(inspect.signature(DataLoader.__init__).parameters) - {
            "self"
        } | _DATALOADER, False
    known: set[str] = {"type"}
    if path == "optim_wrapper":
        known |= _OPTIM_WRAPPER
    for place, names in _TAKEN_OUT.items():
        if place.fullmatch(path):
            known |= names
    kind = options.get(f"{path}.type", node.get("type"))
    kinds = [kind] if kind is not None else list(_IMPLIED.get(path, ()))
    if path == "train_cfg" and kind is None:
        known |= {"by_epoch"}
    if not kinds:
        return set(node), True
    # Elsewhere the class around it may take out what is its own, as mmcv's norm_cfg.requires_grad.
    open_ended = not _BUILT.fullmatch(path)
    for kind in kinds:
        cls = find_type(kind)
        if cls is None:
            return known, True
        names, more = _arguments(cls)
        known |= names
        open_ended |= more
    return known, open_ended


def _arguments(cls: Any) -> tuple[set[str], bool]:
    """The names a constructor or function takes, and whether it takes any name."""
    if not inspect.isclass(cls):
        parameters = _parameters(cls)
        return {p.name for p in parameters}, any(p.kind is p.VAR_KEYWORD for p in parameters)
    names: set[str] = set()
    for base in cls.__mro__:
        if base is not object and "__init__" in vars(base):
            parameters = _parameters(base.__init__)
            names |= {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                return names - {"self"}, False
    return names - {"self"}, True


def _parameters(function: Any) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # built in
        return [inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)]


def _check_kind(key: str, old: Any, new: Any) -> None:
    """Refuse words in the place of a number or of true and false."""
    if isinstance(old, bool) and isinstance(new, str):
        raise UserError(
            f"--cfg-options {key}={new}: this is {old} in the config; give True or False"
        )
    # A loss scale may also be "dynamic".
    if type(old) is int and isinstance(new, str) and not key.endswith("loss_scale"):
        raise UserError(f"--cfg-options {key}={new}: this is {old} in the config; give a number")


def check_values(cfg: Config) -> None:
    """Check the numbers that would be found wrong only when training has been set up.

    Raises:
        UserError: On the first that is not a whole number, or too small, and on schedulers that end before they begin.
    """
    for part in ("train_dataloader", "val_dataloader", "test_dataloader", "train_cfg"):
        node = cfg.get(part) or {}
        for name, least in _AT_LEAST.items():
            value = node.get(name, least)
            # Of loops, mmengine takes whole numbers that are a quotient's, too.
            is_whole = type(value) is int or (
                part == "train_cfg" and isinstance(value, float) and value.is_integer()
            )
            if not is_whole or value < least:
                raise UserError(
                    f"{part}.{name} is {value!r}; it has to be a whole number from {least} on"
                )
    schedulers = cfg.get("param_scheduler")
    for index, scheduler in enumerate(schedulers if isinstance(schedulers, list) else []):
        settings = scheduler if isinstance(scheduler, dict) else {}
        begin, end = settings.get("begin", 0), settings.get("end")
        if isinstance(begin, int) and isinstance(end, int) and end <= begin:
            raise UserError(
                f"param_scheduler.{index} begins at {begin} and ends at {end}; the end has to be later"
            )


def check_types(cfg: Config) -> None:
    """Check that the parts of a config that registries build are of a registered ``type``.

    Raises:
        UserError: On the first that is not, with the nearest registered name.
    """
    for path, kind in _types({name: cfg[name] for name in cfg if name in _top_level()}):
        if _BUILT.fullmatch(path) and find_type(kind) is None:
            raise UserError(f"{path}.type={_unregistered(kind)}")


@contextmanager
def naming_the_nearest() -> Iterator[None]:
    """While something is built: a name that a registry lacks is told with the nearest that there is.

    Raises:
        KeyError: In place of mmengine's.
    """
    try:
        yield
    except KeyError as error:
        lacking = _LACKING.search(str(error.args[0] if error.args else ""))
        if not lacking:
            raise
        raise KeyError(f"type={_unregistered(lacking[1])}") from error


def _unregistered(kind: str) -> str:
    near = _nearest_type(kind)
    hint = f"; the nearest is {near!r}" if near else ""
    return (
        f"{kind!r} is not registered{hint}; a class of your own has to be imported by "
        "custom_imports in the config"
    )


def _nearest_type(kind: str) -> Optional[str]:
    """The registered name most like ``kind``: of its scope, if it has one, or of any."""
    names = _registered_names()
    scope, _, name = kind.rpartition(".")
    without_scope = {registered.rpartition(".")[2] for registered in names}
    if scope:
        near = difflib.get_close_matches(kind, [n for n in names if n.startswith(f"{scope}.")], n=1)
        if near:
            return near[0]
    near = difflib.get_close_matches(name, without_scope, n=1)
    return near[0] if near else None


def _types(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every ``type`` that is a name, with the part of the config that it is the type of."""
    if isinstance(node, dict):
        kind = node.get("type")
        if isinstance(kind, str):
            yield path, kind
        for key, value in node.items():
            # Albumentations' transforms, and what other classes call so, are none of mmcv's.
            if key != "transforms" or _takes_transforms(kind):
                yield from _types(value, f"{path}.{key}" if path else key)
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from _types(value, f"{path}.{index}")


def _takes_transforms(kind: Any) -> bool:
    """Whether the ``transforms`` of a class are registered ones, as those of mmcv's wrappers are."""
    return str(getattr(find_type(kind), "__module__", "")).startswith("mmcv.transforms.")


def _registries() -> list[Registry]:
    return [value for value in vars(mmengine.registry).values() if isinstance(value, Registry)]


def find_type(kind: Any) -> Optional[Any]:
    """The class or function that ``type=kind`` stands for in the default scope, or None."""
    if not isinstance(kind, str):
        return kind
    scope = DefaultScope.get_current_instance()
    if scope is not None:
        with user_mistakes(f"cannot use default_scope={scope.scope_name!r}"):
            import_module(f"{scope.scope_name}.registry")  # which is how children come to be known
    for registry in _registries():
        # As building does, which also says something for each registry that the scope lacks.
        scoped = registry.children.get(scope.scope_name) if scope else None
        found = (registry if scoped is None else scoped).get(kind)
        if found is not None:
            return found
    return None


def _registered_names() -> set[str]:
    """All registered names, those of other scopes than mmengine's with the scope before them."""
    names: set[str] = set()
    pending = [(registry, "") for registry in _registries()]
    while pending:
        registry, scope = pending.pop()
        names |= {f"{scope}{name}" for name in registry.module_dict}
        pending += [(child, f"{child.scope}.") for child in registry.children.values()]
    return names
