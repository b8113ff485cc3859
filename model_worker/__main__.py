"""The command line's door: `model-worker`, or `python -m model_worker`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line. If only the client side is installed, say what to install."""
    try:
        from model_worker import cli
    except ModuleNotFoundError as error:
        sys.exit(
            f"error: the worker's packages are missing, first of all {error.name}: "
            "pip install 'embedding-service[worker]', or `make setup` in a checkout"
        )
    cli.main()


if __name__ == "__main__":
    main()
