"""The model argument of a command: a shipped model, or one of the user's."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import persample
from persample import losses
from persample.checks.outputs_loss import weighted_sum_of_outputs
from persample.errors import OptionError, PersampleError
from persample.experiments.models import INPUT_SHAPES, MODELS, build_model
from persample.files import at_home
from persample.sources.batch import as_batch
from persample.sources.splits.tree import map_tensors

_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(persample.__file__).parent), "<frozen ")

_RETURN = "return a model, (model, inputs), or (model, inputs, targets, loss_fn)"

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Asked:
    """A model, perhaps with a batch and a loss.

    Attributes:
        name: How the user calls the model.
        model: The network.
        inputs: A batch, as for `PerSampleGradSource.moments`, or None.
        targets: Its targets.
        loss_fn: The loss of each sample, or None for one that stands in.
    """

    name: str
    model: nn.Module
    inputs: Any = None
    targets: Any = None
    loss_fn: Callable[[Any, Any], Any] | None = None

    def arguments(self) -> tuple[nn.Module, Callable[[Any, Any], Any], Any, Any]:
        """Return the model, the loss, inputs and targets; a weighted sum of the outputs if there is no loss.

        Raises:
            OptionError: There is no batch.
        """
        if self.inputs is None:
            raise OptionError(
                f"{self.name} returned no batch: pass the shape of a sample by --shape (and --tokens if it takes "
                "integers), or return (model, inputs)"
            )
        if self.loss_fn is not None:
            return self.model, self.loss_fn, self.inputs, self.targets
        return self.model, weighted_sum_of_outputs(), self.inputs, torch.arange(self._size)

    @property
    def title(self) -> str:
        """The model, the size of the batch and the dtype."""
        return f"{self.name}, batch of {self._size}, {str(_dtype_of(self.model)).removeprefix('torch.')}"

    @property
    def _size(self) -> int:
        return as_batch(self.inputs, None, self.model).size


def ask(
    name: str, *, shape: str | None, tokens: int | None, batch_size: int | None, default_size: int, dtype: str | None
) -> Asked:
    """Return the model called `name` with its batch.

    Args:
        name: A shipped model; or `package.module:name` or `path/to/file.py:name`, found from the working directory
            too. What stands there is a module, or is called without arguments and returns a module, (module, inputs),
            or (module, inputs, targets, loss_fn), where the loss is that of each sample.
        shape: The shape of a sample as in "3,32,32", for a batch of random numbers in place of the one that came with
            the model.
        tokens: The numbers of that batch are whole, and below this one.
        batch_size: The number of its samples; `default_size` if None.
        default_size: See there.
        dtype: That of the model and the batch; as they are made if None.

    Raises:
        OptionError: There is no such model, it cannot be made, or it does not run on its batch.
    """
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    asked = Asked(name, build_model(name)) if name in MODELS else _of_the_user(name)
    if asked.inputs is not None and shape is None and batch_size is not None:
        raise OptionError(f"{name} has its own batch: omit --batch-size, or pass --shape too")
    if dtype is not None:
        inputs, targets = (_converted(part, DTYPES[dtype]) for part in (asked.inputs, asked.targets))
        asked = replace(asked, model=asked.model.to(DTYPES[dtype]), inputs=inputs, targets=targets)
    sizes = sample_shape(name, shape)
    if sizes is not None:
        size = batch_size or default_size
        asked = replace(asked, inputs=random_inputs(sizes, tokens, size, _dtype_of(asked.model)))
        if name in MODELS and shape is None:
            return replace(asked, targets=torch.randint(10, (size,)), loss_fn=losses.cross_entropy)
        asked = replace(asked, targets=None, loss_fn=None)
    return asked


def sample_shape(name: str, shape: str | None) -> tuple[int, ...] | None:
    """Return the shape of a sample from "3,32,32", or that of a shipped model if `shape` is None.

    Raises:
        OptionError: that is no shape.
    """
    if shape is None:
        return INPUT_SHAPES.get(name)
    try:
        sizes = tuple(int(part) for part in shape.split(",") if part)
    except ValueError:
        sizes = (-1,)
    if any(size < 1 for size in sizes):
        raise OptionError(f"shape={shape!r} must be positive integers with commas between them, such as 3,32,32")
    return sizes


def random_inputs(shape: tuple[int, ...], tokens: int | None, size: int, dtype: torch.dtype) -> Tensor:
    """Return a batch of `size` samples of `shape`: random numbers, or integers below `tokens`."""
    if tokens is not None:
        return torch.randint(tokens, (size, *shape))
    return torch.randn(size, *shape, dtype=dtype)


def require_runs(asked: Asked) -> None:
    """Raise `OptionError` if the model does not run on its batch, or the loss on its outputs.

    The shape of the losses is looked at later.
    """
    args, kwargs, targets = as_batch(asked.inputs, asked.targets, asked.model).for_a_call()
    inputs = asked.inputs
    if isinstance(inputs, Tensor):
        what = f"{inputs.dtype} of shape {tuple(inputs.shape)}"
        advice = "give its sample's shape by --shape, and --tokens if it takes integers"
    else:
        what = f"inputs of type {type(inputs).__name__}"
        advice = f"if they hold the targets, too, pass these apart; {_RETURN}"
    with torch.no_grad(), _failing(f"the model does not run on {what}", advice):
        outputs = asked.model(*args, **kwargs)
    if asked.loss_fn is not None:
        with torch.no_grad(), _failing(f"the loss of {asked.name} fails", "it is called with outputs and targets"):
            asked.loss_fn(outputs, targets)


def _of_the_user(name: str) -> Asked:
    place, colon, attribute = name.rpartition(":")
    if not (colon and place and attribute):
        raise OptionError(
            f"no model is called {name!r}; choose one of {', '.join(MODELS)}, package.module:factory or "
            "path/to/file.py:factory"
        )
    path = at_home(Path(place))
    is_file = path.suffix == ".py" or not all(map(str.isidentifier, place.split(".")))
    with _importing_from(path.parent if is_file else Path.cwd()):
        module = _load_file(path) if is_file else _import(place)
        if not hasattr(module, attribute):
            raise OptionError(f"{place} has nothing called {attribute!r}")
        made = getattr(module, attribute)
        if not isinstance(made, nn.Module):
            if not callable(made):
                raise OptionError(
                    f"{name} is of type {type(made).__name__}, neither a module nor a function that makes one"
                )
            with _failing(f"{name}() fails", "it is called without arguments, and returns the model"):
                made = made()
    parts = made if isinstance(made, tuple) and len(made) in (2, 4) else (made,)
    if not isinstance(parts[0], nn.Module):
        raise OptionError(f"{name} made {_kinds(made)}: {_RETURN}")
    return Asked(name, *parts)


def _kinds(made: Any) -> str:
    kinds = f" ({', '.join(type(part).__name__ for part in made)})" if isinstance(made, tuple) else ""
    return f"a {type(made).__name__}{kinds}"


def _load_file(path: Path) -> ModuleType:
    # The name is no package's, whatever the file is called.
    spec = importlib.util.spec_from_file_location(f"_model_in_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise OptionError(f"{path} is not a Python file: correct the path, or give package.module:factory")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    with _failing(f"{path} cannot be imported", "mend it"):
        spec.loader.exec_module(module)
    return module


def _import(name: str) -> ModuleType:
    with _failing(f"{name} cannot be imported", "it is looked for in the working directory and in what is installed"):
        return importlib.import_module(name)


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    here = str(folder.absolute())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


@contextmanager
def _failing(what: str, advice: str) -> Iterator[None]:
    """Tell in one line what happens in the user's code, and where.

    Raises:
        OptionError: Anything was raised.
    """
    try:
        yield
    except PersampleError:
        raise
    except (Exception, SystemExit) as error:
        reason = " ".join([f"{type(error).__name__}:", *str(error).split()])
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_NOT_THE_USERS)]
        where = f", in {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""
        raise OptionError(f"{what} ({reason}{where}): {advice}") from error


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _converted(tree: Any, dtype: torch.dtype) -> Any:
    return map_tensors(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, tree)
