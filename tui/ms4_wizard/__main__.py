"""`python -m ms4_wizard` is `ms4-wizard`."""

import sys

from ms4_wizard.cli import main

if __name__ == "__main__":
    sys.exit(main())
