"""`python -m ms4_wizard` is `ms4-wizard`."""

import sys

from ms4_wizard.cli import main

sys.exit(main())
