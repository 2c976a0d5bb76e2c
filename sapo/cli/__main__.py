"""`python -m sapo.cli`, as `accelerate launch` starts it."""

from sapo.cli import main

if __name__ == "__main__":
    main()
