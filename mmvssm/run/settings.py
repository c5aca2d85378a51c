"""Check settings before a run starts: ``--cfg-options``, registered types, and values that cannot work.

mmengine accepts any key in ``--cfg-options``; a misspelt one is saved with the config and has no effect. We reject a
new key that the constructor does not accept, and report every other new key.
"""

import argparse
import ast
import difflib
import inspect
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Optional

import mmengine.registry
from mmengine.config import Config, DictAction
from mmengine.registry import DefaultScope, Registry, init_default_scope
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from ..errors import UserError, brief, shown, user_mistakes

_CONFIGS = Path(__file__).resolve().parents[2] / "configs"
_DELETE = "_delete_"  # mmengine's key to replace a dict instead of merging into it
_MOST_COMMON = 16  # a config has larger numbers in one meaning only
_MOST_PLACES = 10  # settings that a message lists
_SLIP = 0.85  # names at least this similar count as typos; difflib suggests from 0.6 on

# Top-level names that mmengine or our tools read, besides the arguments of Runner. All other names are variables, which
# the config file has used already.
_READ = {
    *("runner_type", "model_wrapper_cfg", "sync_bn", "find_unused_parameters", "compile"),
    *("activation_checkpointing", "efficient_conv_bn_eval", "custom_imports"),
    *("prepare_data", "check_data", "tta_model", "tta_pipeline"),
}
# mmengine removes these keys before it calls a part's constructor.
_TAKEN_OUT = {
    *("type", "priority", "convert_to_iter_based", "constructor", "paramwise_cfg"),
    *("num_batch_per_epoch",),
}
# Parts of a config that a registry builds directly. Elsewhere, as in a model's test_cfg or clip_grad, only the class
# that receives a ``type`` knows its meaning and the settings that it removes.
_BUILT = re.compile(
    "|".join(
        (
            r"(tta_)?model(\.module)?(\.(backbone|neck|data_preprocessor))?",
            r"(train|val|test)_dataloader(\.(sampler|batch_sampler|collate_fn|worker_init_fn))?",
            r"(train|val|test)_dataloader(\.dataset|\.datasets\.\d+)+(PIPELINE)?",
            r"tta_(PIPELINE)",
            r"(train|val|test)_cfg|log_processor|prepare_data",
            r"(val|test)_evaluator(\.\d+)?(\.metrics\.\d+)?",
            r"optim_wrapper(\.optimizer)?|param_scheduler(\.\d+)?",
            r"(default|custom)_hooks\.\w+|visualizer(\.vis_backends\.\d+)?",
        )
    ).replace("PIPELINE", r"\.?pipeline\.\d+(\.transforms(\.\d+)*)*")
)
_UNREGISTERED = re.compile(r"(\S+) is not in the \S+ registry")  # mmengine's words
_AT_LEAST = {"batch_size": 1, "num_workers": 0, "max_epochs": 1, "max_iters": 1, "val_interval": 1}
# Optimizers that mmengine registers if their package is installed.
_PACKAGES = {
    re.compile("Lion"): "lion-pytorch",
    re.compile("DAdapt(AdaGrad|Adam|SGD)"): "dadaptation",
    re.compile("Sophia.*"): "Sophia-Optimizer",
    re.compile("bnb_.*|.*(8|32)bit"): "bitsandbytes",
    re.compile("Adafactor"): "transformers",
}
# Dicts, and lists that hold one, which mmengine would split at their commas; "{:05}.png" is none.
_DICT = re.compile(r"""[\[(](.*[\[(,])?(\{|dict\()|\{["'}]|dict\(""")


class SettingsAction(DictAction):
    """Read ``--cfg-options`` as mmengine does, and reject malformed options in one line.

    mmengine drops spaces and makes lists of values with commas; we keep a value that is an existing path, and read
    dicts, and lists that hold one, as Python writes them.
    """

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        """Read the options.

        Raises:
            UserError: If an option has no ``=``, or its value cannot be read.
        """
        found = dict(getattr(namespace, self.dest, None) or {})
        for text in values or []:
            key, equals, value = text.partition("=")
            if not key or not equals:
                raise UserError(f"--cfg-options {text}: options are KEY=VALUE, without spaces")
            if set(" ,") & set(value) and os.path.exists(value):
                found[key] = value
                continue
            if _DICT.match(value.replace(" ", "")):
                found[key] = _read_data(text, value)
                continue
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


def _read_data(option: str, text: str) -> Any:
    """Read data in Python's notation, ``dict(name=value)`` included; nothing is evaluated.

    Raises:
        UserError: If it is anything else.
    """

    def read(node: ast.expr) -> Any:
        if isinstance(node, (ast.List, ast.Tuple)):
            items = [read(item) for item in node.elts]
            return items if isinstance(node, ast.List) else tuple(items)
        if isinstance(node, ast.Dict) and None not in node.keys:
            return {read(key): read(value) for key, value in zip(node.keys, node.values)}
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "dict" and not node.args:
            if any(keyword.arg is None for keyword in node.keywords):
                raise ValueError("dict(**...)")
            return {keyword.arg: read(keyword.value) for keyword in node.keywords}
        return ast.literal_eval(node)

    try:
        value = read(ast.parse(text.strip(), mode="eval").body)
        return Config({"value": value}).value
    except (SyntaxError, TypeError, ValueError, MemoryError, RecursionError) as error:
        raise UserError(
            f"--cfg-options {brief(option)}: the value cannot be read; a dict is \"dict(type='SGD', lr=0.01)\" or "
            "\"{'type': 'SGD', 'lr': 0.01}\", in quotes of the shell, and may be in a list"
        ) from error


def check_config_file(path: str) -> None:
    """Check that a config file exists.

    Raises:
        UserError: If it does not; the message names the most similar config beside it or among ours.
    """
    if os.path.isfile(path):
        return
    known: dict[str, str] = {}
    for folder in (_CONFIGS, Path("configs"), Path(path).parent):
        known.update({file.stem: os.path.relpath(file) for file in folder.glob("*.py")})
    near = difflib.get_close_matches(Path(path).stem, known, n=1)
    raise UserError(
        f"there is no config file {path}" + (f"; did you mean {known[near[0]]}?" if near else "")
    )


# ---------------------------------------------------------------------------------- --cfg-options


def spread_dicts(cfg: Config, options: dict[str, Any]) -> dict[str, Any]:
    """Write options whose values are dicts as options for each entry, which mmengine merges in the same way.

    A dict in place of something else, such as None, replaces it.
    """
    spread: dict[str, Any] = {}
    for key, value in options.items():
        names = isinstance(value, dict) and [str(name) for name in value]
        if not names or not all(name.isidentifier() for name in names):
            spread[key] = value
            continue
        if not isinstance(_at(cfg, key), (dict, _Missing)):
            spread[f"{key}.{_DELETE}"] = True
        spread.update(spread_dicts(cfg, {f"{key}.{name}": item for name, item in value.items()}))
    return spread


def drop_refused(cfg: Config, options: dict[str, Any]) -> Iterator[str]:
    """Drop settings of a part that options give another ``type`` if its constructor does not accept them.

    Args:
        cfg: Changed in place: the config before the options are merged into it.
        options: Values by dotted key.

    Yields:
        A line on each such part.
    """
    for key, kind in options.items():
        path, _, last = key.rpartition(".")
        node = _at(cfg, path)
        if last != "type" or not isinstance(node, dict) or kind == node.get("type"):
            continue
        names, is_closed = _arguments(path, kind)
        refused = [name for name in node if name not in names and f"{path}.{name}" not in options]
        if is_closed and _BUILT.fullmatch(path) and refused:
            for name in refused:
                del node[name]
            yield f"{path}.type={kind} drops {', '.join(refused)}, which {kind} does not take"


class _Missing:
    """What :func:`_at` returns where there is nothing."""


def _at(cfg: Config, path: str) -> Any:
    """Return what is at a dotted path in a config."""
    node: Any = cfg
    for part in path.split("."):
        if isinstance(node, (list, tuple)) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, (dict, Config)) and part in node:
            node = node[part]
        else:
            return _Missing()
    return node


def check_options(cfg: Config, options: dict[str, Any], amp: bool = False) -> list[str]:
    """Check ``--cfg-options`` against a config and the constructors of its parts.

    Args:
        cfg: The config before the options are merged into it.
        options: Values by dotted key.
        amp: Whether ``--amp`` makes the optimizer wrapper an ``AmpOptimWrapper`` later.

    Returns:
        New keys that no constructor confirms, each with the most similar name, if there is one.

    Raises:
        UserError: If a constructor does not accept a key, if a key is a variable of the config file, or if a value is
            of the wrong kind.
    """
    init_default_scope(cfg.get("default_scope", "mmengine"))
    top, unchecked = dict(cfg.items()), []
    for key, value in options.items():
        node: Any = top
        parts = key.split(".")
        for depth, part in enumerate(parts):
            path = ".".join(parts[:depth])
            if part == _DELETE or f"{path}.{_DELETE}" in options:
                break
            if isinstance(node, (list, tuple)):
                node = _item(node, part, path)
            elif not isinstance(node, dict):
                raise UserError(
                    f"--cfg-options {key}: {path} is {node!r} in the config and has no settings; to "
                    f"replace it, add {path}.{_DELETE}=True"
                )
            elif part in node:
                if not path:
                    _check_is_read(part, top)
                node = node[part]
            else:
                kind = options.get(f"{path}.type", node.get("type"))
                if amp and path == "optim_wrapper":
                    kind = "AmpOptimWrapper"
                unchecked += _check_new(top, node, key, path, part, kind)
                break
        else:
            _check_kind(key, node, value)
    return unchecked


def _item(node: Sequence, part: str, path: str) -> Any:
    """Return the element of a list by its number in a key."""
    if not len(node):
        raise UserError(f"--cfg-options {path}.{part}: {path} is an empty list; give all of it")
    if not part.isdigit() or int(part) >= len(node):
        raise UserError(
            f"--cfg-options {path}.{part}: {path} is a list of {len(node)}; its elements are "
            f"{path}.0 to {path}.{len(node) - 1}"
        )
    if isinstance(node, tuple):
        raise UserError(
            f"--cfg-options {path}.{part}: {path} is a tuple, {node!r:.80}; give all of it"
        )
    return node[int(part)]


def _check_is_read(name: str, top: dict) -> None:
    """Reject a variable of the config file: setting it after the file was read has no effect."""
    if name in _top_level():
        return
    places = list(_places(top, name, top[name]))
    remedy = f"set {', '.join(places[:_MOST_PLACES])}" if places else "set what it was used for"
    raise UserError(
        f"--cfg-options {name} has no effect: it is a variable that the config file has used already; "
        f"{remedy}"
    )


def _check_new(top: dict, node: dict, key: str, path: str, part: str, kind: Any) -> list[str]:
    """Check a key whose ``part`` is new in ``node``, which is at ``path`` in a config.

    Returns:
        The key to report; empty if the constructor accepts it.

    Raises:
        UserError: If the constructor does not accept the key. Outside of ``_BUILT`` the class around ``node`` may use
            it, so there we reject only likely typos.
    """
    names, is_closed = _arguments(path, kind)
    if part in names:
        return []
    is_exact = is_closed and bool(_BUILT.fullmatch(path))
    known = sorted(names.union(node) if path else names)
    near = difflib.get_close_matches(part, known, n=1, cutoff=0.6 if is_exact else _SLIP)
    where = f"{path}." if path else ""
    suggestions = [f"{where}{name}" for name in near]
    if is_closed:
        suggestions += _places(top, part)
        if is_exact or near or (suggestions and not path):
            hint = (
                f"the nearest is {suggestions[0]}" if suggestions else f"there are {shown(known)}"
            )
            raise UserError(f"--cfg-options {where}{part}: unknown setting; {hint}")
    return [f"{key} (did you mean {suggestions[0]}?)" if near else key]


def _arguments(path: str, kind: Any) -> tuple[set[str], bool]:
    """Return the argument names of a part's constructor, and whether it accepts no others."""
    if not path:
        return _top_level(), True
    if kind is None and re.fullmatch(r"\w+_dataloader", path):
        kind = DataLoader
    elif kind is None and path == "optim_wrapper":
        kind = "OptimWrapper"
    found = find_type(kind)
    if found is None:
        return set(), False
    names, functions = set(_TAKEN_OUT), [found]
    if inspect.isclass(found):
        functions = [vars(c)["__init__"] for c in found.__mro__[:-1] if "__init__" in vars(c)]
    # A constructor with **kwargs passes them on to its base class.
    for function in functions:
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):  # built in
            return names, False
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        names |= {p.name for p in parameters if p.kind not in variable} - {"self"}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return names, True
    return names, False


def _top_level() -> set[str]:
    return set(inspect.signature(Runner.__init__).parameters) - {"self", "cfg"} | _READ


def _places(node: Any, name: str, used: Any = None, path: str = "") -> Iterator[str]:
    """Yield the paths of settings called ``name``, or with the value ``used``, in the parts of a config that are read.

    A tuple has the value too if all its sides have it, as in ``scale=(160, 160)``.
    """
    # Small numbers occur everywhere by chance.
    is_telling = type(used) in (int, float) and used > _MOST_COMMON
    is_list = isinstance(node, (list, tuple))
    for key, value in enumerate(node) if is_list else dict(node).items():
        if path or key in _top_level():
            where = f"{path}.{key}" if path else key
            parts = value if isinstance(value, (list, tuple)) else [value]
            if path and (
                key == name or (is_telling and parts and all(part == used for part in parts))
            ):
                yield where
            elif isinstance(value, (dict, list, tuple)):
                yield from _places(value, name, used, where)


def _check_kind(key: str, old: Any, new: Any) -> None:
    """Reject a string where the config has a number or a boolean."""
    if isinstance(old, bool) and isinstance(new, str):
        raise UserError(
            f"--cfg-options {key}={new}: this is {old} in the config; give True or False"
        )
    # A loss scale may also be "dynamic".
    if type(old) is int and isinstance(new, str) and not key.endswith("loss_scale"):
        raise UserError(f"--cfg-options {key}={new}: this is {old} in the config; give a number")


# ------------------------------------------------------------------------------- values and types


def check_values(cfg: Config) -> None:
    """Check numbers that would raise only after training is set up.

    Raises:
        UserError: If a number is not whole or too small, or if a scheduler ends before it begins.
    """
    for part in ("train_dataloader", "val_dataloader", "test_dataloader", "train_cfg"):
        node = cfg.get(part) or {}
        for name, least in _AT_LEAST.items():
            value = node.get(name, least)
            # mmengine's loops also take a float that is whole, such as a quotient.
            is_whole = type(value) is int or (
                part == "train_cfg" and isinstance(value, float) and value.is_integer()
            )
            if not is_whole or value < least:
                raise UserError(
                    f"{part}.{name} is {value!r}; it must be a whole number of at least {least}"
                )
    schedulers = cfg.get("param_scheduler")
    for index, scheduler in enumerate(schedulers if isinstance(schedulers, list) else []):
        settings = scheduler if isinstance(scheduler, dict) else {}
        begin, end = settings.get("begin", 0), settings.get("end")
        if isinstance(begin, int) and isinstance(end, int) and end <= begin:
            raise UserError(
                f"param_scheduler.{index} begins at {begin} and ends at {end}; the end must be later"
            )


def check_types(cfg: Config) -> None:
    """Check that the parts of a config that registries build have a registered ``type``.

    Raises:
        UserError: If a type is not registered; the message suggests the most similar name.
    """
    for path, kind in _types({name: cfg[name] for name in cfg if name in _top_level()}):
        if _BUILT.fullmatch(path) and find_type(kind) is None:
            raise UserError(f"{path}.type={_explain_unregistered(kind)}")


@contextmanager
def suggest_similar_name() -> Iterator[None]:
    """Add the most similar registered name to mmengine's error for a ``type`` that is not registered.

    Raises:
        KeyError: In place of mmengine's error.
    """
    try:
        yield
    except KeyError as error:
        unregistered = _UNREGISTERED.search(str(error.args[0] if error.args else ""))
        if not unregistered:
            raise
        raise KeyError(f"type={_explain_unregistered(unregistered[1])}") from error


def find_type(kind: Any) -> Optional[Any]:
    """Return the class or function of ``type=kind`` in the default scope, or None."""
    if not isinstance(kind, str):
        return kind
    scope = DefaultScope.get_current_instance()
    if scope is not None:
        with user_mistakes(f"cannot use default_scope={scope.scope_name!r}"):
            import_module(f"{scope.scope_name}.registry")  # registers the scope's registries
    for registry in _registries():
        # As building does; mmengine would also log each registry that the scope lacks.
        scoped = registry.children.get(scope.scope_name) if scope else None
        found = (registry if scoped is None else scoped).get(kind)
        if found is not None:
            return found
    return None


def _explain_unregistered(kind: str) -> str:
    for name, package in _PACKAGES.items():
        if name.fullmatch(kind.rpartition(".")[2]):
            return f"{kind!r} is of a package that is not installed; pip install {package}"
    near = _nearest_type(kind)
    hint = f"; the nearest is {near!r}" if near else ""
    return f"{kind!r} is not registered{hint}; import a class of your own by custom_imports in the config"


def _nearest_type(kind: str) -> Optional[str]:
    """Return the registered name most similar to ``kind``, with or without its scope."""
    names = _registered_names()
    names |= {name.rpartition(".")[2] for name in names}
    near = difflib.get_close_matches(kind, sorted(names), n=1)
    return near[0] if near else None


def _types(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield every ``type`` that is a name, with the path of its part."""
    if isinstance(node, dict):
        kind = node.get("type")
        if isinstance(kind, str):
            yield path, kind
        for key, value in node.items():
            # Only the transforms of mmcv's wrappers are registered; those of Albumentations are not.
            if key != "transforms" or _is_of_mmcv(kind):
                yield from _types(value, f"{path}.{key}" if path else key)
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from _types(value, f"{path}.{index}")


def _is_of_mmcv(kind: Any) -> bool:
    return str(getattr(find_type(kind), "__module__", "")).startswith("mmcv.transforms.")


def _registries() -> list[Registry]:
    return [value for value in vars(mmengine.registry).values() if isinstance(value, Registry)]


def _registered_names() -> set[str]:
    """Return all registered names; names outside mmengine's scope begin with their scope."""
    names: set[str] = set()
    pending = [(registry, "") for registry in _registries()]
    while pending:
        registry, scope = pending.pop()
        names |= {f"{scope}{name}" for name in registry.module_dict}
        pending += [(child, f"{child.scope}.") for child in registry.children.values()]
    return names
