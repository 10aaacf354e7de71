"""The conformance suite: what every backend must pass, for those who write their own.

`suite` has the test class, `zoo` the models, `drawn` random problems, `truth` the float64 loop, and `trace` what a call
must not change. `module_sweep` and `support` run backends on lists of models.

It needs pytest and hypothesis: `pip install "persample[testing]"`.
"""

from persample.errors import MissingPackageError

try:
    import hypothesis  # noqa: F401
    import pytest
except ModuleNotFoundError as error:
    raise MissingPackageError(
        f'persample.testing cannot be used here ({error}); run: pip install "persample[testing]"'
    ) from error

# So that a failing assertion of the suite shows the values that it compares, as those of a test module do.
pytest.register_assert_rewrite(f"{__name__}.candidate", f"{__name__}.suite", f"{__name__}.trace")

from persample.testing.candidate import Candidate as Candidate
from persample.testing.candidate import Verdict as Verdict
from persample.testing.problem import Problem as Problem
from persample.testing.suite import BackendSuite as BackendSuite
from persample.testing.suite import judge_case as judge_case
from persample.testing.trace import no_trace as no_trace
from persample.testing.truth import Truth as Truth
from persample.testing.truth import per_sample_truth as per_sample_truth
from persample.testing.zoo import FAMILIES as FAMILIES
from persample.testing.zoo import ZOO as ZOO
from persample.testing.zoo import Case as Case
