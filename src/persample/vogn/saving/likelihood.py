"""The likelihood of a posterior as text, for the header of its file."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from persample import losses
from persample.errors import UsageError
from persample.vogn.prediction import LIKELIHOODS, likelihood_of


@dataclass(frozen=True)
class NotInFile:
    """Stands for a loss that a file can only name; asking it for a prediction is an error."""

    name: str

    def summary(self) -> NoReturn:
        """Refuse to predict.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            f"The posterior was trained with the loss {self.name}, which its file does not hold: pass loss_fn=... to "
            "load(), or likelihood=... to predict()."
        )

    def __call__(self, outputs: Any, targets: Any) -> NoReturn:
        self.summary()


def packed(loss_fn: Callable[[Any, Any], Any] | None) -> str:
    """Return what `unpacked` reads."""
    if loss_fn is None:
        return json.dumps(None)
    try:
        found = likelihood_of(loss_fn)
    except UsageError:
        inner: Any = loss_fn
        while isinstance(inner, functools.partial):
            inner = inner.func
        return json.dumps({"name": getattr(inner, "__name__", type(inner).__name__)})
    if isinstance(found, str):
        return json.dumps({"name": found})
    if isinstance(found, NotInFile):
        return json.dumps({"name": found.name})
    kind: Any = type(found)
    ours = bool(LIKELIHOODS.get(str(kind.__name__)) is kind)
    if not ours:  # somebody else's, which may have the same name
        return json.dumps({"name": f"{kind.__module__}.{kind.__qualname__}"})
    settings: Any = found
    return json.dumps({"name": kind.__name__} | asdict(settings))


def unpacked(text: str) -> Callable[[Any, Any], Any] | None:
    """Return a loss of the same likelihood.

    Raises:
        ValueError: it is not what `packed` returned, `TypeError` and `LookupError` likewise.
    """
    content = json.loads(text)
    if content is None:
        return None
    name = str(content.pop("name"))
    if name in _BY_NAME:
        return _BY_NAME[name]
    return LIKELIHOODS[name](**content) if name in LIKELIHOODS else NotInFile(name)


_BY_NAME: dict[str, Callable[[Any, Any], Any]] = {"categorical": losses.cross_entropy, "bernoulli": losses.bernoulli}
