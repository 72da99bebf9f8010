"""`python -m lorax_core` is the `lorax` command."""

from lorax_core.cli.main import main

if __name__ == "__main__":
    main()
