"""Which code decided a number: fingerprints of the modules that train and score, now and at the commits of runs."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

import agrivision_repro
from agrivision_repro.runs.store import git

_PACKAGE = Path(agrivision_repro.__file__).parent
_DECIDE = ("losses.py", "metrics.py", "models/*.py", "training/*.py", "runs/run.py", "runs/workspace.py")  # modules whose code decides a number
_DECIDE += ("analysis/moments.py", *(f"data/{name}.py" for name in ("batches", "editions", "readers", "synthetic", "synthetic_files", "tiles")))


def _plain(node: object) -> object:
    "Return a syntax tree as nested lists, the same in every version of Python: `ast.dump` is not."
    if isinstance(node, ast.AST):
        return [type(node).__name__, *((name, _plain(value)) for name, value in ast.iter_fields(node) if value is not None and value != [])]
    return [_plain(part) for part in node] if isinstance(node, list) else repr(node)


def fingerprint(
    source: str,  # of a module
) -> str:  # 8 hexadecimal digits
    "Hash a module's syntax tree; comments, docstrings and layout do not count."
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return hashlib.sha256(repr(_plain(tree)).encode()).hexdigest()[:8]


def _decides(name: str) -> bool:
    "Return True if a file of the package decides a number."
    return not name.endswith("__init__.py") and any(fnmatch(name, pattern) for pattern in _DECIDE)


def code_now() -> dict[str, str]:  # file of the package → fingerprint
    "Return the fingerprints of the code as it is."
    names = sorted(path.relative_to(_PACKAGE).as_posix() for path in _PACKAGE.rglob("*.py"))
    return {name: fingerprint((_PACKAGE / name).read_text(encoding="utf-8")) for name in names if _decides(name)}


def code_at(commit: str) -> dict[str, str]:  # as `code_now`; empty if the checkout lacks the commit
    "Return the fingerprints of the code at a commit of this checkout."
    names = [line.removeprefix(f"{_PACKAGE.name}/") for line in git("ls-tree", "-r", "--name-only", commit, _PACKAGE.name).splitlines()]
    return {name: fingerprint(git("show", f"{commit}:{_PACKAGE.name}/{name}")) for name in names if _decides(name)}


def changed_since(
    code: Mapping[str, Mapping[str, str]],  # commit → fingerprints, of `code_at`
) -> list[str]:  # files, sorted; a commit whose code is not known counts as changed throughout
    "List the files whose code differs from that at any of the commits."
    now = code_now()
    return sorted({name for known in code.values() for name in now.keys() | known.keys() if now.get(name) != known.get(name)})
