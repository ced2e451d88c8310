"""`python -m perigee`, as the supervisor starts its children."""

import sys

from perigee.cli import main

sys.exit(main())
