"""Answers to `pretraining.random_masking`."""

import numpy as np
import torch

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("pretraining.random_masking")


def in_loops(key=lambda value: value, places="patch", hidden="patch", seen=list, source=lambda noise, row: noise[row]):
    """Lists for each image; `places` and `hidden` say whose question is answered."""

    def mask_of(noise, visible):
        keeps, restores, masks = [], [], []
        for row in range(len(noise)):
            values = source(noise, row).tolist()
            order = sorted(range(len(values)), key=lambda i: key(values[i]))
            where = [order.index(i) for i in range(len(values))]
            keeps.append(seen(order[:visible]))
            restores.append(where if places == "patch" else order)
            asked = {"patch": where, "order": order, "shuffled": range(len(values))}[hidden]
            masks.append([place >= visible for place in asked])
        return torch.tensor(keeps), torch.tensor(restores), torch.tensor(masks)

    return mask_of


right(in_loops())


@right
def by_scatter(noise, visible):
    b, n = noise.shape
    keep_order = torch.sort(noise, dim=-1).indices
    places = torch.arange(n).expand(b, n)
    back = torch.empty(b, n, dtype=torch.long).scatter_(1, keep_order, places)
    mask = torch.ones(b, n, dtype=torch.bool).scatter_(1, keep_order[:, :visible], False)
    return keep_order[:, :visible], back, mask


@right
def as_in_the_authors_code(noise, visible):
    shuffled = torch.argsort(noise, dim=1)
    restore = torch.argsort(shuffled, dim=1)
    mask = torch.ones(noise.shape)
    mask[:, :visible] = 0
    return shuffled[:, :visible], restore, torch.gather(mask, dim=1, index=restore).bool()


for key, change in {
    "not-inverted": {"places": "order"},
    "not-inverted-mask": {"places": "order", "hidden": "order"},
    "most-noise": {"key": lambda value: -value},
    "mask-shuffled": {"hidden": "shuffled"},
    "keep-in-reading-order": {"seen": sorted},
    "one-for-all": {"source": lambda noise, row: noise[0]},
}.items():
    variant(key)(in_loops(**change))


@variant("mask-inverted")
def zeros_and_ones_exchanged(noise, visible):
    keep, restore, mask = by_scatter(noise, visible)
    return keep, restore, ~mask


@variant("hidden-kept")
def the_rest(noise, visible):
    _, restore, mask = by_scatter(noise, visible)
    return torch.from_numpy(np.argsort(noise.numpy(), axis=1)[:, visible:].copy()), restore, mask


@unknown
def the_first_patches(noise, visible):
    places = torch.arange(noise.shape[1]).repeat(len(noise), 1)
    return places[:, :visible], places, places >= visible


@unknown
def one_too_many(noise, visible):
    return by_scatter(noise, visible + 1)


@unknown
def numbers_for_truth(noise, visible):
    keep, restore, mask = by_scatter(noise, visible)
    return keep, restore, mask.float()


@unknown
def only_what_is_kept(noise, visible):
    return by_scatter(noise, visible)[0]


@unknown
def across_the_batch(noise, visible):
    order = noise.argsort(0)
    return order[:, :visible], order.argsort(0), order.argsort(0) >= visible


unknown(in_loops(places="order", hidden="shuffled"))
unknown(in_loops(key=lambda value: -value, seen=sorted))
unknown(in_loops(hidden="order"))
