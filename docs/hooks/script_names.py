"""Find the public names that a script uses, also those of objects that it never names, read without importing it.

``result = trace.sensitivity(model)`` uses ``Sensitivity``: the types of variables follow from the annotations of the
packages' functions, methods and fields. Where an annotation names several public classes, all of them count.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

from api_names import definition_of, overloads_of, public_names

PACKAGES = ("flowgraph", "rl")
Name = tuple[str, str]
"""Package and public name."""

_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")


@cache
def names_used(script: Path) -> frozenset[Name]:
    """Find the public names that a script uses.

    Args:
        script: a Python file.
    """
    reader = _Reader()
    reader.visit(ast.parse(script.read_text(encoding="utf-8")))
    return frozenset(reader.used)


class _Reader(ast.NodeVisitor):
    """Walk a script in its order and keep the types of its variables.

    Attributes:
        used: what was found so far.
    """

    def __init__(self) -> None:
        self.used: set[Name] = set()
        self._packages: dict[str, str] = {}
        self._types: dict[str, set[Name]] = {}

    def visit_Import(self, node: ast.Import) -> None:
        """Keep the name that a package is imported under."""
        for alias in node.names:
            if alias.name in PACKAGES:
                self._packages[alias.asname or alias.name] = alias.name

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        """Keep public names that are imported by name."""
        for alias in node.names:
            if node.module in PACKAGES and alias.name in public_names(node.module):
                self.used.add((node.module, alias.name))
                self._types[alias.asname or alias.name] = {(node.module, alias.name)}

    def visit_Assign(self, node: ast.Assign) -> None:
        """Give the targets the type of the value."""
        self.visit(node.value)
        for target in node.targets:
            self._bind(target, node.value)

    def visit_For(self, node: ast.For) -> None:
        """Give the variable of a loop the types of what it runs over."""
        self.visit(node.iter)
        self._bind(node.target, node.iter)
        for statement in [*node.body, *node.orelse]:
            self.visit(statement)

    def visit_ListComp(self, node: ast.ListComp) -> None:
        """Read the loops of a comprehension before its result."""
        self._read_comprehension(node.generators, [node.elt])

    def visit_SetComp(self, node: ast.SetComp) -> None:
        """Read the loops of a comprehension before its result."""
        self._read_comprehension(node.generators, [node.elt])

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> None:
        """Read the loops of a comprehension before its result."""
        self._read_comprehension(node.generators, [node.elt])

    def visit_DictComp(self, node: ast.DictComp) -> None:
        """Read the loops of a comprehension before its results."""
        self._read_comprehension(node.generators, [node.key, node.value])

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Count a public name of a package, and the types of a member that is read."""
        self.used |= self._types_of(node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """Count the types of a result."""
        self.used |= self._types_of(node)
        self.generic_visit(node)

    def _read_comprehension(self, generators: list[ast.comprehension], results: list[ast.expr]) -> None:
        """Bind the variables of the loops, then read conditions and results."""
        for generator in generators:
            self.visit(generator.iter)
            self._bind(generator.target, generator.iter)
            for condition in generator.ifs:
                self.visit(condition)
        for result in results:
            self.visit(result)

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        """Give every name of a target the types of a value."""
        types = self._types_of(value)
        for node in ast.walk(target):
            if isinstance(node, ast.Name):
                self._types[node.id] = types

    def _types_of(self, node: ast.expr) -> set[Name]:
        """Return the public names that an expression's type mentions; a package's member stands for itself."""
        if isinstance(node, ast.Name):
            return self._types.get(node.id, set())
        if isinstance(node, ast.Call):
            return self._types_of_call(node)
        if isinstance(node, ast.Subscript):
            return self._types_of(node.value)
        if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
            return set().union(*(self._types_of(element) for element in node.elts))
        if isinstance(node, ast.ListComp):
            return self._types_of(node.elt)
        if not isinstance(node, ast.Attribute):
            return set()

        package = self._packages.get(node.value.id) if isinstance(node.value, ast.Name) else None
        if package is not None:
            return {(package, node.attr)} if node.attr in public_names(package) else set()
        found: set[Name] = set()
        for owner in self._types_of(node.value):
            found |= _member_types(owner, node.attr)
        return found

    def _types_of_call(self, node: ast.Call) -> set[Name]:
        """Return the types of a result: the class that is constructed, or those that a function returns."""
        # zip(a, b), sorted(a), enumerate(a): a loop over them is a loop over their arguments.
        if isinstance(node.func, ast.Name) and node.func.id in ("zip", "sorted", "enumerate", "list", "reversed"):
            return set().union(*(self._types_of(argument) for argument in node.args))
        results: set[Name] = set()
        for name in self._types_of(node.func):
            results |= _result_types(name, node)
        return results


def _result_types(name: Name, call: ast.Call) -> frozenset[Name]:
    """Return the types of a call: of a class the class itself, of a function those of its annotation."""
    package, public = name
    place = public_names(package)[public]
    definition = definition_of(place)
    if isinstance(definition, ast.ClassDef):
        return frozenset({name})
    fitting = [overload for overload in overloads_of(place) if _fits(overload, call)]
    chosen = fitting[0] if fitting else definition
    if chosen is None or chosen.returns is None:
        return frozenset()
    return _mentioned(package, ast.unparse(chosen.returns))


def _fits(overload: ast.FunctionDef, call: ast.Call) -> bool:
    """Return whether a call passes every keyword that an overload requires, with a value that its Literal lists."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    arguments = overload.args
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        if default is not None:
            continue
        if argument.arg not in given:
            return False
        value = given[argument.arg]
        annotation = ast.unparse(argument.annotation) if argument.annotation else ""
        if annotation.startswith("Literal[") and ast.unparse(value) not in annotation:
            return False
    return True


@cache
def _member_types(owner: Name, member: str) -> frozenset[Name]:
    """Return the types of a field, a property, or of what a method returns."""
    package, public = owner
    definition = definition_of(public_names(package)[public])
    if not isinstance(definition, ast.ClassDef):
        return frozenset()
    for node in definition.body:
        if isinstance(node, ast.FunctionDef) and node.name == member and node.returns is not None:
            returned = ast.unparse(node.returns)
            return frozenset({owner}) if returned == "Self" else _mentioned(package, returned)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == member:
            return _mentioned(package, ast.unparse(node.annotation))

    # Members of base classes that are public themselves.
    inherited: frozenset[Name] = frozenset()
    for base in definition.bases:
        for ancestor in _mentioned(package, ast.unparse(base)):
            inherited |= _member_types(ancestor, member)
    return inherited


def _mentioned(package: str, annotation: str) -> frozenset[Name]:
    """Return the public names in an annotation."""
    public = public_names(package)
    return frozenset((package, word) for word in _IDENTIFIER.findall(annotation) if word in public)
