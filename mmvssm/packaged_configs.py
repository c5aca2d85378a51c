"""Configs of this package by name: ``_base_ = 'mmvssm::groupmamba_maskrcnn_coco.py'``.

They lie in ``mmvssm/.mim/configs``, where packages of OpenMMLab have theirs.
"""

from mmengine.utils import is_installed

from .private_names import config_lookup, replace_config_lookup

SCOPE = "mmvssm"

# mmengine finds the distribution's files by pkg_resources, which points into site-packages even
# where the installation is editable. A module's name it looks up as Python does, and takes the
# folder that its file is in.
_MODULE = "mmvssm.version"

_package_and_path = config_lookup()


def _get_package_and_cfg_path(cfg_path: str) -> tuple[str, str]:
    """Split ``package::path``; mmengine's own function knows OpenMMLab's distributions alone."""
    module, _, path = cfg_path.partition("::")
    if module == SCOPE:
        return _MODULE, path
    package, path = _package_and_path(cfg_path)
    # mmseg is in mmsegmentation, but with the forks in onedl-mmsegmentation. Where it is in
    # neither, mmengine's sentence names the former.
    forked = is_installed(module) and not is_installed(package)
    return (module if forked else package), path


def register_configs() -> None:
    """Let every config that is read from now on name those of this package. Idempotent."""
    replace_config_lookup(_get_package_and_cfg_path)
