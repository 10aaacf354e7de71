"""Run the `persample` command by `python -m persample`, as `torchrun` does."""

from persample.cli import main

if __name__ == "__main__":
    main()
