"""`python -m embedding_service`: the command line."""

from embedding_service.cli import main

if __name__ == "__main__":
    main()
