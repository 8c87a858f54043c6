"""Triton's interpreter, made faster by two things that it does again and again; what it computes stays the same.

It walks all names of ``triton.language`` to replace them whenever a kernel calls a function, and not only when the
kernel is launched. It builds its table of numpy's dtypes whenever it looks one up. Together that is half of the time.
"""

from __future__ import annotations

from collections.abc import Callable


def hasten() -> None:
    """Let the interpreter do both once, where it works as described (triton 3.6 to 3.9)."""
    from triton.runtime import interpreter

    executor = getattr(interpreter, "GridExecutor", None)
    if executor is not None and hasattr(interpreter, "_patch_lang"):
        interpreter._patch_lang, executor.__call__ = once_per_launch(interpreter._patch_lang, executor.__call__)
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = once_per_type(interpreter._get_np_dtype)


def once_per_launch(patch: Callable, launch: Callable) -> tuple[Callable, Callable]:
    """``patch`` for the first function of each module that a launch runs, and the launch that forgets afterwards."""
    patched = set()

    def patch_once(fn):
        module = id(fn.__globals__)
        if module not in patched:
            patched.add(module)
            return patch(fn)
        return None  # only a launch restores what its own call returned, and that call is the first

    def launch_and_forget(self, *args, **options):
        patched.clear()
        try:
            return launch(self, *args, **options)
        finally:
            patched.clear()

    return patch_once, launch_and_forget


def once_per_type(look_up: Callable) -> Callable:
    """``look_up``, remembered by the name of the type: not all types can be hashed."""
    found = {}

    def remembered(dtype):
        if dtype.name not in found:
            found[dtype.name] = look_up(dtype)
        return found[dtype.name]

    return remembered
