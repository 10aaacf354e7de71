"""Backend `"hooks"`: the paper's method, written by hand (forward hook, tensor hook, unfold)."""

from persample.sources.backends.hooks.source import HooksSource as HooksSource
