"""Entry point of ``python -m lowrank``."""

from lowrank.cli import main

if __name__ == "__main__":
    main()
