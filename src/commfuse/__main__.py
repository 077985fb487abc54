"""``python -m commfuse`` is ``commfuse``."""

import sys

from commfuse.cli import main

if __name__ == "__main__":  # ranks that are started from here import this file again
    sys.exit(main())
