"""The versions of torch this package works with, checked before anything of torch's newer interfaces is touched."""

from __future__ import annotations

import torch
from packaging.version import Version

MINIMUM_TORCH = Version("2.11")


def check_torch(version: str) -> None:
    """Raises ImportError, saying what to install, where `version` of torch is too old."""
    # A nightly (2.11.0.dev) or a vendor's local build (2.11.0a0+nv) of a supported release counts as that release.
    if Version(Version(version).base_version) < MINIMUM_TORCH:
        raise ImportError(
            f"sla_compile needs torch {MINIMUM_TORCH} or newer, found torch {version}; "
            f'install one with: pip install "torch>={MINIMUM_TORCH}"',
            name="torch",
        )


check_torch(torch.__version__)
