"""The contest: its plan, each method against an independent truth, and all of it from the command line."""

from __future__ import annotations

import csv
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from persample import Ensemble, Posterior, metrics
from persample.errors import DataError, OptionError
from persample.experiments.contest.command import contest, main
from persample.experiments.contest.course import Course
from persample.experiments.contest.data import in_format_of
from persample.experiments.contest.methods import METHODS, DropoutNetworks, sure, with_dropout
from persample.experiments.contest.report import read_json, table, write_json
from persample.experiments.contest.running import OutOfTime, fit, measure
from persample.experiments.contest.settings import BUDGETS, SMALL, TRIALS
from persample.experiments.contest.tasks import Result, Results, Task, chosen, plan
from persample.experiments.data import ImageDataset


@pytest.fixture
def course(digits: ImageDataset) -> Course:
    """40 digits to train on, and 20 to predict."""
    data = replace(digits, name="mnist")
    return Course(
        data=data,
        outside=data.test_inputs.flip(2),
        epochs=3,
        batch_size=16,
        seed=0,
        device=torch.device("cpu"),
    )


def solved(datasets: tuple[str, ...], losses: dict[Task, float] | None = None) -> tuple[list[Task], Results]:
    """Do tasks in the order of the plan, until none is left; the order, and results with these losses, else 1."""
    order: list[Task] = []
    results: dict[Task, Result] = {}
    while True:
        for task in plan(datasets, results):
            if task not in results and all(need in results for need in task.needs()):
                break
        else:
            return order, results
        order.append(task)
        scores = dict.fromkeys(("accuracy", "calibration_error", "brier", "auroc"), 0.5)
        results[task] = Result(scores | {"log_loss": (losses or {}).get(task, 1.0)}, 0.0, "cpu")


class TestPlan:
    def test_all_methods_have_as_many_trials_in_settings_that_differ(self) -> None:
        for tried in TRIALS.values():
            trained = {name for name, method in METHODS.items() if method.runs == 1}
            assert tried.keys() == trained
            assert {len(settings) for settings in tried.values()} == {6}
            for settings in tried.values():
                assert len({tuple(one.items()) for one in settings}) == 6
                assert len({tuple(one) for one in settings}) == 1

    def test_has_trials_then_three_seeds_and_three_ensembles_of_others(self) -> None:
        order, results = solved(("mnist",))
        assert len(order) == len(set(order))
        for name, method in METHODS.items():
            runs = [task for task in order if task.method == name and not task.trial]
            members = any(other.of == name and other.runs > 1 for other in METHODS.values())
            assert {task.seed for task in runs} == set(range(9 if members else 3))
            assert {task.settings for task in runs} == {chosen("mnist", name, results)}
            if method.runs == 3:
                taken = [need.seed for task in runs for need in task.needs()]
                assert sorted(taken) == list(range(9))
        for task in order:
            assert all(order.index(need) < order.index(task) for need in task.needs())

    def test_begins_with_what_matters_most(self) -> None:
        order, _ = solved(("cifar10", "mnist"))
        first = {
            kind: next(n for n, task in enumerate(order) if (task.dataset, task.trial, task.seed) == kind)
            for kind in (("cifar10", True, 0), ("cifar10", False, 0), ("mnist", True, 0), ("cifar10", False, 8))
        }
        assert sorted(first.values()) == list(first.values())

    def test_takes_the_settings_of_the_lowest_log_loss(self) -> None:
        adam = (("lr", 1e-3),)
        losses = {
            Task("mnist", "Adam", adam, 0, True): 0.5,
            Task("mnist", "Laplace", (*adam, ("prior_precision", 300.0)), 0, True): 0.2,
        }
        _, results = solved(("mnist",), losses)
        assert chosen("mnist", "Adam", results) == chosen("mnist", "3 × Adam", results) == adam
        assert chosen("mnist", "Laplace", results) == (*adam, ("prior_precision", 300.0))
        run = Task("mnist", "Laplace", (*adam, ("prior_precision", 300.0)), 2, False)
        assert run.needs() == [Task("mnist", "Adam", adam, 2, False)]

    def test_a_method_without_a_good_trial_has_no_runs(self) -> None:
        results = {task: Result({}, 0.0, "cpu", "diverged") for task in plan(("mnist",), {}) if task.method == "Vadam"}
        assert chosen("mnist", "Vadam", results) is None
        assert all(task.trial for task in plan(("mnist",), results) if task.method == "Vadam")


#: 40 samples say little against a prior for 60,000.
FOR_FEW_SAMPLES = {
    "VOGN": {"prior_precision": 1.0, "temperature": 1e-4},
    "IVON": {"prior_precision": 0.1, "temperature": 0.01},
    "Vadam": {"prior_precision": 1e3, "temperature": 1e-6, "lr": 0.01},
}


class TestMethods:
    @pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.start])
    def test_learn_and_are_repeatable(self, name: str, course: Course) -> None:
        course = replace(course, epochs=40)
        probabilities = []
        for _ in range(2):
            torch.manual_seed(0)
            start = METHODS[name].start
            assert start is not None
            training = start(course, **TRIALS["mnist"][name][0] | FOR_FEW_SAMPLES.get(name, {}))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of tiny data
                fit(training, course)
            predictor = training.predictor()
            generator = course.generator("evaluation")
            prediction = predictor.predict(course.data.train_inputs, samples=8, generator=generator, rows_at_once=7)
            probabilities.append(prediction.probabilities)
        assert torch.equal(*probabilities)
        torch.testing.assert_close(probabilities[0].sum(1), torch.ones(40))
        assert metrics.log_loss(probabilities[0], course.data.train_targets) < 0.9 * math.log(10)

    def test_adam_is_pytorch_s_with_a_cosine(self, course: Course) -> None:
        start = METHODS["Adam"].start
        assert start is not None
        training = start(course, lr=0.01)
        seen: list[torch.Tensor] = []
        step = training.step
        training.step = lambda inputs, targets: (seen.append(inputs), step(inputs, targets))[1]
        fit(training, course)

        model = course.network()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        targets = {
            image.numpy(force=True).tobytes(): label
            for image, label in zip(course.data.train_inputs, course.data.train_targets, strict=True)
        }
        assert [len(inputs) for inputs in seen] == [16, 16, 8] * 3
        for index, inputs in enumerate(seen):
            optimizer.param_groups[0]["lr"] = 0.01 * (1 + math.cos(math.pi * index / 9)) / 2
            optimizer.zero_grad()
            labels = torch.stack([targets[image.numpy(force=True).tobytes()] for image in inputs])
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        learned = training.predictor()
        assert isinstance(learned, Posterior)
        for name, p in model.named_parameters():
            torch.testing.assert_close(learned.mean[name], p.detach())
            assert learned.variance[name].eq(0).all()

    def test_swag_has_mean_and_variance_of_the_later_epochs(self, course: Course) -> None:
        course = replace(course, epochs=5)
        start = METHODS["SWAG"].start
        assert start is not None
        training = start(course, lr=0.01, swa_lr=0.001)
        path: list[dict[str, torch.Tensor]] = []
        after = training.after_epoch
        named = dict(course.network().named_parameters())

        def watched(epoch: int) -> None:
            after(epoch)
            values = [p.detach().double().clone() for p in training.optimizer.param_groups[0]["params"]]
            path.append(dict(zip(named, values, strict=True)))

        training.after_epoch = watched
        fit(training, course)
        learned = training.predictor()
        assert isinstance(learned, Posterior)
        for name in named:
            later = torch.stack([weights[name] for weights in path[2:]])
            torch.testing.assert_close(learned.mean[name].double(), later.mean(0), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(
                learned.variance[name].double(), later.var(0, correction=0), rtol=1e-2, atol=1e-7
            )
        assert [training.schedule(done) for done in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.1, 0.1])

    def test_dropout_averages_networks(self, course: Course) -> None:
        model = with_dropout(course.network(), 0.5)
        assert [type(layer) for layer in model][-2:] == [nn.Dropout, nn.Linear]
        inputs = course.data.test_inputs
        torch.manual_seed(3)
        predicted = DropoutNetworks(model).predict(inputs, samples=3, generator=None, rows_at_once=None)
        torch.manual_seed(3)
        draws = torch.stack([model.train()(inputs).softmax(1).detach() for _ in range(3)]).double()
        mean = draws.mean(0)
        entropy = -(mean * mean.log()).sum(1)
        torch.testing.assert_close(predicted.probabilities.double(), mean, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(predicted.entropy.double(), entropy, rtol=1e-5, atol=1e-6)
        information = entropy + (draws * draws.log()).sum(2).mean(0)
        torch.testing.assert_close(predicted.mutual_information.double(), information, rtol=1e-4, atol=1e-5)

    def test_laplace_of_the_last_layer_leaves_the_others(self, course: Course) -> None:
        network = sure(course.network())
        convert, whole = METHODS["Laplace, last layer"].convert, METHODS["Laplace"].convert
        assert convert is not None
        assert whole is not None
        last, both = (make(course, network, prior_precision=30.0) for make in (convert, whole))
        assert isinstance(last, Posterior)
        assert isinstance(both, Posterior)
        assert list(last.mean) == ["7.weight", "7.bias"]
        assert list(both.mean) == list(network.mean)
        for name, mean in last.mean.items():
            assert torch.equal(mean, network.mean[name])
            torch.testing.assert_close(last.precision[name], both.precision[name])

    def test_scores_of_a_sure_network(self, course: Course) -> None:
        model = course.network()
        scores = measure(sure(model), course, 1, outside=True)
        with torch.no_grad():
            log_probabilities = model(course.data.test_inputs).double().log_softmax(1)
        targets = course.data.test_targets
        assert scores["log_loss"] == pytest.approx(F.nll_loss(log_probabilities, targets).item(), rel=1e-5)
        assert scores["accuracy"] == (log_probabilities.argmax(1) == targets).double().mean().item()
        assert 0 <= scores["auroc"] <= 1
        assert "auroc" not in measure(sure(model), course, 1, outside=False)

    def test_stop_when_the_time_is_over(self, course: Course) -> None:
        start = METHODS["Adam"].start
        assert start is not None
        with pytest.raises(OutOfTime):
            fit(start(course, lr=0.01), course, end=0.0)

    def test_an_ensemble_averages_its_members(self, course: Course) -> None:
        members = [sure(replace(course, seed=seed).network()) for seed in range(3)]
        inputs = course.data.test_inputs
        predicted = Ensemble(members).predict(inputs, samples=1)
        mean = torch.stack([m.predict(inputs, samples=1).probabilities for m in members]).mean(0)
        torch.testing.assert_close(predicted.probabilities, mean)


def test_images_of_another_kind_get_the_format() -> None:
    images = torch.stack([torch.linspace(-1, 3, 100), torch.linspace(-2, 5, 100)]).view(1, 2, 10, 10)
    others = torch.tensor([[0.0, 1.0], [2.0, 4.0]]).view(1, 1, 2, 2)
    found = in_format_of(images, others)
    assert found.shape == (1, 2, 10, 10)
    torch.testing.assert_close(found[0, 0, 4:6, 4:6], torch.tensor([[-1.0, 0.0], [1.0, 3.0]]))
    torch.testing.assert_close(found[0, 1, 4:6, 4:6], torch.tensor([[-2.0, -0.25], [1.5, 5.0]]))
    assert (found[0, 0, 0] == -1).all()
    assert (found[0, 1, :, -1] == -2).all()


class TestReport:
    def test_is_read_as_written(self, tmp_path: Path) -> None:
        _, results = solved(("mnist",))
        about, costs = {"budgets": {}, "machine": "m"}, {"mnist": {"Adam": 1.0}}
        write_json(tmp_path / "results.json", about, costs, results)
        assert read_json(tmp_path / "results.json") == (about, costs, results)

    def test_a_damaged_file_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "results.json").write_text(json.dumps({"contest": {}}))
        with pytest.raises(DataError, match=r"results\.json is not a file of a contest, or is damaged"):
            read_json(tmp_path / "results.json")

    def test_sorts_by_log_loss_and_marks_the_best_single_network(self) -> None:
        order, _ = solved(("mnist",))
        losses = {task: 0.3 for task in order if task.method == "SWAG"}
        losses |= {task: 0.2 for task in order if task.method == "3 × VOGN"}
        _, results = solved(("mnist",), losses)
        lines = table("mnist", results, {"mnist": {"VOGN": 1.5, "Adam": 1.0, "SWAG": 1.0}}).splitlines()[2:]
        assert lines[0].startswith("| 3 × VOGN | 0.2000 ± 0.0000 |")
        assert lines[0].endswith("| 3 | 4.5 | 96 |")
        assert lines[1].startswith("| SWAG | **0.3000 ± 0.0000** |")


def test_the_whole_contest_goes_on(real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--small", "--data-dir", str(real_data), "--out", str(tmp_path), "--dataset", "mnist", "--seeds", "1"]
    main([*small, "--devices", "cpu:1", "--minutes", "0.02"])
    first = json.loads((tmp_path / "results.json").read_text())["results"]
    main([*small, "--devices", "cpu:2"])
    rows = json.loads((tmp_path / "results.json").read_text())["results"]
    assert rows[: len(first)] == first
    assert len(rows) == 6 * 9 + 9
    assert not [row for row in rows if row["problem"]]
    with (tmp_path / "results.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert (tmp_path / "contest.png").stat().st_size > 10_000
    capsys.readouterr()
    main([*small, "--minutes", "0"])
    assert "| VOGN | lr" in capsys.readouterr().out


def test_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no data set 'cifar'; choose among cifar10, mnist"):
        contest(out=tmp_path, datasets=("cifar",))
    for devices in ("cpu", "cpu:0", "cpu:x", "nowhere:1"):
        with pytest.raises(OptionError, match="such as cuda:8,cpu:7"):
            contest(out=tmp_path, devices=devices, minutes=0)
    contest(out=tmp_path, minutes=0)
    with pytest.raises(DataError, match="a contest with other settings"):
        contest(out=tmp_path, small=True, minutes=0)
    assert SMALL.keys() == BUDGETS.keys()
