"""FCOS (Tian et al. 2019, "Fully Convolutional One-Stage Object Detection"): every pixel of a pyramid says whether it
lies in an object, of which class, and how far the sides are. No anchors, no proposals.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, log
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torchvision.ops import batched_nms, clip_boxes_to_image

from vitcourse.layers import widened

from .base import DenseModel
from .boxes import Target, giou
from .pyramid import make_neck
from .terms import Term, Terms, focal_loss


class FcosOutput(NamedTuple):
    """What the head says of N points, those of all maps one after the other.

    Attributes:
        logits: (B, N, K), one sigmoid for each class.
        distances: (B, N, 4), to the left, top, right and bottom side, in strides.
        centerness: (B, N), a logit.
        sizes: rows and columns of each map.
        size: (height, width) of the images, where it is known.
    """

    logits: Tensor
    distances: Tensor
    centerness: Tensor
    sizes: list[tuple[int, int]]
    size: tuple[int, int] | None = None


class FcosHead(nn.Module):
    """The head that all maps share (section 3.2 and figure 2), with centre-ness beside the box.

    As in the authors' later code and torchvision, a ReLU keeps distances positive and they count in strides, so that
    maps need no factor of their own; group norm, in 32 groups, follows each convolution.

    Args:
        channels: of the maps.
        num_classes: K.
        num_convs: convolutions of each of the two branches.

    >>> out = FcosHead(32, num_classes=5)([torch.zeros(2, 32, 4, 6), torch.zeros(2, 32, 2, 3)])
    >>> out.logits.shape, out.distances.shape, out.centerness.shape
    (torch.Size([2, 30, 5]), torch.Size([2, 30, 4]), torch.Size([2, 30]))
    """

    def __init__(self, channels: int, num_classes: int, num_convs: int = 4) -> None:
        super().__init__()
        self.channels = channels
        self.class_branch, self.box_branch = (_branch(channels, num_convs) for _ in range(2))
        self.logits = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.distances = nn.Conv2d(channels, 4, 3, padding=1)
        self.centerness = nn.Conv2d(channels, 1, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        self.prior(0.01)

    def prior(self, probability: float) -> None:
        """Let every class start with this probability (Lin et al. 2017, section 4.1)."""
        nn.init.constant_(self.logits.bias, -log((1 - probability) / probability))

    def forward(self, maps: Sequence[Tensor]) -> FcosOutput:
        """Maps (B, channels, H_i, W_i) to predictions for their N = Σ H_i · W_i points."""
        parts = []
        for x in maps:
            box = self.box_branch(x)
            both = (self.logits(self.class_branch(x)), self.distances(box).relu(), self.centerness(box))
            parts.append([rearrange(part, "b c h w -> b (h w) c") for part in both])
        logits, distances, centerness = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return FcosOutput(logits, distances, centerness[..., 0], [tuple(x.shape[-2:]) for x in maps])


def _branch(channels: int, num_convs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    groups = gcd(32, channels // 2, channels)  # two channels at least: of a map of one pixel, one has no variance
    for _ in range(num_convs):
        layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(groups, channels), nn.ReLU()]
    return nn.Sequential(*layers)


class Points(NamedTuple):
    """Where the N points of a pyramid lie on the image.

    Attributes:
        xy: (N, 2), column and row in pixels.
        stride: (N,), of the map that each is on.
        span: (N, 2); a point is for boxes whose farthest side is farther than the first, and nearer than the second.
    """

    xy: Tensor
    stride: Tensor
    span: Tensor


def points_of(
    sizes: Sequence[tuple[int, int]], strides: Sequence[int], device: torch.device | None = None, offset: float = 0.5
) -> Points:
    """The points of maps, in reading order, map after map.

    Each map is for boxes whose farthest side is four to eight strides away, the finest also for smaller ones, the
    coarsest also for larger ones (section 3.2; for strides of 8 to 128 these are the paper's 64, 128, 256 and 512).

    Args:
        sizes: rows and columns of each map.
        strides: of the maps in pixels.
        offset: where in its square of stride² pixels a point lies: the middle (section 3.1). torchvision has 0.

    >>> points = points_of([(1, 2), (1, 1)], [8, 16])
    >>> points.xy.tolist(), points.span.tolist()
    ([[4.0, 4.0], [12.0, 4.0], [8.0, 8.0]], [[0.0, 64.0], [0.0, 64.0], [64.0, inf]])
    """
    if len(sizes) != len(strides):
        raise ValueError(f"{len(sizes)} maps have {len(strides)} strides; give one for each")
    xy, per_point, span = [], [], []
    for level, ((h, w), stride) in enumerate(zip(sizes, strides, strict=True)):
        rows, columns = (torch.arange(n, device=device, dtype=torch.float32) for n in (h, w))
        ys, xs = torch.meshgrid(rows, columns, indexing="ij")
        xy.append((torch.stack([xs, ys], dim=-1).flatten(0, 1) + offset) * stride)
        low = 0.0 if level == 0 else 4.0 * stride
        high = float("inf") if level == len(sizes) - 1 else 8.0 * stride
        per_point.append(xy[-1].new_full((h * w,), stride))
        span.append(xy[-1].new_tensor([low, high]).expand(h * w, 2))
    return Points(torch.cat(xy), torch.cat(per_point), torch.cat(span))


def decode(distances: Tensor, points: Points) -> Tensor:
    """Distances (…, N, 4) in strides to corners (…, N, 4) in pixels."""
    d = distances * points.stride[:, None]
    return torch.cat([points.xy - d[..., :2], points.xy + d[..., 2:]], dim=-1)


def assign(points: Points, boxes: Tensor, radius: float | None = 1.5) -> Tensor:
    """Which box each point is to predict (section 3.2): (N,), its number, −1 for none.

    A point must lie inside the box, its farthest side must be in the point's span and, with centre sampling, its centre
    within ``radius`` strides along each axis; None leaves that out. Of several boxes the smallest is taken.

    >>> assign(points_of([(2, 2)], [8]), torch.tensor([[0.0, 0.0, 16.0, 16.0], [0.0, 0.0, 7.0, 7.0]])).tolist()
    [1, 0, 0, 0]
    """
    if not len(boxes):
        return torch.full((len(points.xy),), -1, device=points.xy.device)
    near, far = points.xy[:, None] - boxes[None, :, :2], boxes[None, :, 2:] - points.xy[:, None]  # (N, n, 2)
    sides = torch.cat([near, far], dim=-1)
    farthest = sides.amax(-1)
    fits = (sides.amin(-1) > 0) & (farthest > points.span[:, :1]) & (farthest < points.span[:, 1:])
    if radius is not None:
        off_centre = (near - far).abs().amax(-1) / 2
        fits &= off_centre < radius * points.stride[:, None]
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1).expand_as(fits)
    smallest, index = areas.masked_fill(~fits, float("inf")).min(dim=1)
    return torch.where(smallest.isfinite(), index, -1)


@dataclass(frozen=True)
class FcosLoss:
    """The three terms of FCOS, each a sum over points, all divided by the points that have a box (eq. 2).

    Focal loss for the classes of all points; for those that have a box, GIoU (as in the authors' later code; the paper
    has IoU) and the binary cross-entropy of centre-ness (eq. 3).

    Attributes:
        radius: see :func:`assign`.
        alpha, gamma: of the focal loss.
    """

    radius: float | None = 1.5
    alpha: float = 0.25
    gamma: float = 2.0

    def __call__(self, output: FcosOutput, points: Points, targets: Sequence[Target]) -> Terms:
        """Terms ``class``, ``box`` and ``centerness``; boxes are corners in pixels."""
        chosen = torch.stack([assign(points, target["boxes"], self.radius) for target in targets])  # (B, N)
        positive = chosen >= 0
        labels = torch.cat([t["labels"][c[c >= 0]] for t, c in zip(targets, chosen, strict=True)])
        boxes = torch.cat([t["boxes"][c[c >= 0]] for t, c in zip(targets, chosen, strict=True)])
        logits, distances, middle = (widened(part) for part in output[:3])
        classes = torch.zeros_like(logits)
        classes[(*positive.nonzero(as_tuple=True), labels)] = 1.0
        count = positive.sum()

        points_of_boxes = points.xy.expand(*positive.shape, 2)[positive]
        overlap = giou(decode(distances, points)[positive], boxes.to(distances))
        true = centerness(points_of_boxes, boxes)
        centre = F.binary_cross_entropy_with_logits(middle[positive], true.to(middle), reduction="sum")
        return {
            "class": Term(focal_loss(logits, classes, self.alpha, self.gamma).sum(), count),
            "box": Term((1 - overlap).sum(), count),
            "centerness": Term(centre, count),
        }


def centerness(xy: Tensor, boxes: Tensor) -> Tensor:
    """How near the middle of its box (n, 4) a point (n, 2) lies, 1 there and 0 on a side (eq. 3): (n,).

    >>> centerness(torch.tensor([[2.0, 5.0]]), torch.tensor([[0.0, 0.0, 10.0, 10.0]])).item()
    0.5
    """
    near, far = xy - boxes[:, :2], boxes[:, 2:] - xy
    return (torch.minimum(near, far) / torch.maximum(near, far)).prod(-1).sqrt()


class Fcos(DenseModel):
    """A detector: a backbone, a pyramid on it, and the head of FCOS on each of its maps.

    Args:
        backbone: see :class:`DenseModel`.
        num_classes: K.
        channels: of the pyramid and the head.
        levels, extra: of the pyramid; see :class:`Pyramid`. The paper's P3 to P7 are stages 1 to 3 and ``"p6p7"``.
        num_convs: of each branch of the head.

    Attributes:
        criterion: the loss, which may be replaced.

    >>> from vitcourse import create_model
    >>> model = Fcos(create_model("swin_tiny", img_size=64, num_classes=0, depths=(1, 1), num_heads=(2, 4)), 3, 32)
    >>> images = torch.rand(2, 3, 64, 64)
    >>> targets = [{"boxes": torch.tensor([[8.0, 8, 40, 30]]), "labels": torch.tensor([2])}]
    >>> targets.append({"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)})
    >>> sorted(model.losses(model(images), targets))
    ['box', 'centerness', 'class']
    >>> [sorted(found) for found in model.results(model(images))][0]
    ['boxes', 'labels', 'scores']
    """

    head_names = ("head.logits",)

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int = 80,
        channels: int = 256,
        levels: Sequence[float] | None = None,
        extra: str = "p6p7",
        num_convs: int = 4,
    ) -> None:
        super().__init__(backbone, num_classes)
        self.neck, self.indices, self.strides = make_neck(backbone, channels, levels, extra)
        self.head = FcosHead(channels, num_classes, num_convs)
        self.num_convs, self.criterion = num_convs, FcosLoss()

    def forward(self, x: Tensor, targets: Sequence[Target] | None = None) -> FcosOutput:
        """Images (B, C, H, W) to predictions for each point; targets are not looked at."""
        output = self.head(self.neck(self.backbone.feature_maps(x, self.indices)))
        return output._replace(size=tuple(x.shape[-2:]))

    def reset_classifier(self, num_classes: int) -> None:
        """Other classes: a new last layer of the class branch, randomly initialised."""
        old, self.num_classes = self.head.logits, num_classes
        self.head.logits = nn.Conv2d(self.head.channels, num_classes, 3, padding=1).to(old.weight)
        nn.init.normal_(self.head.logits.weight, std=0.01)
        self.head.prior(0.01)

    def points(self, output: FcosOutput) -> Points:
        return points_of(output.sizes, self.strides, output.logits.device)

    def losses(self, output: FcosOutput, targets: Sequence[Target]) -> Terms:
        """The terms of the loss; boxes are corners in pixels of the image that went in."""
        return self.criterion(output, self.points(output), targets)

    def results(
        self,
        output: FcosOutput,
        size: tuple[int, int] | None = None,
        threshold: float = 0.05,
        iou_threshold: float = 0.6,
        candidates: int = 1000,
        detections: int = 100,
    ) -> list[dict[str, Tensor]]:
        """Boxes of each image, the surest first: ``boxes`` (n, 4) in pixels, ``scores`` (n,) and ``labels`` (n,).

        The score is the root of class probability times centre-ness, as in the authors' later code.

        Args:
            output: of the model.
            size: (height, width) to which boxes are clipped; by default that of the images that went in.
            threshold: scores must be above.
            iou_threshold: of two boxes of one class that overlap by more, the surer one is kept.
            candidates: of each map, before that.
            detections: of each image, after it.
        """
        points = self.points(output)
        boxes = clip_boxes_to_image(decode(output.distances, points).float(), size or output.size)
        scores = (output.logits.float().sigmoid() * output.centerness.float().sigmoid()[..., None]).sqrt()
        lengths = [h * w for h, w in output.sizes]
        found = []
        for image_boxes, image_scores in zip(boxes, scores, strict=True):
            parts = [
                _best(*level, threshold, candidates)
                for level in zip(image_boxes.split(lengths), image_scores.split(lengths), strict=True)
            ]
            kept, values, labels = (torch.cat(part) for part in zip(*parts, strict=True))
            order = batched_nms(kept, values, labels, iou_threshold)[:detections]
            found.append({"boxes": kept[order], "scores": values[order], "labels": labels[order]})
        return found


def _best(boxes: Tensor, scores: Tensor, threshold: float, candidates: int) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest pairs of point and class of one map: boxes (n, 4), scores (n,) and labels (n,)."""
    point, label = (scores > threshold).nonzero(as_tuple=True)
    values, order = scores[point, label].topk(min(candidates, len(point)))
    return boxes[point[order]], values, label[order]
