"""`python -m provenn` is `provenn`."""

import sys

from provenn.cli import main

sys.exit(main())
