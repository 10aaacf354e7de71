"""The Trainer of Hugging Face, as users call it: what it accumulates, clips, saves and evaluates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import persample
from persample.errors import OptionError, UnsupportedModelError, UsageError
from persample.testing.devices import generator_of

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
pytest.importorskip("accelerate", reason="accelerate is not installed: pip install accelerate")

from persample.integrations.transformers import VariationalTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = torch.randint(1, 9, (50, 7), generator=generator_of(1))
LABELS = (TOKENS > 4).sum(1).gt(3).long()


def data_of(labels: Tensor, tokens: Tensor = TOKENS) -> list[dict[str, Tensor]]:
    return [{"input_ids": t, "labels": label} for t, label in zip(tokens, labels, strict=True)]


SMALL = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "vocab_size": 9,
    "max_position_embeddings": 8,
}


def bert(dropout: float = 0.0, kind: str = "ForSequenceClassification", **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **SMALL, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **{"num_labels": 2, **settings}
    )
    return getattr(transformers, f"Bert{kind}")(config)


def gpt() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return transformers.GPT2LMHeadModel(config)


def make(
    folder: Path,
    model: nn.Module,
    rule: Any = persample.VOGN,
    *,
    batch_size: int = 10,
    parts: int = 1,
    data: Any = None,
    seed: int | None = 3,
    of_trainer: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    kind: Any = VariationalTrainer,
    **arguments: Any,
) -> Any:
    defaults = {
        "num_train_epochs": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "per_device_eval_batch_size": 20,
    }
    settings = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=parts,
        **(defaults | arguments),
    )
    generator = None if seed is None else generator_of(seed)
    made = rule(model, **{"data_size": 50, "lr": 0.05, "generator": generator, **(optimizer or {})})
    data = data_of(LABELS) if data is None else data
    return kind(model, settings, train_dataset=data, eval_dataset=data, optimizers=(made, None), **(of_trainer or {}))


class OfItsOwn(VariationalTrainer):
    """Computes the loss by itself, as users of the Trainer do."""

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(input_ids=inputs["input_ids"])
        loss = F.cross_entropy(outputs.logits, inputs["labels"])
        return (2 * loss, outputs) if return_outputs else 2 * loss


class OfTheTrainers(VariationalTrainer):
    """Changes the loss that the Trainer computes."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().compute_loss(*args, **kwargs)


def optimizer_of(trainer: Any) -> Any:
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def assert_same(one: Any, other: Any, **tolerances: float) -> None:
    assert optimizer_of(one).steps == optimizer_of(other).steps
    for (name, p), q in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        tolerance = {"rtol": 1e-3, "atol": 1e-5} | tolerances
        torch.testing.assert_close(p, q, **tolerance, msg=lambda m, name=name: f"{name}: {m}")
    precisions = optimizer_of(one)._precision(), optimizer_of(other)._precision()
    torch.testing.assert_close(*precisions, **({"rtol": 1e-3, "atol": 1e-5} | tolerances))


class TestTraining:
    @pytest.mark.parametrize("rule", [persample.VOGN, persample.IVON])
    @pytest.mark.parametrize(("whole", "part", "parts"), [(20, 5, 4), (16, 8, 2), (24, 8, 3)])
    def test_accumulated_batches_are_one_large_batch(
        self, rule: Any, whole: int, part: int, parts: int, tmp_path: Path
    ) -> None:
        """Also at the end of an epoch, where there are fewer parts, and the last one is smaller."""
        one = make(tmp_path, bert(), rule, batch_size=whole, max_grad_norm=0.0)
        other = make(tmp_path, bert(), rule, batch_size=part, parts=parts, max_grad_norm=0.0)
        for trainer in (one, other):
            trainer.train()
        assert_same(one, other)

    def test_the_trainer_clips_the_accumulated_gradient(self, tmp_path: Path) -> None:
        one = make(tmp_path, bert(), batch_size=25, max_grad_norm=0.02)
        other = make(tmp_path, bert(), batch_size=5, parts=5, max_grad_norm=0.02)
        unclipped = make(tmp_path, bert(), batch_size=25, max_grad_norm=0.0)
        for trainer in (one, other, unclipped):
            trainer.train()
        assert_same(one, other)
        weights = [t.model.classifier.weight for t in (one, unclipped)]
        assert (weights[0] - weights[1]).abs().max() > 1e-3

    @pytest.mark.parametrize("kind", [OfItsOwn, OfTheTrainers])
    @pytest.mark.parametrize("draws", [1, 2])
    def test_a_subclass_with_another_loss(self, kind: Any, draws: int, tmp_path: Path) -> None:
        """Only the Trainer's own factor is taken out of it."""
        trainers = [
            make(tmp_path, bert(), batch_size=b, parts=n, kind=kind, max_grad_norm=0.0, max_steps=2, optimizer=o)
            for b, n, o in ((20, 1, {"mc_samples": draws}), (10, 2, {"mc_samples": draws}))
        ]
        for trainer in trainers:
            trainer.train()
        if draws == 1:
            assert_same(*trainers)
        by_hand = persample.VOGN(
            bert(),
            lambda outputs, labels: 2 * F.cross_entropy(outputs.logits, labels, reduction="none"),
            data_size=50,
            lr=0.05,
            generator=generator_of(3),
            mc_samples=draws,
        )
        once = make(
            tmp_path, bert(), batch_size=50, kind=kind, max_grad_norm=0.0, max_steps=1, optimizer={"mc_samples": draws}
        )
        once.train()
        by_hand.observe({"input_ids": TOKENS}, LABELS)
        by_hand.step()
        for p, q in zip(once.model.parameters(), by_hand.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)

    def test_several_draws_are_those_of_observe(self, tmp_path: Path) -> None:
        trainer = make(tmp_path, bert(), batch_size=50, max_steps=1, optimizer={"mc_samples": 3}, max_grad_norm=0.0)
        trainer.train()
        by_hand = persample.VOGN(
            bert(),
            lambda outputs, labels: F.cross_entropy(outputs.logits, labels, reduction="none"),
            data_size=50,
            lr=0.05,
            generator=generator_of(3),
            mc_samples=3,
        )
        by_hand.observe({"input_ids": TOKENS}, LABELS)
        by_hand.step()
        for p, q in zip(trainer.model.parameters(), by_hand.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize("seed", [3, None])
    def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(self, seed: int | None, tmp_path: Path) -> None:
        settings: dict[str, Any] = {"parts": 2, "num_train_epochs": 3, "lr_scheduler_type": "cosine", "seed": seed}
        whole = make(tmp_path, bert(0.1), **settings, save_strategy="steps", save_steps=2)
        whole.train()
        resumed = make(tmp_path, bert(0.1), **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert_same(whole, resumed, rtol=0, atol=0)

    def test_a_loss_for_each_sequence(self, tmp_path: Path) -> None:
        """Where sequences have other numbers of ignored labels, a mean over all tokens has no loss of a sample."""
        labels = TOKENS.clone()
        labels[::2, :4] = -100

        def mean_over_sequences(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
            losses = F.cross_entropy(outputs.logits.transpose(1, 2)[..., :-1], labels[:, 1:], reduction="none")
            return losses.sum(1).mean()

        refused = make(tmp_path, gpt(), data=data_of(labels))
        with pytest.raises(UsageError, match="ignored"):
            refused.train()
        loss = {"compute_loss_func": mean_over_sequences}
        one = make(tmp_path, gpt(), batch_size=20, data=data_of(labels), of_trainer=loss, max_grad_norm=0.0)
        other = make(tmp_path, gpt(), batch_size=5, parts=4, data=data_of(labels), of_trainer=loss, max_grad_norm=0.0)
        for trainer in (one, other):
            trainer.train()
        assert_same(one, other)

    def test_an_optimizer_of_others_is_refused(self, tmp_path: Path) -> None:
        trainer = make(tmp_path, bert())
        trainer.optimizer = None
        with pytest.raises(UsageError, match=r"AdamW.*optimizers=\(persample\.VOGN"):
            trainer.train()

    def test_the_best_posterior_is_loaded_not_only_its_mean(self, tmp_path: Path) -> None:
        best: dict[str, Any] = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
        best["lr_scheduler_type"] = "constant"
        trainer = make(tmp_path, bert(), num_train_epochs=3, metric_for_best_model="eval_runtime", **best)
        trainer.args.greater_is_better = False
        losses = iter([1.0, 2.0, 3.0])  # the first epoch is the best
        evaluate = trainer.evaluate
        trainer.evaluate = lambda *a, **k: evaluate(*a, **k) | {"eval_runtime": next(losses)}
        trainer.train()
        early = make(tmp_path / "early", bert(), num_train_epochs=1, lr_scheduler_type="constant")
        early.train()
        assert_same(trainer, early, rtol=0, atol=0)


class TestEvaluation:
    def draws(self, trainer: Any, tokens: Tensor = TOKENS) -> Tensor:
        """The outputs under the draws, shape (K, B, …)."""
        trainer.model.eval()
        optimizer, generator, outputs = optimizer_of(trainer), generator_of(trainer.seed_of_draws), []
        for _ in range(trainer.samples):
            with torch.no_grad(), optimizer.sampled_params(generator=generator):
                outputs.append(trainer.model(input_ids=tokens).logits)
        return torch.stack(outputs)

    def test_of_classes(self, tmp_path: Path) -> None:
        trainer = make(tmp_path, bert(), of_trainer={"samples": 5})
        trainer.train()
        probabilities = self.draws(trainer).softmax(-1).mean(0)
        predicted = trainer.predict(data_of(LABELS))
        torch.testing.assert_close(torch.tensor(predicted.predictions).exp(), probabilities)
        assert predicted.metrics["test_loss"] == pytest.approx(F.nll_loss(probabilities.log(), LABELS).item(), rel=1e-5)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(predicted.metrics["test_loss"])

    @pytest.mark.parametrize("of_tokens", [False, True])
    def test_of_smoothed_labels(self, of_tokens: bool, tmp_path: Path) -> None:
        model, data = (gpt(), data_of(TOKENS)) if of_tokens else (bert(), data_of(LABELS))
        trainer = make(tmp_path, model, data=data, of_trainer={"samples": 5}, label_smoothing_factor=0.2)
        trainer.train()
        log = self.draws(trainer).softmax(-1).mean(0).log()
        outputs, labels = (log[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()) if of_tokens else (log, LABELS)
        due = F.cross_entropy(outputs, labels, label_smoothing=0.2).item()
        assert trainer.evaluate()["eval_loss"] == pytest.approx(due, rel=1e-5)

    def test_of_tokens(self, tmp_path: Path) -> None:
        trainer = make(tmp_path, gpt(), data=data_of(TOKENS), of_trainer={"samples": 5})
        trainer.train()
        log = self.draws(trainer).softmax(-1).mean(0).log()
        due = F.nll_loss(log[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
        assert trainer.evaluate()["eval_loss"] == pytest.approx(due.item(), rel=1e-5)

    def test_of_real_numbers(self, tmp_path: Path) -> None:
        labels = TOKENS.float().mean(1)
        trainer = make(tmp_path, bert(num_labels=1), data=data_of(labels), of_trainer={"samples": 5})
        trainer.train()
        mean = self.draws(trainer).mean(0)
        due = F.mse_loss(mean.squeeze(1), labels).item()
        assert trainer.evaluate()["eval_loss"] == pytest.approx(due, rel=1e-5)
        torch.testing.assert_close(torch.tensor(trainer.predict(data_of(labels)).predictions), mean)

    def test_of_several_labels(self, tmp_path: Path) -> None:
        labels = torch.stack([LABELS, 1 - LABELS, LABELS], 1).float()
        model = bert(num_labels=3, problem_type="multi_label_classification")
        trainer = make(tmp_path, model, data=data_of(labels), of_trainer={"samples": 5})
        trainer.train()
        probabilities = self.draws(trainer).sigmoid().mean(0)
        predicted = torch.tensor(trainer.predict(data_of(labels)).predictions)
        torch.testing.assert_close(predicted.sigmoid(), probabilities)
        due = F.binary_cross_entropy(probabilities, labels).item()
        assert trainer.evaluate()["eval_loss"] == pytest.approx(due, rel=1e-5)

    def test_without_labels_the_likelihood_must_be_said(self, tmp_path: Path) -> None:
        data = [{"input_ids": t} for t in TOKENS]
        with pytest.raises(UsageError, match=r'the data have no labels.*likelihood="categorical"'):
            make(tmp_path, bert()).predict(data)
        trainer = make(tmp_path, bert(), of_trainer={"likelihood": "categorical", "samples": 3})
        trainer.train()
        found = torch.tensor(trainer.predict(data).predictions)
        torch.testing.assert_close(found.exp(), self.draws(trainer).softmax(-1).mean(0))

    def test_at_the_mean_if_asked_for(self, tmp_path: Path) -> None:
        trainer = make(tmp_path, bert(), of_trainer={"samples": 0})
        trainer.train()
        with torch.no_grad():
            due = trainer.model.eval()(input_ids=TOKENS, labels=LABELS).loss.item()
        assert trainer.evaluate()["eval_loss"] == pytest.approx(due, rel=1e-5)

    def test_evaluating_does_not_change_the_training(self, tmp_path: Path) -> None:
        plain, evaluated = make(tmp_path, bert()), make(tmp_path, bert(), eval_strategy="steps", eval_steps=1)
        for trainer in (plain, evaluated):
            trainer.train()
        assert_same(plain, evaluated, rtol=0, atol=0)

    def test_options(self, tmp_path: Path) -> None:
        with pytest.raises(OptionError, match="samples=-1"):
            make(tmp_path, bert(), of_trainer={"samples": -1})
        with pytest.raises(OptionError, match="likelihood='poisson'"):
            make(tmp_path, bert(), of_trainer={"likelihood": "poisson"})


def test_what_mixes_samples_is_refused_as_ever(tmp_path: Path) -> None:
    class WithBatchNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.BatchNorm1d(7), nn.Linear(7, 2))

        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            logits = self.layers(input_ids.float())
            return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}

    trainer = make(tmp_path, WithBatchNorm())
    with pytest.raises(UnsupportedModelError, match="BatchNorm"):
        trainer.train()
