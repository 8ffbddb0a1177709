"""Who imports whom, read from the source: the tests of DESIGN's arrows and of DVC's code dependencies share it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in sorted((ROOT / "vapi").rglob("*.py"))
}


def imported(module: str, deferred: bool = True, hints: bool = True) -> set[str]:
    """Dotted names that a module imports; without ``deferred`` only those at its top, without ``hints`` none for annotations alone."""
    tree = ast.parse(MODULES[module].read_text())
    names: set[str] = set()
    for node in _statements(tree, deferred, hints):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: absolute imports only"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {str(node.module)} | (whole & MODULES.keys())
    return names


def _statements(tree: ast.AST, deferred: bool, hints: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not deferred:
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not hints:
            continue
        yield node
        yield from _statements(node, deferred, hints)


def ours(module: str, **kinds: bool) -> set[str]:
    """The modules of vapi that a module imports, packages' own __init__ included."""
    return {name for name in imported(module, **kinds) if name in MODULES}


def libraries(module: str, **kinds: bool) -> set[str]:
    """The top-level names of everything else that it imports."""
    return {name.split(".")[0] for name in imported(module, **kinds) if not name.startswith("vapi")}


def reached(module: str, without: set[str]) -> set[str]:
    """Every module of vapi that loading ``module`` loads, itself included; not through ``without``. A subpackage counts whole."""
    found: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name not in found and name not in without:
            found.add(name)
            todo += ours(name, deferred=False, hints=False)
            todo += [part for part in MODULES if part.startswith(f"{name}.") and name != "vapi"]
    return found
