"""A posterior over the weights of a LoRA adapter alone, whose model stays frozen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import persample
from persample.testing.devices import generator_of

peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")

TOKENS = torch.randint(9, (6, 7), generator=generator_of(1))


def adapted(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=9, n_positions=8, n_embd=8, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    lora = peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"], **settings)
    model = peft.get_peft_model(transformers.GPT2LMHeadModel(config), lora).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora" in name:  # B begins at zero, which would hide errors in A
                p.normal_(generator=generator_of(2))
    return model


def loss_fn(outputs: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs.logits.transpose(1, 2)[..., :-1], labels[:, 1:], reduction="none").mean(1)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}])
@pytest.mark.parametrize("backend", ["fused", "vmap"])
def test_gradients_of_the_adapter_are_those_of_single_samples(settings: dict[str, Any], backend: str) -> None:
    model = adapted(**settings)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names
    assert all("lora" in name for name in names)
    moments = persample.make_source(backend, model, loss_fn).moments({"input_ids": TOKENS}, TOKENS)
    assert moments.mean.keys() == names
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for i in range(len(TOKENS)):
        loss = loss_fn(model(input_ids=TOKENS[i : i + 1]), TOKENS[i : i + 1]).sum()
        params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, g in zip(params, torch.autograd.grad(loss, list(params.values())), strict=True):
            rows[name].append(g)
    for name in names:
        stacked = torch.stack(rows[name])
        torch.testing.assert_close(moments.mean[name], stacked.mean(0))
        torch.testing.assert_close(moments.second_moment[name], stacked.square().mean(0))


def test_the_posterior_is_over_the_adapter_alone() -> None:
    model = adapted()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = persample.VOGN(model, loss_fn, data_size=6, lr=0.05, generator=generator_of(3))
    losses = []
    for _ in range(40):
        losses.append(optimizer.observe({"input_ids": TOKENS}, TOKENS).item())
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all("lora" in name for name in optimizer.posterior.mean)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    predicted = optimizer.predict({"input_ids": TOKENS}, samples=3, pick=lambda output: output.logits[:, -1])
    assert predicted.probabilities.shape == (6, 9)
