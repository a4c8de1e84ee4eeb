"""Images with labels, scenes with boxes and masks, clips with motions; embedded, rendered, or in folders of a user.

``open_dataset`` opens all of them by name:

* **classes**: ``fashion_mnist_subset``, torchvision's (``cifar10``, …), ``imagefolder:PATH``; transforms in
  ``transforms``;
* **boxes and masks**: ``scenes``, ``coco:PATH``, ``voc:PATH``, ``masks:PATH``; transforms and batches in ``joint``;
* **clips**: ``moving``, ``video:PATH``.

>>> fashion = open_dataset("fashion_mnist_subset", "test")
>>> image, label = fashion[0]
>>> tuple(image.shape), image.dtype, len(fashion), fashion.classes[label]
((1, 28, 28), torch.uint8, 2000, 'Shirt')
"""

from vitcourse.data.annotated import IGNORE, AnnotatedImages, SemanticMask
from vitcourse.data.datasets import Augmented, ImageDataset, check_batch, hold_out, subset
from vitcourse.data.embedded import photo, photo_names, texture, texture_names
from vitcourse.data.joint import (
    ClipTransform,
    Letterbox,
    collate_dense,
    dense_eval_transform,
    dense_train_transform,
)
from vitcourse.data.moving import Moving, moving
from vitcourse.data.reading import read_image, read_mask
from vitcourse.data.scenes import Scenes, scenes
from vitcourse.data.sources import open_dataset, split_names
from vitcourse.data.transforms import IMAGENET_MEAN, IMAGENET_STD, as_image, eval_transform, train_transform
from vitcourse.data.video import Sampling, VideoFolder

__all__ = [
    "IGNORE",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "AnnotatedImages",
    "Augmented",
    "ClipTransform",
    "ImageDataset",
    "Letterbox",
    "Moving",
    "Sampling",
    "Scenes",
    "SemanticMask",
    "VideoFolder",
    "as_image",
    "check_batch",
    "collate_dense",
    "dense_eval_transform",
    "dense_train_transform",
    "eval_transform",
    "hold_out",
    "moving",
    "open_dataset",
    "photo",
    "photo_names",
    "read_image",
    "read_mask",
    "scenes",
    "split_names",
    "subset",
    "texture",
    "texture_names",
    "train_transform",
]
