"""Images with labels: the embedded data, torchvision's data sets, folders of images; and their transforms.

>>> fashion = open_dataset("fashion_mnist_subset", "test")
>>> image, label = fashion[0]
>>> tuple(image.shape), image.dtype, len(fashion), fashion.classes[label]
((1, 28, 28), torch.uint8, 2000, 'Shirt')
"""

from vitcourse.data.datasets import Augmented, ImageDataset, check_batch, hold_out, subset
from vitcourse.data.embedded import photo, photo_names, texture, texture_names
from vitcourse.data.reading import read_image
from vitcourse.data.sources import open_dataset, split_names
from vitcourse.data.transforms import IMAGENET_MEAN, IMAGENET_STD, as_image, eval_transform, train_transform

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Augmented",
    "ImageDataset",
    "as_image",
    "check_batch",
    "eval_transform",
    "hold_out",
    "open_dataset",
    "photo",
    "photo_names",
    "read_image",
    "split_names",
    "subset",
    "texture",
    "texture_names",
    "train_transform",
]
