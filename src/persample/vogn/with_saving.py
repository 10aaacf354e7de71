"""What every variational optimizer saves, loads and copies."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from persample.errors import UsageError
from persample.vogn.changed_gradients import Left
from persample.vogn.distributed import Processes
from persample.vogn.observations import Observations
from persample.vogn.saving.checkpoint import COUNTS, checked, pack_run
from persample.vogn.saving.noise import generator_setter, pack_generator
from persample.vogn.saving.state_schema import Kinds
from persample.vogn.settings import OF_RUN, RUN


class WithSaving(torch.optim.Optimizer):
    """Base of the optimizers whose whole state, the noise's included, is saved as plain tensors and numbers."""

    #: Names the layout of the state: rules of one name can load each other's.
    rule: ClassVar[str]

    #: Whether the rule needs the moments of each draw apart, with the noise of the draw.
    keeps_draws_apart: ClassVar[bool] = False

    #: What the state of a parameter holds, beside the number of its steps.
    state_kinds: ClassVar[Kinds]

    # What is saved, and what a copy takes along beside it.
    _saved: ClassVar[tuple[str, ...]] = (*OF_RUN, *COUNTS)
    _copied: ClassVar[tuple[str, ...]] = (
        "model",
        "loss_fn",
        "generator",
        "_observations",
        "_warned_of_width",
        "_warned_of_state",
        "_warned_of_gradients",
        "_known_as_untrained",
        "_processes",
    )

    generator: torch.Generator | None
    _observations: Observations
    _left: Left | None
    _used: Mapping[str, Tensor]
    _processes: Processes | None

    @abstractmethod
    def _make_source(self) -> Any:
        """Return what gives the moments of the gradients."""

    @abstractmethod
    def _make_states(self) -> None:
        """Make the state of each parameter that has none."""

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

        Each parameter group has these entries once more, packed, as `run`, for tools that keep PyTorch's own entries
        only: `torch.distributed.checkpoint.state_dict` saves and loads the optimizer as any other.

        With several processes it is the same on all of them.

        Raises:
            UsageError: called inside `sampled_params()`, where the model holds a draw; between `observe()` and
                `step()` where several processes train together; or a parameter was replaced or resized.
        """
        self._refuse_while_drawn("state_dict()")
        self._follow_model()
        if self._processes is not None and self._observations.parts:
            raise UsageError(
                "Of several processes each has observed something else since the last step, so there is not one state "
                "to save: call step() first."
            )
        if self.state:
            self._make_states()
        run = {
            "rule": self.rule,
            **{name: getattr(self, name) for name in self._saved},
            "observations": self._observations.packed(),
            "generator": pack_generator(self.generator),
        }
        saved = super().state_dict()
        packed = pack_run(run)
        for group in saved["param_groups"]:
            group[RUN] = packed
        return saved | run

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict()` returned.

        Parameters that have the same names correspond by them, whatever their order. If all have other names, they
        correspond by position, as in every PyTorch optimizer. If the state has a generator and this optimizer has none,
        it gets one.

        Raises:
            UsageError: called inside `sampled_params()`, or a parameter was replaced or resized.
            OptionError: it is not the state of such an optimizer with the same parameters, or it is damaged; nothing is
                changed.
        """
        self._refuse_while_drawn("load_state_dict()")
        self._follow_model()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = dict(state_dict)
            state_dict = hook(self, state_dict) or state_dict
        groups = self.param_groups
        loaded = checked(
            state_dict,
            groups,
            rule=self.rule,
            kinds=self.state_kinds,
            known=self.defaults,
            draws_apart=self.keeps_draws_apart,
        )
        set_generator = generator_setter(loaded.generator, self.generator)
        own = [{name: group[name] for name in ("params", "param_names", RUN)} for group in groups]
        new_groups = [settings | params for settings, params in zip(loaded.groups, own, strict=True)]
        states: defaultdict[Tensor, Any] = defaultdict(dict, loaded.states)
        # Not by PyTorch, which would cast the state to the dtypes of the parameters: it is kept in at least float32.
        self.__setstate__({"state": states, "param_groups": new_groups})
        vars(self).update(loaded.run)
        self._observations, self._left = loaded.observations, None
        self.generator = set_generator()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """Return all but the source, for `pickle` and `copy.deepcopy`: the model belongs to it, and is copied too."""
        self._refuse_while_drawn("copying or pickling the optimizer")
        return super().__getstate__() | {name: self.__dict__[name] for name in self._saved + self._copied}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # also called by load_state_dict, with two entries only
        self.defaults.pop("differentiable", None)  # which PyTorch has put there just now, and which is no setting
        if "source" not in self.__dict__:
            self.source = self._make_source()
            self._drawn = False
            self._left, self._used = None, {}  # a copy of a parameter has no p.grad
            self._seen = None
