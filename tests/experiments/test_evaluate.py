from __future__ import annotations

import torch

from persample import VOGN
from persample.experiments.data import ImageDataset
from persample.experiments.evaluate import predict, predict_averaged
from persample.experiments.recipes import configure
from persample.experiments.run import start
from persample.experiments.seeds import make_generator


def vogn() -> VOGN:
    optimizer = start(configure("mnist-5k", "vogn"), 40).optimizer
    assert isinstance(optimizer, VOGN)
    return optimizer


def test_predicts_at_the_parameters_as_they_are(digits: ImageDataset) -> None:
    model = start(configure("mnist-5k", "adam"), 40).model

    probabilities = predict(model, digits.train_inputs)

    with torch.no_grad():
        expected = torch.exp(torch.log_softmax(model(digits.train_inputs).double(), dim=1))
    assert probabilities.dtype == torch.float64
    torch.testing.assert_close(probabilities, expected, rtol=1e-5, atol=1e-9)


def test_averages_over_draws_from_the_posterior(digits: ImageDataset) -> None:
    optimizer, inputs = vogn(), digits.train_inputs
    generator = make_generator(5, "evaluation", 2)
    total = torch.zeros(len(inputs), 10)
    for _ in range(3):
        with optimizer.sampled_params(generator=generator), torch.no_grad():
            total += optimizer.model(inputs).softmax(1)

    averaged = predict_averaged(optimizer, inputs, draws=3, seed=5, epoch=2)

    torch.testing.assert_close(averaged, total / 3)
    assert not averaged.equal(predict_averaged(optimizer, inputs, draws=3, seed=5, epoch=3))


def test_many_inputs_meet_the_same_draws(digits: ImageDataset) -> None:
    optimizer, one = vogn(), digits.train_inputs[:1]

    averaged = predict_averaged(optimizer, one.expand(1201, -1, -1, -1), draws=2, seed=0, epoch=1)

    assert averaged.shape == (1201, 10)
    torch.testing.assert_close(averaged, averaged[:1].expand(1201, 10), rtol=1e-5, atol=1e-6)
    assert predict(optimizer.model, one.expand(1201, -1, -1, -1)).shape == (1201, 10)


def test_leaves_noise_and_mean_as_they_were(digits: ImageDataset) -> None:
    optimizer = vogn()
    noise = optimizer.generator.get_state()
    mean = [parameter.clone() for parameter in optimizer.model.parameters()]

    predict_averaged(optimizer, digits.train_inputs, draws=2, seed=0, epoch=1)

    assert optimizer.generator.get_state().equal(noise)
    assert all(map(torch.equal, mean, optimizer.model.parameters()))
