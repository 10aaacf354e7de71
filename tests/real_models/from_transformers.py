"""Models of the package transformers in their smallest sizes, with random weights: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

_CLASSES = 3
_TOKENS = 20
_TEXT: dict[str, Any] = {
    "vocab_size": _TOKENS,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 10,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_labels": _CLASSES,
}
_IMAGE: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": _CLASSES,
}


def _text(size: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, _TOKENS, (size, 5))}


def _padded_text(size: int) -> dict[str, Tensor]:
    """Sentences of one to five words."""
    lengths = 5 - torch.arange(size) % 5
    return _text(size) | {"attention_mask": (torch.arange(5) < lengths.unsqueeze(1)).long()}


def _two_texts(size: int) -> dict[str, Tensor]:
    return _text(size) | {"decoder_input_ids": torch.randint(3, _TOKENS, (size, 4))}


def _images(pixels: int) -> Callable[[int], dict[str, Tensor]]:
    return lambda size: {"pixel_values": torch.randn(size, 3, pixels, pixels).double()}


def _sounds(size: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(size, 64).double()}


@dataclass(frozen=True)
class RealModel:
    """A model of somebody else.

    Attributes:
        kind: the name of its class in transformers.
        config: the settings of its configuration.
        inputs: makes the inputs of a batch of the given size.
        output: the name of the output that the loss takes.
        rounding: the relative error of what it computes; some normalise in float32 whatever their dtype is.
    """

    kind: str
    config: dict[str, Any]
    inputs: Callable[[int], dict[str, Tensor]]
    output: str = "logits"
    rounding: float = 1e-10

    def build(self) -> nn.Module:
        """Return the model in float64, its scales and shifts away from the ones and zeros of initialisation."""
        model_class = getattr(transformers, self.kind)
        model: nn.Module = model_class(model_class.config_class(**self.config)).double()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        return model

    def loss(self, outputs: Any, targets: Any = None) -> Tensor:
        """Return a loss that depends on all entries of the output, shape `(B,)`."""
        flat = getattr(outputs, self.output).flatten(1)
        return (flat.sin() * torch.linspace(-1, 1, flat.shape[1], dtype=flat.dtype)).sum(1)


MODELS = {
    "BERT": RealModel("BertForSequenceClassification", _TEXT, _padded_text),
    "BERT with written-out attention": RealModel(
        "BertForMaskedLM", _TEXT | {"attn_implementation": "eager"}, _padded_text
    ),
    "DistilBERT": RealModel(
        "DistilBertForSequenceClassification",
        {"vocab_size": _TOKENS, "dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12, "num_labels": _CLASSES},
        _padded_text,
    ),
    "RoBERTa": RealModel("RobertaForSequenceClassification", _TEXT, _text),
    "ELECTRA": RealModel("ElectraForSequenceClassification", _TEXT | {"embedding_size": 6}, _padded_text),
    "ALBERT, one layer used twice": RealModel(
        "AlbertForSequenceClassification", _TEXT | {"embedding_size": 6}, _padded_text
    ),
    "DeBERTa": RealModel("DebertaForSequenceClassification", _TEXT, _padded_text),
    "DeBERTa v2 with relative attention": RealModel(
        "DebertaV2ForSequenceClassification",
        _TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        _padded_text,
    ),
    "XLNet": RealModel(
        "XLNetForSequenceClassification",
        {"vocab_size": _TOKENS, "d_model": 8, "n_layer": 2, "n_head": 2, "d_inner": 12, "num_labels": _CLASSES},
        _text,
    ),
    "Funnel": RealModel(
        "FunnelForSequenceClassification",
        {
            "vocab_size": _TOKENS,
            "block_sizes": [1, 1],
            "d_model": 8,
            "n_head": 2,
            "d_head": 4,
            "d_inner": 12,
            "num_labels": _CLASSES,
        },
        lambda size: {"input_ids": torch.randint(3, _TOKENS, (size, 6))},
    ),
    "GPT-2": RealModel(
        "GPT2LMHeadModel",
        {
            "vocab_size": _TOKENS,
            "n_embd": 8,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 10,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        _padded_text,
    ),
    "OPT": RealModel(
        "OPTForCausalLM",
        {
            "vocab_size": _TOKENS,
            "hidden_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 12,
            "max_position_embeddings": 10,
            "word_embed_proj_dim": 8,
        },
        _text,
    ),
    "BLOOM": RealModel(
        "BloomForCausalLM", {"vocab_size": _TOKENS, "hidden_size": 8, "n_layer": 2, "n_head": 2}, _padded_text
    ),
    "Llama": RealModel("LlamaForCausalLM", _TEXT | {"num_key_value_heads": 1}, _text, rounding=1e-6),
    "Gemma": RealModel("GemmaForCausalLM", _TEXT | {"num_key_value_heads": 1, "head_dim": 4}, _text, rounding=1e-6),
    "Mamba": RealModel(
        "MambaForCausalLM",
        {"vocab_size": _TOKENS, "hidden_size": 8, "num_hidden_layers": 2, "state_size": 4},
        _text,
        rounding=1e-6,
    ),
    "T5": RealModel(
        "T5ForConditionalGeneration",
        {"vocab_size": _TOKENS, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2},
        _two_texts,
    ),
    "BART": RealModel(
        "BartForConditionalGeneration",
        {
            "vocab_size": _TOKENS,
            "d_model": 8,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 12,
            "decoder_ffn_dim": 12,
            "max_position_embeddings": 10,
        },
        _two_texts,
    ),
    "ViT": RealModel("ViTForImageClassification", _IMAGE, _images(16)),
    "DeiT": RealModel("DeiTForImageClassification", _IMAGE, _images(16)),
    "CLIP's image tower": RealModel(
        "CLIPVisionModelWithProjection", _IMAGE | {"projection_dim": 4}, _images(16), "image_embeds"
    ),
    "Swin": RealModel(
        "SwinForImageClassification",
        {
            "image_size": 16,
            "patch_size": 2,
            "embed_dim": 4,
            "depths": [2, 2],
            "num_heads": [1, 2],
            "window_size": 4,
            "num_labels": _CLASSES,
        },
        _images(16),
    ),
    "SegFormer": RealModel(
        "SegformerForImageClassification",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [4, 8],
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
            "num_labels": _CLASSES,
        },
        _images(16),
    ),
    "ConvNeXt": RealModel(
        "ConvNextForImageClassification",
        {"hidden_sizes": [4, 8], "depths": [1, 2], "num_stages": 2, "num_labels": _CLASSES},
        _images(16),
    ),
    "ConvNeXt V2": RealModel(
        "ConvNextV2ForImageClassification",
        {"hidden_sizes": [4, 8], "depths": [1, 2], "num_stages": 2, "num_labels": _CLASSES},
        _images(16),
    ),
    "wav2vec 2.0": RealModel(
        "Wav2Vec2ForSequenceClassification",
        {
            "vocab_size": _TOKENS,
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 12,
            "conv_dim": [4, 4],
            "conv_stride": [2, 2],
            "conv_kernel": [3, 3],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
            "apply_spec_augment": False,  # which draws from NumPy's random numbers
            "classifier_proj_size": 4,
            "num_labels": _CLASSES,
        },
        _sounds,
    ),
}

#: With BatchNorms: in training mode these have no per-sample gradients.
WITH_BATCH_NORM = {
    "ResNet": RealModel(
        "ResNetForImageClassification",
        {
            "embedding_size": 4,
            "hidden_sizes": [4, 8],
            "depths": [1, 2],
            "layer_type": "basic",
            "num_labels": _CLASSES,
        },
        _images(32),
    ),
    "ResNet with bottlenecks": RealModel(
        "ResNetForImageClassification",
        {"embedding_size": 4, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": _CLASSES},
        _images(32),
    ),
    "RegNet": RealModel(
        "RegNetForImageClassification",
        {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "groups_width": 2, "num_labels": _CLASSES},
        _images(32),
    ),
    "MobileNet V1": RealModel(
        "MobileNetV1ForImageClassification",
        {"depth_multiplier": 0.25, "min_depth": 2, "num_labels": _CLASSES},
        _images(32),
    ),
    "MobileNet V2": RealModel(
        "MobileNetV2ForImageClassification",
        {"depth_multiplier": 0.1, "min_depth": 2, "depth_divisible_by": 2, "num_labels": _CLASSES},
        _images(32),
    ),
}
