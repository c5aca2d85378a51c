"""Let configs inherit this package's configs by name: ``_base_ = 'mmvssm::groupmamba_maskrcnn_coco.py'``.

``mmengine.hub`` and the inferencers of mmdet and mmseg know these names too. The configs lie in
``mmvssm/.mim/configs``, where packages of OpenMMLab have theirs.
"""

from typing import Callable, Optional

from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.infer import BaseInferencer
from mmengine.utils import get_installed_path, is_installed

from .private_names import (
    config_lookup,
    metafile_lookup,
    replace_config_lookup,
    replace_index_lookup,
    replace_metafile_lookup,
)

SCOPE = "mmvssm"

# Given a distribution, mmengine asks pkg_resources, which points into site-packages even for an editable installation.
# Given a module, it imports it and takes the folder of its file.
_MODULE = "mmvssm.version"

_package_and_path = config_lookup()
_config_and_weights = metafile_lookup()


def _get_package_and_cfg_path(cfg_path: str) -> tuple[str, str]:
    """Split ``package::path``; mmengine's own function knows only OpenMMLab's distributions."""
    module, _, path = cfg_path.partition("::")
    if module == SCOPE:
        return _MODULE, path
    package, path = _package_and_path(cfg_path)
    # mmseg comes from mmsegmentation or from the fork onedl-mmsegmentation. If neither is installed, mmengine's error
    # names the former.
    forked = is_installed(module) and not is_installed(package)
    return (module if forked else package), path


def _get_cfg_metainfo(
    original: Callable[[str, str], dict], package_path: str, cfg_path: str
) -> dict:
    """An index's entry. The authors' addresses in ours become ``mmvssm://`` names, which load under our names."""
    entry = original(package_path, cfg_path)
    if package_path == get_installed_path(_MODULE):
        entry = {**entry, "Weights": f"{SCOPE}://{entry['Name']}"}
    return entry


def _load_model_from_metafile(
    inferencer: BaseInferencer, model: str
) -> tuple[Config, Optional[str]]:
    """The config of a model, and its weights if ``model-index.yml`` names some."""
    if not model.startswith(f"{SCOPE}::"):
        return _config_and_weights(inferencer, model)
    cfg = get_config(model, pretrained=True)
    return cfg, cfg.get("model_path")


def register_configs() -> None:
    """Let everything that mmengine reads from now on name configs of this package. Idempotent."""
    replace_config_lookup(_get_package_and_cfg_path)
    replace_index_lookup(_get_cfg_metainfo)
    replace_metafile_lookup(_load_model_from_metafile)
