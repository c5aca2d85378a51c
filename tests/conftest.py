"""Settings of every test."""

import pytest
from mmengine.registry import DefaultScope


@pytest.fixture(autouse=True)
def no_default_scope():
    """Each test begins without a default scope, whatever those before it in its process ran.

    mmengine looks unprefixed types up in the default scope, and a run that a test made leaves its own behind: a model
    would be built or not by the order of tests, which processes share out differently each time.
    """
    DefaultScope._instance_dict.clear()
