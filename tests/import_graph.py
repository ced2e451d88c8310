"""Who imports whom under a package's folder, read from the source: nothing of it is executed."""

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

DYNAMIC_IMPORTS = {"import_module", "__import__"}


@dataclass(frozen=True)
class ImportGraph:
    """`internal` maps each module of the package to the modules of it that it imports, wherever in its text; `external`
    to the top-level names of all others.
    """

    internal: Mapping[str, frozenset[str]]
    external: Mapping[str, frozenset[str]]

    @classmethod
    def read(cls, package: Path) -> "ImportGraph":
        """The graph of the package whose folder is `package`."""
        paths = {module_name(path, package.parent): path for path in sorted(package.rglob("*.py"))}
        named = {
            module: set(_imports(ast.parse(path.read_text(encoding="utf-8")), module, path.name == "__init__.py"))
            for module, path in paths.items()
        }
        inside = f"{package.name}."
        return cls(
            {
                module: frozenset(_resolve(name, paths) for name in names if f"{name}.".startswith(inside))
                for module, names in named.items()
            },
            {
                module: frozenset(name.split(".")[0] for name in names if not f"{name}.".startswith(inside))
                for module, names in named.items()
            },
        )

    def reached_from(self, module: str) -> set[str]:
        """`module` and all that importing it executes: what it imports, and every package on the way there."""
        reached: set[str] = set()
        waiting = [module]
        while waiting:
            current = waiting.pop()
            if current not in reached:
                reached.add(current)
                waiting += [*self.internal.get(current, ()), *_packages_of(current)]
        return reached

    def cycles(self) -> list[list[str]]:
        """Modules that import each other, one list a cycle found, each starting and ending with the same module."""
        found: list[list[str]] = []
        finished: set[str] = set()

        def visit(module: str, path: list[str]) -> None:
            if module in path:
                found.append([*path[path.index(module) :], module])
            elif module not in finished:
                for imported in sorted(self.internal.get(module, ())):
                    visit(imported, [*path, module])
                finished.add(module)

        for module in self.internal:
            visit(module, [])
        return found


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(tree: ast.Module, module: str, is_package: bool) -> Iterator[str]:
    """The full name of everything imported, at the top, in functions, or under a condition."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=source, names=names, level=level):
                base = _absolute(source, level, module, is_package)
                yield from (f"{base}.{alias.name}" if alias.name != "*" else base for alias in names)
            case ast.Call(
                func=ast.Attribute(attr=name) | ast.Name(id=name), args=[ast.Constant(value=str(target)), *_]
            ):
                if name in DYNAMIC_IMPORTS:
                    yield target


def _absolute(source: str | None, level: int, module: str, is_package: bool) -> str:
    if level == 0:
        return source or ""
    package = module.split(".") if is_package else module.split(".")[:-1]
    return ".".join([*package[: len(package) - level + 1], *([source] if source else [])])


def _resolve(name: str, modules: Iterable[str]) -> str:
    """The module that `name` is, or in which it is defined."""
    while name not in modules and "." in name:
        name = name.rpartition(".")[0]
    return name


def _packages_of(module: str) -> Iterator[str]:
    while "." in module:
        module = module.rpartition(".")[0]
        yield module
