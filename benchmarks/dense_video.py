"""Do detectors, segmenters and models of clips cost more here than in torchvision or transformers?

    python -m benchmarks.dense_video                            every pair, small shapes
    python -m benchmarks.dense_video --size full                at the sizes of the papers: minutes on a CPU
    python -m benchmarks.dense_video --only detr swin3d --mode train --rounds 31

Same weights, same input, same run, in turns; before anything is timed, both must say the same. Inference is in
evaluation and inference mode; a step of training has the matching where there is one, the loss, its gradient and a
fused AdamW. transformers' models attend as they do by default, fused by PyTorch where they can; a row says how.
Of FCOS the pyramid and the head are compared, on maps that are there already; DETR is around the same backbone on both
sides. Results, with the load of the machine meanwhile: ``dense_video_<device type>.json``; rows that are not asked for
are kept.
"""

import argparse
import copy
import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import default_device, in_turns, ratio, with_earlier, write_results
from benchmarks.pretraining import optimized
from vitcourse import create_model, load_weights
from vitcourse.dense_prediction import Detr, Eomt, FcosHead, FcosLoss, FeaturePyramid, MaskSetLoss, mean_loss, points_of
from vitcourse.dense_prediction.boxes import to_centres
from vitcourse.video import TimeSformer, VideoSwin
from vitcourse.weights.huggingface import translate

TARGET = 1.03  # ours over theirs, at most
CLASSES = 20
Step = Callable[[], Any]


class Side(NamedTuple):
    """One of two models that do the same.

    Attributes:
        model: what is trained.
        infer: its answer, as tensors.
        loss: what a step of training goes down.
    """

    model: nn.Module
    infer: Callable[[], list[Tensor]]
    loss: Callable[[], Tensor]


Pair = dict[str, Side]  # ours, and the peer's under its name


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


# ----------------------------------------------------------------------------------------------------------- detection


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
    ours = nn.Sequential(FeaturePyramid(widths, channels, "p6p7"), FcosHead(channels, CLASSES))
    backbone = FeaturePyramidNetwork(widths, channels, LastLevelP6P7(channels, channels))
    backbone.out_channels = channels
    theirs = FCOS(backbone, CLASSES, anchor_generator=AnchorGenerator(tuple((s,) for s in strides), ((1.0,),) * 5))
    ours, theirs = same_order(ours.to(device), theirs.to(device))
    named, images = OrderedDict(enumerate(maps)), ImageList(torch.zeros(batch, 3, side, side), [(side, side)] * batch)

    def their_heads() -> tuple[list[Tensor], dict[str, Tensor]]:
        levels = list(backbone(OrderedDict(named)).values())
        return levels, theirs.head(levels)

    def their_answer() -> list[Tensor]:
        heads = their_heads()[1]
        return [heads["cls_logits"], heads["bbox_regression"], heads["bbox_ctrness"][..., 0]]

    def their_loss() -> Tensor:
        levels, heads = their_heads()
        counts = [x.shape[2] * x.shape[3] for x in levels]
        return sum(theirs.compute_loss(targets, heads, theirs.anchor_generator(images, levels), counts).values())

    def our_loss() -> Tensor:
        output = ours(maps)
        points = points_of(output.sizes, strides, output.logits.device)
        return mean_loss(FcosLoss()(output, points, targets))

    return {
        "ours": Side(ours, lambda: list(ours(maps)[:3]), our_loss),
        "torchvision": Side(theirs, their_answer, their_loss),
    }


def same_order(ours: nn.Module, theirs: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Ours with the weights of theirs, whose parameters come in another order of the heads, but in one of each kind."""
    neck, head = ours
    pairs = [
        (neck.lateral, theirs.backbone.inner_blocks),
        (neck.output, theirs.backbone.layer_blocks),
        (neck.extra, theirs.backbone.extra_blocks),
        (head.class_branch, theirs.head.classification_head.conv),
        (head.logits, theirs.head.classification_head.cls_logits),
        (head.box_branch, theirs.head.regression_head.conv),
        (head.distances, theirs.head.regression_head.bbox_reg),
        (head.centerness, theirs.head.regression_head.bbox_ctrness),
    ]
    with torch.no_grad():
        for mine, other in pairs:
            for a, b in zip(mine.parameters(), other.parameters(), strict=True):
                a.copy_(b)
    return ours, theirs


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
        activation_dropout=0.1,  # in the MLPs, as in the authors' code and in ours
        auxiliary_loss=True,
    )
    theirs = DetrForObjectDetection(config)
    width, stride = (2048, 32) if full else (32, 8)
    body = Maps(copy.deepcopy(theirs.model.backbone.model), side, width, stride)
    ours = Detr(body, CLASSES, dim, queries, 8, depth, depth, hidden)
    state = {k: v for k, v in translate(theirs.state_dict())[0].items() if not k.startswith("backbone.")}
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith("backbone.") for name in missing)
    ours, theirs = ours.to(device), theirs.to(device)
    images, targets = torch.rand(batch, 3, side, side, device=device), random_targets(batch, side, device)
    labels = [{"class_labels": t["labels"], "boxes": to_centres(t["boxes"], (side, side))} for t in targets]

    def our_answer() -> list[Tensor]:
        found = ours(images)
        return [found.logits[-1], found.boxes[-1]]

    def their_answer() -> list[Tensor]:
        found = theirs(images)
        return [found.logits, found.pred_boxes]

    return {
        "ours": Side(ours, our_answer, lambda: mean_loss(ours.losses(ours(images), targets))),
        "transformers": Side(theirs, their_answer, lambda: theirs(images, labels=labels).loss),
    }


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
    theirs = EomtForUniversalSegmentation(config)
    sizes = {"img_size": side, "embed_dim": dim, "depth": depth, "num_heads": heads, "num_classes": 0}
    vit = create_model("vit_tiny", **sizes, reg_tokens=4, no_embed_class=True, init_values=1.0)
    ours = load_weights(Eomt(vit, CLASSES, queries, num_blocks=3), theirs).to(device)
    theirs, ours.criterion = theirs.to(device), MaskSetLoss(points=points)
    images = torch.rand(batch, 3, side, side, device=device)
    targets = random_targets(batch, side, device, masks=True)
    labels = {"mask_labels": [t["masks"] for t in targets], "class_labels": [t["labels"] for t in targets]}

    def our_answer() -> list[Tensor]:
        found = ours(images)
        return [found.logits[-1], found.masks[-1]]

    def their_answer() -> list[Tensor]:
        found = theirs(images)
        return [found.class_queries_logits, found.masks_queries_logits]

    return {
        "ours": Side(ours, our_answer, lambda: mean_loss(ours.losses(ours(images), targets))),
        "transformers": Side(theirs, their_answer, lambda: theirs(images, **labels).loss),
    }


# --------------------------------------------------------------------------------------------------------------- clips


Ask = Callable[[nn.Module, Tensor], Tensor]


def of_clips(ours: nn.Module, theirs: nn.Module, whose: str, ask: Ask, shape: tuple[int, ...], device: str) -> Pair:
    """Two classifiers of clips (B, C, T, H, W), ours with the weights of the other."""
    with torch.no_grad():
        for parameter in theirs.parameters():  # among others the layer after attention along time, which starts at zero
            nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else None
    ours, theirs = load_weights(ours, theirs).to(device), theirs.to(device)
    clips, labels = torch.randn(shape, device=device), torch.randint(0, 400, shape[:1], device=device)

    def side(model: nn.Module, logits: Callable[[], Tensor]) -> Side:
        return Side(model, lambda: [logits()], lambda: F.cross_entropy(logits(), labels))

    return {"ours": side(ours, lambda: ours(clips)), whose: side(theirs, lambda: ask(theirs, clips))}


def timesformer(kind: str, full: bool, device: str) -> Pair:
    from transformers import TimesformerConfig, TimesformerForVideoClassification

    side, width, depth, heads = (224, 768, 12, 12) if full else (96, 192, 4, 3)
    config = TimesformerConfig(
        image_size=side,
        num_frames=8,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        num_labels=400,
        attention_type=f"{kind}_space_time",
    )
    ours = TimeSformer(
        side, num_frames=8, attention_type=kind, embed_dim=width, depth=depth, num_heads=heads, num_classes=400
    )
    shape = (1 if full else 2, 3, 8, side, side)
    peer = TimesformerForVideoClassification(config)
    return of_clips(ours, peer, "transformers", lambda model, x: model(x.transpose(1, 2)).logits, shape, device)


def swin3d(full: bool, device: str) -> Pair:
    """torchvision's swin3d_t in full; its first two stages where it is small."""
    from torchvision.models.video import swin3d_t
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    stages = {} if full else {"depths": (2, 2), "num_heads": (3, 6)}
    lists = {name: list(numbers) for name, numbers in stages.items()}
    small = {"patch_size": [2, 4, 4], "embed_dim": 96, "window_size": [8, 7, 7], "stochastic_depth_prob": 0.0, **lists}
    theirs = swin3d_t(stochastic_depth_prob=0.0) if full else SwinTransformer3d(**small)
    shape = (1, 3, 16, 224, 224) if full else (2, 3, 8, 96, 96)
    return of_clips(VideoSwin(**stages), theirs, "torchvision", lambda model, x: model(x), shape, device)


PAIRS: dict[str, Callable[[bool, str], Pair]] = {
    "fcos": fcos,
    "detr": detr,
    "eomt": eomt,
    "timesformer_divided": lambda full, device: timesformer("divided", full, device),
    "timesformer_joint": lambda full, device: timesformer("joint", full, device),
    "swin3d": swin3d,
}
MODES, SIZES = ("infer", "train"), ("small", "full")


# ----------------------------------------------------------------------------------------------------------- measuring


def check_same(pair: Pair) -> None:
    """Raise RuntimeError unless both say the same in evaluation: whoever computes less is faster."""
    answers = []
    for side in pair.values():
        side.model.eval()
        with torch.inference_mode():
            answers.append(side.infer())
    for ours, theirs in zip(*answers, strict=True):
        error = (ours - theirs).abs().max() / theirs.abs().max()
        if not error < 1e-3:
            raise RuntimeError(f"the two models differ by {error:.1e} of their largest number; nothing was timed")


def same_pair(name: str, full: bool, device: str) -> Pair:
    """Two models that were seen to say the same."""
    torch.manual_seed(0)
    pair = PAIRS[name](full, device)
    check_same(pair)
    return pair


def steps(pair: Pair, mode: str) -> dict[str, Step]:
    """What is measured of a pair: our step, then the peer's."""
    for side in pair.values():
        side.model.eval()
    if mode == "train":
        return {whose: optimized(side.model, side.loss) for whose, side in pair.items()}
    return {whose: torch.inference_mode()(side.infer) for whose, side in pair.items()}


def attention_of(peer: nn.Module) -> str | None:
    """How a model of transformers attends."""
    return getattr(getattr(peer, "config", None), "_attn_implementation", None)


def measure(name: str, mode: str, size: str, device: str, rounds: int) -> dict[str, Any]:
    """One row: the ratio of our time to the peer's."""
    pair = same_pair(name, size == "full", device)
    both = steps(pair, mode)
    (peer,) = both.keys() - {"ours"}
    taken = in_turns(both, device, rounds, warmup=3 if size == "small" else 1)
    row = {"model": name, "mode": mode, "size": size, "peer": peer, "rounds": rounds}
    shortest = {"ours_ms": 1e3 * min(taken["ours"]), "theirs_ms": 1e3 * min(taken[peer])}
    about = {"attention": attention_of(pair[peer].model), "load": os.getloadavg()[0]}
    return {**row, **ratio(taken["ours"], taken[peer]), **shortest, **about}


def order(row: dict[str, Any]) -> tuple[int, int, str]:
    return SIZES.index(row["size"]), list(PAIRS).index(row["model"]), row["mode"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--only", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rounds", type=int, default=9, help="5 at least")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, for both sides alike")
    args = parser.parse_args()
    if args.rounds < 5:
        parser.error(f"--rounds {args.rounds} must be at least 5")
    torch.set_num_threads(args.threads)
    file = f"dense_video_{torch.device(args.device).type}"
    for name in args.only:
        for mode in args.mode:
            row = measure(name, mode, args.size, args.device, args.rounds)
            verdict = "" if row["ratio"] <= TARGET else f"  slower than {TARGET}"
            print(f"{name} {args.size} {mode} / {row['peer']}: {row['ratio']:.3f}{verdict}", flush=True)
            rows = with_earlier(file, [row], args.device, lambda r: (r["model"], r["mode"], r["size"]))
            write_results(file, sorted(rows, key=order), args.device)


if __name__ == "__main__":
    main()
