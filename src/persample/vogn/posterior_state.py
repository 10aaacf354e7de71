"""A posterior over the weights as the state of an optimizer: parameter groups, precision, prior, saving."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from types import EllipsisType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from persample.errors import OptionError, UsageError
from persample.sources.recording.results import LossReduction
from persample.vogn.batch_gradient import BatchGradient
from persample.vogn.changed_parameters import (
    fingerprint,
    present_names,
    refuse_resized,
    refuse_shared_memory,
    warn_of_untrained,
)
from persample.vogn.core import Tensors
from persample.vogn.distributed import Processes, warn_of_separate_processes
from persample.vogn.failures import require_positive
from persample.vogn.first_argument import Trained, model_and_params
from persample.vogn.lending import Lending
from persample.vogn.loss import loss_of
from persample.vogn.param_group import Part, make_part
from persample.vogn.pending import MomentSource, Pending
from persample.vogn.posterior import Posterior
from persample.vogn.prediction import telling
from persample.vogn.prior import Prior
from persample.vogn.saving.checkpoint import COUNTS, checked, pack_run
from persample.vogn.saving.noise import generator_setter, pack_generator
from persample.vogn.saving.state_schema import Kinds
from persample.vogn.settings import (
    OF_RUN,
    OF_WEIGHTS,
    RUN,
    SharedSettings,
    each_weights,
    groups_of,
    name_params,
    params_of_group,
    refuse_unknown_settings,
    require_generator,
    require_settings,
    settings_of_run,
)
from persample.vogn.supported_models import refuse_model, refuse_processes

# What the settings of other variational optimizers are called here.
_ELSEWHERE = {
    "ess": "the effective sample size is data_size / temperature; ",
    "weight_decay": "a weight decay of w is prior_precision = w * data_size; ",
    "betas": "they are momentum and decay; ",
    "beta1": "it is the first of betas; ",
    "beta2": "it is the second of betas; ",
    "clip_radius": "it is max_update; ",
}


class PosteriorState(torch.optim.Optimizer):
    """Base of `VariationalOptimizer`: holds the posterior; training it is up to the subclass.

    The whole state, the noise's included, is saved as plain tensors and numbers. The arguments are those of all rules.

    Args:
        model: the network, or its `named_parameters()` or `parameters()`.
        loss_fn: `loss_fn(outputs, targets)` returns minus the log-likelihood of each sample, shape `(B,)`. None if only
            passes of your own are recorded, see `sampled_params()`.
        settings: those that the rule has beside the ones below, which a group may change, too.
        unknown: what is no argument of any rule, to be refused by name.

    Raises:
        OptionError: an argument is out of its range; a parameter is not the model's, frozen, or given twice; or the
            model is wrapped in DistributedDataParallel or DataParallel.
        UnsupportedModelError: the parameters are sharded.
    """

    #: Names the layout of the state: rules of one name can load each other's.
    rule: ClassVar[str]

    #: What the state of a parameter holds, beside the number of its steps.
    state_kinds: ClassVar[Kinds]

    #: Whether the rule needs the moments of each draw apart, with the noise of the draw.
    keeps_draws_apart: ClassVar[bool] = False

    #: Whether the rule needs the products ĝ ∘ ε of gradients and noise, which take the place of second moments.
    needs_products: ClassVar[bool] = False

    # What is saved, and what a copy takes along beside it.
    _saved: ClassVar[tuple[str, ...]] = (*OF_RUN, *COUNTS)
    _copied: ClassVar[tuple[str, ...]] = (
        "model",
        "loss_fn",
        "generator",
        "_pending",
        "_warned_of_width",
        "_warned_of_state",
        "_known_as_untrained",
        "_processes",
    )

    data_size: int
    augmentation: float
    mc_samples: int
    loss_reduction: LossReduction
    max_grad_norm: float | None

    def __init__(
        self,
        model: Trained,
        loss_fn: Callable[[Any, Any], Tensor] | None,
        settings: dict[str, Any],
        *,
        data_size: int | EllipsisType = ...,
        prior_precision: float | Mapping[str, Tensor] = 1.0,
        prior_mean: float | Mapping[str, Tensor] = 0.0,
        prior: Prior | None = None,
        temperature: float = 1.0,
        temperature_start: float = 0.01,
        temperature_steps: int = 0,
        max_grad_norm: float | None = None,
        augmentation: float = 1.0,
        mc_samples: int = 1,
        loss_reduction: LossReduction = "mean",
        generator: torch.Generator | None = None,
        params: Iterable[Any] | None = None,
        process_group: ProcessGroup | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            known = ", ".join(("loss_fn", *settings, *SharedSettings.__annotations__))
            name = next(iter(unknown))
            raise TypeError(
                f"{type(self).__name__}() has no argument {name!r}: {_ELSEWHERE.get(name, '')}it takes {known}."
            )
        if data_size is ...:
            raise TypeError(f"{type(self).__name__}() needs data_size=…, the number of training samples.")
        network, params = model_and_params(model, params)
        refuse_model(network, several_processes=not self.keeps_draws_apart)
        if process_group is not None and self.keeps_draws_apart:
            refuse_processes(type(self).__name__)
        require_generator("generator", generator)
        of_run = {
            "data_size": data_size,
            "augmentation": augmentation,
            "mc_samples": mc_samples,
            "loss_reduction": loss_reduction,
            "max_grad_norm": max_grad_norm,
        }
        vars(self).update(settings_of_run(of_run))
        self.generator = generator
        self.model: nn.Module = network
        self.loss_fn = loss_fn
        self.source = self._make_source()
        self._begin()
        if prior is not None:
            prior = _prior_of(prior)
            prior_mean, prior_precision = prior.mean, prior.precision
        of_groups = {
            "prior_precision": prior_precision,
            "prior_mean": prior_mean,
            "temperature": temperature,
            "temperature_start": temperature_start,
            "temperature_steps": temperature_steps,
        }
        super().__init__(groups_of(params, network), settings | of_groups)
        # Parameters that could be trained and are in no group were left out on purpose.
        trainable = {name for name, p in network.named_parameters() if p.requires_grad}
        self._known_as_untrained = trainable - {*self._params()}
        self._seen: Any = None
        self._follow_model()
        if process_group is None:
            warn_of_separate_processes()
        self._processes = None if process_group is None else self._joined(process_group)

    def _begin(self) -> None:
        self.steps = 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self._pending = Pending(draws_apart=self.keeps_draws_apart)
        self._lending = Lending()
        self._warned_of_width = False
        self._warned_of_state = False

    # What a rule implements.

    def _make_source(self) -> MomentSource:
        """Return the source of moments; here of the mean only, the batch's ordinary gradient."""
        return BatchGradient(self.model, loss_of(self.loss_fn, self.model))

    @abstractmethod
    def _new_state(self, param: Tensor, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the initial state of a parameter: numbers, and tensors of its shape, dtype and device.

        Args:
            param: the mean, in at least float32.
            settings: the settings of its group.
        """

    @abstractmethod
    def _part_precision(self, part: Part) -> Tensors:
        """Return the precision of the posterior over each weight."""

    # What users call.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model, with their own settings, to the trained ones.

        Args:
            param_group: "params" and any of the settings of the rule.

        Raises:
            OptionError: a setting is out of its range, or a parameter is not the model's, frozen, or given twice.
        """
        named = name_params(self.model, params_of_group(param_group), taken=self._params().values())
        refuse_unknown_settings(param_group, self.defaults)
        group = {**self.defaults, **param_group}
        for setting in OF_WEIGHTS:
            group[setting] = each_weights(setting, group[setting], named)
        require_settings(group)
        super().add_param_group({**group, "params": list(named.items()), RUN: None})

    @property
    def posterior(self) -> Posterior:
        """The current posterior: copies of the tensors, with the model, and the loss if it shows a likelihood.

        Raises:
            UsageError: inside `sampled_params()`, where the model holds a draw.
        """
        self._lending.refuse("posterior")
        self._follow_model()
        params = self._params()
        precision = dict(zip(params, self._precision(), strict=True))
        mean = {name: p.detach().to(precision[name].dtype, copy=True) for name, p in params.items()}
        return Posterior(mean, precision, self.model, telling(self.loss_fn))

    @property
    def prior(self) -> Prior:
        """The prior over the trained parameters."""
        self._follow_model()
        mean: dict[str, Tensor] = {}
        precision: dict[str, Tensor] = {}
        for part in self._parts(self._params()):
            mean |= part.per_weight(part.prior_mean)
            precision |= part.per_weight(part.prior_precision)
        return Prior(mean, precision)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a run needs, beside the model, to continue bit for bit, as plain tensors and numbers.

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
        self._lending.refuse("state_dict()")
        self._follow_model()
        if self._processes is not None and self._pending.observations.parts:
            raise UsageError(
                "Each process has its own observations since the last step, so there is no common state to save: call "
                "step() first."
            )
        if self.state:
            self._make_states()
        run = {
            "rule": self.rule,
            **{name: getattr(self, name) for name in self._saved},
            "observations": self._pending.observations.packed(),
            "generator": pack_generator(self.generator),
        }
        saved = super().state_dict()
        packed = pack_run(run)
        for group in saved["param_groups"]:
            group[RUN] = packed
        return saved | run

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict()` returned.

        Parameters that have the same names correspond by them, whatever their order. If all have other names, they
        correspond by position, as in every PyTorch optimizer. If the state has a generator and this optimizer has none,
        it gets one.

        Raises:
            UsageError: called inside `sampled_params()`, or a parameter was replaced or resized.
            OptionError: it is not the state of such an optimizer with the same parameters, or it is damaged; nothing is
                changed.
        """
        self._lending.refuse("load_state_dict()")
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
            products=self.needs_products,
        )
        set_generator = generator_setter(loaded.generator, self.generator)
        own = [{name: group[name] for name in ("params", "param_names", RUN)} for group in groups]
        new_groups = [settings | params for settings, params in zip(loaded.groups, own, strict=True)]
        states: defaultdict[Tensor, Any] = defaultdict(dict, loaded.states)
        # Not by PyTorch, which would cast the state to the dtypes of the parameters: it is kept in at least float32.
        self.__setstate__({"state": states, "param_groups": new_groups})
        vars(self).update(loaded.run)
        self._pending.observations, self._pending.left = loaded.observations, None
        self.generator = set_generator()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    # Inner workings.

    def _joined(self, process_group: ProcessGroup) -> Processes:
        """Broadcast the model and the seed of the first process."""
        processes = Processes(process_group)
        processes.share_model(self.model)
        seed = torch.initial_seed() if self.generator is None else self.generator.initial_seed()
        self.generator = torch.Generator().manual_seed(processes.share_seed(seed))
        return processes

    def __getstate__(self) -> dict[str, Any]:
        """Return everything but the source, for `pickle` and `copy.deepcopy`; the model is included and copied."""
        self._lending.refuse("copying or pickling the optimizer")
        return super().__getstate__() | {name: self.__dict__[name] for name in self._saved + self._copied}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # also called by load_state_dict, with two entries only
        self.defaults.pop("differentiable", None)  # which PyTorch has put there just now, and which is no setting
        if "source" not in self.__dict__:
            self.source = self._make_source()
            self._lending = Lending()
            self._seen = None

    def _follow_model(self) -> None:
        """Follow changes of the model, and refuse those that cannot be followed.

        Parameters that have another name now, as after pruning, are followed.

        Raises:
            UsageError: a parameter was replaced, removed, resized, or tied by its memory; or it has another name than
                when it was observed.
            UnsupportedModelError: a parameter was sharded.
        """
        settings_of_run(vars(self))
        seen = fingerprint(self.model), [id(p) for group in self.param_groups for p in group["params"]]
        if seen == self._seen:
            return
        for group in self.param_groups:
            self._follow_group(group)
        trained = self._params()
        refuse_shared_memory(trained)
        ids = {id(p) for p in trained.values()}
        for param in [p for p in self.state if id(p) not in ids]:  # of which the user has taken the place in its group
            del self.state[param]
        warn_of_untrained(self.model, trained.values(), self._known_as_untrained)
        self._seen = seen

    def _follow_group(self, group: dict[str, Any]) -> None:
        params = group["params"]
        present = present_names(self.model, params, group["param_names"])
        of_weights = [group[setting] for setting in OF_WEIGHTS if isinstance(group[setting], list)]
        if any(len(values) != len(params) for values in of_weights):
            raise UsageError(
                "The parameters of a group were changed by hand, but not its prior_mean and prior_precision, which "
                "need a tensor for each parameter: change them together, or create a new optimizer."
            )
        for name, param, *kept in zip(present, params, *of_weights, strict=True):
            refuse_resized(name, param, [*kept, *tensors_of_state(self.state.get(param, {}))])
        if present != group["param_names"] and self._pending.observations.parts:
            raise UsageError(
                "Parameters were renamed after they were observed: call step(), or zero_grad() to discard the "
                "observations, before you change the model."
            )
        group["param_names"] = present

    def _params(self) -> dict[str, Tensor]:
        """All trained parameters by name, in the order of the groups."""
        named = (zip(group["param_names"], group["params"], strict=True) for group in self.param_groups)
        return {name: p for pairs in named for name, p in pairs}

    def _state(self, param: Tensor, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The state of `param`: created at its first use, and moved and cast with the model."""
        state: dict[str, Any] = self.state[param]
        dtype = torch.promote_types(param.dtype, torch.float32)
        if not state:
            with torch.no_grad(), torch.inference_mode(False):  # training goes on from it, even if a prediction made it
                state |= {"step": 0, **self._new_state(param.detach().to(dtype), settings)}
        for key, value in state.items():
            if isinstance(value, Tensor) and (value.dtype != dtype or value.device != param.device):
                state[key] = value.to(param.device, dtype)
        return state

    def _make_states(self) -> None:
        self._parts(self._params())

    def _parts(self, names: Iterable[str]) -> list[Part]:
        """The parameters called `names`, group by group."""
        size = self.data_size * self.augmentation
        parts = [
            make_part(group, self._state, data_size=size, step=self.steps, names=names) for group in self.param_groups
        ]
        return [part for part in parts if part.names]

    def _precision(self) -> list[Tensor]:
        """The precision of the posterior over all trained parameters, in the order of the groups."""
        total: list[Tensor] = []
        for part in self._parts(self._params()):
            precision = self._part_precision(part)
            if part.is_flat:
                require_positive(dict(zip(part.names, precision, strict=True)))
            total += precision
        return total


def _prior_of(prior: Any) -> Prior:
    if isinstance(prior, Posterior):
        return prior.as_prior()
    if not isinstance(prior, Prior):
        raise OptionError(
            f"prior is of type {type(prior).__name__}: pass a persample.Prior, for example posterior.as_prior(); one "
            "number for all weights is prior_precision."
        )
    return prior


def tensors_of_state(state: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors in the state of a parameter."""
    return [value for value in state.values() if isinstance(value, Tensor)]
