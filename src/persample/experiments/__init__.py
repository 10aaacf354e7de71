"""The experiments: real data sets, the paper's two models, training by VOGN and Adam, metrics, figures.

`app` has the commands. `reproduction` runs the paper's Figure 2: `recipes` and `config` hold settings, `data` the data
sets, `models` the networks, `train` and `evaluate` the work, `figures` the picture. `australian_credit` and `contest`
are comparisons with other methods.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from persample.experiments.data import ImageDataset as ImageDataset
    from persample.experiments.data import hold_out as hold_out
    from persample.experiments.data import load_dataset as load_dataset
    from persample.experiments.metrics import Metrics as Metrics
    from persample.experiments.models import lenet5 as lenet5
    from persample.experiments.models import mnist_convnet as mnist_convnet
    from persample.experiments.recipes import configure as configure
    from persample.experiments.reproduction import Outcome as Outcome
    from persample.experiments.reproduction import reproduce as reproduce

#: What users import, by the modules it is in; these need packages that the library does without.
_FROM = {
    "ImageDataset": "data",
    "Metrics": "metrics",
    "Outcome": "reproduction",
    "configure": "recipes",
    "hold_out": "data",
    "lenet5": "models",
    "load_dataset": "data",
    "mnist_convnet": "models",
    "reproduce": "reproduction",
}


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FROM[name]}"), name)
