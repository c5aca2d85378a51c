"""The module that ``mmengine.hub.get_model`` expects in a package."""


def register_all_modules(init_default_scope: bool = True) -> None:
    """Do nothing: ``import mmvssm`` has registered everything.

    Args:
        init_default_scope: Ignored. Our configs name the scope of each model themselves.
    """
