"""Methods with sizes that the user gives: U of those that divide heads, W of the double ring."""

from functools import partialmethod

from provenn.distributed.methods import METHODS, method_called, register


def sized_method(name: str, ranks: int, *, ulysses: int | None = None, windows: int | None = None) -> str:
    """The name of a method with these sizes, which is registered where it is new.

    Args:
        name: of the method.
        ranks: processes that share a sequence.
        ulysses: U; None is the method's own.
        windows: W of a double ring; None is the method's own.

    Raises:
        UserError: no such method, one that does not take the size, or a size that does not divide.

    >>> sized_method("loongtrain", 4, ulysses=1, windows=2)
    'loongtrain with ulysses=1, windows=2'
    """
    sizes = {key: size for key, size in (("ulysses", ulysses), ("windows", windows)) if size is not None}
    method = method_called(name, **sizes)
    method.mesh(ranks)
    if not sizes:
        return name
    called = f"{name} with {', '.join(f'{key}={size}' for key, size in sizes.items())}"
    if called not in METHODS:
        kind = type(method)
        register(type(kind.__name__, (kind,), {"name": called, "__init__": partialmethod(kind.__init__, **sizes)}))
    return called
