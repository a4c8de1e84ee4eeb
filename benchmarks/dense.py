"""Do detectors and segmenters cost more here than in torchvision or transformers?

    python -m benchmarks.dense                       every pair, small shapes
    python -m benchmarks.dense --full                at the sizes of the papers
    python -m benchmarks.dense --only detr --mode train

Same shapes, same run, in turns: inference, and a step of training with matching, loss, gradient and AdamW. FPN and FCOS
are compared with torchvision's on maps that are there already; DETR and EoMT with transformers' models, DETR around the
same backbone. Results: ``dense_<device type>.json``.
"""

import argparse
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.common import default_device, in_turns, ratio, with_earlier, write_results
from benchmarks.pretraining import optimized
from vitcourse import create_model
from vitcourse.dense_prediction import Detr, Eomt, FcosHead, FcosLoss, FeaturePyramid, MaskSetLoss, mean_loss, points_of
from vitcourse.dense_prediction.boxes import to_centres

TARGET = 1.03  # ours over theirs, at most
CLASSES = 20
Step = Callable[[], Any]


class Pair(NamedTuple):
    """Two models that do the same: what is called for inference, and a loss."""

    ours: nn.Module
    theirs: nn.Module
    infer: dict[str, Step]
    loss: dict[str, Callable[[], Tensor]]


def random_targets(batch: int, side: int, device: str, masks: bool = False) -> list[dict[str, Tensor]]:
    """Seven objects an image, as COCO has on average."""
    targets = []
    for _ in range(batch):
        low = torch.rand(7, 2) * 0.6 * side
        boxes = torch.cat([low, low + side * (0.05 + 0.35 * torch.rand(7, 2))], dim=1)
        target = {"boxes": boxes, "labels": torch.randint(0, CLASSES, (7,))}
        if masks:
            target["masks"] = torch.zeros(7, side, side)
            for mask, (x1, y1, x2, y2) in zip(target["masks"], boxes.int().tolist(), strict=True):
                mask[y1:y2, x1:x2] = 1
        targets.append({name: value.to(device) for name, value in target.items()})
    return targets


def fcos(full: bool, device: str) -> Pair:
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.image_list import ImageList
    from torchvision.ops import FeaturePyramidNetwork
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    batch, side, channels = (2, 512, 256) if full else (2, 192, 64)
    widths, strides = [channels, 2 * channels, 4 * channels], [8, 16, 32, 64, 128]
    maps = [torch.rand(batch, c, side // s, side // s, device=device) for c, s in zip(widths, strides, strict=False)]
    targets = random_targets(batch, side, device)
    ours = nn.Sequential(FeaturePyramid(widths, channels, "p6p7"), FcosHead(channels, CLASSES)).to(device)
    backbone = FeaturePyramidNetwork(widths, channels, LastLevelP6P7(channels, channels))
    backbone.out_channels = channels
    theirs = FCOS(backbone, CLASSES, anchor_generator=AnchorGenerator(tuple((s,) for s in strides), ((1.0,),) * 5))
    theirs = theirs.to(device)
    named, images = OrderedDict(enumerate(maps)), ImageList(torch.zeros(batch, 3, side, side), [(side, side)] * batch)

    def their_heads() -> tuple[list[Tensor], dict[str, Tensor]]:
        levels = list(backbone(OrderedDict(named)).values())
        return levels, theirs.head(levels)

    def their_loss() -> Tensor:
        levels, heads = their_heads()
        counts = [x.shape[2] * x.shape[3] for x in levels]
        return sum(theirs.compute_loss(targets, heads, theirs.anchor_generator(images, levels), counts).values())

    def our_loss() -> Tensor:
        output = ours(maps)
        points = points_of(output.sizes, strides, output.logits.device)
        return mean_loss(FcosLoss()(output, points, targets))

    infer = {"ours": lambda: ours(maps), "torchvision": their_heads}
    return Pair(ours, theirs, infer, {"ours": our_loss, "torchvision": their_loss})


class Maps(nn.Module):
    """transformers' backbone behind the contract of ours."""

    num_classes, in_chans = 0, 3

    def __init__(self, model: nn.Module, side: int, width: int, stride: int) -> None:
        super().__init__()
        self.model, self.img_size = model, (side, side)
        self.feature_info = [{"num_chs": width, "reduction": stride}]

    def feature_maps(self, x: Tensor, indices: Any = (-1,)) -> list[Tensor]:
        return [self.model(x).feature_maps[-1]]


def detr(full: bool, device: str) -> Pair:
    import copy

    from transformers import DetrConfig, DetrForObjectDetection

    batch, side, dim, depth = (2, 512, 256, 6) if full else (4, 128, 64, 2)
    queries, hidden = (100, 2048) if full else (20, 256)
    small = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
    shapes = {"out_features": ["stage4"]} if full else {**small, "out_features": ["stage2"]}
    config = DetrConfig(
        backbone_config={"model_type": "resnet", **shapes},
        use_timm_backbone=False,
        d_model=dim,
        num_queries=queries,
        encoder_layers=depth,
        decoder_layers=depth,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=hidden,
        decoder_ffn_dim=hidden,
        num_labels=CLASSES,
        dropout=0.1,
        auxiliary_loss=True,
    )
    theirs = DetrForObjectDetection(config).to(device)
    width, stride = (2048, 32) if full else (32, 8)
    body = Maps(copy.deepcopy(theirs.model.backbone.model), side, width, stride)
    ours = Detr(body, CLASSES, dim, queries, 8, depth, depth, hidden).to(device)
    images, targets = torch.rand(batch, 3, side, side, device=device), random_targets(batch, side, device)
    labels = [{"class_labels": t["labels"], "boxes": to_centres(t["boxes"], (side, side))} for t in targets]
    return Pair(
        ours,
        theirs,
        {"ours": lambda: ours(images), "transformers": lambda: theirs(images)},
        {
            "ours": lambda: mean_loss(ours.losses(ours(images), targets)),
            "transformers": lambda: theirs(images, labels=labels).loss,
        },
    )


def eomt(full: bool, device: str) -> Pair:
    from transformers import EomtConfig, EomtForUniversalSegmentation

    batch, side, dim, depth, heads = (1, 640, 384, 12, 6) if full else (2, 128, 64, 4, 4)
    queries, points = (200, 12544) if full else (20, 1024)
    config = EomtConfig(
        hidden_size=dim,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        image_size=side,
        num_blocks=3,
        num_queries=queries,
        num_labels=CLASSES,
        train_num_points=points,
    )
    theirs = EomtForUniversalSegmentation(config).to(device)
    sizes = {"img_size": side, "embed_dim": dim, "depth": depth, "num_heads": heads, "num_classes": 0}
    vit = create_model("vit_tiny", **sizes, reg_tokens=4, no_embed_class=True, init_values=1.0)
    ours = Eomt(vit, CLASSES, queries, num_blocks=3).to(device)
    ours.criterion = MaskSetLoss(points=points)
    images = torch.rand(batch, 3, side, side, device=device)
    targets = random_targets(batch, side, device, masks=True)
    labels = {"mask_labels": [t["masks"] for t in targets], "class_labels": [t["labels"] for t in targets]}
    return Pair(
        ours,
        theirs,
        {"ours": lambda: ours(images), "transformers": lambda: theirs(images)},
        {
            "ours": lambda: mean_loss(ours.losses(ours(images), targets)),
            "transformers": lambda: theirs(images, **labels).loss,
        },
    )


PAIRS = {"fcos": fcos, "detr": detr, "eomt": eomt}
MODES = ("infer", "train")


def steps(name: str, mode: str, full: bool, device: str) -> dict[str, Step]:
    """What is measured of a pair: our step, then the peer's."""
    torch.manual_seed(0)
    pair = PAIRS[name](full, device)
    if mode == "train":
        models = (pair.ours, pair.theirs)
        return {kind: optimized(model, pair.loss[kind]) for kind, model in zip(pair.loss, models, strict=True)}
    pair.ours.eval()
    pair.theirs.eval()
    return {kind: torch.no_grad()(step) for kind, step in pair.infer.items()}


def measure(name: str, mode: str, full: bool, device: str, rounds: int) -> dict[str, Any]:
    """One row: the ratio of our time to the peer's."""
    both = steps(name, mode, full, device)
    (peer,) = both.keys() - {"ours"}
    taken = in_turns(both, device, rounds)
    row = {"model": name, "mode": mode, "size": "full" if full else "small", "peer": peer, "rounds": rounds}
    shortest = {"ours_ms": 1e3 * min(taken["ours"]), "theirs_ms": 1e3 * min(taken[peer])}
    return {**row, **ratio(taken["ours"], taken[peer]), **shortest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--only", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--full", action="store_true", help="the sizes of the papers")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, for both sides alike")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    file = f"dense_{torch.device(args.device).type}"
    for name in args.only:
        for mode in args.mode:
            row = measure(name, mode, args.full, args.device, args.rounds)
            verdict = "" if row["ratio"] <= TARGET else f"  slower than {TARGET}"
            print(f"{name} {mode} / {row['peer']}: {row['ratio']:.3f}{verdict}", flush=True)
            rows = with_earlier(file, [row], args.device, lambda r: (r["model"], r["mode"], r["size"]))
            write_results(file, rows, args.device)


if __name__ == "__main__":
    main()
