from __future__ import annotations

import os
from itertools import groupby

import pytest
import torch
import torchvision
from dualhook.integrations.torchvision import (
    add_columns,
    class_names,
    estimate,
    head,
    layers,
    preprocessing,
    to_image,
)
from PIL import Image
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Subset
from torchvision.datasets import FakeData, FashionMNIST, ImageFolder, VisionDataset
from torchvision.models import ResNet50_Weights
from torchvision.models.regnet import BlockParams

import dualhook

LONG = pytest.mark.skipif(not os.environ.get("DUALHOOK_SWEEP"), reason="more of a family: DUALHOOK_SWEEP=1 runs it")
FAMILIES = groupby(
    torchvision.models.list_models(module=torchvision.models),
    key=lambda name: torchvision.models.get_model_builder(name).__module__,
)
NAMES = [
    name if not number else pytest.param(name, marks=LONG)
    for _, family in FAMILIES
    for number, name in enumerate(family)
]
"""The first of every family, and the others, which are as deep or wide as they are and built of the same code."""
CLASSES = 709  # a prime that is the width of no layer
BLOCKS = {
    "alexnet": ["classifier.1", "classifier.4"],
    "convnext_tiny": ["features.7.2.block.0", "features.7.2.block.3", "features.7.2.block.5"],
    "densenet121": ["features.denseblock4.denselayer16.conv1", "features.denseblock4.denselayer16.conv2"],
    "mobilenet_v3_small": ["classifier.0"],
    "resnet18": ["layer4.1.conv1", "layer4.1.conv2"],
    "shufflenet_v2_x0_5": ["conv5.0"],
    "squeezenet1_1": ["features.12.squeeze", "features.12.expand1x1", "features.12.expand3x3"],
    "swin_t": [f"features.7.1.{name}" for name in ("attn.qkv", "attn.proj", "mlp.0", "mlp.3")],
    "vgg11": ["classifier.0", "classifier.3"],
    "vit_b_16": [
        f"encoder.layers.encoder_layer_11.{name}"
        for name in ("self_attention.in_proj", "self_attention.out_proj", "mlp.0", "mlp.3")
    ],
}
"""What "head+block" adds to the head, by how the models are written."""


# ---- layers ------------------------------------------------------------------------------------------------------


@pytest.fixture
def shapes_only(monkeypatch):
    """Models without memory; RegNet computes its widths with tensors, which need data."""
    widths = BlockParams.from_init_params.__func__

    def from_init_params(cls, *args, **kwargs):
        with torch.device("cpu"):
            return widths(cls, *args, **kwargs)

    monkeypatch.setattr(BlockParams, "from_init_params", classmethod(from_init_params))
    with torch.device("meta"):
        yield


def build(name: str, **options) -> nn.Module:
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    return torchvision.models.get_model(name, **options)


@pytest.mark.parametrize("name", NAMES)
def test_the_head_is_what_the_number_of_classes_changes(name, shapes_only):
    model = build(name, num_classes=CLASSES)
    sized = {name.rpartition(".")[0] for name, parameter in model.named_parameters() if parameter.shape[0] == CLASSES}
    assert set(layers(model, "head")) == sized
    assert len(sized) == {"googlenet": 3, "inception_v3": 2}.get(name, 1)


@pytest.mark.parametrize("name", BLOCKS)
def test_head_and_block(name, shapes_only):
    model = build(name)
    assert layers(model, "head+block") == [*BLOCKS[name], head(model)]
    everything = layers(model, "all")
    maps = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    assert set(everything) == set(maps) | {name for name in everything if name.endswith(".in_proj")}
    assert len(everything) == len(set(everything))


def test_auxiliary_heads_are_not_the_head(shapes_only):
    model = build("googlenet").eval()
    assert head(model) == "fc"
    assert set(layers(model)) == {"aux1.fc2", "aux2.fc2", "fc"}
    assert layers(build("googlenet", aux_logits=False)) == ["fc"]


def test_the_model_is_left_as_it_was():
    model = torchvision.models.mobilenet_v3_small(num_classes=3).eval()
    recorder = dualhook.instrument(model, layers=layers(model), verbose=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    assert layers(model) == ["classifier.3"]
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(value.device.type == "cpu" and value.grad is None for value in model.parameters())
    recorder.discard()


def test_what_cannot_be_found_is_said(shapes_only):
    with pytest.raises(dualhook.DualHookError, match="expected one of 'head', 'head.block', 'all'"):
        layers(build("alexnet"), "tail")
    with pytest.raises(dualhook.DualHookError, match="does not run on images of 3×225×225: pass image_size="):
        layers(build("vit_b_16"), image_size=225)
    with pytest.raises(dualhook.DualHookError, match="Flatten comes from no linear map"):
        layers(nn.Flatten())
    with pytest.raises(dualhook.DualHookError, match="no linear map 'fc' in a forward pass of AlexNet"):
        estimate(build("alexnet"), layers=["fc"])


# ---- cost --------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """A convolution (its map halved), then tokens through a linear map twice, then a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=False)
        self.mix = nn.Linear(4, 4)
        self.out = nn.Linear(4, 5)

    def forward(self, images):
        tokens = self.stem(images).flatten(2).transpose(1, 2)
        return self.out(self.mix(self.mix(tokens)).relu_().mean(1))


def test_cost_counted_by_hand():
    table = estimate(Small(), 8, layers="all")
    # input map 1×8×8, output map 4×4×4, their sides, one stored row; 16 tokens twice, 4 + 4 numbers; one row of 4 + 5
    expected = [("stem", 16, 4 * (64 + 64) + 24 + 32), ("mix", 32, 32 * (4 * 8 + 24)), ("out", 1, 4 * 9 + 24)]
    assert [tuple(row.values()) for row in table] == expected
    by_choice = {row["choice"]: row for row in estimate(Small(), 8)}
    assert [row["layers"] for row in by_choice.values()] == [1, 2, 3]
    assert by_choice["all"]["bytes"] == sum(size for _, _, size in expected)
    assert by_choice["head"]["bytes"] == 60
    assert estimate(Small().bfloat16(), 8, layers="head")["bytes"].tolist() == [2 * 9 + 24]


@pytest.mark.parametrize(
    ("build", "image"), [(Small, (1, 8, 8)), (torchvision.models.convnext_tiny, (3, 32, 32))], ids=["own", "convnext"]
)
def test_layers_cost_what_the_recorder_says(build, image):
    model = build()
    with dualhook.instrument(model, layers=layers(model, "all", image[-1]), verbose=False) as recorder:
        told = recorder.estimate(torch.zeros(1, *image))
    assert list(estimate(model, image[-1], layers="all")) == list(told)


def test_image_size(shapes_only):
    assert "3×299×299" in estimate(build("inception_v3")).title
    assert "3×224×224" in estimate(build("vit_b_16")).title
    assert "3×240×240" in estimate(build("efficientnet_b1"), weights="efficientnet_b1").title


# ---- weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["resnet50", "ResNet50_Weights.DEFAULT", ResNet50_Weights.DEFAULT])
def test_class_names_and_transform_of_weights(weights):
    assert class_names(weights)[207] == "golden retriever"
    assert preprocessing(weights).crop_size == [224]


def test_an_image_comes_back_from_its_normalisation():
    image = torch.rand(3, 224, 224)
    transform = preprocessing("resnet50")
    transform.resize_size = transform.crop_size
    shown = to_image(transform(image)[None], "resnet50")
    assert shown.shape == (1, 3, 224, 224)
    assert torch.allclose(shown[0], image, atol=1e-6)
    assert to_image(torch.full((3, 1, 1), 9.0), "resnet50").max() == 1


@pytest.mark.parametrize("weights", ["resnet51", "ResNet50_Weights.NONE", "NoSuch_Weights.DEFAULT"])
def test_unknown_weights(weights):
    with pytest.raises(dualhook.DualHookError, match="expected a model's name"):
        class_names(weights)


# ---- data sets ---------------------------------------------------------------------------------------------------


class Shapes(VisionDataset):
    """Six images of two classes, under whichever name torchvision's data sets hold their targets."""

    def __init__(self, attribute="targets", targets=None, classes=("circle", "square"), target_transform=None) -> None:
        super().__init__(root="", target_transform=target_transform)
        self.numbers = [0, 1, 1, 0, 1, 0]
        setattr(self, attribute, torch.tensor(self.numbers) if targets is None else targets)
        if classes:
            self.classes = classes

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int):
        label = self.numbers[index]
        return torch.full((4,), float(index)), self.target_transform(label) if self.target_transform else label


class Columns:
    """Stands in for a memory: the columns it was given."""

    def __init__(self, dataset) -> None:
        self.added: dict[str, list] = {}
        add_columns(self, dataset)

    def add_column(self, name, values) -> None:
        self.added[name] = values


def test_totals_by_label_and_class_name():
    dataset, model = Shapes(), nn.Linear(4, 2)
    recorder = dualhook.instrument(model, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for x, y in recorder.track(DataLoader(dataset, batch_size=2, shuffle=True)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    memory = recorder.close()
    add_columns(memory, dataset)
    attention = memory.attend(model, torch.ones(1, 4))
    assert attention.sum_by("label")["label"].tolist() == [0, 1]
    assert attention.sum_by("class")["class"].tolist() == ["circle", "square"]
    totals = (attention.sum_by(name)["contribution"].tolist() for name in ("label", "class"))
    assert next(totals) == next(totals)
    assert FashionMNIST.classes[0] == "T-shirt/top"  # what the real ones have
    with pytest.raises(dualhook.DualHookError, match="FakeData has neither targets nor labels"):
        add_columns(memory, FakeData())


@pytest.mark.parametrize(
    ("attribute", "targets"),
    [
        ("targets", None),  # MNIST
        ("targets", [0, 1, 1, 0, 1, 0]),  # CIFAR, ImageFolder
        ("labels", torch.tensor([0, 1, 1, 0, 1, 0]).numpy()),  # SVHN, STL10
        ("_labels", [0, 1, 1, 0, 1, 0]),  # Flowers102, FGVCAircraft, Food101
        ("_samples", [(f"{i}.png", label) for i, label in enumerate([0, 1, 1, 0, 1, 0])]),  # StanfordCars, GTSRB
    ],
)
@pytest.mark.parametrize("transform", [None, lambda label: 7 - label])
def test_columns_are_what_a_loader_gives(attribute, targets, transform):
    dataset = Shapes(attribute, targets, target_transform=transform)
    other = Shapes(classes=("moon", "star"))
    nested = ConcatDataset([Subset(Subset(dataset, [5, 2, 4, 1]), torch.tensor([3, 0, 0])), dataset, other])
    for rows in (dataset, Subset(dataset, range(1, 6, 2)), nested):
        assert Columns(rows).added["label"] == [label for _, label in rows]
    assert Columns(dataset).added["class"] == ["circle", "square", "square", "circle", "square", "circle"]
    assert Columns(nested).added["class"][:3] == ["square", "circle", "circle"]
    assert Columns(nested).added["class"][-2:] == ["star", "moon"]


def test_class_names_as_data_sets_keep_them():
    assert "class" not in Columns(Shapes(classes=None)).added
    several = Shapes(classes=(("tench", "Tinca tinca"), ("goldfish",)))  # ImageNet, Imagenette
    assert Columns(several).added["class"][:2] == ["tench, Tinca tinca", "goldfish"]
    unlabelled = Shapes("labels", [0, 1, -1, -1, 1, 0])  # STL10
    assert Columns(unlabelled).added["class"][1:3] == ["square", "unlabelled"]
    numbered = Shapes(classes=None)
    numbered.class_to_idx = {"square": 1, "circle": 0}
    assert Columns(numbered).added["class"][:2] == ["circle", "square"]


@pytest.mark.parametrize("targets", [["a.xml"] * 6, [None] * 6, torch.zeros(6, 8)])  # VOC, CLEVR's test, QMNIST
def test_targets_that_are_no_class_numbers(targets):
    with pytest.raises(dualhook.DualHookError, match="the targets of Shapes are no class numbers"):
        Columns(Shapes(targets=targets))


def folder_of_images(root) -> ImageFolder:
    for number, name in enumerate(("cat", "dog")):
        (root / name).mkdir()
        for index in range(3):
            Image.new("RGB", (40, 40), (90 * index, 200 * number, 60)).save(root / name / f"{index}.png")
    return ImageFolder(root, transform=torchvision.transforms.ToTensor())


def test_the_labels_of_a_folder_are_found_without_its_images(tmp_path, monkeypatch):
    dataset = folder_of_images(tmp_path)
    monkeypatch.setattr(ImageFolder, "__getitem__", None)
    assert Columns(Subset(dataset, [4, 0])).added == {"label": [1, 0], "class": ["dog", "cat"]}


def test_a_classifier_from_its_first_step_to_its_answer(tmp_path):
    dataset = Subset(folder_of_images(tmp_path), [5, 0, 3, 1])
    model = torchvision.models.mobilenet_v3_small(num_classes=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    recorder = dualhook.instrument(model, layers=layers(model, "head+block"), verbose=False)
    for images, labels in recorder.track(DataLoader(dataset, batch_size=2, shuffle=True)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    memory = recorder.close()
    add_columns(memory, dataset)
    assert list(memory.layers) == ["classifier.0", "classifier.3"]
    attention = memory.attend(model.eval(), dataset[0][0][None])
    totals = attention.sum_by("class")
    assert totals.where(layer=head(model))["class"].tolist() == ["cat", "dog"]
    assert memory.verify().max_error < 1e-5
