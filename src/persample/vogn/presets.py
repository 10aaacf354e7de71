"""Settings of published experiments, as keyword arguments: `VOGN(model, loss_fn, data_size=N, **osawa2019_lenet5())`.

They are taken from the code that the authors published with each paper, and translated into the settings of `VOGN`:

- Osawa et al. add gradients up, m ← β m + g, where `VOGN` averages them, m ← β m + (1 − β) g; so their learning rate
  is divided by 1 − β here, which makes both the same as long as β is constant. They add the prior's term to the
  gradient before, and divide by the new curvature.
- What they call the decay of an average is the weight of the new value; here it is that of the old one.
- Their prior variance is 1 / λ, their KL weighting the temperature, and their factor on the size of the data set the
  augmentation.

Where an architecture has BatchNorm in training mode, which mixes the samples, replace it first (`persample.fix`).
"""

from __future__ import annotations

from typing import Any


def algorithm1() -> dict[str, Any]:
    """The algorithm as printed by Jain and Khan: no momentum, temperature 1, s_0 = 0, line 7 divides by s_t.

    `lr` α, `prior_precision` λ and `decay` γ are yours to choose. The first step is α N / λ gradients long, which a
    `DangerousFirstStepWarning` tells where it is too long: then add `hess_init=`.
    """
    return {"order": "printed", "momentum": 0.0, "temperature": 1.0, "hess_init": 0.0}


def osawa2019_lenet5() -> dict[str, Any]:
    """LeNet-5 on CIFAR-10 without augmentation: batch size 128, 211 epochs, constant learning rate.

    Source: Osawa et al., "Practical Deep Learning with Bayesian Principles", NeurIPS 2019; dl-with-bayes,
    `distributed/classification/configs/cifar10/lenet_vogn_bs128_4gpu.json`. There each of four processes drew its own
    six weights for its quarter of the batch, and the first step was taken at the mean, for which `hess_init` stands
    here: it makes the first draws narrow, and is forgotten by the next.
    """
    return _OSAWA2019 | {
        "prior_precision": 100.0,
        "temperature_start": 0.1,
        "temperature_steps": 11719,
        "mc_samples": 6,
    }


def osawa2019_lenet5_batchnorm() -> dict[str, Any]:
    """LeNet-5 with BatchNorm on CIFAR-10 without augmentation, the small experiment on one GPU.

    Batch size 128, 30 epochs, learning rate times 0.9 after each. Source: dl-with-bayes,
    `classification/configs/cifar10/lenet_vogn.json`. Its gradients are averaged, so its learning rate stands unchanged.
    """
    return {
        "lr": 0.01,
        "prior_precision": 1.0,
        "decay": 0.999,
        "hess_init": 8e-3,
        "order": "updated",
        "momentum": 0.9,
        "bias_correction": False,
        "average_prior": True,
        "temperature": 1.0,
        "mc_samples": 10,
    }


def osawa2019_resnet18() -> dict[str, Any]:
    """ResNet-18 on CIFAR-10 with random crops and flips: batch size 256, 161 epochs.

    The learning rate fell to a tenth after 80 and 120 epochs; the parameters of BatchNorm had no prior and no noise.
    Source: as for `osawa2019_lenet5`, `resnet18_vogn_bs256_8gpu.json`.
    """
    return _OSAWA2019 | {"prior_precision": 50.0, "augmentation": 10.0, "mc_samples": 5}


def osawa2019_vgg19() -> dict[str, Any]:
    """VGG-19 on CIFAR-10 with random crops and flips: batch size 256, 161 epochs.

    The learning rate fell to a tenth after 80 and 120 epochs. Source: as for `osawa2019_lenet5`,
    `vgg19_vogn_bs256_8gpu.json`.
    """
    return _OSAWA2019 | {"prior_precision": 0.5, "augmentation": 10.0, "mc_samples": 5}


def khan2018_australian() -> dict[str, Any]:
    """One hidden layer of 64 ReLUs on the Australian credit data, 345 training samples.

    Batch size and draws were 1 and 1, 1 and 16, or 128 and 16 (pass `mc_samples`), for 16 epochs times the batch size.
    The initial precision is that of the prior. Source: Khan et al., "Fast and Scalable Bayesian Deep Learning by
    Weight-Perturbation in Adam", ICML 2018, figure 3; vadam, `pytorch/vogn_code`.
    """
    return {
        "lr": 1e-3,
        "prior_precision": 1.0,
        "decay": 0.999,
        "hess_init": 0.0,
        "order": "updated",
        "momentum": 0.0,
        "temperature": 1.0,
    }


# What the experiments of Osawa et al. on several GPUs have in common: learning rate 1e-4, momentum 0.9 of sums, weight
# 0.999 of the new curvature, damping 1e-3.
_OSAWA2019: dict[str, Any] = {
    "lr": 1e-3,
    "decay": 0.001,
    "hess_init": 1.0,
    "order": "updated",
    "momentum": 0.9,
    "bias_correction": False,
    "average_prior": True,
    "damping": 1e-3,
    "temperature": 1.0,
}
