"""Small members of every classification family of torchvision, by the module that defines the family."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from sweep.harness import Case
from torch import Tensor, nn
from torchvision.models import (
    AlexNet,
    GoogLeNet,
    convnext,
    densenet,
    efficientnet,
    inception,
    maxvit,
    mnasnet,
    mobilenetv2,
    mobilenetv3,
    regnet,
    resnet,
    shufflenetv2,
    squeezenet,
    swin_transformer,
    vgg,
    vision_transformer,
)
from torchvision.models.googlenet import BasicConv2d, Inception, InceptionAux  # the module goes by a function's name

CLASSES = 5


def images(pixels: int, batch: int = 3) -> Callable[[nn.Module], Tensor]:
    """The loss on a batch of that many random images; auxiliary heads count like the last one."""

    def loss(model: nn.Module) -> Tensor:
        x, y = torch.randn(batch, 3, pixels, pixels), torch.randint(0, CLASSES, (batch,))
        output = model(x)
        logits = output if isinstance(output, tuple) else (output,)
        return sum(nn.functional.cross_entropy(one, y) for one in logits)

    return loss


def with_classifier(model: nn.Module, sizes: Iterable[int]) -> nn.Module:
    """The model with narrower linear layers in its classifier, whose widths no constructor offers."""
    places = [place for place, module in enumerate(model.classifier) if isinstance(module, nn.Linear)]
    sizes = [*sizes, CLASSES]
    for place, i, o in zip(places, sizes[:-1], sizes[1:], strict=True):
        model.classifier[place] = nn.Linear(i, o)
    return model


def slim(block: type[nn.Module], by: int = 16) -> type[nn.Module]:
    """A convolution block with a fraction of its channels, for families that hold their widths in their code."""

    class Slim(block):
        def __init__(self, in_channels: int, out_channels: int, **options: Any) -> None:
            super().__init__(in_channels if in_channels == 3 else in_channels // by, out_channels // by, **options)

    return Slim


def small_alexnet() -> nn.Module:
    return with_classifier(AlexNet(), [9216, 16, 16])


def small_vgg(batch_norm: bool) -> nn.Module:
    features = vgg.make_layers([8, "M", 16, 16, "M"], batch_norm)
    with torch.device("meta"):  # a hundred million weights of a classifier that is replaced
        model = vgg.VGG(features, init_weights=False)
    return with_classifier(model, [16 * 7 * 7, 16, 16])


def small_googlenet() -> nn.Module:
    conv = slim(BasicConv2d, 8)
    blocks = [conv, *(partial(block, conv_block=conv) for block in (Inception, InceptionAux))]
    model = GoogLeNet(CLASSES, init_weights=False, blocks=blocks)
    model.fc = nn.Linear(128, CLASSES)
    for head in (model.aux1, model.aux2):
        head.fc1, head.fc2 = nn.Linear(256, 32), nn.Linear(32, CLASSES)
    return model


def small_inception() -> nn.Module:
    conv = slim(inception.BasicConv2d)
    kinds = (f"Inception{letter}" for letter in "ABCDE")
    blocks = [conv, *(partial(getattr(inception, kind), conv_block=conv) for kind in kinds), inception.InceptionAux]
    model = inception.Inception3(CLASSES, aux_logits=False, init_weights=False, inception_blocks=blocks)
    model.fc = nn.Linear(128, CLASSES)
    return model


def small_convnext() -> nn.Module:
    sizes = [convnext.CNBlockConfig(8, 16, 1), convnext.CNBlockConfig(16, None, 1)]
    return convnext.ConvNeXt(sizes, layer_scale=0.1, num_classes=CLASSES)


def small_efficientnet() -> nn.Module:
    blocks = [
        efficientnet.MBConvConfig(1, 3, 1, 8, 8, 1, 1.0, 1.0),
        efficientnet.MBConvConfig(2, 5, 2, 8, 16, 2, 1.0, 1.0),
    ]
    return efficientnet.EfficientNet(blocks, 0.2, num_classes=CLASSES, last_channel=32)


def small_efficientnet_v2() -> nn.Module:
    blocks = [
        efficientnet.FusedMBConvConfig(1, 3, 1, 8, 8, 1),
        efficientnet.FusedMBConvConfig(2, 3, 2, 8, 8, 1),
        efficientnet.MBConvConfig(2, 3, 2, 8, 16, 1),
    ]
    return efficientnet.EfficientNet(blocks, 0.2, num_classes=CLASSES, last_channel=32)


def small_mobilenet_v2() -> nn.Module:
    settings = [[1, 8, 1, 1], [2, 16, 2, 2], [2, 24, 1, 2]]
    return mobilenetv2.MobileNetV2(CLASSES, width_mult=0.5, inverted_residual_setting=settings)


def small_mobilenet_v3() -> nn.Module:
    blocks = [
        mobilenetv3.InvertedResidualConfig(8, 3, 8, 8, True, "RE", 2, 1, 1.0),
        mobilenetv3.InvertedResidualConfig(8, 5, 24, 16, True, "HS", 1, 1, 1.0),
        mobilenetv3.InvertedResidualConfig(16, 3, 32, 16, False, "HS", 1, 1, 1.0),
    ]
    return mobilenetv3.MobileNetV3(blocks, 32, CLASSES)


def small_regnet(se_ratio: float | None) -> nn.Module:
    sizes = regnet.BlockParams([1, 2], [8, 16], [4, 8], [1.0, 1.0], [2, 2], se_ratio)
    return regnet.RegNet(sizes, CLASSES, stem_width=8)


def small_maxvit() -> nn.Module:
    return maxvit.MaxVit((32, 32), 8, 4, [8, 16], [1, 1], 8, 0.0, num_classes=CLASSES)


def small_swin(**version: Any) -> nn.Module:
    return swin_transformer.SwinTransformer([2, 2], 8, [2, 2], [2, 2], [4, 4], num_classes=CLASSES, **version)


def small_swin_v2() -> nn.Module:
    parts = {"block": swin_transformer.SwinTransformerBlockV2, "downsample_layer": swin_transformer.PatchMergingV2}
    return small_swin(**parts)


NORM = ("BatchNorm2d",)
SWIN = ("LayerNorm", "*.relative_position_bias_table")
V2 = ("LayerNorm", "*.logit_scale", "*.attn.qkv.bias")  # it clones its query, key and value bias before use

FAMILIES: dict[str, dict[str, Case]] = {
    "alexnet": {"alexnet": Case(small_alexnet, images(64))},
    "convnext": {"convnext": Case(small_convnext, images(32), ("LayerNorm2d", "LayerNorm", "*.layer_scale"))},
    "densenet": {
        "densenet": Case(lambda: densenet.DenseNet(4, (2, 2, 2, 2), 8, num_classes=CLASSES), images(32), NORM)
    },
    "efficientnet": {
        "v1": Case(small_efficientnet, images(32), NORM),
        "v2": Case(small_efficientnet_v2, images(32), NORM),
    },
    "googlenet": {"googlenet": Case(small_googlenet, images(32), NORM)},
    "inception": {"v3": Case(small_inception, images(75), NORM)},
    "maxvit": {"maxvit": Case(small_maxvit, images(32), (*NORM, *SWIN))},
    "mnasnet": {"mnasnet": Case(lambda: mnasnet.MNASNet(0.1, CLASSES), images(32), NORM)},
    "mobilenetv2": {"v2": Case(small_mobilenet_v2, images(32), NORM)},
    "mobilenetv3": {"v3": Case(small_mobilenet_v3, images(32), NORM)},
    "regnet": {
        "x": Case(lambda: small_regnet(None), images(32), NORM),
        "y": Case(lambda: small_regnet(1.0), images(32), NORM),
    },
    "resnet": {
        "resnet": Case(lambda: resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], CLASSES), images(32), NORM),
        "resnext": Case(
            lambda: resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], CLASSES, groups=4, width_per_group=4),
            images(32),
            NORM,
        ),
    },
    "shufflenetv2": {
        "v2": Case(
            lambda: shufflenetv2.ShuffleNetV2([2, 1, 1], [8, 16, 32, 64, 64], num_classes=CLASSES), images(32), NORM
        )
    },
    "squeezenet": {
        "1_0": Case(lambda: squeezenet.SqueezeNet("1_0", CLASSES), images(32)),
        "1_1": Case(lambda: squeezenet.SqueezeNet("1_1", CLASSES), images(32)),
    },
    "swin_transformer": {
        "v1": Case(small_swin, images(32), SWIN),
        "v2": Case(small_swin_v2, images(32), V2),
    },
    "vgg": {
        "plain": Case(lambda: small_vgg(False), images(32)),
        "bn": Case(lambda: small_vgg(True), images(32), NORM),
    },
    "vision_transformer": {
        "vit": Case(
            lambda: vision_transformer.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=CLASSES),
            images(32),
            ("LayerNorm", "class_token", "encoder.pos_embedding"),
        )
    },
}
