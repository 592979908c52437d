"""`python -m nanoflow`."""

from __future__ import annotations

import sys

from nanoflow.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
