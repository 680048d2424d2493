"""These tests run where Triton can: in its interpreter (TRITON_INTERPRET=1), or with a GPU."""

from __future__ import annotations

import os

import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available() else ["test_*.py"]
