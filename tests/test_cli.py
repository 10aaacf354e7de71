from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from persample.cli import main

Command: TypeAlias = Callable[..., tuple[int, str, str]]


@pytest.fixture
def persample(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Return a function that runs the command in an empty folder: exit code, output, error output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PERSAMPLE_DATA", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["persample", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def test_reproduces_on_real_digits(persample: Command, tmp_path: Path) -> None:
    code, out, _ = persample("reproduce", "--epochs", "1", "--batch-size", "500")

    assert code == 0
    assert "adam epoch 1/1: test accuracy" in out
    assert "vogn epoch 1/1: test accuracy" in out
    assert "VOGN, averaged" in out
    assert out.splitlines()[-1] == "Figure: runs/mnist-5k/figure2.png"
    assert (tmp_path / "runs/mnist-5k/figure2.png").exists()


def test_trains_one_optimizer_and_resumes_it(persample: Command, tmp_path: Path) -> None:
    settings = ("--optimizer", "adam", "--schedule", "constant", "--batch-size", "1000", "--lr", "0.01")
    once = persample("train", *settings, "--epochs", "2", "--out", "once")

    first = persample("train", *settings, "--epochs", "1", "--out", "twice")
    second = persample("train", *settings, "--epochs", "2", "--out", "twice", "--resume")

    assert [once[0], first[0], second[0]] == [0, 0, 0]
    assert (tmp_path / "once/metrics.csv").read_bytes() == (tmp_path / "twice/metrics.csv").read_bytes()


def test_measures_on_held_out_training_data(persample: Command, tmp_path: Path) -> None:
    settings = ("--validation", "500", "--epochs", "2", "--evaluate-every", "2", "--batch-size", "1000")

    code, out, _ = persample("train", "--temperature", "0.5", *settings)

    assert code == 0
    assert "vogn epoch 2/2: validation accuracy" in out
    assert "vogn epoch 1/2" not in out


def test_sums_up_runs_with_different_seeds(persample: Command) -> None:
    for seed in ("0", "1"):
        settings = ("--optimizer", "adam", "--epochs", "1", "--batch-size", "1000")
        persample("train", *settings, "--seed", seed, "--out", seed)

    code, out, _ = persample("summary", "0", "1")

    assert code == 0
    assert "over 2 seeds" in " ".join(out.split())
    assert out.count("±") >= 6
    assert persample("summary", "0", "2")[0] == 1


def test_says_how_to_go_on_after_an_interrupt(persample: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("persample.experiments.app.run_experiment", interrupt)

    code, _, err = persample("train")

    assert code != 0
    assert "the same command with --resume" in err
    assert "Traceback" not in err


def test_crosschecks(persample: Command) -> None:
    code, out, _ = persample(
        "crosscheck", "--model", "mnist-convnet", "--batch-size", "3", "--dtype", "float64", "--backend", "hooks"
    )

    assert code == 0
    assert "mnist-convnet, batch of 3, float64" in out
    assert "hooks" in out
    assert "agrees" in out


def test_explains_a_shipped_model(persample: Command) -> None:
    code, out, _ = persample("explain", "lenet5", "--backend", "hooks", "--backend", "fused", "--dtype", "float64")

    assert code == 0
    assert "backend 'hooks' serves this model" in out
    assert "backend 'fused' serves this model" in out
    assert out.count("11.weight") == 2


MODELS_OF_A_USER = """
import torch
from torch import nn

whole = nn.Linear(3, 2)
number = 3

def build():
    return nn.Sequential(nn.Embedding(9, 4), nn.LSTM(4, 3, batch_first=True))

def with_batch():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), torch.randn(5, 3)

def nothing():
    return None

def with_loss():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 3))
    inputs, targets = torch.randint(9, (6, 2)), torch.arange(6) % 3
    return model, inputs, targets, nn.CrossEntropyLoss()

def two_inputs():
    return nn.Bilinear(3, 2, 4), (torch.randn(5, 3), torch.randn(5, 2))

def normed():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

def takes_an_argument(size):
    return nn.Linear(size, 2)

def raises():
    return nn.Linear(3, "two")

def leaves():
    raise SystemExit(3)

def wrong_batch():
    return nn.Linear(3, 2), torch.randn(5, 4)

def wrong_loss():
    return nn.Linear(3, 2), torch.randn(5, 3), torch.zeros(5), lambda outputs, targets: outputs.no_such_method()
class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
    def forward(self, x):
        return self.scale * x
def own_parameter():
    return Scaled()
def targets_among_inputs():
    return nn.Linear(3, 2), (torch.randn(5, 3), torch.zeros(5))
def no_loss():
    return nn.Linear(3, 2), torch.randn(5, 3), torch.zeros(5)
"""


@pytest.fixture
def models_of_a_user(tmp_path: Path) -> str:
    """A file in the working directory that is no package; its path."""
    (tmp_path / "with spaces é").mkdir()
    (tmp_path / "with spaces é" / "beside_it.py").write_text("VALUE = 1\n")
    (tmp_path / "models_of_a_user.py").write_text(MODELS_OF_A_USER)
    path = tmp_path / "with spaces é" / "models of a user.py"
    path.write_text(f"import beside_it\n{MODELS_OF_A_USER}")
    return str(path.relative_to(tmp_path))


@pytest.mark.parametrize("place", ["package", "file"])
@pytest.mark.parametrize(
    ("name", "arguments", "title"),
    [
        ("with_batch", ["--eval"], "batch of 5, float32"),
        ("with_loss", [], "batch of 6, float32"),
        ("with_loss", ["--dtype", "float64"], "batch of 6, float64"),
        ("two_inputs", [], "batch of 5, float32"),
        ("whole", ["--shape", "3"], "batch of 16, float32"),
        ("whole", ["--shape", "7,3", "--batch-size", "4"], "batch of 4, float32"),
        ("normed", ["--shape", "3", "--eval", "--batch-size", "4"], "batch of 4, float32"),
        ("takes_tokens", ["--shape", "2", "--tokens", "9", "--batch-size", "4"], "batch of 4, float32"),
    ],
)
def test_crosschecks_a_model_of_the_user(
    persample: Command, models_of_a_user: str, place: str, name: str, arguments: list[str], title: str
) -> None:
    where = models_of_a_user if place == "file" else "models_of_a_user"
    name = {"takes_tokens": "build"}.get(name, name)

    code, out, err = persample("crosscheck", "--model", f"{where}:{name}", "--backend", "fused", *arguments)

    assert (code, err) == (0, "")
    assert title in " ".join(out.split())
    assert "agrees" in out


def test_crosschecks_with_the_loss_of_the_user(persample: Command, tmp_path: Path) -> None:
    (tmp_path / "lossy.py").write_text(
        "import torch\n"
        "def loss(outputs, targets):\n"
        "    print('the loss of the user', targets.tolist())\n"
        "    return (outputs - targets).square().sum(1)\n"
        "def build():\n"
        "    return torch.nn.Linear(3, 1), torch.randn(2, 3), torch.tensor([[7.0], [8.0]]), loss\n"
    )

    code, out, _ = persample("crosscheck", "--model", "lossy.py:build", "--backend", "hooks")

    assert code == 0
    assert "the loss of the user [[7.0], [8.0]]" in out


@pytest.mark.parametrize("arguments", [["with_loss"], ["whole", "--shape", "3", "--batch-size", "6"]])
def test_benchmarks_a_model_of_the_user(persample: Command, models_of_a_user: str, arguments: list[str]) -> None:
    name, *more = arguments

    code, out, _ = persample(
        "bench", "--model", f"{models_of_a_user}:{name}", "--rounds", "1", "--backend", "hooks", *more
    )

    assert code == 0
    assert "batch of 6, float32" in " ".join(out.split())
    assert "plain" in out


def test_refuses_what_mixes_the_samples_of_a_users_model(persample: Command, models_of_a_user: str) -> None:
    code, _, err = persample("crosscheck", "--model", "models_of_a_user:normed", "--shape", "3", "--backend", "fused")

    assert code == 1
    assert "BatchNorm1d '1' is in training mode" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["crosscheck", "bench", "explain"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("models_of_a_user:takes_an_argument", "models_of_a_user:takes_an_argument() fails (TypeError: takes_an_arg"),
        ("models_of_a_user:leaves", "models_of_a_user:leaves() fails (SystemExit: 3, in models_of_a_user.py, line"),
        ("models_of_a_user:raises", "models_of_a_user:raises() fails (TypeError: "),
        ("models_of_a_user:wrong_batch", "the model does not run on torch.float32 of shape (5, 4) (RuntimeError: "),
        ("models_of_a_user:wrong_loss", "the loss of models_of_a_user:wrong_loss fails (AttributeError: "),
        ("models_of_a_user:targets_among_inputs", "the model does not run on inputs of type tuple (TypeError: "),
        (
            "models_of_a_user:no_loss",
            "models_of_a_user:no_loss made a tuple (Linear, Tensor, Tensor): return a model, (model, inputs), or",
        ),
        ("missing.py:build", "missing.py is not a Python file: correct the path"),
        (".:build", ". is not a Python file"),
        ("some-module:build", "some-module is not a Python file"),
        ("/:build", "/ is not a Python file"),
        ("broken.py:build", "broken.py cannot be imported (SyntaxError: "),
        (
            "failing.py:build",
            "failing.py cannot be imported (ZeroDivisionError: division by zero, in failing.py, line 2)",
        ),
        ("failing:build", "failing cannot be imported (ZeroDivisionError: division by zero, in failing.py, line 2)"),
        ("models_of_a_user:", "no model is called 'models_of_a_user:'"),
        (":build", "no model is called ':build'"),
        ("~nobody_of_this_name/model.py:build", "~nobody_of_this_name/model.py begins with a home folder"),
    ],
)
def test_what_fails_in_the_users_code_is_one_message(
    persample: Command, models_of_a_user: str, tmp_path: Path, command: str, name: str, message: str
) -> None:
    (tmp_path / "broken.py").write_text("def build(:\n")
    (tmp_path / "failing.py").write_text("\n1 / 0\n")
    arguments = [name] if command == "explain" else ["--model", name]

    code, _, err = persample(command, *arguments)

    assert code == 2
    assert err.startswith(f"persample: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["crosscheck", "bench"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["whole"], "returned no batch: pass the shape of a sample by --shape"),
        (["with_loss", "--batch-size", "3"], "has its own batch: omit --batch-size"),
        (["whole", "--shape", "4"], "the model does not run on torch.float32 of shape"),
        (["whole", "--shape", "3", "--dtype", "float16"], "dtype='float16' must be one of float32, float64"),
    ],
)
def test_says_what_is_missing_beside_a_model(
    persample: Command, models_of_a_user: str, command: str, arguments: list[str], message: str
) -> None:
    name, *more = arguments

    code, _, err = persample(command, "--model", f"{models_of_a_user}:{name}", *more)

    assert code == 2
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["whole"], "backend 'fused' may serve this model"),
        (["whole", "--shape", "3"], "backend 'fused' serves this model"),
        (["build", "--shape", "5", "--tokens", "9"], "backend 'fused' serves this model"),
        (["build", "--shape", "5", "--tokens", "9", "--backend", "hooks"], "backend 'hooks' refuses this model"),
        (["with_batch"], "persample.fix(model)"),
        (["with_batch", "--eval"], "backend 'fused' serves this model"),
    ],
)
def test_explains_a_model_of_the_user(persample: Command, tmp_path: Path, arguments: list[str], expected: str) -> None:
    (tmp_path / "models_of_a_user.py").write_text(MODELS_OF_A_USER)

    code, out, _ = persample("explain", f"models_of_a_user:{arguments[0]}", *arguments[1:])

    assert code == 0
    assert expected in " ".join(out.split())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("models_of_a_user:missing", "models_of_a_user has nothing called 'missing'"),
        ("models_of_a_user:number", "models_of_a_user:number is of type int"),
        ("models_of_a_user:nothing", "models_of_a_user:nothing made a NoneType"),
        ("no_such_package:build", "no_such_package cannot be imported"),
        (
            "resnet",
            "no model is called 'resnet'; choose one of mnist-convnet, lenet5, package.module:factory or path",
        ),
    ],
)
def test_models_that_do_not_exist(persample: Command, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "models_of_a_user.py").write_text(MODELS_OF_A_USER)

    code, _, err = persample("explain", name)

    assert code == 2
    assert err.startswith(f"persample: {message}")
    assert err.count("\n") == 1


def test_benchmarks(persample: Command) -> None:
    code, out, _ = persample("bench", "--batch-size", "2", "--rounds", "1", "--backend", "hooks")

    assert code == 0
    assert "plain" in out
    assert "hooks" in out


@pytest.mark.parametrize("command", ["crosscheck", "bench"])
def test_tells_each_problem_in_full(persample: Command, tmp_path: Path, command: str) -> None:
    (tmp_path / "models_of_a_user.py").write_text(MODELS_OF_A_USER)
    chosen = ["--backend", "hooks", "--backend", "fused"]

    code, out, _ = persample(command, "--model", "models_of_a_user:own_parameter", "--shape", "3", *chosen)

    assert code == 0
    table, _, below = out.partition("└")
    assert "hooks" in table
    assert "hooks: The model (Scaled) has parameters of its own, and backend 'hooks' has" in " ".join(below.split())


def test_quantities_by_name(persample: Command) -> None:
    some = ["--batch-size", "3", "--backend", "fused", "--quantity", "norms", "--quantity", "clipped-sum"]
    code, out, _ = persample("bench", "--rounds", "1", *some)
    assert code == 0
    assert "norms, clipped-sum" in out
    code, out, _ = persample("crosscheck", "--model", "mnist-convnet", *some)
    assert code == 0
    assert "quantities" in out


def test_machineries_of_a_backend_by_names_of_their_own(persample: Command) -> None:
    pytest.importorskip("opacus")
    names = ["opacus (rules)", "opacus"]
    code, out, _ = persample("crosscheck", "--batch-size", "2", *(x for name in names for x in ("--backend", name)))

    assert code == 0
    assert out.count("agrees") == 2
    assert out.index("opacus (rules)") < out.index("opacus (module)"), "the machinery that ran behind the plain name"


def test_lists_the_backends(persample: Command) -> None:
    code, out, _ = persample("backends")

    assert code == 0
    for name in ("loop", "hooks", "backpack", "opacus", "vmap"):
        assert name in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reproduce", "--dataset", "svhn"], "persample: no data set is called 'svhn'; choose one of"),
        (["train", "--optimizer", "sgd"], "persample: no optimizer is called 'sgd'"),
        (["train", "--optimizer", "adam", "--momentum", "0.5"], "persample: adam has no setting momentum"),
        (["train", "--schedule", "linear"], "persample: schedule='linear' must be one of constant, cosine"),
        (["reproduce", "--epochs", "0"], "persample: epochs=0 must be at least 1"),
        (["crosscheck", "--backend", "nobody"], "persample: no backend is called 'nobody'; choose among"),
        (["bench", "--quantity", "norm"], "persample: no quantity is called 'norm'; choose among mean, second-moment"),
        (["bench", "--model", "resnet"], "persample: no model is called 'resnet'"),
        (["explain", "lenet5", "--backend", "nobody"], "persample: no backend is called 'nobody'; choose among"),
        (["explain", "lenet5", "--shape", "3,x"], "persample: shape='3,x' must be positive integers with commas"),
        (
            ["explain", "lenet5", "--shape", "1,32,32"],
            "persample: the model does not run on torch.float32",
        ),
        (["bench", "--dtype", "int8"], "persample: dtype='int8' must be one of float32, float64"),
    ],
)
def test_what_does_not_exist_is_one_message_and_code_2(persample: Command, arguments: list[str], message: str) -> None:
    code, _, err = persample(*arguments)

    assert code == 2
    assert err.startswith(message)
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["reproduce", "--nonsense"], ["nonsense"], ["bench", "--rounds", "many"]])
def test_a_wrong_command_line_is_code_2(persample: Command, arguments: list[str]) -> None:
    code, _, err = persample(*arguments)

    assert code == 2
    assert "Usage: persample" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reproduce", "--dataset", "mnist", "--data-dir", "nowhere"], "persample: nowhere is not a folder"),
        (["train", "--resume"], "persample: there is no run to resume in runs/mnist-5k-vogn"),
    ],
)
def test_what_fails_is_one_message_and_code_1(persample: Command, arguments: list[str], message: str) -> None:
    code, _, err = persample(*arguments)

    assert code == 1
    assert err.startswith(message)
    assert err.count("\n") == 1


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_says_what_to_install(package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from persample.cli import main; main()"

    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert ended.returncode == 1
    assert 'pip install "persample[experiments]"' in ended.stderr
    assert "Traceback" not in ended.stderr


class TestAustralian:
    """The command, for one epoch, where the data are at hand."""

    @pytest.fixture
    def command(self, persample: Command, real_data: Path) -> Command:
        return lambda *more: persample(
            "australian", "--data-dir", str(real_data), "--epochs", "1", "--seeds", "1", "--jobs", "1", *more
        )

    def test_prints_ours_beside_the_published_and_goes_on(self, command: Command, tmp_path: Path) -> None:
        code, out, _ = command("--method", "Vadam")
        assert code == 0
        assert "0.944" in out
        assert "Scores: runs/australian/scores.csv" in out
        first = (tmp_path / "runs/australian/scores.csv").read_text().splitlines()
        assert len(first) == 4

        code, _, err = command("--method", "Vadam")
        assert code == 1
        assert "--resume" in err

        code, _, _ = command("--method", "Vadam", "--method", "mean-field VI", "--resume")
        assert code == 0
        both = (tmp_path / "runs/australian/scores.csv").read_text().splitlines()
        assert both[:4] == first
        assert len(both) == 7

    def test_refuses_an_unknown_method(self, command: Command) -> None:
        code, _, err = command("--method", "sgd")
        assert code == 2
        assert "choose among VOGN, Vadam, mean-field VI" in err


def test_contest_without_time_writes_what_is_there(persample: Command, tmp_path: Path) -> None:
    code, out, _ = persample("contest", "--dataset", "mnist", "--minutes", "0")

    assert code == 0
    assert "## MNIST" in out
    assert (tmp_path / "runs/contest/results.json").exists()


def test_contest_refuses_devices_without_numbers(persample: Command) -> None:
    code, _, err = persample("contest", "--devices", "cpu", "--minutes", "0")

    assert code == 2
    assert "cuda:8,cpu:7" in err
