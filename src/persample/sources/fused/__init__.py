"""Backend `"fused"`: the project's own engine."""

from persample.sources.fused.source import FusedSource as FusedSource
