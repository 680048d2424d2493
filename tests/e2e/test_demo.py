"""`overtone demo` does the main job and says so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.demo import demo_cache, needs_demo


@needs_demo
@pytest.mark.timeout(900)
def test_demo_runs_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "models").symlink_to(demo_cache())
    command = [sys.executable, "-m", "overtone.api.cli", "demo", "--store", str(tmp_path), "--adapters", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "hot-loaded loca-2" in done.stdout
    assert re.search(r"tokens from 3 adapters and the base", done.stdout)
    for name in ("(base model)", "loca-0", "sdctft-1", "loca-2"):
        assert name in done.stdout
    assert "stopped with status 0" in done.stdout
