"""Lesson 00: images, tokens and grids of any shape; large scores; modules in both modes, called again."""

import torch

from vitcourse.course.cases import Case, build, call
from vitcourse.train import TrainConfig

from ..domain import Draws, domain


@domain("vit.image_to_patch")
def image_to_patch(rng: Draws) -> Case:
    p, h, w = rng.size(1, 5), rng.size(1, 5), rng.size(1, 5)
    return call(rng.floats(rng.size(1, 3), rng.size(1, 4), h * p, w * p), p)


@domain("vit.sincos_2d")
def sincos_2d(rng: Draws) -> Case:
    return call(rng.size(1, 14), rng.size(1, 14), 4 * rng.size(1, 48))


@domain("vit.attention_weights")
def attention_weights(rng: Draws) -> Case:
    b, heads, d, spread = rng.size(1, 3), rng.size(1, 4), rng.size(1, 16), rng.spread(0.1, 1.0, 1.0, 5.0)
    return call(rng.floats(b, heads, rng.size(1, 9), d, spread=spread), rng.floats(b, heads, rng.size(1, 9), d))


def tokens(rng: Draws, dim: int) -> tuple:
    """Tokens, and with them a grid, or none."""
    h, w, prefix = rng.size(1, 4), rng.size(1, 4), rng.size(0, 2)
    x = rng.floats(rng.size(1, 4), prefix + h * w, dim)
    return (x,) if rng.sometimes(0.3) else (x, (h, w, prefix))


@domain("vit.Attention")
def attention(rng: Draws) -> list[Case]:
    heads = rng.size(1, 4)
    dim = heads * rng.size(1, 6)
    module = build(dim, heads) if rng.sometimes(0.5) else build(dim=dim, num_heads=heads)
    module = module.train() if rng.sometimes(0.5) else module
    return [module.call(*tokens(rng, dim)) for _ in range(rng.size(1, 3))]


@domain("vit.Block")
def block(rng: Draws) -> list[Case]:
    heads = rng.size(1, 4)
    dim = heads * rng.size(1, 6)
    more = {} if rng.sometimes(0.3) else {"mlp_ratio": rng.choice([1, 1.5, 2.0, 3.0])}
    module = build(dim, heads, **more)
    module = module.train() if rng.sometimes(0.5) else module
    return [module.call(*tokens(rng, dim)) for _ in range(rng.size(1, 3))]


@domain("vit.VisionTransformer")
def vision_transformer(rng: Draws) -> list[Case]:
    side, patch, channels, heads = rng.size(1, 4), rng.size(1, 4), rng.size(1, 4), rng.size(1, 3)
    module = build(
        img_size=side * patch,
        patch_size=patch,
        in_chans=channels,
        num_classes=rng.size(1, 7),
        embed_dim=heads * rng.size(2, 5),
        depth=rng.size(1, 4),
        num_heads=heads,
    )
    module = module.train() if rng.sometimes(0.5) else module
    images = (rng.floats(rng.size(1, 4), channels, side * patch, side * patch) for _ in range(rng.size(1, 3)))
    return [module.call(image) for image in images]


@domain("vit.learning_rate")
def learning_rate(rng: Draws) -> Case:
    lr, total = rng.number(1e-4, 2.0), rng.size(3, 400)
    config = TrainConfig(lr=lr, min_lr=lr * rng.choice([0.0, 0.01, 0.5]), warmup=rng.choice([0.0, 0.05, 0.2, 0.5]))
    warm = round(config.warmup * total)
    near = [0, warm - 1, warm, warm + 1, total - 2, total - 1, rng.size(0, total - 1), rng.size(0, total - 1)]
    return call(min(max(rng.choice(near), 0), total - 1), total, config)


@domain("vit.resize_pos_embed")
def resize_pos_embed(rng: Draws) -> Case:
    # To one column PyTorch 2.14 interpolates wrongly with antialias=True: every row is the first.
    (h, w), new, prefix = (rng.size(1, 8), rng.size(2, 8)), (rng.size(1, 12), rng.size(2, 12)), rng.size(0, 5)
    if rng.sometimes(0.1):
        new = (h, w)
    table = rng.floats(1, prefix + h * w, rng.size(1, 8))
    if prefix == 0 and rng.sometimes(0.5):
        return call(table, (h, w), new)
    return call(table, (h, w), torch.Size(new) if rng.sometimes(0.2) else new, prefix)
