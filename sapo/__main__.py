"""`python -m sapo`: the command."""

from sapo.cli import main

if __name__ == "__main__":
    main()
