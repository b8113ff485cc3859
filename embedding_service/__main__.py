"""The command line's door: `embedding-service`, or `python -m embedding_service`."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line. If only the client side is installed, say what to install."""
    # For grpc, before it is imported. It writes a line for each call that it refuses by itself. Strangers could fill
    # logs.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # For grpc too. These are the ciphers of TLS 1.2, and it has no setting for the oldest version. A cipher that needs
    # a key that both sides share, of which there is none, leaves TLS 1.3 alone.
    os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-PSK-AES128-CBC-SHA"
    try:
        from embedding_service import cli
    except ModuleNotFoundError as error:
        sys.exit(
            f"error: the commands need the server side, and {error.name} is not installed: "
            "pip install 'embedding-service[cpu]', or `make setup` in a checkout"
        )
    cli.main()


if __name__ == "__main__":
    main()
