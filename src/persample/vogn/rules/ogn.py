"""OGN: VOGN without noise."""

from __future__ import annotations

from typing import ClassVar

from persample.vogn.rules.vogn import VOGN


class OGN(VOGN):
    """Online Gauss-Newton: the rule of `VOGN` with σ = 0 while training, so the gradients are those at the mean.

        ĝ = Σ g_i / M,   h = Σ g_i² / M,   g_i the gradient of sample i's loss at μ_t
        s_{t+1} = γ s_t + (1 − γ) h
        μ_{t+1} = μ_t − α (ĝ + λ μ_t / N) / (s_t + λ / N)

    Source: Osawa et al., "Practical Deep Learning with Bayesian Principles", NeurIPS 2019, where it is the
    deterministic sibling of VOGN whose settings are found first. Its posterior, for predictions, is
    N(μ, 1 / (N s + λ)): an online Laplace approximation (Khan et al., "Approximate Inference Turns Deep Networks into
    Gaussian Processes", NeurIPS 2019).

    Settings, arguments and use are those of `VOGN`, and each can load the state of the other. `mc_samples` should stay
    1, because all draws are the same.
    """

    draws_for_training: ClassVar[bool] = False
