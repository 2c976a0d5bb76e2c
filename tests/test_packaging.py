"""The files around the code agree with each other, and what is built from them is whole."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import sapo

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
RUNTIME = {r.name: r.specifier for r in map(Requirement, PROJECT["dependencies"])}
DEV = {r.name: r.specifier for r in map(Requirement, PROJECT["optional-dependencies"]["dev"])}
EXACT_IN_CONDA = {"torch", "transformers", "trl"}  # the rest is bounded as in pyproject.toml


def constraints() -> dict[str, Version]:
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
    return {name: Version(version) for name, version in (line.split("==") for line in lines)}


def our_files() -> list[Path]:
    """What git tracks."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    try:
        names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"git does not list this folder's files ({error})")
    return [ROOT / name for name in names if (ROOT / name).is_file()]  # not the deleted ones that git still tracks


def test_what_the_package_imports_is_declared():
    """Standard library, itself, and the dependencies of the project or of an extra."""
    names = {"sklearn": "scikit-learn", "sentence_transformers": "sentence-transformers"}
    extras = {r.name for extra in PROJECT["optional-dependencies"].values() for r in map(Requirement, extra)}
    known = RUNTIME.keys() | extras | {"verl", "sapo"}
    found = set()
    for path in (ROOT / "sapo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    assert {names.get(name, name) for name in found - sys.stdlib_module_names} <= known


def test_constraints_pin_every_dependency_within_its_range():
    pins = constraints()
    ranges = RUNTIME | DEV
    assert pins.keys() == ranges.keys()
    assert not {name: str(pins[name]) for name in pins if pins[name] not in ranges[name]}


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_constraints_are_the_upper_ends(name: str):
    pin = constraints()[name]
    assert Version(f"{pin.major}.{pin.minor + 1}") not in RUNTIME[name]


def test_trl_is_pinned_exactly():
    assert str(RUNTIME["trl"]) == f"=={constraints()['trl']}"


def test_environment_agrees_with_pyproject_and_constraints():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    assert environment["name"] == PROJECT["name"]
    assert environment["channels"] == ["conda-forge", "nodefaults"]

    *conda, last = environment["dependencies"]
    *pip, ourselves = last["pip"]
    assert ourselves == "-e .[dev]"
    python = next(spec for spec in conda if spec.startswith("python="))
    assert Version(python.removeprefix("python=")) in SpecifierSet(PROJECT["requires-python"])

    listed = [Requirement(spec) for spec in [*conda, *pip] if spec not in (python, "pip")]
    exact = {name: SpecifierSet(f"=={version}") for name, version in constraints().items() if name in EXACT_IN_CONDA}
    assert len(listed) == len(RUNTIME)
    assert {r.name: r.specifier for r in listed} == RUNTIME | exact


def test_version_is_one():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert sapo.__version__ == PROJECT["version"] == citation["version"]
    assert f"\n## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_license_is_apache_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert PROJECT["license"] == citation["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_citation_names_software_and_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["type"] == "software"
    (paper,) = citation["references"]
    families = [author["family-names"] for author in paper["authors"]]
    assert families == ["Zheng", "Min", "Zhu", "Wu", "Hong", "Chen", "Li"]
    assert [identifier["value"] for identifier in paper["identifiers"]] == ["arXiv:2605.17648"]


def test_readme_names_the_two_commands():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert "make reproduce" in readme
    assert "make test" in readme


def test_ci_calls_make_test_only():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    shebang, *commands = script.read_text("utf-8").splitlines()
    assert shebang == "#!/usr/bin/env bash"
    assert commands == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "make test"]


def make(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`make` as a user types it, whatever make started these tests."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def test_make_alone_lists_every_target():
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert phony
    listed = re.findall(r"^ +make ([\w-]+)", make().stdout, re.MULTILINE)
    assert sorted(listed) == sorted(phony[1].split())


def test_make_reproduce_hands_its_variables_on():
    done = make("-n", "reproduce", "DATA=my data", "OUT=my out", "PRESET=small")
    assert '.venv/bin/sapo run --preset small --out "my out" --data "my data"\n' in done.stdout
    assert done.stdout.endswith('.venv/bin/sapo figures --out "my out"\n')
    assert "--data" not in make("-n", "reproduce").stdout


def test_make_names_the_python_it_needs(tmp_path: Path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "python3.8"
    old.write_text("#!/bin/sh\nexit 1\n")  # what the version check of an older Python answers
    old.chmod(0o755)
    done = make("test", f"PYTHON={old}", cwd=tmp_path)
    assert done.returncode != 0
    assert "sapo needs Python 3.11 to 3.13" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_wheel_holds_the_package_and_nothing_else(tmp_path: Path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "sapo", source / "sapo", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", source / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", tmp_path, source]
    subprocess.run(build, check=True, capture_output=True)

    (wheel,) = tmp_path.glob("sapo-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = {Path(name).name for name in archive.namelist()}
    assert names == {str(path.relative_to(source)) for path in (source / "sapo").rglob("*") if path.is_file()}
    assert "sapo/py.typed" in names
    assert {"LICENSE", "entry_points.txt"} <= metadata


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?<![\w.])/(?:work|root|farm|home)/",
        r"\b(?:pypi\.org|pythonhosted\.org|test\.pypi|download\.pytorch|anaconda\.org|anaconda\.com)",
    ],
    ids=["machine path", "registry host"],
)
def test_no_file_names(pattern: str):
    files = our_files()
    assert len(files) > 10
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in files
        for match in re.finditer(pattern, path.read_text("utf-8", errors="ignore"))
    ]
    assert not found
