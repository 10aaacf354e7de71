"""What users run to trust and to compare: agreement of the backends, and what they cost."""

from persample.checks.benchmark import Cost as Cost
from persample.checks.benchmark import benchmark as benchmark
from persample.checks.crosscheck import Agreement as Agreement
from persample.checks.crosscheck import crosscheck as crosscheck
