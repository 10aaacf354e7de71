"""Backend `"fused"`: the project's own engine."""

from persample.sources.backends.fused.source import FusedSource as FusedSource
