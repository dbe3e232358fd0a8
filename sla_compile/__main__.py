"""``python -m sla_compile``, the same as the console script ``sla-compile``."""

from sla_compile.cli import main

raise SystemExit(main())
