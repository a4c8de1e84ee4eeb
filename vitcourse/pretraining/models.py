"""The ViT of BEiT (Bao et al. 2021), by name; the visual tokenizer beside it is in ``vq``."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitcourse.hybrid import RelativeAttention
from vitcourse.hybrid.blocks import table_size
from vitcourse.layers import attention, attention_weights, check_mask, to_pair
from vitcourse.registry import Preprocess, build_model, register_model
from vitcourse.vit import SIZES, Grid, VisionTransformer, resize_pos_embed, whole_grid
from vitcourse.vit.positions import grid_of_checkpoint, size_of_source

from . import make_objective
from . import vq as vq  # which registers the tokenizer
from .options import OBJECTIVES


class BeitAttention(RelativeAttention):
    """Self-attention with a learnt bias for every offset between patches, and three more for [CLS] (section 2.3).

    Those are from a prefix token to a patch, from a patch to a prefix token, and between prefix tokens.
    """

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = True, *, grid_size: tuple[int, int]) -> None:
        super().__init__(dim, num_heads, qkv_bias, grid_size=grid_size)
        self.prefix_bias_table = nn.Parameter(torch.zeros(3, num_heads))
        nn.init.zeros_(self.relative_position_bias_table)

    head_axes = {**RelativeAttention.head_axes, "prefix_bias_table": 1}

    def bias_of(self, grid: Grid, like: Tensor) -> Tensor:
        """(1, H, P + N, P + N), of the dtype of ``like``."""
        h, w, prefix = grid
        bias, n = self.position_bias((h, w), like), h * w
        if not prefix:
            return bias
        to_patch, to_prefix, between = self.prefix_bias_table.to(like.dtype)[..., None, None]  # (H, 1, 1) each
        top = torch.cat([between.expand(-1, prefix, prefix), to_patch.expand(-1, prefix, n)], dim=2)
        return torch.cat([top, torch.cat([to_prefix.expand(-1, n, prefix), bias[0]], dim=2)], dim=1)[None]

    def forward(self, x: Tensor, grid: Grid | None, mask: Tensor | None = None) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        bias = self.bias_of(whole_grid(grid, self), like=q)
        if self.recorder is None:
            x = attention(q, k, v, bias=bias, mask=mask, backend=self.backend)
        else:  # fused kernels never form the weights, so whoever wants to see them pays for the plain equation
            check_mask(mask, (*q.shape[:3], x.shape[1]))
            weights = attention_weights(q, k, bias=bias, mask=mask)
            self.recorder.append(weights)
            x = weights @ v
        return self.proj(x.transpose(1, 2).flatten(2))


class Beit(VisionTransformer):
    """The ViT of BEiT: relative position biases in each block, not absolute positions; layer scale; mean pooling.

    Arguments are those of :class:`vitcourse.VisionTransformer`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        global_pool: str = "avg",
        pos_embed: str = "none",
        init_values: float | None = 0.1,
        **arguments: Any,
    ) -> None:
        sizes = zip(to_pair(img_size, "img_size"), to_pair(patch_size, "patch_size"), strict=True)
        grid = tuple(side // patch for side, patch in sizes)
        super().__init__(
            img_size,
            patch_size,
            global_pool=global_pool,
            pos_embed=pos_embed,
            init_values=init_values,
            attn_layer=partial(BeitAttention, grid_size=grid),
            **arguments,
        )

    def no_weight_decay(self) -> set[str]:
        return {*super().no_weight_decay(), "relative_position_bias_table", "prefix_bias_table"}

    def checkpoint_names(self, names: Collection[str]) -> Callable[[str], str]:
        """How to call what timm's BEiT has."""
        return lambda name: name.replace(".gamma_1", ".ls1.gamma").replace(".gamma_2", ".ls2.gamma")

    def adapt_state_dict(
        self, state: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """Another checkpoint in this model's names and sizes: timm's names, tables of offsets interpolated.

        timm has no bias of the keys, which would change no softmax, and one table for patches and prefix.

        Args:
            state: its tensors by name.
            facts: what else is known of it; see :meth:`vitcourse.vit.VisionTransformer.adapt_state_dict`.

        Raises:
            ValueError: a table could be that of several maps.
        """
        state, size = super().adapt_state_dict(state, facts), size_of_source(facts or {})
        for name, mixer in self.named_modules():
            if not isinstance(mixer, BeitAttention):
                continue
            if (bias := state.pop(f"{name}.q_bias", None)) is not None:
                state[f"{name}.qkv.bias"] = torch.cat([bias, torch.zeros_like(bias), state.pop(f"{name}.v_bias")])
            key, prefix = f"{name}.relative_position_bias_table", f"{name}.prefix_bias_table"
            if key not in state:
                continue
            if prefix not in state:
                state[key], state[prefix] = state[key][:-3], state[key][-3:]
            own = table_size(mixer.grid_size)
            known = size and table_size(tuple(s // p for s, p in zip(size, self.patch_size, strict=True)))
            table = grid_of_checkpoint(len(state[key]), own, known, key, "source_img_size" in (facts or {}))
            if table is not None:
                state[key] = resize_pos_embed(state[key][None], table, own)[0]
        return state


_HALF = Preprocess(img_size=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop_pct=0.9)
for _size in ("tiny", "small", "base", "large"):
    register_model(f"beit_{_size}", Beit, _HALF, **SIZES[_size])
    register_model(f"beit_{_size}_patch16_224", Beit, _HALF, **SIZES[_size], patch_size=16, img_size=224)


def build_pretrainer(objective: str, encoder: str, encoder_args: Mapping[str, Any], **options: Any) -> nn.Module:
    """What an objective trains, an encoder by name in it: so a file of all of it can be opened again."""
    return make_objective(objective, build_model(encoder, encoder_args), **options)[0]


for _name in OBJECTIVES:
    register_model(f"{_name}_pretrainer", partial(build_pretrainer, _name), _HALF)
