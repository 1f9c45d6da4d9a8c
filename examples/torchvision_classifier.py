"""Record the head of a torchvision classifier while it trains, and ask which classes its answers are made of.

python examples/torchvision_classifier.py                    # 2,000 of the images that ship with dualhook, seconds
python examples/torchvision_classifier.py --model resnet18   # or any of torchvision.models.list_models()
"""

import argparse

import torch
import torch.nn.functional as F
from dualhook.integrations.torchvision import add_columns, estimate, layers
from torch.utils.data import DataLoader
from torchvision.datasets import VisionDataset
from torchvision.models import get_model

import dualhook
from dualhook.data import CLASSES, load_fashion_mnist_subset


class Clothes(VisionDataset):
    """Shipped images [n, 784] in three channels, with targets and classes as torchvision's data sets have them."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        super().__init__(root="")
        self.images = F.pad(images.reshape(-1, 1, 28, 28), (2, 2, 2, 2)).expand(-1, 3, -1, -1)
        self.targets, self.classes = labels, CLASSES

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], int(self.targets[index])


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="shufflenet_v2_x0_5")
parser.add_argument("--epochs", type=int, default=2, metavar="N")
options = parser.parse_args()
torch.manual_seed(0)
data = load_fashion_mnist_subset()
train, test = Clothes(data.train_images[:2000], data.train_labels[:2000]), Clothes(data.test_images, data.test_labels)
model = get_model(options.model, num_classes=10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

print(estimate(model, image_size=32), end="\n\n")
recorder = dualhook.instrument(model, layers=layers(model, "head"))
for _ in range(options.epochs):
    for images, labels in recorder.track(DataLoader(train, batch_size=50, shuffle=True)):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
memory = recorder.close()
add_columns(memory, train)

image, label = test[0]
attention = memory.attend(model.eval(), image[None])
print(f"true class: {CLASSES[label]}, predicted: {CLASSES[model(image[None]).argmax()]}", end="\n\n")
print(attention.top(3), attention.sum_by("class"), memory.verify(), sep="\n\n")
assert memory.verify().max_error < 1e-5
