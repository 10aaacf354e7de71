"""The published comparison: its settings, its scores, and that it does not depend on how many run at a time."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from persample.errors import DataError, OptionError
from persample.experiments.australian_credit.scores import Run, Score, read_csv, write_csv
from persample.experiments.australian_credit.settings import METHODS, PUBLISHED, Setting, make_optimizer
from persample.experiments.australian_credit.train import measure, train, train_all
from persample.experiments.data.australian import TableDataset, load_australian
from persample.experiments.seeds import make_generator
from persample.experiments.tables import australian_table
from persample.testing.devices import generator_of
from persample.vogn import VOGN, MeanFieldVI, Vadam


@pytest.fixture(scope="module")
def data() -> TableDataset:
    """40 rows to train and 30 to test, which a line separates for the most part."""
    generator = generator_of(0)
    inputs = torch.randn(70, 14, generator=generator)
    targets = (inputs[:, 0] + 0.3 * torch.randn(70, generator=generator) > 0).float()
    return TableDataset(inputs[:40], targets[:40], inputs[40:], targets[40:])


class TestData:
    def test_is_the_published_split(self, real_data: Path) -> None:
        data = load_australian(real_data)
        assert data.train_inputs.shape == data.test_inputs.shape == (345, 14)
        assert data.train_targets.shape == data.test_targets.shape == (345,)
        folder = real_data / "australian"
        for name, tensor in {"X_tr": data.train_inputs, "y_te": data.test_targets}.items():
            expected = np.loadtxt(folder / f"australian_scale_{name}.csv")
            np.testing.assert_array_equal(tensor.numpy(force=True), expected.astype(np.float32))
        assert set(data.train_targets.unique().tolist()) == {0.0, 1.0}
        assert data.train_inputs.abs().max() == 1

    def test_a_damaged_file_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "australian").mkdir()
        (tmp_path / "australian" / "australian_scale_X_tr.csv").write_text("1 2 3")
        with pytest.raises(DataError, match=r"australian_scale_X_tr\.csv is not the published file"):
            load_australian(tmp_path)


class TestSettings:
    @pytest.mark.parametrize("method", METHODS)
    def test_all_begin_at_the_prior_width(self, method: str) -> None:
        model = nn.Linear(3, 1)
        optimizer = make_optimizer(Setting(method, 16, 16), model, 345, generator_of(0))
        kinds: dict[str, type] = {"VOGN": VOGN, "Vadam": Vadam, "mean-field VI": MeanFieldVI}
        assert isinstance(optimizer, kinds[method])
        for precision in optimizer.posterior.precision.values():
            torch.testing.assert_close(precision, torch.ones_like(precision))
        for precision in optimizer.prior.precision.values():
            assert (precision == 1).all()
        assert optimizer.param_groups[0]["lr"] == 1e-3
        assert optimizer.mc_samples == 16

    def test_every_method_has_three_published_settings(self) -> None:
        assert [(s.method, s.batch_size, s.draws) for s in PUBLISHED] == [
            (method, *sizes) for method in METHODS for sizes in ((1, 1), (16, 16), (128, 16))
        ]


class TestScores:
    def test_against_numpy(self, data: TableDataset) -> None:
        """The scores of a posterior with known weights, from draws made by hand."""
        model = nn.Sequential(nn.Linear(14, 1), nn.Flatten(0))
        setting = Setting("VOGN", 4, 2)
        optimizer = make_optimizer(setting, model, 40, generator_of(1))
        for rows in torch.arange(40).split(8):
            optimizer.observe(data.train_inputs[rows], data.train_targets[rows])
            optimizer.step()
        score = measure(Run(setting, 3, 1), optimizer, data)

        posterior, generator = optimizer.posterior, make_generator(3, "evaluation")
        x, y, xt, yt = (t.double().numpy(force=True) for t in vars(data).values())

        def table(inputs: np.ndarray, targets: np.ndarray, draws: int) -> np.ndarray:
            rows = []
            for _ in range(draws):
                weights = {name: w.double().numpy(force=True) for name, w in posterior.sample(generator).items()}
                logits = (inputs @ weights["0.weight"].T + weights["0.bias"]).ravel()
                rows.append(-np.logaddexp(0, np.where(targets == 1, -logits, logits)))
            return np.stack(rows)

        kl = posterior.kl(1.0).item()
        on_training_data, on_test_data = table(x, y, 1000), table(xt, yt, 1000)
        due = [(kl - part.sum(1).mean()) / 40 for part in np.split(on_training_data, 100)]
        np.testing.assert_allclose(score.negative_elbos, due, rtol=1e-5)
        due = [-math.log(np.exp(part.sum(1)).mean()) / 30 for part in np.split(on_test_data, 100)]
        np.testing.assert_allclose(score.test_log_losses, due, rtol=1e-5)
        assert score.averaged_log_loss == pytest.approx(-np.log(np.exp(on_test_data).mean(0)).mean(), rel=1e-5)


class TestRuns:
    @pytest.mark.parametrize("method", METHODS)
    def test_learn(self, method: str, data: TableDataset) -> None:
        before, after = (train(Run(Setting(method, 8, 2), 0, epochs), data) for epochs in (0, 60))
        assert sum(after.negative_elbos) < sum(before.negative_elbos)

    def test_do_not_depend_on_jobs_and_leave_the_global_noise(self, data: TableDataset) -> None:
        runs = [Run(Setting(method, 16, 2), seed, 1) for method in ("VOGN", "Vadam") for seed in range(2)]
        state = torch.random.get_rng_state()
        one = {score.run: score for score in train_all(runs, data)}
        assert torch.random.get_rng_state().equal(state)
        two = {score.run: score for score in train_all(runs, data, jobs=2)}
        assert one.keys() == two.keys() == set(runs)
        for run in runs:
            assert one[run].negative_elbos == pytest.approx(two[run].negative_elbos, rel=1e-6)

    def test_refuse_less_than_one_job(self, data: TableDataset) -> None:
        with pytest.raises(OptionError, match="at least 1"):
            list(train_all([], data, jobs=0))


def scores() -> list[Score]:
    return [
        Score(Run(Setting("VOGN", 1, 1), seed, 16), (0.9 + 0.1 * seed, 0.95), (0.4, 0.38 - 0.1 * seed), 0.3)
        for seed in range(2)
    ]


def test_the_table_has_ours_beside_the_published() -> None:
    table = australian_table(scores())
    cells = [next(iter(column.cells)) for column in table.columns]
    ours = ["0.950 ± 0.041", "0.938", "25%", "0.365 ± 0.057", "0.384", "50%", "0.300 ± 0.000"]
    assert cells == ["VOGN", "1", "1", *ours]


class TestFile:
    def test_has_every_run_and_is_read_again(self, tmp_path: Path) -> None:
        write_csv(scores(), tmp_path / "scores.csv")
        with (tmp_path / "scores.csv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        expected = [("VOGN", "0", "16"), ("VOGN", "1", "16")]
        assert [(row["method"], row["seed"], row["epochs"]) for row in rows] == expected
        assert read_csv(tmp_path / "scores.csv") == scores()

    def test_is_empty_if_it_is_not_there(self, tmp_path: Path) -> None:
        assert read_csv(tmp_path / "scores.csv") == []

    @pytest.mark.parametrize("content", ["a,b\n1,2\n", "method,batch_size,draws,seed,epochs\nVOGN,x,1,0,1\n"])
    def test_of_another_kind_is_refused(self, content: str, tmp_path: Path) -> None:
        (tmp_path / "scores.csv").write_text(content)
        with pytest.raises(DataError, match="not a table of scores"):
            read_csv(tmp_path / "scores.csv")
