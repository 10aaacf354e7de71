"""What every variational optimizer saves, loads and copies."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from persample.errors import UsageError
from persample.vogn.checkpoint import check_matches, pack_generator, unpack_generator, unpack_states
from persample.vogn.observed import Observations
from persample.vogn.processes import Processes


class WithSaving(torch.optim.Optimizer):
    """Base of the optimizers whose whole state, the noise's included, is saved as plain tensors and numbers."""

    #: Names the layout of the state: rules of one name can load each other's.
    rule: ClassVar[str]

    # What is saved, and what a copy takes along beside it.
    _saved: ClassVar[tuple[str, ...]] = (
        "data_size",
        "augmentation",
        "mc_samples",
        "loss_reduction",
        "max_grad_norm",
        "steps",
        "skipped_steps",
        "skipped_in_a_row",
    )
    _copied: ClassVar[tuple[str, ...]] = (
        "model",
        "loss_fn",
        "generator",
        "_observations",
        "_warned_of_width",
        "_warned_of_state",
        "_known_as_untrained",
        "_processes",
    )

    generator: torch.Generator | None
    _observations: Observations
    _processes: Processes | None

    @abstractmethod
    def _make_source(self) -> Any:
        """Return what gives the moments of the gradients."""

    @abstractmethod
    def _params(self) -> dict[str, Tensor]:
        """All trained parameters by name, in the order of the groups."""

    @abstractmethod
    def _follow_model(self) -> None:
        """Take notice of what changed in the model, and refuse what cannot be followed."""

    @abstractmethod
    def _refuse_while_drawn(self, call: str) -> None:
        """Raise `UsageError` where the model holds a draw."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything beside the model that a run needs to go on bit for bit, as plain tensors and numbers.

        To the entries of every PyTorch optimizer come `rule`, `data_size` and the other settings that are not of
        groups, the counts of steps, `observations` (what waits for the next step), and `generator` (its device and
        state; None if the global generator is used, whose state is the caller's to save). It can be loaded with
        `torch.load(..., weights_only=True)`.

        With several processes it is the same on all of them.

        Raises:
            UsageError: called inside `sampled_params()`, where the model holds a draw; or between `observe()` and
                `step()` where several processes train together.
        """
        self._refuse_while_drawn("state_dict()")
        self._follow_model()
        if self._processes is not None and self._observations.parts:
            raise UsageError(
                "Of several processes each has observed something else since the last step, so there is not one state "
                "to save: call step() first."
            )
        return {
            **super().state_dict(),
            "rule": self.rule,
            **{name: getattr(self, name) for name in self._saved},
            "observations": self._observations.packed(),
            "generator": pack_generator(self.generator),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict()` returned. Parameters correspond by position, as in every PyTorch optimizer.

        If the state has a generator and this optimizer has none, it gets one.

        Raises:
            UsageError: called inside `sampled_params()`.
            OptionError: it is not the state of such an optimizer with the same parameters; nothing is changed.
        """
        self._refuse_while_drawn("load_state_dict()")
        self._follow_model()
        check_matches(state_dict, self.rule, self._saved, self.param_groups)
        self.generator = unpack_generator(state_dict["generator"], self.generator)
        names = [group["param_names"] for group in self.param_groups]
        super().load_state_dict(dict(state_dict))
        for group, own_names in zip(self.param_groups, names, strict=True):
            group["param_names"] = own_names
        # PyTorch has cast the state to the dtypes of the parameters, but it is kept in at least float32.
        self.state.update(unpack_states(state_dict, self.param_groups))
        for name in self._saved:
            setattr(self, name, state_dict[name])
        self._observations = Observations.unpacked(state_dict["observations"], self._params())

    def __getstate__(self) -> dict[str, Any]:
        """Return all but the source, for `pickle` and `copy.deepcopy`: the model belongs to it, and is copied too."""
        self._refuse_while_drawn("copying or pickling the optimizer")
        return super().__getstate__() | {name: self.__dict__[name] for name in self._saved + self._copied}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # also called by load_state_dict, with two entries only
        if "source" not in self.__dict__:
            self.source = self._make_source()
            self._drawn = False
            self._seen: list[tuple[Any, ...]] = []
