"""Read checkpoints, find the last one of a run, and check that one fits a model."""

import re
from collections import OrderedDict
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Optional

import numpy as np
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader, load_state_dict
from mmengine.utils import is_list_of
from torch import Size, Tensor, nn

from ..datasets.testing import testing_config
from ..errors import UserError, brief, shown, user_mistakes
from ..files import read_text
from ..models.blueprint import BLUEPRINT, check_blueprint, check_scope, read_blueprint
from ..models.weights import with_published
from ..safe_checkpoint import UnsafeCheckpointError, load_checkpoint_safely
from .hooks.checkpoint_hook import INTERRUPTED
from .settings import check_config_file

_LONGEST_NAME = 4096  # bytes of a path
_HUB = ("log_scalars", "runtime_info", "resumed_keys")
# What mmengine needs to resume: entries of a checkpoint, and their keys.
_RUN_STATE = dict(meta=("epoch", "iter"), optimizer=("state", "param_groups"), message_hub=_HUB)


class Checkpoint:
    """Content of a checkpoint. We trust none of it: any entry may be missing or of another type.

    Args:
        path: File or URL, for messages.
        content: The dictionary in the file.
    """

    def __init__(self, path: str, content: dict[str, Any]) -> None:
        self.path = path
        self.content = content

    @classmethod
    def load(cls, path: str) -> "Checkpoint":
        """Read a file, or what a URL or a name (``https://``, ``mmvssm://`` ...) names, with ``weights_only=True``.

        A published model's weights get our names.

        Raises:
            UserError: If it cannot be loaded, or holds code or objects.
        """
        if "://" not in path:
            with user_mistakes(kinds=(UnsafeCheckpointError,)):
                return cls(path, with_published(load_checkpoint_safely)(path))
        with user_mistakes(f"cannot load {path}"):
            content = CheckpointLoader.load_checkpoint(path, "cpu")
        if not isinstance(content, dict):
            raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of weights")
        return cls(path, content)

    @property
    def meta(self) -> dict[str, Any]:
        """The run's ``meta``, or an empty dictionary."""
        meta = self.content.get("meta")
        return meta if isinstance(meta, dict) else {}

    @property
    def dataset_meta(self) -> dict[str, Any]:
        """The metainfo of the training data, or an empty dictionary."""
        dataset_meta = self.meta.get("dataset_meta")
        return dataset_meta if isinstance(dataset_meta, dict) else {}

    @property
    def classes(self) -> Optional[list[str]]:
        """Names of the classes that the model was trained on, if the checkpoint has them."""
        return as_names(self.dataset_meta.get("classes"))

    def weights(self, strip_module: bool = True) -> dict[str, Any]:
        """The weights by name.

        Args:
            strip_module: Whether to drop the prefix ``module.`` of distributed training.

        Raises:
            UserError: If ``state_dict`` is not a dictionary of names.
        """
        weights = self.content.get("state_dict", self.content)
        if not isinstance(weights, dict) or not all(isinstance(key, str) for key in weights):
            raise UserError(
                f"{self.path} holds no weights: its state_dict is not a dictionary of names"
            )
        if not strip_module:
            return weights
        renamed = type(weights)((key.removeprefix("module."), v) for key, v in weights.items())
        if hasattr(weights, "_metadata"):
            renamed._metadata = weights._metadata
        return renamed

    @property
    def blueprint(self) -> dict[str, Any]:
        """What the checkpoint says of its model and training; not checked, and empty if it is not readable."""
        try:
            return read_blueprint(self.meta.get(BLUEPRINT))
        except UserError:
            return {}

    def planned(self, name: str) -> Optional[int]:
        """The training's ``batch_size``, ``max_epochs`` or ``max_iters``, if the checkpoint has it."""
        schedule = self.blueprint.get("schedule")
        value = {**(schedule if isinstance(schedule, dict) else {}), **self.blueprint}.get(name)
        return value if isinstance(value, int) else None

    def config(self) -> Config:
        """Return a config of its model alone, for predicting, exporting, and testing with ``--data-root``.

        Raises:
            UserError: If it holds no blueprint, or one that we refuse.
        """
        if BLUEPRINT not in self.meta:
            raise UserError(f"{self.path} does not say how to build its model; give its config too")
        try:
            blueprint = read_blueprint(self.meta[BLUEPRINT])
            scope = check_scope(blueprint)
            if scope == "mmpretrain":
                import_module("mmvssm.pretraining")  # whose classes a distilled classifier is of
            check_blueprint(blueprint, self.weights())
            return testing_config(scope, blueprint["model"], blueprint["pipeline"])
        except UserError as error:
            raise UserError(f"{self.path} cannot be used without its config: {error}") from error

    def check_fits(self, model: nn.Module) -> None:
        """Load the weights into ``model`` and check that every key and shape matches, and every weight is finite.

        mmengine only warns, and would then train or test a model that is partly random.

        Args:
            model: Built for this check; its weights are overwritten.

        Raises:
            UserError: If the weights belong to another model, or are not finite.
        """
        weights = self.weights()
        try:
            load_state_dict(model, weights, strict=True)
        except Exception as error:  # a weight that is no tensor may raise anything
            raise UserError(self._misfit(model.state_dict(), weights)) from error
        floating = {k: x for k, x in model.state_dict().items() if _is_floating(x)}
        parameters = {name for name, _ in model.named_parameters()}
        # A buffer may be meant to hold infinity.
        bad = [
            k
            for k, x in floating.items()
            if not (x.isfinite() if k in parameters else x == x).all()
        ]
        if bad:
            raise UserError(
                f"{self.path} holds NaN or infinity in {len(bad)} weights ({shown(bad)}), as predictions would; take "
                "an earlier checkpoint"
            )

    def count_shared(self, model: nn.Module) -> str:
        """Return a line that counts the weights that ``model`` takes from this checkpoint (``load_from``).

        Raises:
            UserError: If there are none.
        """
        own, weights = shapes_of(model), self.weights()
        shared = sum(getattr(weights.get(key), "shape", None) == own[key] for key in own)
        if not shared:
            raise UserError(f"none of the weights in {self.path} fits this model")
        return f"Starting from {self.path}: {shared} of the model's {len(own)} weights come from it"

    def check_resumable(self) -> None:
        """Check that the checkpoint holds the state of a training run, not only weights.

        Raises:
            UserError: If it does not.
        """
        missing = [name for name in _RUN_STATE if name not in self.content]
        if missing:
            reason = f"it lacks the state of a training run ({', '.join(missing)})"
        elif malformed := next(self._malformed(), None):
            reason = f"its {malformed} is malformed"
        else:
            return
        raise UserError(
            f"{self.path} cannot be resumed from because {reason}; to start from its weights use --cfg-options "
            f"load_from={self.path}"
        )

    def _malformed(self) -> Iterator[str]:
        """Yield entries that mmengine cannot resume from; each check assumes that those before it passed."""
        for name, keys in _RUN_STATE.items():
            if not _is_dict(self.content[name]) or not all(k in self.content[name] for k in keys):
                yield name
        state, groups = (self.content["optimizer"][name] for name in _RUN_STATE["optimizer"])
        if not _is_dict(state) or not all(map(_is_dict, state.values())):
            yield "optimizer['state']"
        if not is_list_of(groups, dict) or not all("lr" in group for group in groups):
            yield "optimizer['param_groups']"
        meta, hub = self.content["meta"], self.content["message_hub"]
        for name in ("epoch", "iter"):
            if type(meta[name]) is not int or meta[name] < 0:
                yield f"meta['{name}']"
        if type(meta.get("seed", 0)) not in (int, type(None)):
            yield "meta['seed']"
        for name in _HUB:
            if not _is_dict(hub[name]) or not all(isinstance(key, str) for key in hub[name]):
                yield f"message_hub['{name}']"
        for entry in hub["log_scalars"].values():
            parts = ("_log_history", "_count_history") if isinstance(entry, HistoryBuffer) else ()
            if not all(isinstance(vars(entry).get(part), np.ndarray) for part in parts):
                yield "message_hub['log_scalars']"

    def _misfit(self, own: dict[str, Tensor], weights: dict[str, Any]) -> str:
        """Describe in one line how ``weights`` differ from a model's own."""
        missing = [k for k in own if k not in weights and "num_batches_tracked" not in k]
        unexpected = [k for k in weights if k not in own]
        reshaped = [
            f"{k} is {_shape_of(weights[k])} there and {tuple(own[k].shape)} here"
            for k in own
            if k in weights and getattr(weights[k], "shape", None) != own[k].shape
        ]
        found = [
            f"{len(keys)} {what} ({shown(keys)})"
            for keys, what in (
                (missing, "missing from it"),
                (unexpected, "unknown to the model"),
                (reshaped, "of another shape"),
            )
            if keys
        ]
        line = f"{self.path} does not fit this config's model, weights: {'; '.join(found)}"
        origin = ", ".join(self._origin())
        return f"{line}; it was trained {origin}" if origin else line

    def _origin(self) -> Iterator[str]:
        """Yield the config, backbone and classes of the checkpoint's training, if it has them."""
        # mmengine names an experiment <config>_<date>_<time>.
        name = re.sub(r"_?\d{8}_\d{6}$", "", brief(self.meta.get("experiment_name", "")))
        if name:
            yield f"with config {name}"
        backbone = self.blueprint.get("model", {}).get("backbone")
        if isinstance(backbone, dict):
            arch = backbone.get("arch", backbone.get("depth", ""))
            arch = "of its own arch" if isinstance(arch, dict) else brief(arch)
            yield f"backbone {brief(backbone.get('type'))} {arch}".rstrip()
        if self.classes:
            yield f"{len(self.classes)} classes ({shown(self.classes)})"


def read_config(path: str, **options: Any) -> Config:
    """Read a config file, or make the config of a checkpoint's model.

    Args:
        path: A config file, or a checkpoint (``.pth``) that holds a blueprint.
        options: Further arguments of ``Config.fromfile``.

    Raises:
        UserError: If it cannot be read.
    """
    if is_checkpoint(path):
        return Checkpoint.load(path).config()
    check_config_file(path)
    with user_mistakes(f"cannot read the config {path}"):
        return Config.fromfile(path, **options)


def is_checkpoint(path: str) -> bool:
    """Whether the name of a file is that of a checkpoint."""
    return path.endswith(".pth")


def find_last(work_dir: str) -> tuple[Optional[Checkpoint], list[str]]:
    """Find the newest checkpoint of a training run that loads.

    That is the one that ``last_checkpoint`` names, unless the run was killed during the write or before it updated
    ``last_checkpoint``.

    Args:
        work_dir: Work dir of the run.

    Returns:
        The checkpoint, or None if there is none; and the newer files that do not load.

    Raises:
        UserError: If there are checkpoints but none of them loads.
    """
    skipped = []
    for path in map(str, _by_recency(Path(work_dir))):
        try:
            content = load_checkpoint_safely(path)
            if "optimizer" in content:
                return Checkpoint(path, content), skipped
        except UnsafeCheckpointError:
            pass
        skipped.append(path)
    if skipped:
        raise UserError(
            f"none of the {len(skipped)} checkpoints in {work_dir} can be resumed from; name another with --resume "
            "FILE, or start a new run in another --work-dir"
        )
    return None, []


def named_checkpoint(work_dir: Path) -> Optional[Path]:
    """Return the checkpoint that a run's ``last_checkpoint`` names, if it exists."""
    try:
        named = Path(read_text(work_dir / "last_checkpoint", _LONGEST_NAME).strip() or ".")
        # If the work dir was moved or copied, take the file of that name in it.
        here = work_dir / named.name
        named = here if here.is_file() else named
        return named if named.is_file() else None
    except OSError:  # there is none, or it names nothing that could be a file
        return None


def shapes_of(model: nn.Module) -> dict[str, Size]:
    """Return the shapes of a model's weights by name, without BatchNorm's counters, which old checkpoints lack."""
    return {k: v.shape for k, v in model.state_dict().items() if "num_batches_tracked" not in k}


def as_names(classes: Any) -> Optional[list[str]]:
    """``classes`` as a list of strings, or None if it is no list."""
    return [str(name) for name in classes] if isinstance(classes, (list, tuple)) else None


def _by_recency(work_dir: Path) -> Iterator[Path]:
    """Yield training checkpoints: first the one in ``last_checkpoint``, then by step, newest first."""
    named = named_checkpoint(work_dir)
    if named is not None:
        yield named
    steps = {
        path: int(match.group(1))
        for path in work_dir.glob("*.pth")
        if (match := re.fullmatch(r"(?:epoch|iter)_(\d+)", path.stem))
    }
    others = sorted(steps, key=steps.__getitem__, reverse=True)
    interrupted = work_dir / INTERRUPTED
    if interrupted.is_file():  # its name has no step
        moment = interrupted.stat().st_mtime
        others.insert(sum(path.stat().st_mtime > moment for path in others), interrupted)
    for path in others:
        if named is None or path.name != named.name:
            yield path


def _is_dict(value: Any) -> bool:
    return type(value) in (dict, OrderedDict)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _shape_of(value: Any) -> Any:
    """Return the shape of a tensor, or the type of any other value."""
    return tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
