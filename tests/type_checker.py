"""The run-time type checker of the suite: beartype, with two settings that jaxtyping's import hook needs."""

from pathlib import Path
from typing import Any, Self, TypeVar

from beartype import BeartypeConf, FrozenDict, beartype

T = TypeVar("T")

SOURCES = Path(__file__).parents[1] / "src"
UNCHECKED_MODULES = {
    # Numba compiles these functions; it cannot compile a wrapper around them.
    "flowgraph.propagation.numba_kernels",
    # Typer calls these functions. Its callback for --version replaces the flag's value by None.
    "flowgraph.cli",
    "rl.cli",
}

_SETTINGS = BeartypeConf(
    # An int is accepted where a float is annotated, as type checkers do.
    is_pep484_tower=True,
    # The first item of a list is checked instead of a random one: the generator of `random` belongs to the tests.
    is_random=False,
    # The hook checks one function at a time, so that the class that `Self` stands for is unknown here.
    hint_overrides=FrozenDict({Self: Any}),
)


def check_calls(function: T) -> T:
    """Check every call of a function against its annotations."""
    return beartype(conf=_SETTINGS)(function)


def checked_modules() -> list[str]:
    """List the modules of both packages whose calls are checked.

    The hook takes prefixes and no exceptions, so that the list names modules instead of packages. The ``__init__``
    modules are left out, because the name of a package is a prefix of every module in it.
    """
    modules = []
    for path in sorted(SOURCES.rglob("*.py")):
        name = ".".join(path.relative_to(SOURCES).with_suffix("").parts)
        if path.name != "__init__.py" and name not in UNCHECKED_MODULES:
            modules.append(name)
    return modules
