"""Two tasks for the tests of the engine: one compares views and remembers, one counts what differs between samples."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from vitcourse.train import Task, TrainConfig


class Views(Dataset):
    """Two random views of each of ``n`` vectors, drawn anew in each epoch."""

    def __init__(self, n: int = 24) -> None:
        self.vectors = torch.randn(n, 6, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, index: int) -> dict:
        x = self.vectors[index]
        return {"views": (x + 0.1 * torch.randn(6), x + 0.1 * torch.randn(6)), "index": index}


class TwoViews(Task):
    """Contrast with a momentum encoder and a queue, as MoCo has them, both of which are the task's own."""

    name = "two_views"
    couples_batch = True
    counts_samples = True

    def setup(self, model, train_set, config, device):
        self.teacher = copy.deepcopy(model).requires_grad_(False)
        self.queue = F.normalize(torch.ones(8, 3, device=device), dim=-1)
        self.seen = []

    def loss(self, model, batch):
        first, second = batch["views"]
        self.seen.append(batch["index"].tolist())
        queries, self.keys = F.normalize(model(first), dim=-1), F.normalize(self.teacher(second), dim=-1)
        logits = torch.cat([(queries * self.keys).sum(-1, keepdim=True), queries @ self.queue.T], 1) / 0.2
        first_is_right = torch.zeros(len(first), dtype=torch.long, device=logits.device)
        return F.cross_entropy(logits, first_is_right, reduction="sum"), len(first)

    def after_step(self, model, step, total):
        assert not torch.is_grad_enabled() and 0 <= step < total
        for mean, weight in zip(self.teacher.parameters(), model.parameters(), strict=True):
            mean.lerp_(weight, 0.1 * (1 - step / total))
        self.queue = torch.cat([self.keys, self.queue])[: len(self.queue)]

    def state_dict(self):
        return {"teacher": self.teacher.state_dict(), "queue": self.queue}

    def load_state_dict(self, state):
        self.teacher.load_state_dict(state["teacher"])
        self.queue = state["queue"].to(self.queue)


class Points(Dataset):
    """Samples with 0 to 5 points each, as pictures have objects; float64, where the order of a sum hardly matters."""

    def __init__(self, n: int = 37, most: int = 5) -> None:
        random = torch.Generator().manual_seed(1)
        self.x = torch.randn(n, 4, generator=random, dtype=torch.float64)
        counts = [(i * i) % (most + 1) for i in range(n)]
        self.points = [torch.randn(k, 2, generator=random, dtype=torch.float64) for k in counts]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple:
        return self.x[index], self.points[index]


class Nearness(Task):
    """Distance of one predicted point from all points of its sample, as a mean over the points."""

    name = "nearness"
    metrics = ("val_loss", "furthest")
    best = ("furthest", "min")

    def collate(self, samples):
        counts = torch.tensor([len(points) for _, points in samples])
        points = torch.cat([points for _, points in samples])
        of = torch.arange(len(samples)).repeat_interleave(counts)
        return {"x": torch.stack([x for x, _ in samples]), "of": of}, [points]

    def check(self, sample):
        if sample[1].shape[1:] != (2,):
            raise ValueError(f"points have shape {tuple(sample[1].shape)}; give (K, 2)")

    def loss(self, model, batch):
        (inputs, (points,)) = batch
        errors = (model(inputs["x"])[inputs["of"]] - points).square().sum(-1)
        return errors.sum(), torch.tensor(len(errors))

    def evaluate(self, model, dataset, config=None, **processes):
        found = super().evaluate(model, dataset, config, **processes)
        return {**found, "furthest": found["val_loss"] and found["val_loss"] ** 0.5}


def regressor() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 2)).double()


# 37 samples in batches of 16: the last batch has 5.
COUNTED = TrainConfig(epochs=3, batch_size=16, drop_last=False, lr=1e-2, ema=0.9, device="cpu")
