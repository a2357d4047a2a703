"""Architectures of torchvision, timm and transformers with random weights and small inputs."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

Made = tuple[nn.Module, Any]


class Case(NamedTuple):
    """An architecture.

    Attributes
    ----------
    name : str
        Library and name, such as ``"timm:resnet18"``.
    family : str
        Kind of network.
    make : callable
        Function that returns the model and an input, a tensor or a mapping of arguments by name.
    """

    name: str
    family: str
    make: Callable[[], Made]


#: Names of torchvision by family, and the size of the image.
_TORCHVISION = {
    "plain and residual": (
        96, "alexnet vgg11 vgg16_bn resnet18 resnet50 wide_resnet50_2 resnext50_32x4d squeezenet1_1"
    ),
    "mobile": (
        64, "mobilenet_v2 mobilenet_v3_small mobilenet_v3_large mnasnet0_5 mnasnet1_0 "
        "shufflenet_v2_x0_5 shufflenet_v2_x1_5 efficientnet_b0 efficientnet_b2 efficientnet_v2_s "
        "regnet_x_400mf regnet_y_400mf regnet_y_800mf regnet_x_1_6gf"
    ),
    "branches": (96, "densenet121 densenet169 googlenet inception_v3"),
    "transformers and ConvNeXt": (64, "convnext_tiny swin_t swin_v2_t maxvit_t vit_b_32"),
    "segmentation": (
        64, "deeplabv3_mobilenet_v3_large deeplabv3_resnet50 fcn_resnet50 lraspp_mobilenet_v3_large"
    ),
}  # fmt: skip
#: Arguments of constructors that are slow, or that fix the size of the image.
_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
    "maxvit_t": {"input_size": (224, 224)},
    "vit_b_32": {"image_size": 64},
}
_SIZES = {"maxvit_t": 224, "inception_v3": 128, "s3d": 224}  # whose layers need more
_DETECTION = (
    "fasterrcnn_resnet50_fpn fasterrcnn_mobilenet_v3_large_fpn retinanet_resnet50_fpn "
    "fcos_resnet50_fpn ssd300_vgg16 ssdlite320_mobilenet_v3_large"
)
_VIDEO = "r3d_18 mc3_18 r2plus1d_18 s3d swin3d_t"

#: Names of timm by family.
_TIMM = {
    "ViT and relatives": (
        "vit_tiny_patch16_224 vit_small_patch16_224 deit_tiny_patch16_224 deit3_small_patch16_224 "
        "beit_base_patch16_224 cait_xxs24_224 xcit_nano_12_p16_224 volo_d1_224 "
        "convit_tiny pit_ti_224 tnt_s_patch16_224 levit_128s crossvit_tiny_240 coat_lite_tiny "
        "mixer_s32_224 gmlp_ti16_224 resmlp_12_224 eva02_tiny_patch14_224 hiera_tiny_224 "
        "sequencer2d_s flexivit_small visformer_tiny"
    ),
    "Swin and windows": (
        "swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 twins_svt_small nest_tiny "
        "mvitv2_tiny gcvit_xxtiny davit_tiny maxvit_rmlp_pico_rw_256 coatnet_pico_rw_224 "
        "pvt_v2_b0 focalnet_tiny_srf"
    ),
    "ConvNeXt and relatives": (
        "convnext_atto convnextv2_atto convmixer_768_32 inception_next_tiny "
        "poolformer_s12 mambaout_femto starnet_s1 fasternet_t0 rdnet_tiny"
    ),
    "mobile": (
        "mobilenetv4_conv_small mobilenetv4_hybrid_medium mobilenetv3_small_050 "
        "mobilevit_xxs mobilevitv2_050 edgenext_xx_small efficientformer_l1 efficientvit_b0 "
        "efficientvit_m0 ghostnet_100 ghostnetv2_100 repghostnet_050 tinynet_e lcnet_050 "
        "fastvit_t8 repvit_m0_9 swiftformer_xs tiny_vit_5m_224 shvit_s1 hardcorenas_a "
        "rexnet_100 fbnetc_100 spnasnet_100 mnasnet_small"
    ),
    "EfficientNet": (
        "efficientnet_b0 efficientnetv2_rw_t tf_efficientnetv2_b0 tf_efficientnet_lite0 "
        "mixnet_s gc_efficientnetv2_rw_t efficientnet_es"
    ),
    "residual": (
        "resnet18 resnet26d resnetv2_50 resnetv2_50x1_bit seresnet18 resnest14d res2net50_14w_8s "
        "skresnet18 ecaresnet26t bat_resnext26ts lambda_resnet26t botnet26t_256 "
        "gernet_s repvgg_a0 resnetblur18 tresnet_m selecsls42 cspresnet50 senet154"
    ),
    "NFNet": ("dm_nfnet_f0 nf_regnet_b0 nf_resnet26 eca_nfnet_l0"),
    "RegNet": ("regnetx_002 regnety_002 regnetz_005"),
    "HRNet and DLA": ("hrnet_w18_small dla34 dla46_c vovnet39a ese_vovnet19b_dw hgnet_tiny"),
    "branches": (
        "densenet121 inception_v3 inception_v4 inception_resnet_v2 xception41 dpn48b nasnetalarge"
    ),
    "VGG": "vgg11_bn",
}  # fmt: skip
_IMAGE = 64


def _library(name: str) -> Any:
    """Import a module of torchvision, or of a library that imports torchvision itself.

    Its wheels on PyPI are for CUDA.  Beside PyTorch for CPUs their operators cannot be loaded, and
    the import ends at those whose schemas it expects: these are declared.  The models here call
    none.
    """
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:  # transformers does without
        pass
    except RuntimeError:
        for operator in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{operator}",
                "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            )
    return importlib.import_module(name)


def _torchvision(name: str, size: int) -> Made:
    models = _library("torchvision.models")
    options = _OPTIONS.get(name, {})
    if name in ("deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "fcn_resnet50",
                "lraspp_mobilenet_v3_large"):  # fmt: skip
        options = {"weights_backbone": None}
    return models.get_model(name, weights=None, **options), torch.randn(1, 3, size, size)


def _detection(name: str) -> Made:
    models = _library("torchvision.models")
    model = models.get_model(name, weights=None, weights_backbone=None)
    size = 300 if name.startswith("ssd") else 96
    return model.backbone, torch.randn(1, 3, size, size)


def _video(name: str) -> Made:
    models = _library("torchvision.models")
    size = _SIZES.get(name, 64)
    return models.get_model(name, weights=None), torch.randn(1, 3, 16, size, size)


def _raft() -> Made:
    models = _library("torchvision.models")
    model = models.get_model("raft_small", weights=None)
    return model, {"image1": torch.randn(1, 3, 128, 128), "image2": torch.randn(1, 3, 128, 128)}


def _timm(name: str) -> Made:
    """Return a model for a small image if its constructor and its layers allow one."""
    timm = _library("timm")
    attempts: list[dict[str, Any]] = [{"img_size": _IMAGE}, {"img_size": 2 * _IMAGE}, {}]
    for options in attempts:
        try:
            model = timm.create_model(name, pretrained=False, num_classes=10, **options).eval()
        except Exception:  # of many kinds, where a size does not fit
            continue
        fixed = model.default_cfg["input_size"][-1]
        for size in (options.get("img_size", _IMAGE), 2 * _IMAGE, fixed):
            x = torch.randn(1, 3, size, size)
            try:
                with torch.inference_mode():
                    model(x)
            except Exception:
                continue
            return model, x
    raise ValueError(f"timm makes no model {name!r}")


def _ids(*shape: int) -> torch.Tensor:
    return torch.randint(2, 90, shape)


_TEXT = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "vocab_size": 100, "max_position_embeddings": 64,
}  # fmt: skip
_VISION = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "image_size": 64, "patch_size": 16,
}  # fmt: skip


def _images(size: int = 64) -> dict[str, Any]:
    return {"pixel_values": torch.randn(1, 3, size, size)}


def _text() -> dict[str, Any]:
    return {"input_ids": _ids(2, 12)}


def _seq2seq() -> dict[str, Any]:
    return {"input_ids": _ids(2, 12), "decoder_input_ids": _ids(2, 6)}


def _transformers_cases() -> dict[str, tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Return the class prefix, the settings and the input of models of transformers, by name."""
    decoder = {"num_key_value_heads": 2, "use_cache": False}
    speech = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 128, "conv_dim": [32] * 7, "vocab_size": 40,
        "num_conv_pos_embedding_groups": 4,
    }  # fmt: skip
    return {
        "bert": ("Bert", _TEXT, _text),
        "roberta": ("Roberta", _TEXT, _text),
        "albert": ("Albert", {**_TEXT, "embedding_size": 32}, _text),
        "electra": ("Electra", {**_TEXT, "embedding_size": 32}, _text),
        "deberta-v2": ("DebertaV2", _TEXT, _text),
        "distilbert": (
            "DistilBert", {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4,
                           "vocab_size": 100}, _text,
        ),
        "gpt2": (
            "GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100,
                     "use_cache": False}, _text,
        ),
        "llama": ("Llama", {**_TEXT, **decoder}, _text),
        "mistral": ("Mistral", {**_TEXT, **decoder}, _text),
        "qwen2": ("Qwen2", {**_TEXT, **decoder}, _text),
        "gemma2": ("Gemma2", {**_TEXT, **decoder, "head_dim": 16}, _text),
        "mixtral": ("Mixtral", {**_TEXT, **decoder, "num_local_experts": 4}, _text),
        "opt": ("OPT", {**_TEXT, "ffn_dim": 128, "word_embed_proj_dim": 64}, _text),
        "bloom": ("Bloom", {**_TEXT, "n_layer": 2, "n_head": 4, "use_cache": False}, _text),
        "xlnet": ("XLNet", {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128,
                            "vocab_size": 100}, _text),
        "squeezebert": ("SqueezeBert", {**_TEXT, "embedding_size": 64}, _text),
        "rwkv": ("Rwkv", {**_TEXT, "use_cache": False}, _text),
        "mamba2": (
            "Mamba2", {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100,
                       "state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 1,
                       "use_cache": False}, _text,
        ),
        "mamba": (
            "Mamba", {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100, "state_size": 8,
                      "use_cache": False}, _text,
        ),
        "t5": (
            "T5", {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4,
                   "vocab_size": 100, "use_cache": False}, _seq2seq,
        ),
        "bart": (
            "Bart", {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 100,
                     "encoder_attention_heads": 4, "decoder_attention_heads": 4, "use_cache": False,
                     "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}, _seq2seq,
        ),
        "clip": (
            "CLIP", {"text_config": {**_TEXT, "eos_token_id": 1}, "vision_config": _VISION,
                     "projection_dim": 32}, lambda: _text() | _images(),
        ),
        "dinov2": ("Dinov2", _VISION, _images),
        "dinov3": ("DINOv3ViT", _VISION, _images),
        "vit": ("ViT", _VISION, _images),
        "siglip": (
            "Siglip", {"text_config": _TEXT, "vision_config": _VISION}, lambda: _text() | _images(),
        ),
        "yolos": (
            "Yolos", {**_VISION, "image_size": [64, 64], "num_detection_tokens": 5}, _images,
        ),
        "dpt": (
            "DPT", {**_VISION, "neck_hidden_sizes": [16, 16, 32, 32],
                    "backbone_out_indices": [0, 1, 1, 1]}, _images,
        ),
        "videomae": (
            "VideoMAE", {**_VISION, "num_frames": 4},
            lambda: {"pixel_values": torch.randn(1, 4, 3, 64, 64)},
        ),
        "convnext": (
            "ConvNext", {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}, _images,
        ),
        "levit": ("Levit", {"image_size": 64}, _images),
        "perceiver": (
            "Perceiver", {"num_latents": 8, "d_latents": 64, "d_model": 32, "num_blocks": 1,
                          "num_self_attends_per_block": 2, "num_self_attention_heads": 4,
                          "num_cross_attention_heads": 4},
            lambda: {"inputs": torch.randn(1, 10, 32)},
        ),
        "segformer": (
            "Segformer", {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}, _images,
        ),
        "swin": (
            "Swin", {"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4], "image_size": 64,
                     "window_size": 4}, _images,
        ),
        "mobilevit": ("MobileViT", {"image_size": 64}, _images),
        "whisper": (
            "Whisper", {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 100,
                        "encoder_attention_heads": 4, "decoder_attention_heads": 4,
                        "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "use_cache": False,
                        "max_source_positions": 50, "pad_token_id": 0, "bos_token_id": 1,
                        "eos_token_id": 1, "decoder_start_token_id": 1},
            lambda: {"input_features": torch.randn(1, 80, 100), "decoder_input_ids": _ids(1, 5)},
        ),
        "wav2vec2": ("Wav2Vec2", speech, lambda: {"input_values": torch.randn(1, 4000)}),
        "hubert": ("Hubert", speech, lambda: {"input_values": torch.randn(1, 4000)}),
        "moonshine": (
            "Moonshine", {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 100,
                          "encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2,
                          "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4,
                          "use_cache": False},
            lambda: {"input_values": torch.randn(1, 4000), "decoder_input_ids": _ids(1, 5)},
        ),
        "sam": (
            "Sam", {"vision_config": {**_VISION, "output_channels": 32, "global_attn_indexes": [1],
                                      "window_size": 2, "mlp_dim": 128, "num_pos_feats": 16},
                    "prompt_encoder_config": {"hidden_size": 32, "image_size": 64, "patch_size": 16,
                                              "image_embedding_size": 4},
                    "mask_decoder_config": {"hidden_size": 32, "mlp_dim": 64,
                                            "num_attention_heads": 2, "iou_head_hidden_dim": 32}},
            lambda: _images() | {"input_points": torch.rand(1, 1, 1, 2) * 60},
        ),
    }  # fmt: skip


def _transformer(name: str) -> Made:
    transformers = _library("transformers")
    prefix, settings, inputs = _transformers_cases()[name]
    model = getattr(transformers, f"{prefix}Model")(
        getattr(transformers, f"{prefix}Config")(**settings)
    )
    return model, inputs()


def _cases() -> Iterator[Case]:
    for family, (size, names) in _TORCHVISION.items():
        for name in names.split():
            make = partial(_torchvision, name, _SIZES.get(name, size))
            yield Case(f"torchvision:{name}", f"torchvision, {family}", make)
    for name in _DETECTION.split():
        yield Case(
            f"torchvision:{name}", "torchvision, detection backbones", partial(_detection, name)
        )
    for name in _VIDEO.split():
        yield Case(f"torchvision:{name}", "torchvision, video and flow", partial(_video, name))
    yield Case("torchvision:raft_small", "torchvision, video and flow", _raft)
    for family, names in _TIMM.items():
        for name in names.split():
            yield Case(f"timm:{name}", f"timm, {family}", partial(_timm, name))
    for name in _transformers_cases():
        yield Case(f"transformers:{name}", "transformers", partial(_transformer, name))


def _in_turns(cases: Iterator[Case]) -> Iterator[Case]:
    """Yield the first case of every family, then the second ones, and so on."""
    families: dict[str, list[Case]] = {}
    for case in cases:
        families.setdefault(case.family, []).append(case)
    for row in itertools.zip_longest(*families.values()):
        yield from (case for case in row if case is not None)


#: All architectures.
CASES = tuple(_in_turns(_cases()))
