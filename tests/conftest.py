"""Settings of every test."""

import functools

import pytest
from mmengine.config import config, utils
from mmengine.registry import DefaultScope

from mmvssm import packaged_configs

# For each `_base_` in another package mmengine looks anew for what is installed, and reads some 70 YAML files there: a
# second of CPU time for a config. None of these changes while tests run.
utils.load = functools.cache(utils.load)
for module in (config, packaged_configs):
    module.is_installed = functools.cache(module.is_installed)


@pytest.fixture(autouse=True)
def no_default_scope():
    """Each test begins without a default scope, whatever those before it in its process ran.

    mmengine looks unprefixed types up in the default scope, and a run that a test made leaves its own behind: a model
    would be built or not by the order of tests, which processes share out differently each time.
    """
    DefaultScope._instance_dict.clear()
