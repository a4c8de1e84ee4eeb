"""Does a step of pre-training cost more here than in transformers or lightly?

    python -m benchmarks.pretraining                 every objective, on a GPU where there is one
    python -m benchmarks.pretraining --only mae      one of them; the other rows of the file are kept

Same shapes, same run, in turns: the forward pass, the loss, its gradient, AdamW, and the momentum encoder, on views and
masks that are there already. MAE and BEiT are compared with transformers' models; MoCo v3 and LeJEPA with a ViT of
timm's and the heads, losses and updates of lightly, which has both (``pip install --no-deps lightly`` is enough).
Results: ``pretraining_<device type>.json``.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import default_device, in_turns, ratio, with_earlier, write_results
from vitcourse import create_model
from vitcourse.pretraining import make_objective
from vitcourse.pretraining.lejepa import random_directions

TARGET = 1.03  # ours over theirs, at most
SIZES = {"img_size": 112, "patch_size": 16, "embed_dim": 192, "num_heads": 3}
HEADS = {"hidden_dim": 512, "out_dim": 64}
Step = Callable[[], Any]


def optimized(model: nn.Module, loss: Callable[[], Tensor], after: Callable[[], Any] = lambda: None) -> Step:
    """One step of training of all that ``model`` trains."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            after()

    return step


def encoder(depth: int, name: str = "vit_tiny", **more: Any) -> nn.Module:
    return create_model(name, num_classes=0, depth=depth, **SIZES, **more)


def timm_encoder(depth: int) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(num_classes=0, depth=depth, **SIZES)


# -------------------------------------------------------------------------------------------- ours, then the peer's


def mae(batch: int, depth: int, device: str) -> dict[str, Step]:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    images, noise = torch.rand(batch, 3, 112, 112, device=device), torch.rand(batch, 49, device=device)
    model, task = make_objective("mae", encoder(depth), decoder_dim=96, decoder_depth=2, decoder_heads=3)
    config = ViTMAEConfig(
        hidden_size=192,
        num_hidden_layers=depth,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=112,
        decoder_hidden_size=96,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=3,
        decoder_intermediate_size=384,
        norm_pix_loss=True,
    )
    model, peer = model.to(device), ViTMAEForPreTraining(config).to(device)
    return {
        "ours": optimized(model, lambda: task.loss(model, (images, noise))[0] / batch),
        "transformers": optimized(peer, lambda: peer(images, noise=noise).loss),
    }


def beit(batch: int, depth: int, device: str) -> dict[str, Step]:
    from transformers import BeitConfig, BeitForMaskedImageModeling

    images = torch.rand(batch, 3, 112, 112, device=device)
    mask = torch.rand(batch, 49, device=device) < 0.4
    words = torch.randint(0, 512, (int(mask.sum()),), device=device)
    model, _ = make_objective("beit", encoder(depth, "beit_tiny"), vocab_size=512)
    config = BeitConfig(
        vocab_size=512,
        hidden_size=192,
        num_hidden_layers=depth,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=112,
        use_mask_token=True,
        use_relative_position_bias=True,
        drop_path_rate=0.0,
    )
    model, peer = model.to(device), BeitForMaskedImageModeling(config).to(device)
    return {
        "ours": optimized(model, lambda: F.cross_entropy(model(images, mask), words)),
        "transformers": optimized(peer, lambda: peer(images, bool_masked_pos=mask, labels=words).loss),
    }


def moco(batch: int, depth: int, device: str) -> dict[str, Step]:
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    views = [torch.rand(batch, 3, 112, 112, device=device) for _ in range(2)]
    model, task = make_objective("moco", encoder(depth), **HEADS)
    model = model.to(device)
    task.keys = copy.deepcopy(nn.Sequential(model.encoder, model.projector)).requires_grad_(False)
    ours = optimized(model, lambda: task.loss(model, views)[0] / batch, lambda: task.move_keys(model, 0.99))

    body = timm_encoder(depth)
    deactivate_requires_grad(body.patch_embed)
    query = nn.Sequential(body, MoCoProjectionHead(192, 512, 64, num_layers=3, batch_norm=True)).to(device)
    predictor = MoCoProjectionHead(64, 512, 64, num_layers=2, batch_norm=True).to(device)
    keys = copy.deepcopy(query)
    deactivate_requires_grad(keys)

    def contrast(q: Tensor, k: Tensor) -> Tensor:
        logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).t() / 0.2
        return F.cross_entropy(logits, torch.arange(batch, device=device)) * 0.4

    def loss() -> Tensor:
        q1, q2 = (predictor(query(view)) for view in views)
        with torch.no_grad():
            k1, k2 = (keys(view) for view in views)
        return contrast(q1, k2) + contrast(q2, k1)

    both = nn.ModuleList([query, predictor])
    return {"ours": ours, "lightly": optimized(both, loss, lambda: update_momentum(query, keys, 0.99))}


def lejepa(batch: int, depth: int, device: str) -> dict[str, Step]:
    from lightly.loss import LeJEPALoss
    from lightly.models.modules import heads

    views = [torch.rand(batch, 3, 112, 112, device=device) for _ in range(2)]
    model, task = make_objective("lejepa", encoder(depth), **HEADS, directions=256)
    model = model.to(device)
    ours = optimized(model, lambda: task.loss(model, (views, random_directions(64, 256).to(device)))[0] / batch)
    peer = nn.Sequential(timm_encoder(depth), heads.LeJEPAProjectionHead(192, 512, 64)).to(device)
    criterion = LeJEPALoss(sigreg_num_vectors=256).to(device)

    def loss() -> Tensor:  # its two terms, as its loss puts them together; there are no local views here
        x = torch.stack([peer(view) for view in views])
        apart = (x.mean(0) - x).square().mean()
        return 0.05 * criterion.sigreg(x) + 0.95 * apart

    return {"ours": ours, "lightly": optimized(peer, loss)}


PAIRS = {"mae": mae, "beit": beit, "moco": moco, "lejepa": lejepa}


def measure(name: str, device: str, rounds: int, batch: int, depth: int) -> dict[str, Any]:
    """One row: images a second of both, and the ratio of our time to the peer's."""
    torch.manual_seed(0)
    steps = PAIRS[name](batch, depth, device)
    peer = next(key for key in steps if key != "ours")
    taken = in_turns(steps, device, rounds)
    return {
        "objective": name,
        "peer": peer,
        "batch": batch,
        "depth": depth,
        "rounds": rounds,
        **ratio(taken["ours"], taken[peer]),
        "ours_images_per_second": batch / min(taken["ours"]),
        "theirs_images_per_second": batch / min(taken[peer]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--only", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=None, help="images a step: 16 on a CPU, 256 elsewhere")
    parser.add_argument("--depth", type=int, default=4, help="blocks of the encoder")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, for both sides alike")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    name = f"pretraining_{torch.device(args.device).type}"
    batch = args.batch or (16 if args.device == "cpu" else 256)
    for objective in args.only:
        try:
            row = measure(objective, args.device, args.rounds, batch, args.depth)
        except ImportError as error:
            print(f"skipped {objective}: {error}", file=sys.stderr)
            continue
        verdict = "" if row["ratio"] <= TARGET else f"  slower than {TARGET}"
        print(f"{objective} / {row['peer']}: {row['ratio']:.3f}{verdict}", flush=True)
        rows = with_earlier(name, [row], args.device, lambda r: r["objective"])
        write_results(name, sorted(rows, key=lambda r: list(PAIRS).index(r["objective"])), args.device)


if __name__ == "__main__":
    main()
