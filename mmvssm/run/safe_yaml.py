"""Read YAML without running code, which mmengine's own handler does for tags such as ``!!python/object/apply``."""

import yaml
from mmengine.fileio import YamlHandler, register_handler


@register_handler(["yaml", "yml"])
class SafeYamlHandler(YamlHandler):
    """mmengine's handler without tags that call or import something; tuples (``!!python/tuple``) stay."""

    def load_from_fileobj(self, file, **kwargs):
        """See the base class."""
        return super().load_from_fileobj(file, **{"Loader": yaml.FullLoader, **kwargs})
