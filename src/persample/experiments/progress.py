"""Progress of a training run in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from persample.experiments.config import TrainConfig
from persample.experiments.records import Record


class LiveProgress(Progress):
    """A bar for each optimizer; a line for each epoch if the output is not a terminal.

    It is a `persample.experiments.train.Watcher`, used inside its own `with` block.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(
            TextColumn("{task.description:<4}"),
            BarColumn(),
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}  {task.fields[result]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks_of_runs: dict[TrainConfig, TaskID] = {}

    def on_batch(self, config: TrainConfig, epoch: int, batch: int, batches: int, loss: float) -> None:
        """Move the bar on."""
        self.update(
            self._task(config),
            total=config.epochs * batches,
            completed=(epoch - 1) * batches + batch,
            epoch=epoch,
        )

    def on_epoch(self, config: TrainConfig, epoch: int, records: list[Record]) -> None:
        """Show the metrics on the held-out data, if measured; for VOGN those of the averaged predictions."""
        measured = [r for r in records if r.epoch == epoch and r.split != "train"]
        if not measured:
            return
        metrics = measured[-1].metrics
        result = f"{measured[-1].split} accuracy {metrics.accuracy:.1%}, log loss {metrics.log_loss:.3f}"
        self.update(self._task(config), epoch=epoch, result=result)
        if not self.console.is_terminal:
            self.console.print(f"{config.optimizer} epoch {epoch}/{config.epochs}: {result}")

    def _task(self, config: TrainConfig) -> TaskID:
        if config not in self._tasks_of_runs:
            self._tasks_of_runs[config] = self.add_task(
                config.optimizer, total=None, epoch=0, epochs=config.epochs, result=""
            )
        return self._tasks_of_runs[config]
