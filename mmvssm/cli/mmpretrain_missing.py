"""mmpretrain, which the pre-training configs need and nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec

from .errors import UserError, one_sentence

_HOW = "`make setup-pretrain` sets up an environment that has what works together and says how to use it"


@contextmanager
def telling_of_mmpretrain() -> Iterator[None]:
    """While a config is read, or what it names is imported: a failure of mmpretrain's is told as one.

    Raises:
        UserError: If it was needed, and is not installed or does not load, which is most often torchvision's doing.
    """
    try:
        yield
    except Exception as error:
        if "mmpretrain" not in _all_said(error):
            raise
        if find_spec("mmpretrain") is None:
            raise UserError(
                f"this config is one for mmpretrain, which is not installed here; {_HOW}"
            ) from error
        for name in ("torchvision", "mmpretrain"):
            try:
                import_module(name)
            except Exception as reason:
                raise UserError(
                    f"this config is one for mmpretrain, and {name} does not load here "
                    f"({one_sentence(reason):.200}); {_HOW}"
                ) from error
        raise


def _all_said(error: BaseException) -> str:
    """The messages of an error and of those behind it, and the files that it went through."""
    said = []
    while error is not None:
        said.append(str(error))
        step = error.__traceback__
        while step is not None:
            said.append(step.tb_frame.f_code.co_filename)
            step = step.tb_next
        error = error.__cause__ or error.__context__
    return "\n".join(said)
