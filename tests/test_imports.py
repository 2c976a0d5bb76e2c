"""What an import costs, and in which direction modules may know each other."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sapo

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sapo"

# The house from the roof down: a room imports from lower floors alone.
FLOORS = (
    ("cli",),
    ("experiments",),
    ("baselines",),
    ("evaluation", "integrations", "training"),
    ("lab", "policy"),
    ("analysis", "decoding"),
    ("semantic_ids",),
    ("data",),
    ("common", "credit"),
    ("errors",),
)
FLOOR = {room: -number for number, rooms in enumerate(FLOORS) for room in rooms}


def loaded_by(code: str) -> set[str]:
    """Top-level packages in `sys.modules` of a fresh interpreter that ran `code`."""
    code += "\nimport json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    return set(json.loads(done.stdout))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(tree: ast.AST, module: str, is_package: bool = False) -> Iterator[str]:
    """Full names that a module imports anywhere, also inside functions and through sapo's lazy names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            parent = parts[: len(parts) - node.level + is_package] if node.level else []
            source = ".".join([*parent, *filter(None, [node.module])])
            for alias in node.names:
                if source == "sapo" and alias.name in sapo.__all__:
                    yield sapo._HOME[alias.name]
                else:
                    yield f"{source}.{alias.name}"


def imports_in(path: Path, types: bool = True) -> set[str]:
    """What a file imports; `types`: also what only type checkers do."""
    tree = ast.parse(path.read_text("utf-8"))
    if not types:
        tree.body = [node for node in tree.body if not isinstance(node, ast.If)]
    return set(imports_of(tree, module_name(path), path.name == "__init__.py"))


def within(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def test_import_sapo_is_light():
    heavy = {"trl", "transformers", "torch", "numpy", "pandas", "scipy", "sklearn", "matplotlib", "seaborn", "datasets"}
    assert not heavy & loaded_by("import sapo; dir(sapo); sapo.__version__; sapo.InputError")


def test_core_loads_neither_trl_nor_transformers_nor_matplotlib():
    core = [path for folder in ("data", "semantic_ids", "credit") for path in sorted((PACKAGE / folder).rglob("*.py"))]
    assert len(core) > 3
    loaded = loaded_by("\n".join(f"import {module_name(path)}" for path in core))
    assert "torch" in loaded
    assert not {"trl", "transformers", "matplotlib", "seaborn"} & loaded


@pytest.mark.parametrize("name", sapo.__all__)
def test_public_name_is_where_it_says(name: str):
    assert getattr(sapo, name) is getattr(sys.modules[sapo._HOME[name]], name)
    assert name in dir(sapo)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'sapo' has no attribute 'Catalogue'"):
        sapo.Catalogue  # noqa: B018


def test_type_checkers_see_the_same_names():
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == sapo._HOME


def room_of(module: str) -> str:
    return module.split(".")[1]


def test_every_module_has_a_room():
    rooms = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if not path.name.startswith("_")}
    assert rooms - {"py.typed"} == set(FLOOR)


@pytest.mark.parametrize("room", FLOOR)
def test_imports_run_downwards(room: str):
    files = [*(PACKAGE / room).rglob("*.py"), *PACKAGE.glob(f"{room}.py")]
    assert files
    wrong = {
        f"{module_name(path)} imports {name}"
        for path in files
        for name in imports_in(path)
        if within(name, "sapo")
        and (other := room_of(f"{name}.")) not in (room, "")
        and FLOOR.get(other, 0) >= FLOOR[room]
    }
    assert not wrong


def test_the_picture_of_the_house_is_the_code():
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    picture = text.split("```")[1]
    floors: dict[int, set[str]] = {}
    for line in picture.strip("\n").splitlines():
        if line[:2].strip():
            floor = int(line[:2])
        floors.setdefault(floor, set()).add(line[4:].split()[0])
    assert floors == {len(FLOORS) - number: set(rooms) for number, rooms in enumerate(FLOORS)}


def test_no_circle_within_a_room():
    """Names that type checkers alone import are no arrows."""
    arrows = {
        module_name(path): {name for name in imports_in(path, types=False) if within(name, "sapo")}
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }
    modules = {
        name: {other for other in arrows if any(within(to, other) for to in tos)} for name, tos in arrows.items()
    }
    while leaves := {name for name, to in modules.items() if not to & set(modules) - {name}}:
        modules = {name: to for name, to in modules.items() if name not in leaves}
    assert not modules


def test_credit_needs_torch_numpy_and_jaxtyping_only():
    allowed = {"torch", "numpy", "jaxtyping", *sys.stdlib_module_names}
    for path in sorted((PACKAGE / "credit").rglob("*.py")):
        for name in imports_in(path):
            ours = within(name, "sapo.credit") or within(name, "sapo.errors")
            assert ours or name.partition(".")[0] in allowed, f"{module_name(path)} imports {name}"


def test_package_imports_no_notebook_figure_script_or_test():
    for path in sorted(PACKAGE.rglob("*.py")):
        roots = {name.partition(".")[0] for name in imports_in(path)}
        assert not roots & {"notebooks", "paper_figures", "benchmarks", "tests"}, module_name(path)


@pytest.mark.parametrize(
    ("module", "code", "imported"),
    [
        ("sapo.data.catalog", "def f():\n    import sapo.decoding.layout", "sapo.decoding.layout"),
        ("sapo.data.catalog", "from ..decoding import layout", "sapo.decoding.layout"),
        ("sapo.data.catalog", "from sapo import policy", "sapo.policy"),
        ("sapo.data.catalog", "from sapo import Policy", "sapo.policy.policy"),
        ("sapo.data.catalog", "from .interactions import Split", "sapo.data.interactions.Split"),
    ],
)
def test_every_way_to_import_is_seen(module: str, code: str, imported: str):
    assert set(imports_of(ast.parse(code), module)) == {imported}
