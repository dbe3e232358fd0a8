"""What the subcommands of the command line share."""

from __future__ import annotations

import argparse

Subcommands = argparse._SubParsersAction  # the type of add_subparsers has no public name


class UsageError(Exception):
    """What the user gave cannot be done; the text says what was expected, what came and what to do."""
