"""The modules of this project that a file imports, directly or not: also inside functions."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "rlhf_vs_dpo"


def module_path(name: str) -> Path | None:
    base = ROOT / "src" / Path(*name.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


def imported(path: Path) -> set[str]:
    """Dotted names of everything imported in a file; `from a import b` gives a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def closure(path: Path) -> set[Path]:
    """Files under src that `path` reaches, package __init__ files that hold code among them."""
    found: set[Path] = set()
    queue = [path]
    while queue:
        for name in imported(queue.pop()):
            module = module_path(name) if name.split(".")[0] == PACKAGE else None
            if module is not None and module not in found:
                found.add(module)
                queue.append(module)
    return {module for module in found if any(not isinstance(n, ast.Expr) for n in ast.parse(module.read_text()).body)}
