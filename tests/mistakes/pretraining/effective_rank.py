"""Answers to `pretraining.effective_rank`."""

import numpy as np
import torch

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("pretraining.effective_rank")
EPS = float(np.finfo(np.float32).eps)


def in_numpy(about=lambda x: x.mean(axis=0), shares=lambda v: v / v.sum(), finish=np.exp, count=None, floor=True):
    """Singular values by NumPy, entropy in a loop."""

    def rank(features):
        x = features.detach().numpy().astype(np.float32)
        values = np.linalg.svd(x - about(x), compute_uv=False)
        if floor:
            values = values[values > EPS * max(x.shape) * np.linalg.norm(x, 2)]
            if values.size == 0:
                return 0.0
        if count is not None:
            return float(count(values))
        return float(finish(sum(-p * np.log(p) if p > 0 or np.isnan(p) else 0.0 for p in shares(values))))

    return rank


right(in_numpy())


@right
def by_categorical(features):
    x = features.detach().float()
    _, values, _ = torch.linalg.svd(x - x.mean(dim=0, keepdim=True), full_matrices=False)
    largest = torch.linalg.svdvals(x)[0]
    values = torch.where(values > EPS * max(x.shape) * largest, values, 0)
    if values.sum() == 0:
        return 0.0
    return torch.distributions.Categorical(probs=values).entropy().exp().item()


@right
def as_a_product(features):
    x = features.detach().float()
    values = torch.linalg.svdvals(x - x.mean(0))
    kept = [v for v in values.tolist() if v > EPS * max(x.shape) * torch.linalg.matrix_norm(x, ord=2).item()]
    total = sum(kept)
    return float(np.prod([(v / total) ** (-v / total) for v in kept])) if kept else 0.0


variant("not-centred")(in_numpy(about=lambda x: 0))
variant("centred-by-image")(in_numpy(about=lambda x: x.mean(axis=1, keepdims=True)))
variant("squared")(in_numpy(shares=lambda v: v * v / (v * v).sum()))
variant("entropy")(in_numpy(finish=float))
variant("bits")(in_numpy(finish=np.exp2))
variant("count")(in_numpy(count=len))
variant("participation")(in_numpy(count=lambda v: np.square(v.sum()) / np.square(v).sum()))
variant("upside-down")(in_numpy(finish=lambda e: 1 / np.exp(e)))


@variant("no-floor")
def without_a_floor(features):
    values = torch.linalg.svdvals(features.detach() - features.detach().mean(0))
    p = values / values.sum()
    return torch.special.entr(p).sum().exp().item()


unknown(in_numpy(about=lambda x: x.mean()))
unknown(in_numpy(shares=lambda v: np.exp(v) / np.exp(v).sum()))
unknown(in_numpy(shares=lambda v: v / v.max()))
unknown(in_numpy(count=lambda v: v.sum() / v.max()))
unknown(in_numpy(count=lambda v: np.log1p(v).sum()))
unknown(lambda features: torch.tensor(by_categorical(features)))
variant("centred-by-image")(lambda features: by_categorical(features.T))
