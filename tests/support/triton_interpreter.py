"""Makes Triton's interpreter quicker, for tests that run kernels in it."""

from functools import cache

import triton.language as tl
from triton.runtime import interpreter


def patch_languages_once(monkeypatch):
    """Leave a language as it is where it has been changed already.

    The interpreter exchanges the language's built-in functions for its own at each launch, and looks for them again at
    each call of a device function, which takes a quarter of the time and finds nothing.
    """
    if not hasattr(interpreter, "_LangPatchScope"):
        return  # a Triton whose interpreter works in another way
    patch = interpreter._patch_lang

    @cache
    def languages(function):
        return [x for x in function.__globals__.values() if x is tl or x is tl.core]

    def patch_where_needed(function):
        if any(tl.core.is_builtin(language.load) for language in languages(function)):
            return patch(function)
        return interpreter._LangPatchScope()  # with nothing to undo

    monkeypatch.setattr(interpreter, "_patch_lang", patch_where_needed)
