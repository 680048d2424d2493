"""A server on a CPU needs no Triton: nothing that it imports does."""

from __future__ import annotations

import subprocess
import sys

_IMPORTS = "overtone.api.cli, overtone.api.server, overtone.api.backend, overtone.engine.runner, overtone.models.merged"


def test_the_server_imports_without_it() -> None:
    program = f"import sys; sys.modules['triton'] = None; import {_IMPORTS}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
