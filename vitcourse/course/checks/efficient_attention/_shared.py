"""What several checks of this lesson share."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Work(TorchDispatchMode):
    """Sums up the values that operations compute. Views compute none, and changes in place none that are new."""

    values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        self.values += sum(t.numel() for t in _tensors(result) if t.untyped_storage().data_ptr() not in known)
        return result


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def grows_linearly(once, twice):
    """Does ``answer`` compute fewer than three times as many values for twice the tokens? Of N², it would be four."""

    def predicate(answer):
        work = []
        for args in (once, twice):
            with torch.no_grad(), _Work() as mode:
                answer(*args)
            work.append(mode.values)
        return work[1] < 3 * work[0]

    return predicate


QUADRATIC = "right, but its work grows with the square of the number of tokens"
