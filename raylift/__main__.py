"""`python -m raylift COMMAND ...`, the same as the `raylift` command."""

from raylift.platform.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
