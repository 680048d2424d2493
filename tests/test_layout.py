"""The repository's own promises: one namespace, imports in one direction, fresh stubs, no paths of a machine."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE_ROOTS = ("server", "kernels", "adapters_store", "tuning", "proto")

# Which parts of ours each part may import, beside itself.
ALLOWED = {
    "errors": set(),
    "v1": set(),
    "client": {"v1", "errors"},
    "kernels": set(),
    "adapters": {"kernels", "errors"},
    "models": {"kernels", "errors"},
    "engine": {"models", "kernels", "errors"},
    "api": {"engine", "models", "adapters", "kernels", "client", "v1", "errors"},
    "tuning": {"adapters", "models", "kernels", "client", "errors"},
}


def our_files() -> list[Path]:
    return [path for root in SOURCE_ROOTS for path in sorted((ROOT / root).rglob("*.py")) if "_pb2" not in path.name]


def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name]


def test_source_roots_are_one_namespace() -> None:
    for root in SOURCE_ROOTS:
        assert not (ROOT / root / "__init__.py").exists()
        assert not (ROOT / root / "overtone" / "__init__.py").exists()
        for package in (ROOT / root / "overtone").iterdir():
            if package.is_dir() and package.name != "__pycache__":
                assert (package / "py.typed").exists(), package


@pytest.mark.parametrize("path", our_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    part = path.relative_to(ROOT).parts[2]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            if name.startswith("overtone."):
                imported = name.split(".")[1]
                assert imported == part or imported in ALLOWED[part], f"{part} must not import {name}"


def test_nothing_that_serves_imports_what_tunes() -> None:
    """Not even when it runs: the command line knows its commands by name, and a server never looks one up."""
    program = (
        "import sys, overtone.api.cli, overtone.api.cli.serve, overtone.api.server, overtone.api.backend, overtone.client\n"
        "found = [name for name in sys.modules if name.startswith('overtone.tuning')]\n"
        "assert not found, found"
    )
    subprocess.run(
        [sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert not any("tuning" in allowed for allowed in ALLOWED.values())


def test_stubs_are_fresh(tmp_path: Path) -> None:
    import google.api

    includes = Path(next(iter(google.api.__path__))).parents[1]
    scripts = Path(sys.executable).parent
    protos = sorted((ROOT / "proto").rglob("*.proto"))
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT / "proto"), "-I", str(includes)]
        + [f"--plugin=protoc-gen-{name}={scripts / f'protoc-gen-{name}'}" for name in ("mypy", "mypy_grpc")]
        + [f"--{kind}_out={tmp_path}" for kind in ("python", "mypy", "grpc_python", "mypy_grpc")]
        + [str(proto) for proto in protos],
        check=True,
        capture_output=True,
    )
    made = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*_pb2*")}
    kept = {
        str(p.relative_to(ROOT / "proto")) for p in (ROOT / "proto").rglob("*_pb2*") if "__pycache__" not in p.parts
    }
    assert made == kept
    for name in made:
        assert (tmp_path / name).read_text() == (ROOT / "proto" / name).read_text(), f"{name}: run `make proto`"


def test_every_error_has_its_own_place() -> None:
    import grpc

    from overtone import errors

    classes = errors.tree()
    drawn = errors.__doc__ or ""
    reasons = [cls.reason for cls in classes]
    assert len(set(reasons)) == len(reasons)
    for cls in classes:
        assert re.fullmatch(r"[A-Z][A-Z0-9_]+[A-Z0-9]", cls.reason)
        assert len(cls.reason) <= 63
        assert grpc.StatusCode[cls.grpc_code]
        assert re.search(rf"\b{cls.__name__}\b", drawn), f"{cls.__name__} is missing from the drawn tree"
        assert errors.for_wire(cls.reason, cls.grpc_code) is cls


def test_nothing_names_a_machine() -> None:
    pattern = re.compile(r"/(?:home|root|work|Users)/[A-Za-z0-9_.-]+/")
    for name in tracked_files():
        path = ROOT / name
        if path.suffix in {".png", ".svg", ".gz"} or not path.is_file():
            continue
        assert not pattern.search(path.read_text(encoding="utf-8", errors="replace")), name
