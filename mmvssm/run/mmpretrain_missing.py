"""mmpretrain, which the pre-training configs need and nothing else."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec

from ..errors import UserError, one_sentence

_HOW = "`make setup-pretrain` sets up an environment that has what works together and says how to use it"
# mmengine's words for a config to inherit, and Python's for a module.
_LACKING = re.compile(r"\bmmpretrain is not installed|No module named '?mmpretrain\b")


@contextmanager
def telling_of_mmpretrain() -> Iterator[None]:
    """While a config is read, or what it names is imported: a failure of mmpretrain's is told as one.

    Raises:
        UserError: If it was needed, and is not installed or does not load, which is most often torchvision's doing.
    """
    try:
        yield
    except Exception as error:
        errors = list(_chain(error))
        if any(_LACKING.search(str(e)) for e in errors) and find_spec("mmpretrain") is None:
            raise UserError(
                f"this config is one for mmpretrain, which is not installed here; {_HOW}"
            ) from error
        if any(map(_comes_from_mmpretrain, errors)):
            for name in ("torchvision", "mmpretrain"):
                try:
                    import_module(name)
                except Exception as reason:
                    raise UserError(
                        f"this config is one for mmpretrain, and {name} does not load here "
                        f"({one_sentence(reason):.200}); {_HOW}"
                    ) from error
        raise


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those behind it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _comes_from_mmpretrain(error: BaseException) -> bool:
    """Whether an error went through a file of mmpretrain's."""
    step = error.__traceback__
    while step is not None:
        if f"{os.sep}mmpretrain{os.sep}" in step.tb_frame.f_code.co_filename:
            return True
        step = step.tb_next
    return False
