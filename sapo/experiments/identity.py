"""What decides a result, as hashes: settings, objectives and code, but no text that only people read."""

import ast
import hashlib
import inspect
import json
import textwrap
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sapo.credit.objectives import OBJECTIVES, Objective


def digest(*parts: Any) -> str:
    """SHA-256 of values that JSON knows."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def code_digest(sources: Iterable[str]) -> str:
    """Hash of what modules define, wherever it stands: no comments, docstrings, order or names of files.

    Imports are left out, as moving code changes them: a name that is imported from elsewhere goes unnoticed where its
    own module is not among the sources. Two definitions of one name in different modules are told apart by their text.

    Raises:
        SyntaxError: a source that is no Python.
    """
    statements = [statement for source in sources for statement in ast.parse(source).body]
    kept = [statement for statement in statements if not _imports(statement) and not _is_text(statement)]
    return digest(sorted(map(_without_docstrings, kept)))


def weights_digest(policy: str | Path) -> str | None:
    """SHA-256 of a policy's weights, in however many files; None where it has none."""
    files = sorted(Path(policy).glob("*.safetensors"))
    return digest(*(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)) if files else None


def objective_identity(name: str) -> dict[str, Any]:
    """All that decides what a registered objective does: its fields, and of a subclass its code too."""
    objective = OBJECTIVES[name]
    fields = {field: value for field, value in asdict(objective).items() if field not in ("label", "source")}
    described = {"name": name, **fields}
    for kind in type(objective).__mro__:
        if kind is Objective:
            return described
        described |= {f"class {kind.__qualname__}": _class_digest(kind)}
    return described


def _class_digest(kind: type) -> str:
    try:
        return code_digest([textwrap.dedent(inspect.getsource(kind))])
    except OSError:  # typed into a console: a class by itself every time
        return f"{kind.__module__}, {id(kind)}"


def _imports(statement: ast.stmt) -> bool:
    """Whether a statement does nothing but import, for types alone included."""
    if isinstance(statement, ast.If):
        return all(map(_imports, [*statement.body, *statement.orelse]))
    return isinstance(statement, ast.Import | ast.ImportFrom)


def _without_docstrings(statement: ast.stmt) -> str:
    for node in ast.walk(statement):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list):
                kept = [part for part in block if not _is_text(part)]
                setattr(node, name, kept or [ast.Pass()] * (name == "body"))
    return ast.unparse(statement)


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
