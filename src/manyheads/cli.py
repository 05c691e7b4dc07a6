"""The `manyheads` command. commands.py and head_commands.py hold it, and need the `cli` extra."""

from __future__ import annotations

import sys

from manyheads.errors import ManyHeadsError


def main() -> None:
    """Run the command line; every error we raise on purpose becomes one clear line."""
    try:
        from manyheads.head_commands import app
    except ImportError as missing:
        sys.exit(
            f"manyheads: the command line needs a package that is not installed ({missing}). "
            "Install it with: pip install 'manyheads[cli]'"
        )
    try:
        app()
    except ManyHeadsError as problem:
        sys.exit(f"manyheads: {problem}")


if __name__ == "__main__":
    main()
