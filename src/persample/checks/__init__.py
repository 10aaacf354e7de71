"""Checks that users run: `explain`, `crosscheck`, `benchmark`, `fix`.

One file each. `memory` measures the peak of a call, `outputs_loss` is the loss if none is given, `copies` copies
models, and `behind_batch_norm` reads subclasses of BatchNorm for `fix`.
"""

from persample.checks.benchmark import Cost as Cost
from persample.checks.benchmark import benchmark as benchmark
from persample.checks.crosscheck import Agreement as Agreement
from persample.checks.crosscheck import crosscheck as crosscheck
from persample.checks.explain import ExplainedParameter as ExplainedParameter
from persample.checks.explain import Explanation as Explanation
from persample.checks.explain import explain as explain
from persample.checks.fix import Change as Change
from persample.checks.fix import Fixed as Fixed
from persample.checks.fix import fix as fix
