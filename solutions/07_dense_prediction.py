# %% [markdown]
# # 07 · Dense prediction: boxes and masks
#
# *From "what is in the picture?" to "what is where?": pyramids, skip connections, and queries that ask for objects.*
#
# **You will build** what detectors and segmenters consist of: the sums of a feature pyramid, the rule that says which point answers
# for which box, generalised IoU, a U-Net's step up, the mask that lets queries live inside a ViT, Hungarian matching, DETR's set
# loss, and the mask that keeps denoising from giving the answers away. You put them together and train a detector, a segmenter and a
# small DETR.
#
# **Why anybody needs it.** A label for a whole picture is seldom what is wanted. Cars have to be counted, cells outlined, and a robot
# must know where the cup ends. A backbone alone gives one coarse map. All that follows turns on two questions: how do fine and coarse
# maps come together, and who answers for which object?
#
# Exercises work as in lesson 00: replace `raise TODO`, run the cell. What you leave blank, the course fills in.

# %%
import copy
import json

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from scipy.optimize import linear_sum_assignment
from torch import nn
from torchvision.ops import FeaturePyramidNetwork, batched_nms, box_convert, box_iou, generalized_box_iou, nms
from torchvision.transforms import v2

import vitcourse
from vitcourse import course, dense_prediction, paths, plot
from vitcourse.course import TODO, exercise, expect, hint, last_attempt
from vitcourse.data import open_dataset, subset
from vitcourse.dense_prediction import DetectionMetric, SegmentationMetric
from vitcourse.dense_prediction.fcos import decode, points_of
from vitcourse.dense_prediction.unet import ConvBlock

session = course.setup()
device = session.device

# %% [markdown]
# ## 0 What one map misses
#
# The scenes of this course are rendered: pieces of clothing, tinted, in front of each other on photographed ground. Boxes and masks are
# exact to the pixel. Here are some of 64 × 64 pixels, small because everything below is trained on one processor. Of Fashion-MNIST's
# ten classes we make five *kinds*.

# %%
# alt: Four scenes with one to four pieces of clothing on bricks or grass, each with a box and the name of its kind; one of the
# pieces, a shoe, is only three pixels high.
KINDS = ("top", "trousers", "dress", "shoe", "bag")
KIND_OF = torch.tensor([0, 1, 0, 2, 0, 3, 0, 3, 4, 3])  # of each of the ten classes


def load(split, count):
    """Scenes (N, 3, 64, 64), normalised, and of each its boxes, its kinds, its masks, and a map: 0 for the ground, else kind + 1."""
    data = subset(open_dataset("scenes", split, img_size=64, objects=(1, 4), scale=(0.12, 0.5)), count)
    images, targets = [], []
    for image, target in data:
        kinds = KIND_OF[target["labels"]]
        table = torch.cat([torch.zeros(1, dtype=torch.int64), KIND_OF + 1])
        plain = {key: target[key].as_subclass(torch.Tensor) for key in ("boxes", "masks", "semantic")}
        found = {"boxes": plain["boxes"], "labels": kinds, "masks": plain["masks"], "map": table[plain["semantic"]]}
        images.append(image.as_subclass(torch.Tensor))
        targets.append({key: value.to(device) for key, value in found.items()})
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std))
    return ((torch.stack(images) / 255 - mean) / std).to(device), targets


mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_dataset("scenes").mean, open_dataset("scenes").std))
images, targets = load("train", 1500 if session.quick else 10_000)
new_images, new_targets = load("val", 200)


def picture(image):
    """A normalised image as it looks."""
    return image.cpu() * std + mean


def draw_boxes(ax, boxes, names=(), colour="white", **options):
    for i, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        style = {"fill": False, "color": colour, "linewidth": 2, **options}
        ax.add_patch(plt.Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, **style))
        if i < len(names):
            at = {"ha": "left", "x": x1} if x1 < 40 else {"ha": "right", "x": x2}
            label = ax.text(**at, y=max(y1 - 1.5, 3), s=names[i], color="white", fontsize=9)
            label.set_bbox({"facecolor": "black", "alpha": 0.55, "pad": 1, "linewidth": 0})


fig, axes = plot.panels(1, 4, width=2.7, height=2.8)
for ax, i in zip(axes, (1, 3, 8, 12), strict=True):
    plot.show_image(ax, picture(new_images[i]))
    draw_boxes(ax, new_targets[i]["boxes"], [KINDS[k] for k in new_targets[i]["labels"]])
plt.show()

# %% [markdown]
# The last map of our backbones has one vector for 16 × 16 pixels, and a detector that works *by points* asks each of them: does the
# middle of your square lie in an object, of which kind, and how far away are its sides? Nobody answers for what lies between the points,
# and where objects share a point, only one can have it. (Anchors, several at each of these places and matched by overlap, soften this,
# and do not remove it.) No model is needed to count what is lost.

# %%
# alt: Left: a scene with the points of a map of stride 16 in it, as dots, and three small shoes, none of which has a point inside its
# box. Right: the share of objects that have a point of their own, against the size of the object in pixels, for maps of strides 4, 8 and
# 16: at stride 16 most objects below 12 pixels have none; at stride 4 all have one but some of the smallest.
whole = torch.tensor([[0.0, float("inf")]])


def with_a_point(strides, targets):
    """Of each object its size in pixels, and whether any point of maps of these strides would be given to it."""
    sizes, has = [], []
    for target in targets:
        boxes = target["boxes"].cpu()
        points = points_of([(64 // s, 64 // s) for s in strides], strides)
        chosen = dense_prediction.assign(points._replace(span=whole.expand(len(points.xy), 2)), boxes, radius=None)
        sizes += (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt().tolist()
        has += [bool((chosen == i).any()) for i in range(len(boxes))]
    return np.array(sizes), np.array(has)


BINS = [0, 6, 9, 12, 16, 20, 26]
fig = plt.figure(figsize=(9.5, 3.3))
left, right = fig.subfigures(1, 2, width_ratios=(1, 1.7))
ax = left.subplots()
plot.show_image(ax, picture(new_images[8]), "points of stride 16")
draw_boxes(ax, new_targets[8]["boxes"])
ax.plot(*(points_of([(4, 4)], [16]).xy.T - 0.5), "o", color=plot.SKY, markeredgecolor="black")
ax, missed = right.subplots(), {}
for stride, style in ((4, "^-"), (8, "s-"), (16, "o-")):
    sizes, has = with_a_point([stride], targets)
    bins = np.digitize(sizes, BINS) - 1
    ax.plot(range(len(BINS)), [100 * has[bins == b].mean() for b in range(len(BINS))], style, label=f"stride {stride}")
    missed[stride] = 100 * (1 - has[sizes < 9].mean())
ax.set_xticks(range(len(BINS)), [f"{a}–{b}" for a, b in zip(BINS, BINS[1:], strict=False)] + [f"{BINS[-1]}+"])
ax.set(xlabel="size of the object, √(width · height), pixels", ylabel="have a point of their own, %", ylim=(0, 105))
ax.legend()
plt.show()

# %%
expect("of objects of less than 9 pixels, those without a point at stride 16, in %", missed[16], at_least=45.0)
expect("and at stride 4", missed[4], at_most=15.0)

# %% [markdown]
# A fine map, then? It has seen little: the first stages of a backbone know edges and textures, not what a shoe is. What is wanted is a map as fine as the
# first and as wise as the last.
#
# ## 1 A pyramid: what the coarse map knows, on the fine one
#
# The **feature pyramid network** (Lin et al. 2017) takes the maps that a hierarchical backbone makes anyway. A 1 × 1 convolution brings
# each to the same width. Then it goes *down from the top*: the coarsest stays; it is enlarged to the size of the next finer one and added
# to it; that sum is enlarged and added to the next, and so on. At the end a 3 × 3 convolution smooths each sum.
#
# $$ S_L = M_L, \qquad S_i = M_i + \operatorname{enlarge}(S_{i+1}), \qquad P_i = \operatorname{conv}_{3\times3}(S_i). $$
#
# ### Exercise 1 · `top_down`
# *Difficulty 2 of 5, about 10 minutes.* Most detectors of the last ten years stand on these sums, and a fine map is only as wise as
# what comes down to it.
#
# The maps have one width already. Enlarge by nearest neighbour, as in the paper: each pixel is repeated, two by two, and what is too
# much at an odd side is cut off (`mode="nearest"`, not `"nearest-exact"`). Sides halve from map to map, rounded *up*.


# %%
@exercise("dense_prediction.top_down")
def top_down(maps):
    """The sums S, new tensors: a list of (B, C, H_i, W_i), finest first, -> a list of the same shapes in the same order."""
    # <solution>
    sums = [maps[-1]]
    for finer in maps[-2::-1]:
        sums.insert(0, finer + F.interpolate(sums[0], size=finer.shape[-2:], mode="nearest"))
    return sums
    # </solution>


# %% [markdown]
# With its convolutions, and held against torchvision's, every parameter random, on maps of odd sizes:


# %%
class Pyramid(nn.Module):
    """Maps (B, C_i, H_i, W_i), finest first, to maps (B, channels, H_i, W_i)."""

    def __init__(self, in_channels, channels):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)

    def forward(self, maps):
        sums = top_down([lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)])
        return [output(x) for output, x in zip(self.output, sums, strict=True)]


torch.manual_seed(0)
theirs = FeaturePyramidNetwork([6, 9, 12], 8)
mine = Pyramid([6, 9, 12], 8)
with torch.no_grad():
    for parameter in theirs.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    names = {"inner_blocks": "lateral", "layer_blocks": "output"}
    moved = {f"{names[k.split('.')[0]]}.{k.split('.')[1]}.{k.split('.')[3]}": v for k, v in theirs.state_dict().items()}
    print(mine.load_state_dict(moved))
    maps = [torch.randn(2, 6, 13, 18), torch.randn(2, 9, 7, 9), torch.randn(2, 12, 4, 5)]
    expected, got = list(theirs(dict(enumerate(maps))).values()), mine(maps)
    by_library = dense_prediction.FeaturePyramid([6, 9, 12], 8)
    print(by_library.load_state_dict(mine.state_dict()))
    ours = by_library(maps)
error = max((a - b).abs().max() / b.abs().max() for a, b in zip(got, expected, strict=True))
expect("largest relative difference from torchvision's", error, at_most=1e-5)
expect("and from the library's", max((a - b).abs().max() for a, b in zip(got, ours, strict=True)), at_most=1e-5)
expect("spread of the result, so that equality means something", got[0].std(), at_least=0.1)

# %% [markdown]
# A plain ViT has one map only. ViTDet (Li et al. 2022) makes a pyramid of that one map, by deconvolutions and pooling
# (`SimpleFeaturePyramid` of the library): where every token has seen everything, there is nothing that only a coarser map could know.
#
# ## 2 Who answers for what?
#
# FCOS (Tian et al. 2019) has no anchors and no proposals. Each point of each map is asked, and the only thing to decide is what it is
# *taught*: which box is its box, or none. The rule has three parts.
#
# * The point must lie **inside** the box (not on an edge).
# * Each level has a **span**, two numbers in pixels. The distance from the point to the *farthest* of the box's four sides must be greater
#   than the first and less than the second (neither may be equal, as in torchvision): fine maps answer for what is small, coarse maps for
#   what is large.
# * If several boxes are left, the **smallest** (by area) wins: a large one has other points.
#
# ### Exercise 2 · `fcos_targets`
# *Difficulty 3 of 5, about 20 minutes.* A detector learns what its targets say, and most of what goes wrong shows as soon as you draw
# which point was given which box.


# %%
@exercise("dense_prediction.fcos_targets")
def fcos_targets(xy, spans, boxes):
    """Points (N, 2), column and row; their spans (N, 2); boxes (n, 4), two corners (x1, y1, x2, y2); n may be 0.

    -> (N,) the number of the box that each point is to predict, −1 for none.
    """
    # <solution>
    if not len(boxes):
        return torch.full((len(xy),), -1, device=xy.device)
    sides = torch.cat([xy[:, None] - boxes[:, :2], boxes[:, 2:] - xy[:, None]], dim=-1)  # (N, n, 4)
    nearest, farthest = sides.amin(-1), sides.amax(-1)
    fits = (nearest > 0) & (farthest > spans[:, :1]) & (farthest < spans[:, 1:])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1).expand_as(fits)
    smallest, index = areas.masked_fill(~fits, float("inf")).min(dim=1)
    return torch.where(smallest.isfinite(), index, -1)
    # </solution>


# %% [markdown]
# Our three maps have strides of 4, 8 and 16. On pictures of 64 pixels the first gets what is nearer than 10.5 pixels, the second what lies
# between 10.5 and 20.5, the third the rest: half pixels, so that no distance lies on the edge between two, where neither level would
# answer. (The paper's spans go from four to eight strides of the level, for pictures a dozen times larger; ours end at two and a half,
# or the coarse maps would have little to do.) Each point in the colour of its box:

# %%
# alt: One scene four times. First with its boxes, in four colours; then with the points of the maps of strides 4, 8 and 16, each
# in the colour of the box that it answers for, small grey ones for none. The smallest object has one point, in the finest map; the
# largest has four, in the coarsest; the two in between have theirs in the middle map.
STRIDES, SPANS = (4, 8, 16), ((0.0, 10.5), (10.5, 20.5), (20.5, float("inf")))


def points_for(sizes, strides=STRIDES, spans=SPANS):
    """Points of maps of these sizes, as `points_of` gives them, with our spans."""
    points = points_of(sizes, strides, device)
    rows = [torch.tensor(span, device=device).expand(h * w, 2) for span, (h, w) in zip(spans, sizes, strict=True)]
    return points._replace(span=torch.cat(rows))


crowded = max(
    range(60),
    key=lambda i: (
        len(new_targets[i]["boxes"]) * new_targets[i]["boxes"][:, 2:].sub(new_targets[i]["boxes"][:, :2]).max().item()
    ),
)
points, boxes = points_for([(16, 16), (8, 8), (4, 4)]), new_targets[crowded]["boxes"]
chosen = fcos_targets(points.xy, points.span, boxes)
fig, axes = plot.panels(1, 4, width=2.7, height=2.9)
for ax in axes:
    plot.show_image(ax, picture(new_images[crowded]))
for i, box in enumerate(boxes):
    draw_boxes(axes[0], box[None], [KINDS[new_targets[crowded]["labels"][i]]], colour=plot.COLOURS[i])
axes[0].set_title("boxes")
for ax, stride in zip(axes[1:], STRIDES, strict=True):
    here = (points.stride == stride).cpu()
    for i in range(-1, len(boxes)):
        xy = points.xy.cpu()[here & (chosen == i).cpu()] - 0.5
        style = (
            {"color": plot.COLOURS[i], "markeredgecolor": "black", "markersize": 7}
            if i >= 0
            else {"color": "#bbbbbb", "markersize": 2}
        )
        ax.plot(*xy.T, "o", **style)
    ax.set_title(f"points of stride {stride}")
plt.show()
answered = [fcos_targets(points.xy, points.span, t["boxes"]).unique() for t in new_targets]
count = sum(len(t["boxes"]) for t in new_targets)
print("objects that no point answers for:", count - sum(int((a >= 0).sum()) for a in answered), "of", count)

# %% [markdown]
# ### How good is a box?
#
# A point that has a box predicts four distances, and a loss has to say how wrong they are. Differences in pixels are a poor measure: two
# pixels are nothing for a coat and everything for a shoe. **IoU**, the overlap over the union, does not depend on the scale. FCOS could
# do with it: its box and the true one both hold the point, so they meet. But boxes that do not meet, as DETR's in section 6, all have an
# IoU of 0, and a gradient of 0. **Generalised IoU** (Rezatofighi et al. 2019) looks at the *hull* $H$, the smallest box that encloses
# both, and subtracts the share of it that is empty:
#
# $$ \operatorname{GIoU}(A, B) = \frac{|A \cap B|}{|A \cup B|} - \frac{|H| - |A \cup B|}{|H|} \in (-1, 1]. $$
#
# ### Exercise 3 · `giou`
# *Difficulty 2 of 5, about 15 minutes.* IoU cannot say how far apart two boxes are that do not meet, and where DETR starts, most do
# not. GIoU can. Your detector, your matching and your DETR all use it.
#
# Boxes have an area here; add no ε. Leading axes broadcast, as they do in PyTorch.


# %%
@exercise("dense_prediction.giou")
def giou(boxes, others):
    """Of each box with its partner, two corners each: (…, 4) twice -> (…,)."""
    # <solution>
    inside = torch.minimum(boxes[..., 2:], others[..., 2:]) - torch.maximum(boxes[..., :2], others[..., :2])
    inside = inside.clamp(min=0).prod(-1)
    hull = torch.maximum(boxes[..., 2:], others[..., 2:]) - torch.minimum(boxes[..., :2], others[..., :2])
    hull = hull.prod(-1)
    areas = [(x[..., 2:] - x[..., :2]).prod(-1) for x in (boxes, others)]
    union = sum(areas) - inside
    return inside / union - (hull - union) / hull
    # </solution>


# %%
# alt: Left: two boxes of 20 pixels that do not meet, with their hull dashed. Middle: IoU and GIoU of a box that slides past the other
# at the same height, against the distance: IoU is a tent that is flat at 0 beyond 20 pixels, GIoU goes on falling on both sides, to about
# minus 0.4. Right: their slopes: beyond 20 pixels that of IoU is 0, that of GIoU small but not 0.
fixed, offsets = torch.tensor([0.0, 0.0, 20.0, 20.0]), torch.linspace(-50, 50, 101)
sliding = fixed + offsets[:, None] * torch.tensor([1.0, 0.0, 1.0, 0.0])
sliding.requires_grad_(True)
values = {"IoU": box_iou(sliding, fixed[None])[:, 0], "GIoU": giou(sliding, fixed)}
slopes = {name: torch.autograd.grad(value.sum(), sliding)[0][:, ::2].sum(1) for name, value in values.items()}
fig, axes = plot.panels(1, 3, width=3.4, height=2.8)
axes[0].add_patch(plt.Rectangle((0, 0), 20, 20, color=plot.BLUE, alpha=0.6))
axes[0].add_patch(plt.Rectangle((32, 5), 20, 20, color=plot.ORANGE, alpha=0.6))
axes[0].add_patch(plt.Rectangle((0, 0), 52, 25, fill=False, linestyle="--"))
axes[0].set(xlim=(-5, 60), ylim=(30, -5), aspect="equal", title="two boxes and their hull")
for ax, lines, title in ((axes[1], values, "value"), (axes[2], slopes, "slope")):
    for (name, line), style in zip(lines.items(), ("-", "--"), strict=True):
        ax.plot(offsets, line.detach(), style, label=name)
    ax.set(xlabel="distance, pixels", title=title)
axes[1].legend()
plt.show()

torch.manual_seed(0)
corner = torch.rand(40, 2) * 50
some = torch.cat([corner, corner + 1 + torch.rand(40, 2) * 30], 1)
difference = (giou(some[:15, None], some[None, 15:]) - generalized_box_iou(some[:15], some[15:])).abs().max()
expect("largest difference from torchvision's, 15 × 25 pairs", difference, at_most=1e-6)
expect("IoU's slope where the boxes are 30 pixels from lying on each other", slopes["IoU"][20].item(), equals=0.0)
expect("GIoU's slope there, towards the other box", slopes["GIoU"][20], at_least=0.005)

# %% [markdown]
# **"My GIoU is NaN."** Two boxes *without an area* have the union 0: zero over zero. Such boxes come from annotations (a line drawn by
# mistake), from cropping, and from predictions that an exponential or a ReLU has brought to nothing; one alone does no harm, both
# together do. Throw out the first two kinds when the data are read. The other cause is *half precision*: in float16, areas in pixels are
# infinite from about 256 × 256 on, and infinity over infinity is NaN as well. Compute boxes in float32.

# %%
line = torch.tensor([5.0, 5.0, 5.0, 9.0])
large = torch.tensor([0.0, 0.0, 300.0, 300.0])
print("a line, with itself:", giou(line, line).item())
print("torchvision's answer:", generalized_box_iou(line[None], line[None]).item())
print("a line, with a box of 300 pixels:", giou(line, large).item())
print("that box with itself, in float16:", giou(large.half(), large.half()).item())

# %% [markdown]
# ## 3 Your detector
#
# The pieces: a CoAtNet of lesson 02 with three maps, **your** pyramid, a head that all maps share (the library's `FcosHead`: what, how far, and how
# central), **your** targets, **your** GIoU. *How central* the point lies in its box is there for the score: points near an edge draw poor boxes,
# and a low centerness, multiplied into the probability, lets them lose. The sums are divided by the number of points that have a box.


# %%
def body():
    """A small CoAtNet: maps of 32, 48 and 96 channels, at strides of 4, 8 and 16."""
    sizes = {"stem_dim": 16, "embed_dim": (32, 48, 96), "depths": (1, 1, 2), "strides": (2, 2, 2)}
    return vitcourse.create_model("coatnet_0", img_size=64, layout="CCT", num_classes=0, **sizes)


class Detector(dense_prediction.Fcos):
    """FCOS on three maps, with your parts; `maps` leaves some of them out."""

    def __init__(self, maps=(0, 1, 2)):
        super().__init__(body(), len(KINDS), channels=32, levels=list(maps), extra="", num_convs=1)
        self.neck = Pyramid([(32, 48, 96)[i] for i in maps], 32)
        self.spans = SPANS if len(maps) == 3 else ((0.0, float("inf")),)

    def points(self, output):
        return points_for(output.sizes, self.strides, self.spans)

    def losses(self, output, targets):
        points = self.points(output)
        chosen = torch.stack([fcos_targets(points.xy, points.span, target["boxes"]) for target in targets])  # (B, N)
        has = chosen >= 0
        labels = torch.cat([t["labels"][c[c >= 0]] for t, c in zip(targets, chosen, strict=True)])
        boxes = torch.cat([t["boxes"][c[c >= 0]] for t, c in zip(targets, chosen, strict=True)])
        wanted = torch.zeros_like(output.logits)
        wanted[(*has.nonzero(as_tuple=True), labels)] = 1.0
        middle = dense_prediction.centerness(points.xy.expand(*has.shape, 2)[has], boxes)
        sums = {
            "class": dense_prediction.focal_loss(output.logits, wanted).sum(),
            "box": (1 - giou(decode(output.distances, points)[has], boxes)).sum(),
            "centerness": F.binary_cross_entropy_with_logits(output.centerness[has], middle, reduction="sum"),
        }
        return {name: dense_prediction.Term(total, has.sum()) for name, total in sums.items()}


torch.manual_seed(0)
detector = Detector().to(device)
few = targets[:8]
with torch.no_grad():
    output = detector(images[:8])
    mine = detector.losses(output, few)
    theirs = dense_prediction.FcosLoss(radius=None)(output, detector.points(output), few)
apart = max(abs(mine[name].total / theirs[name].total - 1).item() for name in theirs)
expect("largest relative difference from the library's loss, term by term", apart, at_most=1e-4)

# %% [markdown]
# **The class term** sees dozens of points without an object for each one that has one (on large pictures, thousands). Focal loss (Lin et
# al. 2017) all but takes the easy ones out of the sum, and the bias of the last layer starts at a probability of 0.01: otherwise the
# first steps only learn to say no.
#
# ### What is mAP?
#
# All detections of a class are sorted by score. Going down the list, a detection is a **hit** if it overlaps an object that no earlier one
# has taken, by at least the threshold (IoU 0.5, say); else it is a miss. After each, *precision* is the share of hits so far, *recall* the share of
# objects found. **AP** is the area under precision over recall, where precision at a recall means the best at this or any higher one
# (COCO reads it at 101 recalls). **mAP** is the mean over classes, and COCO's also over thresholds of 0.50, 0.55 … 0.95. A tiny example,
# three bags and four detections:

# %%
bags = torch.tensor([[4.0, 4, 14, 14], [20, 4, 40, 24], [4, 30, 24, 60]])
found = torch.tensor([[4.0, 4, 14, 15], [44, 40, 60, 60], [22, 4, 40, 24], [4, 5, 14, 14]])
scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
all_bags = torch.full((4,), 4)
metric = DetectionMetric()
metric.update([{"boxes": found, "scores": scores, "labels": all_bags}], [{"boxes": bags, "labels": all_bags[:3]}])
hits, taken = [], set()
print("score   best IoU   hit   precision   recall")
for score, overlaps in zip(scores.tolist(), box_iou(found, bags), strict=True):
    which = int(overlaps.argmax())
    hits.append(overlaps[which].item() >= 0.5 and which not in taken)
    taken |= {which} if hits[-1] else set()
    print(
        f"{score:5.1f} {overlaps[which]:10.2f} {'yes' if hits[-1] else 'no':>5s} {np.mean(hits):11.2f} {sum(hits) / 3:8.2f}"
    )
by_hand = (34 * 1 + 33 * 2 / 3) / 101  # recalls 0 … 0.33 at precision 1, 0.34 … 0.66 at 2/3, none beyond
expect("AP at IoU 0.5, by torchmetrics", metric.compute()["map_50"], close_to=round(by_hand, 4), tol=1e-4)

# %% [markdown]
# The last detection is a good box, and a miss: its bag was taken already. That is why detectors that work by points need **non-maximum suppression**: of
# boxes that overlap, the surest is kept. It must run *for each class on its own*, or a bag in front of a top is thrown away:

# %%
pair, sure, what = torch.tensor([[10.0, 10, 40, 50], [12, 14, 38, 48]]), torch.tensor([0.9, 0.8]), torch.tensor([0, 4])
print("kept by nms over everything:", [KINDS[what[i]] for i in nms(pair, sure, 0.6)])
print("kept by nms for each class: ", [KINDS[what[i]] for i in batched_nms(pair, sure, what, 0.6)])

# %% [markdown]
# And a **baseline**. Someone who looks at no picture can still say: a top is usually here, and of this size. For each kind its mean box,
# with the frequency of the kind as its score.


# %%
def train(model, loss, lr, steps, look=None):
    """AdamW, the rate up and down again; `loss(model, numbers of the batch)`. `look` is called ten times."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.15)
    model.train()
    for step in range(1, steps + 1):
        where = torch.randint(len(images), (16,))
        value = loss(model, where.to(device))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if look and step % max(1, steps // 10) == 0:
            model.eval()
            with torch.no_grad():
                look(step, value.item())
            model.train()
    return model.eval()


@torch.no_grad()
def precision(predict):
    """mAP on new scenes, overall and by size: small is an area below 10² pixels, medium one below 30²."""
    metric = DetectionMetric(small=10, classes=KINDS)
    for start in range(0, len(new_images), 50):
        metric.update(predict(new_images[start : start + 50]), new_targets[start : start + 50])
    return metric.compute()


def train_detector(model, steps=220 if session.quick else 5000):
    def loss(model, where):
        return dense_prediction.mean_loss(model.losses(model(images[where]), [targets[i] for i in where]))

    return train(model, loss, 3e-3, steps)


every_box, every_kind = torch.cat([t["boxes"] for t in targets]), torch.cat([t["labels"] for t in targets])
guess = {
    "boxes": torch.stack([every_box[every_kind == k].mean(0) for k in range(5)]),
    "scores": torch.bincount(every_kind, minlength=5) / len(every_kind),
    "labels": torch.arange(5, device=device),
}
blind = precision(lambda x: [guess] * len(x))

# %%
# NBVAL_IGNORE_OUTPUT
# alt: Four new scenes with the surest boxes that the detector found, their kinds, and dotted the true boxes. Most pieces are found,
# some under the wrong name; neighbours that touch may share a box, and the smallest are missing.
torch.manual_seed(0)
train_detector(detector)
result = precision(lambda x: detector.results(detector(x)))

shown = [i for i in range(40) if len(new_targets[i]["boxes"]) > 2][:4]
with torch.no_grad():
    detections = detector.results(
        detector(torch.stack([new_images[i] for i in shown])), threshold=0.35, iou_threshold=0.4, detections=5
    )
fig, axes = plot.panels(1, 4, width=2.7, height=2.8)
for ax, i, found in zip(axes, shown, detections, strict=False):
    plot.show_image(ax, picture(new_images[i]))
    draw_boxes(ax, new_targets[i]["boxes"], linestyle=":")
    draw_boxes(ax, found["boxes"], [KINDS[k] for k in found["labels"]], colour=plot.ORANGE)
plt.show()
for name in ("map", "map_50", "map_small", "map_medium"):
    print(f"{name:11s} yours {100 * (result[name] or 0):5.1f} %   mean boxes {100 * (blind[name] or 0):5.1f} %")

# %%
expect("mAP at IoU 0.5 of your detector", result["map_50"], at_least=0.15)
expect("its lead over mean boxes", result["map_50"] - blind["map_50"], at_least=0.12)

# %% [markdown]
# What do the levels say? The same scene on its three maps: for each point the probability of its surest class, drawn where the point is.

# %%
# NBVAL_IGNORE_OUTPUT
# alt: A scene, and beside it the three maps of the head as heat: in the finest, a small piece lights up as a single spot; in the middle
# one, pieces of medium size; in the coarsest, the largest piece.
with torch.no_grad():
    output = detector(new_images[crowded][None])
heat = output.logits[0].sigmoid().amax(-1).split([h * w for h, w in output.sizes])
fig, axes = plot.panels(1, 4, width=2.8, height=2.8)
plot.show_image(axes[0], picture(new_images[crowded]), "a scene")
draw_boxes(axes[0], new_targets[crowded]["boxes"])
for ax, level, size, stride in zip(axes[1:], heat, output.sizes, STRIDES, strict=True):
    plot.show_image(
        ax, level.reshape(size), f"stride {stride}", cmap="inferno", vmin=0, vmax=0.7, extent=(-0.5, 63.5, 63.5, -0.5)
    )
    draw_boxes(ax, new_targets[crowded]["boxes"], linewidth=1)
fig.colorbar(axes[3].images[0], ax=list(axes), shrink=0.7, label="probability of the surest kind")
plt.show()

# %% [markdown]
# ### With and without the pyramid: the sweep
#
# `benchmarks/lesson_dense.py` has trained three detectors with the same body, head and number of steps, each at its own best rate, with three seeds:
# the map of stride 16 alone, the map of stride 4 alone, and the pyramid. What we expected, written down before the first run: the coarse map
# alone has less than a third of the pyramid's AP on small objects; the fine map alone is level with the pyramid on small ones, and at
# least 5 points behind in all.<!--~ prediction -->

# %%
sweep = json.loads((paths.results_dir() / "lesson_dense.json").read_text(encoding="utf-8"))
print(f"measured on {sweep['device']}, {sweep['date']}, torch {sweep['versions']['torch']}")


def runs(name, key="accuracy"):
    """One number a seed, in per cent, of scenes that nothing was chosen by."""
    return [100 * row[key] for row in sweep["rows"] if row["name"] == name and row["stage"] == "test"]


def best_rate(name):
    return next(row["lr"] for row in sweep["rows"] if row["name"] == name and row["stage"] == "test")


# %%
# alt: AP at IoU 0.5 … 0.95 for small and medium objects, and AP at 0.5 for all, of three detectors, with the range over three seeds.
DETECTORS = ("one map", "finest map", "pyramid")
fig, (ax,) = plot.panels(1, 1, width=6.8, height=3.2)
for shift, name in zip((-0.25, 0, 0.25), DETECTORS, strict=True):
    values = [runs(name, key) for key in ("map_small", "map_medium", "map_50")]
    ax.bar(
        np.arange(3) + shift,
        [np.mean(v) for v in values],
        0.23,
        alpha=0.8,
        label={"one map": "stride 16 alone", "finest map": "stride 4 alone"}.get(name, name),
    )
    for place, dots in enumerate(values):
        ax.plot([place + shift] * len(dots), dots, "o", color=plot.BLACK, markersize=4)
ax.set_xticks(range(3), ["small (< 10 px),\nmAP", "medium,\nmAP", "all,\nAP at IoU 0.5"])
ax.set_ylabel("%")
ax.legend()
plt.show()

# %% [markdown]
# What came out. On **small** objects the coarse map alone has an mAP of 1.0<!--= percent(lesson_dense, "map_small", name="one map", stage="test") --> %, the pyramid
# 5.0<!--= percent(lesson_dense, "map_small", name="pyramid", stage="test") --> %: less than a third, as expected.<!--? percent(lesson_dense, "map_small", name="one map", stage="test") < percent(lesson_dense, "map_small", name="pyramid", stage="test") / 3 --> On medium ones it is
# 5.0<!--= percent(lesson_dense, "map_medium", name="one map", stage="test") --> against 10.0<!--= percent(lesson_dense, "map_medium", name="pyramid", stage="test") --> %. The finest map alone has
# 5.0<!--= percent(lesson_dense, "map_small", name="finest map", stage="test") --> % on small objects, and in all, at IoU 0.5, 20.0<!--= percent(lesson_dense, "map_50", name="finest map", stage="test") --> %, where the pyramid
# has 25.0<!--= percent(lesson_dense, "map_50", name="pyramid", stage="test") --> % and the coarse map 12.0<!--= percent(lesson_dense, "map_50", name="one map", stage="test") --> %. (Expected: level on small ones, 5<!--~ prediction --> points behind in all.) All three have seen
# 3 200<!--= 200 * 16 --> scenes: none of them is finished, and nobody has waited to see where they end.
#
# ## 4 A class for every pixel
#
# For masks, the way up goes on to the pixels themselves. **U-Net** (Ronneberger et al. 2015) climbs step by step: the coarse map is enlarged, the map
# of the way down that has this size is laid beside it (a *skip connection*), and two convolutions make one of both. The last step takes the
# image itself. With a ViT, whose map has one size, **UNETR** (Hatamizadeh et al. 2022) enlarges earlier layers to the sizes that are wanted.
#
# Adding, as in the pyramid, asks both maps for the same width and the same meaning of each channel. Laying them side by side lets
# the convolution decide.
#
# ### Exercise 4 · `UpBlock`
# *Difficulty 2 of 5, about 15 minutes.* What a thing is, the coarse map knows; where exactly it ends, only the fine one has seen. Here they
# meet.
#
# `self.reduce` gives the coarse map fewer channels; then it is enlarged *bilinearly* to the size of the finer one, and both, the coarse
# one first, go through `self.block`. Without skip connections (`self.skips` is false) nothing is taken from the finer map but its size.


# %%
@exercise("dense_prediction.UpBlock")
class UpBlock(nn.Module):
    """(B, in_channels, h, w) and a finer map (B, skip_channels, H, W) -> (B, channels, H, W)."""

    def __init__(self, in_channels, channels, skip_channels):
        super().__init__()
        self.skips = skip_channels > 0
        self.reduce = nn.Conv2d(in_channels, channels, 1)
        self.block = ConvBlock(channels + skip_channels, channels)

    def forward(self, x, skip):
        # <solution>
        x = F.interpolate(self.reduce(x), size=skip.shape[-2:], mode="bilinear")
        return self.block(torch.cat([x, skip], dim=1) if self.skips else x)
        # </solution>


# %%
class MyUNet(dense_prediction.UNet):
    """The library's U-Net, with your steps up."""

    def __init__(self, num_classes, skips=True):
        super().__init__(body(), num_classes, channels=8, skips=skips)
        widths = (8, 32, 48, 96)
        steps = [UpBlock(coarse, fine, fine * skips) for fine, coarse in zip(widths, widths[1:], strict=False)]
        self.last, self.decoder.blocks = steps[0], nn.ModuleList(steps[1:])


torch.manual_seed(0)
mine, theirs = MyUNet(6).eval(), dense_prediction.UNet(body(), 6, channels=8).eval()
with torch.no_grad():
    for parameter in theirs.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    print(mine.load_state_dict(theirs.state_dict()))
    x = torch.randn(2, 3, 64, 64)
    a, b = mine(x), theirs(x)
expect("largest relative difference from the library's U-Net", (a - b).abs().max() / b.abs().max(), at_most=1e-5)
expect("spread of the logits, so that equality means something", b.std((0, 2, 3)).mean(), at_least=0.005)

# %% [markdown]
# ### What is mIoU?
#
# Count, over all pixels of *all* pictures, where a class was predicted and where it truly is: its IoU is the number of pixels where both
# hold, over those where either does. mIoU is the mean over classes. It is not the mean over pictures, and not accuracy: whoever says "ground" everywhere is
# right for most pixels. Two rows of pixels, three classes, and one pixel of class **255**, "nobody asks about this one", as VOC, Cityscapes and ADE20K mark
# the rims of objects:

# %%
true = torch.tensor([[[0, 0, 0, 1], [0, 0, 2, 255]]])
said = torch.tensor([[[0, 0, 1, 1], [0, 0, 0, 2]]])
for k in range(3):
    both, either = ((said == k) & (true == k)).sum(), (((said == k) | (true == k)) & (true != 255)).sum()
    print(f"class {k}: {both} of {either} pixels")
metric = SegmentationMetric(3, boundary=0)
metric.update(said, true)
expect("mIoU by torchmetrics", metric.compute()["miou"], close_to=(4 / 6 + 1 / 2 + 0) / 3, tol=1e-6)
print(f"accuracy of the same pixels: {metric.compute()['pixel_accuracy']:.3f}")

# %% [markdown]
# The loss must leave class 255 out as well: `F.cross_entropy(…, ignore_index=255)`. Without it PyTorch raises an error on the CPU; on a
# GPU an assertion fails, and its message names no line of yours.
#
# ### Skips on, skips off
#
# Live, and easy, so that it takes seconds: is a pixel *clothing or ground*? Your U-Net, with skip connections and without, with the same seed, steps and
# rate. We look at IoU, and at the share of pixels that are right *within one pixel of a border*: that is where it shows who has seen it.
# The baseline says "ground" everywhere.

# %%
# NBVAL_IGNORE_OUTPUT
# alt: Three scenes, the true masks below them, and what the U-Net draws with and without skip connections. With them outlines are
# crisp; without them there are soft blobs that miss small pieces. Beside it bars of the IoU and of the accuracy near borders for both, and for
# saying "ground" everywhere.
new_maps = torch.stack([t["map"] for t in new_targets])
cloth = (new_maps > 0).long()


def train_unet(model, steps=70 if session.quick else 2000):
    def loss(model, where):
        return F.cross_entropy(model(images[where]), torch.stack([targets[i]["map"] for i in where]).clamp(max=1))

    return train(model, loss, 3e-3, steps)


@torch.no_grad()
def outlines(predict):
    metric = SegmentationMetric(2, boundary=1)
    for start in range(0, len(cloth), 50):
        metric.update(predict(new_images[start : start + 50]), cloth[start : start + 50])
    return metric.compute()


unets, borders = {}, {"ground everywhere": outlines(lambda x: torch.zeros(x[:, 0].shape, dtype=torch.int64))}
for name, skips in (("skips", True), ("no skips", False)):
    torch.manual_seed(0)
    unets[name] = train_unet(MyUNet(2, skips).to(device))
    borders[name] = outlines(lambda x, model=unets[name]: model(x).argmax(1))

fig = plt.figure(figsize=(8.6, 4.8))
left, right = fig.subfigures(1, 2, width_ratios=(0.85, 1))
with torch.no_grad():
    drawn = {name: model(torch.stack([new_images[i] for i in shown])).softmax(1)[:, 1] for name, model in unets.items()}
rows = {"scene": None, "true": [cloth[i] for i in shown], **drawn}
for (title, row), axes in zip(rows.items(), left.subplots(4, 3).reshape(4, 3), strict=True):
    for i, ax in enumerate(axes):
        plot.show_image(
            ax,
            picture(new_images[shown[i]]) if row is None else row[i].float(),
            **({} if row is None else {"vmin": 0, "vmax": 1}),
        )
    axes[0].text(-0.08, 0.5, title, transform=axes[0].transAxes, rotation=90, ha="right", va="center")
ax = right.subplots()
for shift, (key, label, colour) in zip(
    (-0.2, 0.2),
    (("miou", "mean IoU", plot.BLUE), ("boundary_accuracy", "right near borders", plot.ORANGE)),
    strict=True,
):
    ax.bar(np.arange(3) + shift, [100 * r[key] for r in borders.values()], 0.38, color=colour, label=label)
ax.set_xticks(range(3), ["ground\neverywhere", "skips", "no skips"])
ax.set(ylabel="%", ylim=(0, 115))
ax.legend(ncols=2, loc="upper center")
plt.show()

# %%
expect("mean IoU with skip connections", 100 * borders["skips"]["miou"], at_least=65.0)
ahead = borders["skips"]["boundary_accuracy"] - borders["no skips"]["boundary_accuracy"]
expect("their lead near borders, in points", 100 * ahead, at_least=5.0)

# %% [markdown]
# Even without skip connections it knows *roughly where* a piece lies: look at its probabilities. What is gone is the outline, and whatever is smaller than
# a cell of the coarse map. (It is also less sure: where its probability stays below one half it says "ground", and after so few steps that may be everywhere; then
# these bars flatter the skips.) The fair comparison is in the next section: five kinds, three seeds, a ViT as well, and each at its own best rate.
#
# ## 5 Transformers as decoders
#
# No way up at all: let *tokens* stand for what is to be found, and let a product say where it is.
#
# **Segmenter** (Strudel et al. 2021). A learnt token for each class joins the patches in a few more blocks. At the end both are projected and brought
# to length 1; the product of class $k$'s token and patch $i$ is the score of class $k$ there. "Ground" is a class like any other. The scores lie on the
# grid of patches, and are enlarged bilinearly: that is why it wants small patches.
#
# The course ships a small Segmenter that has been trained on many such scenes, for the ground and all ten classes. Here is what four of
# its class tokens claim on its grid of 8 × 8 patches:

# %%
# alt: A scene; the scores of four class tokens on a grid of 8 by 8 patches, that of the ground bright everywhere but on the pieces, the others bright on one piece
# or two each; and the classes of all pixels, the pieces as blobs with rounded outlines.
shipped = vitcourse.create_model(paths.data_dir() / "weights" / "scenes_segmenter.safetensors").to(device).eval()
names = open_dataset("scenes").semantic_classes
with torch.no_grad():
    scores = shipped.decoder(shipped.backbone.feature_maps(new_images[crowded][None])[-1])[0].cpu()  # (11, 8, 8)
    said = shipped(new_images[crowded][None])[0].argmax(0).cpu()
tokens = torch.bincount(said.flatten(), minlength=len(names)).argsort(descending=True, stable=True)[:4]
fig, axes = plot.panels(1, 6, width=1.9, height=2.1)
plot.show_image(axes[0], picture(new_images[crowded]), "a scene")
for ax, k in zip(axes[1:5], tokens.tolist(), strict=True):
    plot.show_image(ax, scores[k], names[k].lower(), cmap="inferno", vmin=scores.min(), vmax=scores.max())
plot.show_image(axes[5], said, "classes", cmap="tab20", vmin=0, vmax=19, interpolation="nearest")
plt.show()

# %% [markdown]
# **EoMT** (Kerssies et al. 2025) goes a step further: no decoder. Learnt queries join the patches *inside the ViT*, in its last blocks, and pass through its own
# attention and MLPs. Each query says a class, or "no object", and a mask. It is a ViT with two small heads.
#
# Left alone, a query would look everywhere. In training it may see only **the patches that its own mask covers so far**, so that it gathers what belongs to its object
# (Mask2Former, Cheng et al. 2022). That costs a mask prediction before each block, at inference too; so EoMT **anneals** it: a block's mask is used with a probability that
# falls from 1 to 0 in the course of the training, one block after the other. At the end it is a plain ViT again.
#
# ### Exercise 5 · `query_mask`
# *Difficulty 3 of 5, about 20 minutes.* With this mask a plain ViT learns to segment, and one wrong row of it lets a softmax run over
# nothing: NaN.
#
# Tokens stand in this order: Q queries, `prefix` others ([CLS], registers), the patches of the grid. A query may attend to all queries, to the prefix, and to the
# patches where its mask, brought to the grid bilinearly, is more than 0. All other tokens may attend to everything.


# %%
@exercise("dense_prediction.query_mask")
def query_mask(masks, grid, prefix):
    """Masks' logits (B, Q, H, W), finer than the grid (h, w) -> (B, 1, N, N), true: may attend; N = Q + prefix + h · w."""
    # <solution>
    covered = F.interpolate(masks, size=grid, mode="bilinear").flatten(2) > 0  # (B, Q, h · w)
    batch, queries, patches = covered.shape
    length = queries + prefix + patches
    mask = torch.ones(batch, length, length, dtype=torch.bool, device=masks.device)
    mask[:, :queries, queries + prefix :] = covered
    return mask[:, None]
    # </solution>


# %% [markdown]
# **EoMT in your own ViT.** With your mask, the whole of EoMT fits into one cell. Held against the library's, all parameters random, mask on and off:


# %%
def eomt(vit, queries, class_head, mask_head, upscale, x, num_blocks, masked):
    """Logits (B, Q, K + 1) and masks (B, Q, h', w') of queries (Q, D) in the last blocks of a ViT."""

    def predict(x):
        x = vit.norm(x)
        pixels = upscale(rearrange(x[:, -h * w :], "b (h w) d -> b d h w", h=h))
        x = x[:, : len(queries)]
        return class_head(x), torch.einsum("bqd,bdhw->bqhw", mask_head(x), pixels)

    x, (h, w, prefix) = vit.embed(x)
    for i, block in enumerate(vit.blocks):
        seen, mask = prefix, None
        if i >= len(vit.blocks) - num_blocks:
            if i == len(vit.blocks) - num_blocks:
                x = torch.cat([queries.expand(len(x), -1, -1), x], dim=1)
            seen = prefix + len(queries)
            mask = query_mask(predict(x)[1], (h, w), prefix) if masked else None
        x = block(x, (h, w, seen), mask)
    return predict(x)


torch.manual_seed(0)
vit = vitcourse.create_model("vit_tiny", img_size=64, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=0)
theirs = dense_prediction.Eomt(vit, len(KINDS), num_queries=6, num_blocks=2).eval()
parts = (theirs.queries, theirs.class_head, theirs.mask_head, theirs.upscale)
different = {}
with torch.no_grad():
    for parameter in theirs.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.4)
    x = torch.randn(2, 3, 64, 48)
    for masked in (True, False):
        theirs.set_probs([float(masked)] * 2)
        expected, got = theirs(x), eomt(vit, *parts, x, 2, masked)
        for what, a, b in (("logits", got[0], expected.logits[-1]), ("masks", got[1], expected.masks[-1])):
            expect(
                f"relative difference of the {what}, {'masked' if masked else 'as a plain ViT'}",
                (a - b).abs().max() / b.abs().max(),
                at_most=1e-4,
            )
        different[masked] = got[1]
expect(
    "what the mask changes, so that equality means something",
    (different[True] - different[False]).abs().max() / different[True].abs().max(),
    at_least=1e-3,
)

# %%
# alt: Left: a mask for three queries, one prefix token and twelve patches as a square of 16 by 16: all may see all, except that in the first three rows some
# patches are dark. Middle: the probability that a block's mask is used, against the progress of the training, for four blocks: each falls from 1 to 0, one after
# the other. Right: the three masks that the square was made of, side by side, twice as fine as the 3 by 4 grid of patches.
torch.manual_seed(3)
rough = F.interpolate(torch.randn(1, 3, 3, 4), (6, 8), mode="bicubic")
fig, axes = plot.panels(1, 3, width=3.5, height=3.0)
plot.show_image(
    axes[0],
    query_mask(rough, (3, 4), 1)[0, 0].float(),
    "who may see whom (dark: not)",
    cmap="Blues_r",
    vmin=0,
    vmax=1.3,
)
for at in (2.5, 3.5):
    axes[0].axhline(at, color="black", linewidth=1)
    axes[0].axvline(at, color="black", linewidth=1)
axes[0].text(-1, 1, "queries", rotation=90, ha="center", va="center", fontsize=9)
axes[0].text(-1, 10, "patches", rotation=90, ha="center", va="center", fontsize=9)
annealed = dense_prediction.Eomt(
    vitcourse.create_model("vit_tiny", img_size=64, depth=4, num_classes=0), 5, num_queries=2
)
for block, style in enumerate(("-", "--", "-.", ":")):
    probabilities = []
    for t in range(101):
        annealed.anneal(t, 100)
        probabilities.append(annealed.mask_probs[block].item())
    axes[1].plot(range(101), probabilities, style, label=f"block {block + 1}")
axes[1].set(xlabel="progress of the training, %", title="probability of the mask")
axes[1].legend(fontsize=9)
beside = torch.cat([(rough[0, i] > 0).float() for i in range(3)], dim=1)
plot.show_image(axes[2], beside, "masks of the 3 queries (dark: not covered)", cmap="Blues_r", vmin=0, vmax=1.3)
for at in (7.5, 15.5):
    axes[2].axvline(at, color=plot.RED, linewidth=2)
plt.show()

# %% [markdown]
# **Why does every query see the other queries?** For two reasons. They have to agree who takes which object: that is why there are no duplicates. And a mask
# may be empty; at the start many are. A query that could see nothing, not even itself, would have a softmax over nothing, and one NaN is in every token after
# the next block.
#
# ### The decoders on the same ViT
#
# The sweep again: UNETR, Segmenter and EoMT on one small ViT with patches of 8 pixels, and the U-Net on the CoAtNet of above, for the ground and five kinds.
# Expected, before the first run: the U-Net is best; UNETR is ahead of Segmenter, thanks to its way up; EoMT, whose queries have to find their
# classes first, is last.<!--~ prediction -->

# %%
# alt: Left: mIoU against training steps for four decoders, with the range over three seeds, and two dotted lines. Right: the share of pixels near a border that are right, as clothing or
# ground, for U-Net and UNETR with and without skip connections, Segmenter and EoMT.
DECODERS = ("U-Net", "UNETR", "Segmenter", "EoMT")
fig, axes = plot.panels(1, 2, width=5.0, height=3.6)
for name in DECODERS:
    curves = [row["curve"] for row in sweep["rows"] if row["name"] == name and row["stage"] == "test"]
    points = list(zip(*([100 * point["accuracy"] for point in curve] for curve in curves), strict=True))
    plot.spread(axes[0], [point["step"] for point in curves[0]], points, label=name)
for guess in (torch.zeros_like(new_maps), (new_maps > 0).long()):  # all ground; right outlines, all tops
    metric = SegmentationMetric(len(KINDS) + 1)
    metric.update(guess, new_maps)
    axes[0].axhline(100 * metric.compute()["miou"], linestyle=":", color="grey")
axes[0].set(xlabel="step of 16 scenes", ylabel="mIoU, %")
axes[0].legend(fontsize=9)
plot.bars(
    axes[1],
    {n: runs(n, "cloth_edge") for n in ("U-Net", "U-Net, no skips", "UNETR", "UNETR, no skips", "Segmenter", "EoMT")},
)
axes[1].set(xlabel="right within 1 pixel of a border, %", xlim=(40, 100))
plt.show()
print("            parameters     best rate    seconds     mIoU")
for name in ("U-Net", "U-Net, no skips", "UNETR", "UNETR, no skips", "Segmenter", "EoMT"):
    row = next(row for row in sweep["rows"] if row["name"] == name and row["stage"] == "test")
    print(f"{name:16s} {row['parameters']:9,d} {row['lr']:10g} {row['cpu_seconds']:10.0f} {np.mean(runs(name)):9.1f} %")

# %% [markdown]
# **Where, long before what.** Two dotted lines help to read the left panel: "ground" everywhere, and *perfect outlines in which every piece is called a top*, the most
# frequent kind. The U-Net ends at 24.4<!--= percent(lesson_dense, "miou", name="U-Net", stage="test") --> %, on the second line:<!--? abs(percent(lesson_dense, "miou", name="U-Net", stage="test") - 24.5) < 1 --> it tells clothing from ground with a mean IoU of
# 95.4<!--= percent(lesson_dense, "cloth_iou", name="U-Net", stage="test") --> %, and has hardly begun to tell kinds apart. UNETR has 24.0<!--= percent(lesson_dense, "miou", name="UNETR", stage="test") --> %, Segmenter 23.0<!--= percent(lesson_dense, "miou", name="Segmenter", stage="test") --> %, EoMT
# 23.0<!--= percent(lesson_dense, "miou", name="EoMT", stage="test") --> %. At this length mIoU does not rank them, whatever we had expected.
#
# **Who knows where the border runs.** Skip connections are worth 10.0<!--= percent(lesson_dense, "cloth_edge", name="U-Net", stage="test") - percent(lesson_dense, "cloth_edge", name="U-Net, no skips", stage="test") --> points within a pixel of a border for the U-Net, and
# 5.0<!--= percent(lesson_dense, "cloth_edge", name="UNETR", stage="test") - percent(lesson_dense, "cloth_edge", name="UNETR, no skips", stage="test") --> for UNETR. Segmenter draws on a grid of 8 × 8 patches and has
# 50.0<!--= percent(lesson_dense, "cloth_edge", name="Segmenter", stage="test") --> %; EoMT, whose patches are enlarged to a stride of 4 first, 60.0<!--= percent(lesson_dense, "cloth_edge", name="EoMT", stage="test") --> %.
#
# These are 200<!--~ setting --> steps from random weights. What the transformer decoders are made for, a large pre-trained ViT, is missing here: EoMT's authors
# find that the larger the ViT and the better its pre-training, the less a decoder adds.
#
# ## 6 Detection as the prediction of a set
#
# FCOS answers many times for each object and needs NMS to choose. **DETR** (Carion et al. 2020) has a fixed number of *queries*, learnt vectors, that look at
# the image and at each other, and say together what there is: each one object, or nothing. No anchors, no spans, no NMS. But then, which query should
# have said which object? A set has no order. So the pairs are chosen that cost least *in sum*:
#
# $$ \hat\sigma = \arg\min_\sigma \sum_j C_{\sigma(j),\,j}, \qquad C_{ij} = 5\, \lVert b_i - b_j \rVert_1 - 2 \operatorname{GIoU}(b_i, b_j) - p_i(c_j), $$
#
# over all ways $\sigma$ to give each object $j$ a query of its own. The **Hungarian algorithm** finds the best (scipy's `linear_sum_assignment` solves the same
# problem). DETR's boxes are $(x, y, w, h)$: centre, width and height, as fractions of the image's width and height.
#
# ### Exercise 6 · `match`
# *Difficulty 3 of 5, about 25 minutes.* It frees DETR of anchors and of NMS, and it is one reason for DETR's slow start.
#
# For one image. `box_convert` of torchvision turns centres into corners, and `giou` is yours. No gradient has to go through the cost.


# %%
@exercise("dense_prediction.match")
def match(probabilities, boxes, labels, wanted):
    """Probabilities (Q, K + 1), "no object" last, and boxes (Q, 4); of n ≤ Q objects labels (n,) and boxes (n, 4).

    -> the cost (Q, n), and the query of each object (n,).
    """
    # <solution>
    corners, corners_wanted = (box_convert(x, "cxcywh", "xyxy") for x in (boxes, wanted))
    distance = (boxes[:, None] - wanted[None]).abs().sum(-1)
    cost = 5 * distance - 2 * giou(corners[:, None], corners_wanted[None]) - probabilities[:, labels]
    rows, columns = linear_sum_assignment(cost.detach().cpu().numpy())
    queries = torch.empty(len(labels), dtype=torch.int64, device=boxes.device)
    queries[torch.as_tensor(columns)] = torch.as_tensor(rows, device=boxes.device)
    return cost, queries
    # </solution>


# %%
# alt: Left: a scene with its boxes in colours, and eight grey boxes of queries at random places; lines join each object to the query that it was given. Right:
# the cost of each of eight queries for each object, as a matrix with numbers; the chosen cells are framed, one in each column and no two in a row.
torch.manual_seed(7)
corners = new_targets[crowded]["boxes"].cpu()
true = dense_prediction.to_centres(corners, (64, 64))
loose = torch.cat([0.1 + 0.8 * torch.rand(8, 2), 0.15 + 0.25 * torch.rand(8, 2)], 1)
likely = torch.randn(8, 6).softmax(-1)
cost, queries = match(likely, loose, new_targets[crowded]["labels"].cpu(), true)
fig = plt.figure(figsize=(8.4, 3.6))
left, right = fig.subfigures(1, 2)
ax = left.subplots()
plot.show_image(ax, picture(new_images[crowded]))
for q, box in enumerate(dense_prediction.to_corners(loose, (64, 64))):
    draw_boxes(ax, box[None], colour="#dddddd", linewidth=1)
    ax.text(64 * loose[q, 0], 64 * loose[q, 1], q, color="white", ha="center", va="center", fontsize=9)
for j, q in enumerate(queries.tolist()):
    draw_boxes(ax, corners[j][None], colour=plot.COLOURS[j])
    ax.plot(*(64 * torch.stack([true[j, :2], loose[q, :2]]).T), color=plot.COLOURS[j])
ax = right.subplots()
ax.imshow(cost, cmap="viridis")
for (i, j), number in np.ndenumerate(cost.numpy()):
    ax.text(
        j, i, f"{number:.1f}", ha="center", va="center", fontsize=9, color="white" if number < cost.mean() else "black"
    )
for j, q in enumerate(queries.tolist()):
    ax.add_patch(plt.Rectangle((j - 0.47, q - 0.47), 0.94, 0.94, fill=False, color=plot.RED, linewidth=2.5))
ax.set(xlabel="object", ylabel="query", title="cost", xticks=range(len(true)), yticks=range(8))
ax.grid(visible=False)
plt.show()
pairs = cost[queries, torch.arange(len(true))].sum()
greedy, left_over = 0.0, cost.clone()
for j in range(len(true)):
    i = int(left_over[:, j].argmin())
    greedy += cost[i, j].item()
    left_over[i] = float("inf")
expect(
    "sum of costs if each object in turn took its best free query, less that of the matching",
    greedy - pairs.item(),
    at_least=0.5,
)

# %% [markdown]
# ### Exercise 7 · `set_loss`
# *Difficulty 4 of 5, about 30 minutes.* Which class is "no object", how much it weighs, and what the sums are divided by: each can keep
# DETR from finding anything, and no error message tells.
#
# Three terms. **Class**: the cross-entropy of *all* queries; those without an object should say the last class, "no object". As they are by far the majority, they
# weigh `no_object` each, the others 1. **L1**: the sum of the four absolute differences of the matched boxes. **GIoU**: $1 - \operatorname{GIoU}$ of the matched boxes. Each is
# summed over the batch and divided by the number of *objects* in the batch, and at least by 1: an image without objects is allowed, and so is a batch of them.


# %%
@exercise("dense_prediction.set_loss")
def set_loss(logits, boxes, queries, targets, no_object=0.1):
    """Logits (B, Q, K + 1) and boxes (B, Q, 4), centres; of each image, in lists: the query of each object (n,), and a target.

    A target is a dict of "labels" (n,) and "boxes" (n, 4), centres. -> three numbers: the terms class, L1 and GIoU.
    """
    # <solution>
    nothing = logits.shape[-1] - 1
    wanted = torch.full(logits.shape[:2], nothing, device=logits.device)
    for i, (query, target) in enumerate(zip(queries, targets, strict=True)):
        wanted[i, query] = target["labels"]
    weights = 1 - (1 - no_object) * (wanted == nothing).to(logits.dtype)
    error = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none") * weights.flatten()

    found = torch.cat([b[query] for b, query in zip(boxes, queries, strict=True)])
    true = torch.cat([target["boxes"] for target in targets])
    overlap = giou(box_convert(found, "cxcywh", "xyxy"), box_convert(true, "cxcywh", "xyxy"))
    count = max(len(true), 1)
    return error.sum() / count, (found - true).abs().sum() / count, (1 - overlap).sum() / count
    # </solution>


# %% [markdown]
# **Why by objects?** Divided by images, a batch of crowded scenes pulls harder than one of empty ones; divided by queries, the weight of everything
# depends on a number that should not matter. And when a batch is cut into parts (gradient accumulation, several GPUs), only sums that are divided by the objects of the
# *whole* batch add up to what the whole batch would give. (So says the paper's appendix. Its code, and that of transformers, divides the class term by the
# sum of the weights instead: that is what `F.cross_entropy` does with a `weight`. The library knows both, as `class_count`.)
#
# ### Denoising, and how it leaks
#
# At the start the matching changes from step to step: a query that was pulled towards the shoe is next asked for the bag. **DN-DETR** (Li et al. 2022) adds a task without
# matching. In training, each object is given to the decoder as a further query, *disturbed*: its box moved, its label sometimes swapped. The decoder has to
# restore it, and which object that is, nobody has to work out. There are several groups, each with every object disturbed anew.
#
# All of these are queries in one decoder, and they attend to each other. A query that could see the disturbed objects would no longer need the image. So there is a mask:
#
# * A query sees queries, and no disturbed object.
# * A disturbed object sees those of its own group, and the queries. It does not see other groups, which have the same objects with other noise.
# * Images have different numbers of objects; shorter groups are padded to the same length. Padding is seen by nobody. (Its own row is that of its
#   group: it sees the real objects of its group, and the queries. A row without anything would be NaN.)
#
# ### Exercise 8 · `denoising_mask`
# *Difficulty 4 of 5, about 25 minutes.* With one wrong block of it the model reads the answers off, its loss is splendid, and it finds
# nothing.


# %%
@exercise("dense_prediction.denoising_mask")
def denoising_mask(real, num_queries):
    """Which places of G groups of n hold an object, (B, G, n) -> (B, 1, N, N), true: may attend; N = G · n + num_queries.

    First come the disturbed objects, group after group, then the queries.
    """
    # <solution>
    batch, groups, places = real.shape
    group = torch.arange(groups, device=real.device).repeat_interleave(places)
    group = F.pad(group, (0, num_queries), value=groups)
    may = (group[:, None] == group) | (group == groups)  # one's own group, and queries
    seen = F.pad(real.flatten(1), (0, num_queries), value=True)
    return (may & seen[:, None])[:, None]
    # </solution>


# %% [markdown]
# ### Your DETR
#
# The library's layers around **your** matching, **your** loss and **your** mask. A DETR that starts from nothing needs hundreds of epochs; in a minute it learns nothing at all,
# and we tried. Here it stands on a backbone that knows such scenes: that of the shipped Segmenter, frozen, its maps computed once. An encoder layer and three decoder layers are all
# that trains.


# %%
class CachedMaps(nn.Module):
    """Takes maps (B, 96, 8, 8) for images, and hands them out as they are."""

    feature_info, num_classes, img_size, in_chans = [{"num_chs": 96, "reduction": 1}], 0, 8, 96

    def feature_maps(self, x, indices=None):
        return [x]

    def no_weight_decay(self):
        return set()


class SetLoss(dense_prediction.BoxSetLoss):
    """Your matching and your loss, as terms that the library adds up."""

    def pairs(self, logits, boxes, targets):
        with torch.no_grad():
            parts = zip(logits.softmax(-1), boxes, targets, strict=True)
            return [match(p, b, target["labels"], target["boxes"])[1] for p, b, target in parts]

    def __call__(self, logits, boxes, targets):
        terms = set_loss(logits, boxes, self.pairs(logits, boxes, targets), targets, self.no_object)
        count = torch.tensor(float(max(1, sum(len(target["labels"]) for target in targets))), device=logits.device)
        weights = {"class": self.class_weight, "l1": self.l1, "giou": self.giou}
        named = zip(weights, terms, strict=True)
        return {name: dense_prediction.Term(value * count, count, weights[name]) for name, value in named}


class MyDetr(dense_prediction.Detr):
    """DETR on cached maps."""

    def __init__(self, **options):
        sizes = {
            "embed_dim": 64,
            "num_heads": 4,
            "encoder_depth": 1,
            "decoder_depth": 3,
            "mlp_dim": 128,
            "dropout": 0.0,
        }
        super().__init__(CachedMaps(), len(KINDS), **sizes, **options)
        self.criterion = SetLoss()

    def forward(self, x, targets=None):
        sizes = [tuple(x.shape[-2:])] * len(x)
        memory, position, valid, _ = self.encode(x)
        queries, proposals = self.make_queries(memory, valid)
        if not self.training or not self.denoising.groups:
            return dense_prediction.DetrOutput(*self.decode(queries, memory, position), sizes, proposals)
        parts = [{**t, "boxes": dense_prediction.to_centres(t["boxes"], x.shape[-2:])} for t in targets]
        disturbed = dense_prediction.disturb(parts, self.num_classes, self.denoising)
        real = torch.zeros_like(disturbed.labels, dtype=torch.bool)
        real[disturbed.image, disturbed.query] = True
        mask = denoising_mask(real.unflatten(1, (disturbed.groups, -1)), self.num_queries)
        logits, boxes = self.decode(self._with_denoising(queries, disturbed), memory, position, mask)
        n = real.shape[1]
        denoised = logits[:, :, :n], boxes[:, :, :n]
        return dense_prediction.DetrOutput(logits[:, :, n:], boxes[:, :, n:], sizes, proposals, denoised, disturbed)


on_map = [{"labels": t["labels"], "boxes": t["boxes"] / 8} for t in targets]  # in cells of the map
with torch.no_grad():
    cached, new_cached = (
        torch.cat([shipped.backbone.feature_maps(x)[-1] for x in every.split(100)]) for every in (images, new_images)
    )

torch.manual_seed(0)
model, twin = (MyDetr(num_queries=10, denoising=2, queries="proposals").to(device) for _ in range(2))
twin.load_state_dict(model.state_dict())
twin.criterion, twin.forward = dense_prediction.BoxSetLoss(), lambda *args: dense_prediction.Detr.forward(twin, *args)
totals = []
for one in (model, twin):
    torch.manual_seed(0)
    totals.append(dense_prediction.mean_loss(one.losses(one(cached[:8], on_map[:8]), on_map[:8])).item())
expect("relative difference from the library's loss, denoising included", abs(totals[0] / totals[1] - 1), at_most=1e-4)

# %% [markdown]
# **What leaks?** Two forward passes that differ in nothing but the labels of the disturbed objects. With the mask, the ordinary queries must
# say exactly the same. Without it they do not, and training would soon teach them to copy.

# %%
# alt: Left: the mask for two groups of three places and five queries as a square of eleven by eleven: two blocks of three on the diagonal, one column of
# each dark because it is padding, and the last five columns bright throughout. Right: the answers of the queries do not change with the mask, and clearly do without.
with torch.no_grad():
    memory, position, valid, _ = model.encode(cached[:8])
    queries, _ = model.make_queries(memory, valid)
    parts = [{**t, "boxes": t["boxes"] / 8} for t in on_map[:8]]
    disturbed = dense_prediction.disturb(
        [{**t, "boxes": box_convert(t["boxes"], "xyxy", "cxcywh")} for t in parts], 5, model.denoising
    )
    other = disturbed._replace(labels=(disturbed.labels + 1) % 5)
    real = torch.zeros_like(disturbed.labels, dtype=torch.bool)
    real[disturbed.image, disturbed.query] = True
    mask, n = denoising_mask(real.unflatten(1, (2, -1)), 10), real.shape[1]
    leaks = {}
    for name, one in (("with the mask", mask), ("without", None)):
        said = [
            model.decode(model._with_denoising(queries, d), memory, position, one)[0][-1, :, n:]
            for d in (disturbed, other)
        ]
        leaks[name] = (said[0] - said[1]).abs().max().item()
fig, axes = plot.panels(1, 2, width=4.2, height=3.0)
drawn = torch.tensor([[True, True, False]]).expand(2, 3)[None]
axes[0].pcolormesh(denoising_mask(drawn, 5)[0, 0].float(), cmap="Blues_r", vmin=0, vmax=1.3, edgecolor="white")
axes[0].invert_yaxis()
axes[0].set_xticks([1.5, 4.5, 8.5], ["group 1", "2", "queries"])
axes[0].set_yticks([1.5, 4.5, 8.5], ["group 1", "group 2", "queries"])
axes[0].set(title="who (row) may see whom", aspect="equal")
axes[0].grid(visible=False)
plot.bars(axes[1], {name: [value] for name, value in leaks.items()}, digits=2)
axes[1].set(xlabel="largest change of a query's logits", xlim=(0, 1.25 * max(leaks.values())))
plt.show()
expect(
    "largest change of a query's logits when disturbed labels change, with the mask",
    leaks["with the mask"],
    at_most=1e-5,
)
expect("and without it", leaks["without"], at_least=1e-2)

# %% [markdown]
# ## 7 "Why does my DETR say the same for every image?"
#
# It is *the* question about DETR. The loss falls, and then all images get the same boxes. Here it is: learnt queries, as in the paper, and, with the same number of steps, what
# is used today: queries that start from **proposals**, the boxes of the map's likeliest tokens (two-stage Deformable DETR, Zhu et al. 2021; here only their boxes are taken over, as
# in DINO, Zhang et al. 2022, and each layer corrects them, as in DAB-DETR, Liu et al. 2022), and **denoising**. While they train, we look at 32<!--~ setting --> fixed scenes. The *spread* is
# how much a query's box varies over the images (standard deviation, as a fraction of the image's side). How many objects have *another query* than at the previous look? And at the
# end: what becomes of AP if each scene is answered **from the map of another one**? Whoever says the same for every image would not notice.


# %%
def train_detr(model, look, steps=130 if session.quick else 5000):
    def loss(model, where):
        wanted = [on_map[i] for i in where]
        return dense_prediction.mean_loss(model.losses(model(cached[where], wanted), wanted))

    return train(model, loss, 1e-3, steps, look)


def observed(model, record):
    """A `look` that writes down spread, changed pairs and loss."""
    watched = [{**t, "boxes": dense_prediction.to_centres(t["boxes"], (8, 8))} for t in on_map[:32]]

    def look(step, value):
        output = model(cached[:32])
        pairs = torch.cat(model.criterion.pairs(output.logits[-1], output.boxes[-1], watched)).cpu()
        moved = 100 * (pairs != record["pairs"]).float().mean().item() if "pairs" in record else float("nan")
        spread = output.boxes[-1].std(0).mean().item()
        record["pairs"] = pairs
        record["rows"].append({"step": step, "spread": spread, "moved": moved, "loss": value})

    return look


# %%
# NBVAL_IGNORE_OUTPUT
# alt: For learnt queries and for proposals with denoising, against the training steps: the spread of boxes over images, about a third of that of the true boxes for
# learnt queries and close to it for proposals; and the share of objects whose query has changed since the previous look, falling to almost nothing for both. Beside
# them AP at IoU 0.5 at the end as bars, together with that of the mean boxes.
detrs, records, reached, swapped = {}, {}, {}, {}
true_spread = dense_prediction.to_centres(every_box.cpu(), (64, 64)).std(0).mean().item()
for name, options in (("learnt queries", {}), ("proposals, denoising", {"queries": "proposals", "denoising": 3})):
    torch.manual_seed(0)
    detrs[name], records[name] = MyDetr(num_queries=10, **options).to(device), {"rows": []}
    train_detr(detrs[name], observed(detrs[name], records[name]))
    for scores, maps in ((reached, new_cached), (swapped, new_cached.roll(1, 0))):
        metric = DetectionMetric(small=10)
        with torch.no_grad():
            metric.update(detrs[name].results(detrs[name](maps), [(64, 64)] * len(maps)), new_targets)
        scores[name] = metric.compute()["map_50"]
fig, axes = plot.panels(1, 3, width=3.5, height=3.0)
for name, style in zip(records, ("o-", "s--"), strict=True):
    rows = records[name]["rows"]
    for ax, key in zip(axes, ("spread", "moved"), strict=False):
        ax.plot([row["step"] for row in rows], [row[key] for row in rows], style, label=name)
axes[0].axhline(true_spread, color="grey", linestyle=":", label="of true boxes")
axes[0].set(xlabel="step", title="spread over images", ylim=(0, None))
axes[0].legend(fontsize=9)
axes[1].set(xlabel="step", title="objects with another query, %", ylim=(0, 100))
plot.bars(
    axes[2], {"mean boxes": [100 * blind["map_50"]], **{k.replace(", ", ",\n"): [100 * v] for k, v in reached.items()}}
)
axes[2].set(title="AP at IoU 0.5, %", xlim=(0, 1.3 * 100 * max(reached.values()) + 1))
plt.show()
for name, record in records.items():
    first, last = record["rows"][0]["loss"], record["rows"][-1]["loss"]
    print(f"{name:21s} loss {first:.1f} -> {last:.1f}, AP at IoU 0.5 {100 * reached[name]:.1f} %, ", end="")
    print(f"from the map of another scene {100 * swapped[name]:.1f} %")

# %%
expect(
    "spread of learnt queries over that of the true boxes",
    records["learnt queries"]["rows"][-1]["spread"] / true_spread,
    at_most=0.6,
)
expect(
    "what AP of proposals with denoising loses with the map of another scene, in points",
    100 * (reached["proposals, denoising"] - swapped["proposals, denoising"]),
    at_least=5.0,
)
expect(
    "AP at IoU 0.5 of proposals with denoising, over that of learnt queries, in points",
    100 * (reached["proposals, denoising"] - reached["learnt queries"]),
    at_least=3.0,
)

# %% [markdown]
# **Diagnosis.** A learnt query begins as the same vector for every image. What distinguishes images reaches it by cross-attention only, and that is nearly uniform at first:
# it gives the *mean* of the map, which is much the same in every image. The best that a query can do then is to say an average box and the commonest class of the objects it is
# matched with. This lowers the loss at once, so that is what it learns; to lower it further it must learn *where to look*, from a gradient that changes its mind with
# every change of the matching. The middle panel has these changes: at first most objects change hands from look to look, with either kind of query. (That they settle
# is partly the schedule's doing: the rate goes to zero.) And mind that a large spread proves nothing by itself: proposals differ from image to image before anything is learnt.
# It takes the third panel, and the line below it, to see that they are also right: from the map of another scene nothing of it is left. And where do queries look? The numbers
# below say how uniform their attention is, before and after training:

# %%
# NBVAL_IGNORE_OUTPUT
# alt: Two rows, one for each DETR: a scene with its true boxes, and beside it, for the four surest queries, the attention of the last decoder layer over the 8 by 8 map,
# with the query's box. It is brightest on or near objects in both. The boxes of learnt queries lie between the objects; those from proposals lie on them, several on
# the same. The title of each map says what the query answers.
from vitcourse.vit import record_attention


def uniformity(model):
    """Entropy of the last layer's attention to the map (heads averaged), 1 being uniform: mean over queries and scenes."""
    with torch.no_grad(), record_attention(model) as weights:
        model(new_cached[:32])
    looked = weights[-1].mean(1)  # (B, Q, 64)
    return (-(looked * looked.log()).sum(-1).mean() / np.log(64)).item()


fig, axes = plt.subplots(2, 5, figsize=(11, 4.8))
for row, (name, model) in zip(axes, detrs.items(), strict=True):
    with torch.no_grad(), record_attention(model) as weights:
        output = model(new_cached[crowded][None])
    looked = weights[-1][0].mean(0).cpu()  # (Q, 64), of the last layer's attention to the map, over heads
    logits, boxes = output.logits[-1, 0].softmax(-1).cpu(), output.boxes[-1, 0].cpu()
    surest = logits[:, :-1].amax(-1).argsort(descending=True)[:4]
    plot.show_image(row[0], picture(new_images[crowded]), name)
    draw_boxes(row[0], new_targets[crowded]["boxes"], linestyle=":")
    for ax, q in zip(row[1:], surest, strict=True):
        plot.show_attention(ax, picture(new_images[crowded]), looked[q].reshape(8, 8))
        draw_boxes(ax, dense_prediction.to_corners(boxes[q][None], (64, 64)), colour=plot.SKY)
        ax.set_title(f"{KINDS[int(logits[q, :-1].argmax())]} {100 * logits[q, :-1].max():.0f} %", fontsize=10)
plt.show()
entropies = {}
for name, options in (("learnt queries", {}), ("proposals, denoising", {"queries": "proposals", "denoising": 3})):
    torch.manual_seed(0)
    fresh = MyDetr(num_queries=10, **options).to(device).eval()
    entropies[name] = uniformity(fresh), uniformity(detrs[name])
    print("entropy of the attention: {:.2f} before training, {:.2f} after".format(*entropies[name]), f"({name})")
expect(
    "entropy of the attention of learnt queries before training, 1 being uniform",
    entropies["learnt queries"][0],
    at_least=0.85,
)

# %% [markdown]
# The queries from proposals need not look sharply: each starts at a place that this very image has proposed, and has only to correct it. (Each map's
# colours are stretched to its own range; the differences are small.) Several of them still claim the same object: that there are no duplicates is what the loss asks for, and it comes last.
#
# **What mends it**, in the order in which you should try it. If you can, start from a trained DETR with a new class head: that is what its authors advise for small data
# sets. Is the backbone trained, and are the images normalised as it expects? Are the boxes centres, as fractions of the *unpadded* image? Is "no object" the last class, with a
# weight of 0.1? Then: fewer queries, though more than the most crowded image has objects; proposals, so that a query has a place from the start; denoising, so that there is a gradient
# that the matching cannot disturb. And patience: the paper trains for 300 to 500<!--~ paper --> epochs.
#
# ### The ladder, over seeds

# %%
# alt: AP at IoU 0.5, and the spread of boxes over images, against the training steps, for four variants of DETR, with the range over three seeds: plain, few queries,
# proposals, proposals with denoising.
ladder = json.loads((paths.results_dir() / "detr_feasibility.json").read_text(encoding="utf-8"))
print(f"measured on {ladder['device']}, {ladder['date']}, torch {ladder['versions']['torch']}")
LADDER = {
    "plain": "50 learnt queries",
    "few": "10 learnt queries",
    "proposals": "10 proposals",
    "proposals, denoising": "and denoising",
}
fig, axes = plot.panels(1, 2, width=4.6, height=3.4)
for ax, key in zip(axes, ("map_50", "spread"), strict=True):
    for name in LADDER:
        curves = [row["curve"] for row in ladder["rows"] if row["variant"] == name and row["stage"] == "test"]
        factor = 100 if key == "map_50" else 1
        points = list(zip(*([factor * (point[key] or 0) for point in curve] for curve in curves), strict=True))
        plot.spread(ax, [point["step"] for point in curves[0]], points, label=LADDER[name])
axes[0].set(xlabel="step of 16 scenes", title="AP at IoU 0.5, %")
axes[1].set(xlabel="step of 16 scenes", title="spread over images", ylim=(0, None))
axes[0].legend(fontsize=9)
plt.show()

# %% [markdown]
# The ladder stands on the shipped backbone, frozen; each rung has its own best rate, 500<!--~ setting --> steps and three seeds. AP at IoU 0.5: 1.6<!--= percent(detr_feasibility, "map_50", variant="plain", stage="test") --> % with
# 50 learnt queries, 6.1<!--= percent(detr_feasibility, "map_50", variant="few", stage="test") --> with ten, 37.3<!--= percent(detr_feasibility, "map_50", variant="proposals", stage="test") --> with ten **proposals**: the one step that decides. Denoising on top has
# 38.2<!--= percent(detr_feasibility, "map_50", variant="proposals, denoising", stage="test") -->, which is no measurable difference;<!--? abs(percent(detr_feasibility, "map_50", variant="proposals, denoising", stage="test") - percent(detr_feasibility, "map_50", variant="proposals", stage="test")) < 2 --> what it buys is time: after 200 steps it has
# 27.1<!--= 100 * sum(c[1]["map_50"] for c in values(detr_feasibility, "curve", variant="proposals, denoising", stage="test")) / 3 --> %, proposals alone 20.0<!--= 100 * sum(c[1]["map_50"] for c in values(detr_feasibility, "curve", variant="proposals", stage="test")) / 3 -->. Without
# proposals, denoising helps little:
# 9.0<!--= percent(detr_feasibility, "map_50", variant="few, denoising", stage="test") --> with ten learnt queries. The right panel is the symptom again: learnt queries stay at about half
# of the spread of the true boxes.
#
# ## 8 Eight traps of boxes and masks
#
# Most detectors that do not learn have nothing wrong with their layers.
#
# **1. The image was resized, the boxes were not.** Or the image was *letterboxed*, that is scaled to fit, then padded, and the boxes were stretched. A picture of 40 × 80 pixels on a
# canvas of 64 × 64 is scaled by 0.8<!--= 64 / 80 --> in both directions. Ours is padded at the right and below; where it is centred, boxes move as well. torchvision's v2 transforms
# take boxes and masks along, if they are `tv_tensors`.

# %%
from torchvision import tv_tensors

from vitcourse.data.joint import Letterbox

target = {
    "boxes": tv_tensors.BoundingBoxes([[10, 10, 70, 30]], format="XYXY", canvas_size=(40, 80), dtype=torch.float32)
}
whole = tv_tensors.Image(torch.zeros(3, 40, 80, dtype=torch.uint8))
boxed, moved = Letterbox((64, 64))(whole, target)
print("on the letterboxed image:", tuple(boxed.shape[-2:]), moved["boxes"].tolist())
print("stretched to the canvas:   ", v2.Resize((64, 64))(target["boxes"]).tolist())

# %% [markdown]
# **2. Is label 0 the background?** In torchvision's detectors it is: labels count from 1. In DETR and here it is a class, and "no object" is the last. In semantic maps (VOC, ours)
# 0 is the ground. Off by one, a model learns well and names everything wrongly.
#
# **3. A map of classes was resized bilinearly.** Between classes 0 and 4, others appear that nobody has painted. Resize maps by nearest neighbour; v2 does, for a `tv_tensors.Mask`.

# %%
painted = torch.tensor([[0, 0, 4, 4]])
bilinear = F.interpolate(painted[None, None].float(), size=(1, 8), mode="bilinear").round().long()
print("bilinear:", bilinear.flatten().tolist())
print("as a tv_tensors.Mask:", v2.Resize((1, 8))(tv_tensors.Mask(painted)).flatten().tolist())

# %% [markdown]
# **4. An image without objects** is a good example: of nothing. Its boxes have the shape (0, 4), not (0,). And its loss is divided by at least 1.

# %%
empty = {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
terms = set_loss(torch.zeros(1, 3, 6), torch.full((1, 3, 4), 0.5), [torch.zeros(0, dtype=torch.int64)], [empty])
print(
    "class, L1, GIoU:",
    [round(value.item(), 4) for value in terms],
    "| points:",
    fcos_targets(torch.rand(2, 2), torch.ones(2, 2), empty["boxes"]).tolist(),
)

# %% [markdown]
# **5. Pixels of class 255** count in nothing: not in the loss, not in mIoU (section 4). **6. Boxes without an area** make GIoU NaN (section 2). **7. NMS over all classes together** throws out what stands in
# front of something else (section 3). **8. Four numbers, three formats.** COCO's files hold (left, top, width, height), DETR wants (centre, centre, width, height) as fractions, torchvision
# and this course two corners in pixels. None of them complains about the others' numbers: draw the boxes *after* your transforms, before you train.
#
# ## 9 When would you choose it?
#
# | | FCOS on a pyramid | DETR | U-Net / UNETR | Segmenter | EoMT |
# | --- | --- | --- | --- | --- | --- |
# | says | boxes | boxes | a class for each pixel | a class for each pixel | masks of objects, or of classes |
# | small things | **yes**, by its finest level | weak on one coarse map | **yes**, by its skips | as fine as its patches | as fine as its upscaled patches |
# | crisp borders | (boxes only) | (boxes only) | **yes** | soft | good, at stride 4 |
# | duplicates | NMS, with a threshold | **none** by design | (none) | (none) | **none** by design |
# | learns from little, quickly | **yes** | no: proposals, denoising, a trained backbone | **yes** | with a trained ViT | with a trained ViT; slowly |
# | what has to be chosen | levels, spans, NMS threshold | queries, four weights | almost nothing | almost nothing | queries, when the mask goes |
# | backbone | hierarchical, or ViTDet's | any | hierarchical, or a ViT's layers | a ViT with small patches | **the ViT itself** |
# | beside the backbone, time goes into | convolutions on fine maps | attention of a few hundred tokens | convolutions at full size | **a few blocks** | **next to nothing** |
#
# The honest summary: for boxes from a few thousand pictures, points on a pyramid. For outlines (cells, roads, organs) a U-Net; it is hard to beat with few pictures. With a large trained
# ViT at hand, and masks of single objects wanted, EoMT. DETR where crowds make NMS fail, with all the help that section 7 lists.
#
# Your own pictures and their boxes or masks go through the same models from the command line, with augmentation, checkpoints and mAP or mIoU:
#
#     vitcourse train --task detect --model fcos --data voc:PATH --out-dir runs/boxes
#     vitcourse train --task segment --model unet --data masks:PATH --out-dir runs/masks
#
# ## Stretch problems
#
# 1. Give `fcos_targets` *centre sampling*: only points within 1.5 strides of the middle. What does it change for small objects?
# 2. Leave out the top-down sums, and keep the three levels. Which of the sizes suffers?
# 3. Put your detector on a plain ViT (with `SimpleFeaturePyramid` for *your* pyramid), and compare at equal multiply–adds.
# 4. Replace the Hungarian matching by a soft one (Sinkhorn). Is it more stable?
# 5. Leave a leak in your denoising mask, and train for 150 steps. How do the losses look, and what does it find?
# 6. Train EoMT without annealing: mask always on, always off. What does each cost at inference, and what in mIoU?
# 7. Predict a *map of borders* with the U-Net, and cut touching pieces apart with it.
# 8. Detect at 128 pixels with the weights that you have trained at 64. What has to change in the spans?
#
# ## Papers
#
# * Lin et al. 2017, [Feature Pyramid Networks](https://arxiv.org/abs/1612.03144); Lin et al. 2017,
#   [Focal Loss for Dense Object Detection](https://arxiv.org/abs/1708.02002).
# * Tian et al. 2019, [FCOS](https://arxiv.org/abs/1904.01355): points instead of anchors.
# * Rezatofighi et al. 2019, [Generalized Intersection over Union](https://arxiv.org/abs/1902.09630).
# * Li et al. 2022, [Exploring Plain Vision Transformer Backbones for Object Detection](https://arxiv.org/abs/2203.16527) (ViTDet).
# * Ronneberger et al. 2015, [U-Net](https://arxiv.org/abs/1505.04597); Cao et al. 2022, [Swin-Unet](https://arxiv.org/abs/2105.05537) (a pyramid of Swin blocks on both ways); Hatamizadeh et al. 2022,
#   [UNETR](https://arxiv.org/abs/2103.10504).
# * Strudel et al. 2021, [Segmenter](https://arxiv.org/abs/2105.05633); Cheng et al. 2022, [Mask2Former](https://arxiv.org/abs/2112.01527); Kerssies et al. 2025,
#   [Your ViT is Secretly an Image Segmentation Model](https://arxiv.org/abs/2503.19108) (EoMT).
# * Carion et al. 2020, [End-to-End Object Detection with Transformers](https://arxiv.org/abs/2005.12872) (DETR); Zhu et al. 2021,
#   [Deformable DETR](https://arxiv.org/abs/2010.04159); Liu et al. 2022, [DAB-DETR](https://arxiv.org/abs/2201.12329); Li et al. 2022,
#   [DN-DETR](https://arxiv.org/abs/2203.01305); Zhang et al. 2022, [DINO](https://arxiv.org/abs/2203.03605).
# * Lin et al. 2014, [Microsoft COCO](https://arxiv.org/abs/1405.0312): mAP as it is used today.
