"""What all tests share."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # helper modules beside the tests, which importlib mode leaves out


@pytest.fixture(autouse=True)
def private_compile_cache(tmp_path_factory, monkeypatch):
    """Compiles afresh: Inductor's disk cache keys on an op's name, not its body, and would serve an older one."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "inductor"))
    yield
    torch._dynamo.reset()
