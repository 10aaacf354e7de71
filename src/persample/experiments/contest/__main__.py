"""Run the contest by `python -m persample.experiments.contest`, which needs neither typer nor rich."""

from persample.experiments.contest.command import main

if __name__ == "__main__":
    main()
