"""`BackendSuite`: the tests that every backend passes, as a class to inherit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import persample
from persample.errors import MissingPackageError, PersampleError, UnsupportedModelError
from persample.testing.candidate import METHODS, Candidate, Method, Verdict, assert_right
from persample.testing.drawn import problems
from persample.testing.drawn.functions import Around
from persample.testing.explosions import BackwardBomb, BlownUpError, Bomb
from persample.testing.problem import Problem
from persample.testing.trace import no_trace
from persample.testing.truth import Stream
from persample.testing.zoo import ZOO, Case


class BackendSuite:
    """Inherit this class in a test module, and name the backend.

    Every test asks the same: is the result that of an independent loop over the samples, in float64 to nine digits; or
    is it an error that says what to do; and is the model as it was?

    Attributes:
        backend: the name by which `persample.make_source` finds it.
        options: its options.
        stream: where its random numbers come from. `"batch"`: it draws those of one ordinary forward pass over the
            batch. `"each"`: every sample goes alone through the model, from the same seed.
        serves: what it must not refuse. `"nothing"`: it may refuse whatever it wants. `"layers"`: drawn models of
            the layers in `persample.testing.drawn.layers`. `"everything"`: all that has per-sample gradients.
        one_in: of as many drawn models it is given one, for a backend that is slow to begin.

    Example:
        >>> from persample.testing import BackendSuite
        >>> class TestLoop(BackendSuite):
        ...     backend = "loop"
        ...     serves = "everything"
    """

    backend: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}
    stream: ClassVar[Stream] = "batch"
    serves: ClassVar[Literal["nothing", "layers", "everything"]] = "nothing"
    one_in: ClassVar[int] = 1

    @property
    def candidate(self) -> Candidate:
        """The backend with its options."""
        return Candidate(self.backend, self.options, self.stream)

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _one_thread(cls) -> Iterator[None]:
        """One thread: the tensors here are tiny, and threads that wait for each other cost more than they give."""
        try:
            persample.make_source(cls.backend, nn.Linear(1, 1), persample.losses.cross_entropy, **cls.options)
        except MissingPackageError as error:
            if not isinstance(error.__cause__, ImportError):
                raise
            pytest.skip(str(error))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)

    @pytest.mark.parametrize("case", ZOO.values(), ids=ZOO)
    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_zoo(self, case: Case) -> None:
        """Every case of the zoo, in batches of several sizes."""
        verdict = judge_case(self.candidate, case)
        self.accept(case, verdict)

    def accept(self, case: Case, verdict: Verdict) -> None:
        """Assert that `verdict` is one that this backend may get for `case`; to be overridden by those that pin it."""
        _require_not_wrong(verdict)
        if self.serves == "everything" and not case.impossible:
            assert verdict.kind == "exact", f"it must not refuse this case: {verdict.reason}"

    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_drawn_layers(self) -> None:
        """Directed graphs of common layers, drawn by chance."""
        self._judge_drawn(anything=False, must_serve=self.serves in ("layers", "everything"))

    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_drawn_anything(self) -> None:
        """Directed graphs of layers, functions and parameters, drawn by chance."""
        self._judge_drawn(anything=True, must_serve=self.serves == "everything")

    def _judge_drawn(self, *, anything: bool, must_serve: bool) -> None:
        @settings(max_examples=max(1, settings().max_examples // self.one_in))
        @given(problem=problems(anything), data=st.data())
        def judge(problem: Problem, data: st.DataObject) -> None:
            if self.stream == "each":
                _drop_out_in_order(problem.model)
            # What must be served is right by itself. Beyond, the self-check may find that the model mixes the samples.
            verdict = self.candidate.judge(
                problem, data.draw(st.sampled_from(["never", "first"])) if must_serve else "first"
            )
            event(verdict.kind)
            _require_not_wrong(verdict)
            assert not must_serve or verdict.kind == "exact", f"it must not refuse this: {verdict.reason}"

        judge()

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_errors_in_drawn_models(self, method: str) -> None:
        """An error in a forward pass, the first one or a later one, passes on and leaves no trace."""

        @settings(max_examples=max(1, settings().max_examples // (4 * self.one_in)))
        @given(problem=problems(), place=st.integers(0, 4), calls_before=st.integers(0, 2))
        def judge(problem: Problem, place: int, calls_before: int) -> None:
            bomb = Bomb(calls_before=calls_before)
            steps: Any = problem.model.get_submodule("steps")
            place %= len(steps)
            steps[place] = Around("exploding", lambda step, *args: bomb(step(*args)), steps[place])
            _with_gradients(problem.model)
            source = self.candidate.source(problem, check="always")
            with no_trace(problem.model, problem.inputs, problem.targets):
                try:
                    getattr(source, method)(problem.inputs, problem.targets)
                except (BlownUpError, UnsupportedModelError):
                    pass
                else:
                    assert bomb.calls_left[0] >= 0, "the error was swallowed"

        judge()

    @pytest.mark.parametrize("make_error", [BlownUpError, RuntimeError, ValueError, KeyError])
    @pytest.mark.parametrize("method", METHODS)
    def test_errors_in_forward(self, method: str, make_error: type[Exception]) -> None:
        """An error of the user's code passes on as it is."""
        error = make_error("seven bells")
        problem = _small_problem(Bomb(lambda: error))
        with (
            no_trace(problem.model, problem.inputs, problem.targets),
            pytest.raises(make_error, match="bells") as raised,
        ):
            getattr(self.candidate.source(problem), method)(problem.inputs, problem.targets)
        assert not isinstance(raised.value, PersampleError)

    @pytest.mark.parametrize("method", METHODS)
    def test_errors_in_loss(self, method: str) -> None:
        """An error in the loss passes on, and leaves no trace."""

        def blow_up(outputs: Tensor, targets: Any) -> Tensor:
            raise BlownUpError

        problem = dataclasses.replace(_small_problem(nn.Tanh()), loss_fn=blow_up)
        with no_trace(problem.model, problem.inputs, problem.targets), pytest.raises(BlownUpError):
            getattr(self.candidate.source(problem), method)(problem.inputs, problem.targets)

    @pytest.mark.parametrize("method", METHODS)
    def test_errors_in_backward(self, method: str) -> None:
        """An error in the backward pass passes on, and leaves no trace."""
        problem = _small_problem(BackwardBomb())
        with (
            no_trace(problem.model, problem.inputs, problem.targets),
            pytest.raises((BlownUpError, UnsupportedModelError)),
        ):
            getattr(self.candidate.source(problem), method)(problem.inputs, problem.targets)

    def test_works_after_an_error(self) -> None:
        """The layers of a model in which a call failed are served afterwards."""
        broken = _small_problem(Bomb())
        with pytest.raises(BlownUpError):
            self.candidate.source(broken).moments(broken.inputs, broken.targets)
        layers = [layer for layer in broken.model.children() if not isinstance(layer, Bomb)]
        repaired = dataclasses.replace(broken, model=nn.Sequential(*layers))
        assert self.candidate.judge(repaired).kind == "exact"

    @pytest.mark.parametrize("method", METHODS)
    def test_one_source_for_many_batches(self, method: Method) -> None:
        """What a call leaves in the backend does not show in later ones: other samples, other sizes, other weights."""
        first = _small_problem(nn.Tanh())
        source = self.candidate.source(first)
        for size in (4, 4, 3, 1, 6):
            inputs, targets = torch.randn(size, 3).double(), torch.arange(size) % 2
            for _ in range(2):
                problem = dataclasses.replace(first, inputs=inputs, targets=targets)
                result = getattr(source, method)(inputs, targets)
                assert_right(method, result, problem.truth(self.stream), problem, {})
                for parameter in first.model.parameters():
                    parameter.data *= 1.1


def judge_case(candidate: Candidate, case: Case) -> Verdict:
    """Return the verdict on `case` in batches of all its sizes: exact, or the first refusal."""
    verdicts = [candidate.judge(case.problem(size)) for size in case.sizes]
    return next((verdict for verdict in verdicts if verdict.kind != "exact"), verdicts[0])


def _require_not_wrong(verdict: Verdict) -> None:
    """Assert that the self-check had nothing to find: users may switch it off, and refusing is the backend's work."""
    assert verdict.kind != "caught", f"a wrong number, which the self-check found: {verdict.reason}"


def _small_problem(middle: nn.Module) -> Problem:
    model = nn.Sequential(nn.Linear(3, 4), middle, nn.Linear(4, 2)).double()
    _with_gradients(model)
    inputs, targets = torch.randn(4, 3).double(), torch.tensor([0, 1, 0, 1])
    return Problem(model, inputs, targets, persample.losses.cross_entropy)


def _drop_out_in_order(model: nn.Module) -> None:
    """Let each dropout see its input in row-major order: it draws in that of memory, which each way may choose."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))


def _with_gradients(model: nn.Module) -> None:
    """Let a part of the parameters have a gradient from before, that must stay."""
    for i, parameter in enumerate(model.parameters()):
        if i % 2 and parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, float(i))
