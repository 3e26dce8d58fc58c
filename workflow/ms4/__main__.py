"""`python -m ms4` is `ms4`."""

from ms4.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
