"""Recording torchvision's classifiers: which layers, at what cost, and names and images for reports.

.. code-block:: python

    model = torchvision.models.resnet18(weights="DEFAULT")
    print(estimate(model))  # what the head, the head and the last block, and all layers cost per image
    recorder = dualhook.instrument(model, layers=layers(model, "head"))
    ...
    memory = recorder.close()
    add_columns(memory, loader.dataset)
    print(memory.attend(model, images).sum_by("class"))

Layers are found in the autograd graph of one forward pass without data, so that a classifier of one's own works like
one of the registry. Needs ``dualhook[torchvision]``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision.models import Inception3, WeightsEnum, get_model_weights, get_weight

from dualhook import DualHookError, DualMemory, Table

__all__ = ["Choice", "add_columns", "class_names", "estimate", "head", "layers", "preprocessing", "to_image"]

Choice = Literal["head", "head+block", "all"]

INDEX_BYTES = 8  # each of step, sample and position of a stored row, and of the sides of a convolution's maps
CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


# ---- layers ------------------------------------------------------------------------------------------------------


def head(model: nn.Module, image_size: int | None = None) -> str:
    """The name of the layer that makes the logits: ``"fc"`` of a ResNet, ``"classifier.6"`` of an AlexNet.

    Raises:
        DualHookError: the model does not run on images of this size, or makes no logits with a linear map.
    """
    return _trace(model, image_size).heads[0]


def layers(model: nn.Module, choice: Choice = "head", image_size: int | None = None) -> list[str]:
    """The names of the layers of a choice, in the model's order, for ``dualhook.instrument(model, layers=...)``.

    ``"head"``: what makes the logits, auxiliary ones of GoogLeNet and Inception too. ``"head+block"``: with it the rest
    of the classifier if that has further layers (AlexNet, VGG, MobileNetV3, MaxViT), else the block before it (the last
    bottleneck, dense layer or transformer block). ``"all"``: every linear map that a forward pass in training uses.
    An attention's stacked projection is called ``in_proj``, like its parameter.

    Raises:
        DualHookError: an unknown choice, a model that does not run on images of this size, or one without a head.
    """
    return _trace(model, image_size).choose(choice)


def estimate(
    model: nn.Module,
    image_size: int | None = None,
    *,
    layers: Choice | Iterable[str] | None = None,
    weights: WeightsEnum | str | None = None,
) -> Table:
    """What recording writes per image and epoch, before training: for every choice, or for each of some ``layers``.

    A linear map stores a row per position: key, output gradient (both in the weight's dtype) and coordinates; a
    convolution its input and output maps and their sides. Nothing is computed: shapes pass through a copy of the model
    without memory. Columns choice, layers (how many), patterns, bytes; with ``layers`` layer, patterns, bytes.

    Args:
        model: any classifier of images; it is not changed.
        image_size: side of the square images; default the crop of ``weights``, a ViT's own size, 299 for Inception v3,
            else 224.
        layers: a choice or layer names, to see the cost of each layer.
        weights: weights, or the name of weights or of a model of the registry, made for images of some size.

    Raises:
        DualHookError: the model does not run on images of this size, or a layer is not there.
    """
    if image_size is None and weights is not None:
        image_size = preprocessing(weights).crop_size[0]
    trace = _trace(model, image_size)
    rows: list[dict[str, str | int]]
    if layers is None:
        by_choice = {choice: trace.choose(choice) for choice in get_args(Choice)}
        rows = [{"choice": name, "layers": len(them), **trace.cost(them)} for name, them in by_choice.items()]
    else:
        names = trace.choose(layers) if isinstance(layers, str) else list(layers)
        rows = [{"layer": name, **trace.cost([name])} for name in names]
    if not rows:
        raise DualHookError("layers= names nothing: expected a choice or names of layers")
    return Table(
        {column: [row[column] for row in rows] for column in rows[0]},
        title=f"one image of {'×'.join(map(str, trace.image))}",
        footer="a convolution is stored as its input and output maps",
        bars=((next(iter(rows[0])),), "bytes"),
    )


@dataclass(frozen=True)
class _Use:
    """One call of a linear map: its patterns, and the bytes of the rows that hold them."""

    patterns: int
    bytes: int


@dataclass
class _Trace(TorchFunctionMode):
    """The linear maps that one forward pass calls, by the weight they use: modules and functionals alike."""

    model: nn.Module
    image: tuple[int, int, int]
    uses: dict[str, list[_Use]] = field(default_factory=dict)
    heads: list[str] = field(default_factory=list)
    before: str | None = None  # the layer that feeds the first head

    def __post_init__(self) -> None:
        super().__init__()
        self._names = {id(parameter): _layer_name(name) for name, parameter in self.model.named_parameters()}
        self._made: dict[Any, str] = {}  # autograd node -> the layer whose output it made

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        given = (*args, *(kwargs or {}).values())
        if func is F.linear:
            self._note(given[1], output, rows=given[0].numel() // given[1].shape[1])
        elif func in CONVOLUTIONS:
            self._note(given[1], output, maps=given[0])
        elif func is F.multi_head_attention_forward:
            query, in_proj, out_proj = given[0], given[5], given[11]
            self._note(in_proj, output[0], rows=query[..., 0].numel())
            self._note(out_proj, output[0], rows=query[..., 0].numel())
        return output

    def _note(self, weight: Tensor, output: Tensor, rows: int = 1, maps: Tensor | None = None) -> None:
        name = self._names.get(id(weight))
        if name is None:
            return
        if maps is None:
            patterns, numbers, sides = rows, rows * sum(weight.shape), 0
        else:  # one stored row; every group has a pattern at each place of the output's map
            patterns = output[0, 0].numel() * (maps.shape[1] // weight.shape[1])
            numbers, sides = maps.numel() + output.numel(), 2 * (weight.dim() - 2)
        size = numbers * weight.dtype.itemsize + rows * (3 + sides) * INDEX_BYTES
        self.uses.setdefault(name, []).append(_Use(patterns, size))
        made = output if output._base is None else output._base  # a view's node goes when it is changed in place
        self._made[made.grad_fn] = name

    def find_heads(self, outputs: Iterable[Tensor]) -> None:
        """The head of an output is the last layer called of all that it comes from; likewise what feeds the head."""
        for output in outputs:
            node = self._last_before([output.grad_fn])
            if node is not None and (name := self._made[node]) not in self.heads:
                if not self.heads:
                    feeding = self._last_before([edge for edge, _ in node.next_functions])
                    self.before = None if feeding is None else self._made[feeding]
                self.heads.append(name)
        self._made.clear()  # lets go of the graph

    def _last_before(self, nodes: Iterable[Any]) -> Any:
        waiting, seen = list(nodes), {None}
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                waiting.extend(edge for edge, _ in node.next_functions)
        return next((node for node in reversed(self._made) if node in seen), None)

    def choose(self, choice: str) -> list[str]:
        """The layers of a choice, in the model's order."""
        if choice not in get_args(Choice):
            raise DualHookError(f"choice {choice!r}: expected one of {', '.join(map(repr, get_args(Choice)))}")
        names = [name for name in dict.fromkeys(self._names.values()) if name in self.uses]
        chosen = {"head": self.heads, "head+block": [*self.heads, *self._block(names)], "all": names}[choice]
        return [name for name in names if name in chosen]

    def _block(self, names: Sequence[str]) -> list[str]:
        """The layers beside the head in its own Sequential, else those of the innermost block that feeds it."""
        if self.before is None:
            return []
        parent = self.heads[0].rpartition(".")[0]
        if parent and isinstance(self.model.get_submodule(parent), nn.Sequential):
            beside = [name for name in names if name.startswith(f"{parent}.") and name not in self.heads]
            if beside:
                return beside
        block = self.before
        while block := block.rpartition(".")[0]:
            inside = [name for name in names if name.startswith(f"{block}.")]
            if len(inside) > 1 and not isinstance(self.model.get_submodule(block), CONTAINERS):
                return inside
        return [self.before]

    def cost(self, names: Iterable[str]) -> dict[str, int]:
        """What some layers record: patterns and bytes."""
        uses = []
        for name in names:
            if name not in self.uses:
                raise DualHookError(f"no linear map {name!r} in a forward pass of {type(self.model).__name__}")
            uses += self.uses[name]
        return {"patterns": sum(use.patterns for use in uses), "bytes": sum(use.bytes for use in uses)}


def _trace(model: nn.Module, image_size: int | None) -> _Trace:
    """Run a copy of the model without memory, as in training, on one image."""
    hollow = _hollow(model)
    own: Any = getattr(model, "image_size", 299 if isinstance(model, Inception3) else 224)
    size = image_size or int(own)
    channels = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)
    dtype = next((parameter.dtype for parameter in hollow.parameters()), torch.float32)
    trace = _Trace(hollow, (channels, size, size))
    try:
        with torch.enable_grad(), trace:
            outputs = hollow(torch.empty(1, *trace.image, dtype=dtype, device="meta"))
    except Exception as error:
        raise DualHookError(
            f"{type(model).__name__} does not run on images of {'×'.join(map(str, trace.image))}: pass image_size= "
            f"({error})"
        ) from error
    trace.find_heads(_tensors(outputs))
    if not trace.heads:
        raise DualHookError(f"the output of {type(model).__name__} comes from no linear map: expected a classifier")
    return trace


def _hollow(model: nn.Module) -> nn.Module:
    """A copy of the model on the meta device: shapes without data. Batch norm takes its stored statistics."""
    memo: dict[int, Any] = {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.is_floating_point())
    hollow = copy.deepcopy(model, memo).train()
    for module in hollow.modules():
        if isinstance(module, _BatchNorm):
            module.eval()  # one image may have one value per channel, which batch statistics refuse
    return hollow


def _layer_name(parameter: str) -> str:
    return parameter.removesuffix("weight").rstrip("._")


def _tensors(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    values = outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, Iterable) else ()
    return [tensor for value in values for tensor in _tensors(value)]


# ---- weights -----------------------------------------------------------------------------------------------------


def class_names(weights: WeightsEnum | str) -> list[str]:
    """The class names of the weights' logits.

    ``weights`` is a weights entry, its name (``"ResNet50_Weights.IMAGENET1K_V2"``) or a model's (``"resnet50"``, its
    default weights); nothing is downloaded.

    Raises:
        DualHookError: no such weights.
    """
    return list(_found(weights).meta["categories"])


def preprocessing(weights: WeightsEnum | str) -> Any:
    """The transform that the weights were evaluated with: image to normalised tensor [3, h, w].

    Raises:
        DualHookError: no such weights.
    """
    return _found(weights).transforms()


def to_image(images: Tensor, weights: WeightsEnum | str) -> Tensor:
    """Undo the normalisation of :func:`preprocessing`: images [..., 3, h, w] from 0 to 1, for display.

    Raises:
        DualHookError: no such weights, or their transform does not normalise.
    """
    transform = preprocessing(weights)
    if not (hasattr(transform, "mean") and hasattr(transform, "std")):
        raise DualHookError(f"the transform of {weights} does not normalise: its images can be shown as they are")
    mean, std = (images.new_tensor(values).reshape(-1, 1, 1) for values in (transform.mean, transform.std))
    return (images * std + mean).clamp(0, 1)


def _found(weights: WeightsEnum | str) -> Any:
    if not isinstance(weights, str):
        return weights
    try:
        return get_weight(weights) if "." in weights else get_model_weights(weights).DEFAULT
    except (ValueError, KeyError, AttributeError) as error:
        raise DualHookError(
            f"weights {weights!r}: expected a model's name ('resnet50') or weights' ('ResNet50_Weights.DEFAULT')"
        ) from error


# ---- data sets ---------------------------------------------------------------------------------------------------


def add_columns(memory: DualMemory, dataset: Dataset[Any]) -> None:
    """Add the column ``label`` (class numbers) and, where the data set names its classes, ``class`` to a memory.

    ``dataset`` is what the training loader drew from: a torchvision data set, a ``Subset`` of one, a ``ConcatDataset``
    of several, nested as you like. No image is read. ``label`` is what the loader gave, after the data set's
    ``target_transform``; ``class`` names the class as it was before it.

    Raises:
        DualHookError: the data set has no targets, they are no class numbers, or they are fewer than the memory has
            samples.
    """
    targets = _targets(dataset)
    memory.add_column("label", [label for label, _ in targets])
    if all(name is not None for _, name in targets):
        memory.add_column("class", [name for _, name in targets])


def _targets(dataset: Any) -> list[tuple[int, str | None]]:
    """Label and class name of every row."""
    if isinstance(dataset, Subset):
        inner = _targets(dataset.dataset)
        return [inner[index] for index in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        return [target for part in dataset.datasets for target in _targets(part)]
    kind, targets = type(dataset).__name__, _stored_targets(dataset)
    try:
        numbers = [int(target) for target in targets]
        transform = getattr(dataset, "target_transform", None)
        labels = numbers if transform is None else [int(transform(number)) for number in numbers]
    except (TypeError, ValueError, RuntimeError) as error:
        raise DualHookError(
            f"the targets of {kind} are no class numbers ({error}): pass what to group by to memory.add_column"
        ) from error
    names = _class_names(dataset)
    return [(label, names(number)) for label, number in zip(labels, numbers, strict=True)]


def _stored_targets(dataset: Any) -> Sequence[Any]:
    """The class numbers as the data set keeps them, by the names torchvision's data sets use."""
    for attribute in ("targets", "labels", "_labels"):
        targets = getattr(dataset, attribute, None)
        if targets is not None:
            return targets.tolist() if hasattr(targets, "tolist") else list(targets)
    if (samples := getattr(dataset, "_samples", None)) is not None:  # (path, class number)
        return [target for _, target in samples]
    raise DualHookError(
        f"{type(dataset).__name__} has neither targets nor labels: pass the labels to memory.add_column"
    )


def _class_names(dataset: Any) -> Callable[[int], str | None]:
    classes = getattr(dataset, "classes", None)
    if classes is None and (numbers := getattr(dataset, "class_to_idx", None)):
        classes = sorted(numbers, key=numbers.__getitem__)
    if classes is None:
        return lambda number: None
    # ImageNet's classes have several names each; STL10's unlabelled images the number -1
    names = [name if isinstance(name, str) else ", ".join(map(str, name)) for name in classes]
    return lambda number: names[number] if 0 <= number < len(names) else "unlabelled"
