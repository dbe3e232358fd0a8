"""What the subcommands of the command line share."""

from __future__ import annotations

import argparse

import torch

Subcommands = argparse._SubParsersAction  # the type of add_subparsers has no public name


class UsageError(Exception):
    """What the user gave cannot be done; the text says what was expected, what came and what to do."""


def device_named(name: str) -> torch.device:
    """The device of an option ``--device``; auto takes cuda where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: no such device; give cpu, cuda or cuda:<index>") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: sparse-linear attention runs on cpu and cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {name}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices here"
        )
    return device


def count(text: str, minimum: int = 1) -> int:
    """An argparse type: a whole number of at least `minimum`."""
    try:
        value = int(text)
    except ValueError:
        value = minimum - 1
    if value < minimum:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {minimum}, got {text!r}")
    return value
