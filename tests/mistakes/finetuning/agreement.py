"""Answers to `finetuning.agreement`."""

import torch

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("finetuning.agreement")


def pairs(predictions, measure):
    return torch.tensor([[measure(a, b) for b in predictions] for a in predictions])


@variant("over-the-models")
def wrong_axis(predictions):
    return torch.stack([torch.stack([(p == q).float() for q in predictions]).mean(0) for p in predictions])


@variant("counted")
def how_many(predictions):
    return pairs(predictions, lambda a, b: float((a == b).sum()))


@variant("disagreement")
def how_different(predictions):
    return pairs(predictions, lambda a, b: (a != b).float().mean().item())


@variant("all-at-once")
def unanimous(predictions):
    same = [len({int(v) for v in column}) == 1 for column in zip(*predictions, strict=True)]
    return torch.tensor(sum(same) / len(same))


@unknown
def without_the_diagonal(predictions):
    return pairs(predictions, lambda a, b: (a == b).float().mean().item()) - torch.eye(len(predictions))


@unknown
def correlation_of_labels(predictions):
    return pairs(predictions, lambda a, b: (a * b).float().mean().item())


@right
def in_loops(predictions):
    return pairs(predictions, lambda a, b: (a == b).float().mean().item())


@right
def by_one_hot(predictions):
    count = int(max(p.max() for p in predictions)) + 1
    hot = torch.nn.functional.one_hot(torch.stack(list(predictions)), count).float()  # (M, N, K)
    return torch.einsum("ink,jnk->ij", hot, hot) / hot.shape[1]
