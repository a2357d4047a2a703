"""``python -m lowrank.cli`` is the command, too."""

from lowrank.cli import main

if __name__ == "__main__":
    main()
