"""Let configs inherit this package's configs by name: ``_base_ = 'mmvssm::groupmamba_maskrcnn_coco.py'``.

They are in ``mmvssm/.mim/configs``, as in OpenMMLab's packages.
"""

from mmengine.utils import is_installed

from .private_names import config_lookup, replace_config_lookup

SCOPE = "mmvssm"

# Given a distribution, mmengine asks pkg_resources, which points into site-packages even for an editable installation.
# Given a module, it imports it and takes the folder of its file.
_MODULE = "mmvssm.version"

_package_and_path = config_lookup()


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


def register_configs() -> None:
    """Make ``mmvssm::`` names work in every config read from now on. Idempotent."""
    replace_config_lookup(_get_package_and_cfg_path)
