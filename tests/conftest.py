"""What all tests share."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # helper modules beside the tests, which importlib mode leaves out

# Inductor compiles a program for each vector instruction set, in each fresh cache, only to see that it can; a pool of
# processes that each import torch gains nothing where the cores run tests; what calls a package's kernels may be slow.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")


@pytest.fixture(autouse=True)
def private_compile_cache(tmp_path_factory, monkeypatch):
    """Compiles afresh: Inductor's disk cache keys on an op's name, not its body, and would serve an older one."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "inductor"))
    yield
    torch._dynamo.reset()
