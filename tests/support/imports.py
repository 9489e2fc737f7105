"""What a file of the package imports, read from its text."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def module_of(path: Path) -> str:
    """fastpg/linear/call.py -> fastpg.linear.call; kernels/tile.py -> fastpg.kernels.tile; a package -> its own name."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "kernels":
        parts = ["fastpg", *parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def files() -> dict[str, Path]:
    """Every module of the package, by name."""
    return {module_of(path): path for folder in ("fastpg", "kernels") for path in sorted((ROOT / folder).rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Modules of fastpg, by their full names, and others by their first. Imports for annotations alone do not count."""
    known, found = files(), set()
    tree = ast.parse(path.read_text())
    tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")]
    package = module_of(path).split(".") if path.name == "__init__.py" else module_of(path).split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name if alias.name in known else alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module.split(".")[0] != "fastpg":
                found.add(module.split(".")[0])
                continue
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                found.add(inner if inner in known else module)
    return found - {module_of(path)}
