"""PyTorch's own list of modules, run through backends: `python -m persample.testing.module_sweep [BACKEND …]`."""

from persample.testing.module_sweep.sweep import Finding as Finding
from persample.testing.module_sweep.sweep import sweep as sweep
