"""DETR (Carion et al. 2020, "End-to-End Object Detection with Transformers"), and what makes it converge sooner."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcourse.layers import widened

from .base import DenseModel
from .boxes import Target, to_centres, to_corners
from .detr_layers import BoxHead, DecoderLayer, EncoderLayer, sine_positions
from .detr_queries import (
    QUERIES,
    BoxPosition,
    Denoising,
    Disturbed,
    Queries,
    denoising_mask,
    disturb,
    token_boxes,
)
from .pyramid import level_of, one_map, valid_tokens
from .set_loss import BoxSetLoss, count_objects, named
from .terms import Term, Terms


class DetrOutput(NamedTuple):
    """What the decoder says, layer by layer, the last of them being the answer.

    Attributes:
        logits: (L, B, Q, K + 1), the last class being "no object".
        boxes: (L, B, Q, 4), centre, width and height as parts of the image.
        sizes: (height, width) of each image in pixels, without padding.
        proposals: logits (B, M, K + 1) and boxes (B, M, 4) of the encoder's tokens, where queries come from these.
        denoised: logits (L, B, G · n, K + 1) and boxes of the disturbed objects, where there are some.
        disturbed: what these were.
    """

    logits: Tensor
    boxes: Tensor
    sizes: list[tuple[int, int]]
    proposals: tuple[Tensor, Tensor] | None = None
    denoised: tuple[Tensor, Tensor] | None = None
    disturbed: Disturbed | None = None


class Detr(DenseModel):
    """Detection as the prediction of a set: a backbone's map, an encoder, and queries that ask it for objects.

    Args:
        backbone: see :class:`DenseModel`.
        num_classes: K.
        embed_dim: width D of the transformer, a multiple of 4; of 8 with anchors, proposals or denoising.
        num_queries: Q, more than an image has objects.
        num_heads: of each attention.
        encoder_depth, decoder_depth: layers. A plain ViT's tokens have seen each other already, and 0 layers of encoder
            may do.
        mlp_dim: hidden width of the MLPs.
        dropout: after each branch and in the MLPs.
        level: the backbone's map, counted from 0 or from the end with −1; a ViT has one.
        queries: ``"embedded"``, learnt vectors, as in the paper; ``"anchors"``, learnt boxes, from which positions
            follow and which each layer corrects (DAB-DETR, Liu et al. 2022); ``"proposals"``, the boxes of the Q tokens
            of the encoder that are likeliest to be objects (two-stage Deformable DETR, Zhu et al. 2021, section 4.2),
            their content learnt (DINO, Zhang et al. 2023, section 3.4).
        denoising: groups of disturbed objects in training; 0 for none. See :class:`.detr_queries.Denoising`.

    Attributes:
        criterion: the loss, which may be replaced.
        denoising: the noise, which may be replaced.

    Raises:
        ValueError: widths that do not fit, unknown queries, a level that does not exist.

    >>> from vitcourse import create_model
    >>> backbone = create_model("vit_tiny", img_size=32, patch_size=8, num_classes=0, depth=1)
    >>> model = Detr(backbone, 3, embed_dim=32, num_queries=5, num_heads=4, encoder_depth=1, decoder_depth=2, mlp_dim=9)
    >>> out = model(torch.rand(2, 3, 32, 32))
    >>> out.logits.shape, out.boxes.shape
    (torch.Size([2, 2, 5, 4]), torch.Size([2, 2, 5, 4]))
    >>> len(model.results(out)[0]["boxes"])
    5
    """

    head_names = ("class_head", "proposal_class", "label_embed")

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int = 80,
        embed_dim: int = 256,
        num_queries: int = 100,
        num_heads: int = 8,
        encoder_depth: int = 6,
        decoder_depth: int = 6,
        mlp_dim: int = 2048,
        dropout: float = 0.1,
        level: int = -1,
        queries: str = "embedded",
        denoising: int = 0,
    ) -> None:
        super().__init__(backbone, num_classes)
        if queries not in QUERIES:
            raise ValueError(f"queries {queries!r} is unknown; use {', '.join(map(repr, QUERIES))}")
        if decoder_depth < 1 or num_queries < 1:
            raise ValueError(f"decoder_depth {decoder_depth} and num_queries {num_queries} must be at least 1")
        self.embed_dim, self.num_queries, self.level, self.queries = embed_dim, num_queries, level, queries
        self.criterion, self.denoising = BoxSetLoss(), Denoising(denoising)

        self.input_proj = nn.Conv2d(level_of(backbone, level)[0], embed_dim, 1)
        sizes = (embed_dim, num_heads, mlp_dim, dropout)
        self.encoder = nn.ModuleList(EncoderLayer(*sizes) for _ in range(encoder_depth))
        self.decoder = nn.ModuleList(DecoderLayer(*sizes) for _ in range(decoder_depth))
        self.norm = nn.LayerNorm(embed_dim)
        self.class_head = nn.Linear(embed_dim, num_classes + 1)
        self.box_head = BoxHead(embed_dim)
        self._make_queries(num_classes, denoising)
        self._init_weights()

    def _make_queries(self, num_classes: int, denoising: int) -> None:
        dim = self.embed_dim
        self.query_embed = nn.Parameter(torch.randn(self.num_queries, dim))  # positions, or content
        if self.queries == "anchors":
            self.anchors = nn.Parameter(torch.rand(self.num_queries, 4).clamp(0.02, 0.98).logit())
        if self.queries == "proposals":
            self.proposal = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim))
            self.proposal_class, self.proposal_box = nn.Linear(dim, num_classes + 1), BoxHead(dim)
        self.box_position = BoxPosition(dim) if self.queries != "embedded" or denoising else None
        self.label_embed = nn.Embedding(num_classes, dim) if denoising else None

    def _init_weights(self) -> None:
        layers = [self.encoder, self.decoder, self.box_head, *filter(None, [self.box_position])]
        for module in layers:
            for parameter in module.parameters():
                if parameter.ndim > 1:
                    nn.init.xavier_uniform_(parameter)
        if self.queries != "embedded":  # a layer that has learnt nothing leaves its box where it is
            for head in (self.box_head, getattr(self, "proposal_box", None)):
                if head is not None:
                    nn.init.zeros_(head[-1].weight)
                    nn.init.zeros_(head[-1].bias)

    def no_weight_decay(self) -> set[str]:
        return {*super().no_weight_decay(), "query_embed", "anchors"}

    def reset_classifier(self, num_classes: int) -> None:
        """Other classes: new, randomly initialised heads, and labels of the denoising."""
        self.num_classes, like = num_classes, self.class_head.weight
        self.class_head = nn.Linear(self.embed_dim, num_classes + 1).to(like)
        if self.queries == "proposals":
            self.proposal_class = nn.Linear(self.embed_dim, num_classes + 1).to(like)
        if self.label_embed is not None:
            self.label_embed = nn.Embedding(num_classes, self.embed_dim).to(like)

    # ------------------------------------------------------------------------------------------------------- forward

    def forward(self, x: Tensor, targets: Sequence[Target] | None = None, valid: Tensor | None = None) -> DetrOutput:
        """Images (B, C, H, W) to predictions.

        Args:
            x: images.
            targets: boxes in corners and pixels; needed for denoising, in training, and not looked at otherwise.
            valid: (B, H, W), False where smaller images were filled up; boxes are then parts of the image without that.
        """
        sizes = sizes_of(x, valid)
        memory, position, valid, mask = self.encode(x, valid)
        queries, proposals = self.make_queries(memory, valid)
        disturbed = None
        if self.training and self.denoising.groups and targets is not None:
            disturbed = disturb(as_parts(targets, sizes), self.num_classes, self.denoising)
        if disturbed is None:
            logits, boxes = self.decode(queries, memory, position, memory_mask=mask)
            return DetrOutput(logits, boxes, sizes, proposals)
        queries = self._with_denoising(queries, disturbed)
        attend = denoising_mask(disturbed, self.num_queries)
        logits, boxes = self.decode(queries, memory, position, attend, mask)
        n = disturbed.labels.shape[1]
        denoised = logits[:, :, :n], boxes[:, :, :n]
        return DetrOutput(logits[:, :, n:], boxes[:, :, n:], sizes, proposals, denoised, disturbed)

    def encode(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Images to the encoder's tokens (B, M, D), positions, which are of images (B, h, w), and that as mask."""
        x_map = self.input_proj(one_map(self.backbone, x, self.level))
        batch, _, h, w = x_map.shape
        mask = None
        if valid is None:
            valid = x_map.new_ones(batch, h, w, dtype=torch.bool)
        else:
            valid = valid_tokens(valid, (h, w))
            mask = valid.flatten(1)[:, None, None]
        position = sine_positions(valid, self.embed_dim).to(x_map.dtype)
        tokens = x_map.flatten(2).transpose(1, 2)
        for layer in self.encoder:
            tokens = layer(tokens, position, mask)
        return tokens, position, valid, mask

    def make_queries(self, memory: Tensor, valid: Tensor) -> tuple[Queries, tuple[Tensor, Tensor] | None]:
        """The queries of each image, and the proposals if they come from these."""
        batch = memory.shape[0]
        learnt = self.query_embed.expand(batch, -1, -1)
        if self.queries == "embedded":  # boxes of logit 0 add nothing
            return Queries(torch.zeros_like(learnt), learnt, learnt.new_zeros(batch, self.num_queries, 4)), None
        if self.queries == "anchors":
            return Queries(learnt, None, self.anchors.expand(batch, -1, -1)), None
        tokens = self.proposal(memory)
        logits, boxes = self.proposal_class(tokens), self.proposal_box(tokens) + token_boxes(valid, side=0.1)
        score = logits[..., :-1].amax(-1) - logits[..., -1]
        score = score.masked_fill(~valid.flatten(1), float("-inf"))
        if score.shape[1] < self.num_queries:
            raise ValueError(
                f"num_queries {self.num_queries} are more than the {score.shape[1]} tokens that proposals come from; "
                "use fewer queries, a finer level or a smaller patch_size"
            )
        best = score.topk(self.num_queries, dim=1).indices[..., None].expand(-1, -1, 4)
        return Queries(learnt, None, boxes.gather(1, best).detach()), (logits, boxes.sigmoid())

    def _with_denoising(self, queries: Queries, disturbed: Disturbed) -> Queries:
        """The disturbed objects, as queries, in front of the others."""
        content = torch.cat([self.label_embed(disturbed.labels).to(queries.content), queries.content], dim=1)
        position = queries.position
        if position is not None:
            position = torch.cat([self.box_position(disturbed.boxes.to(position)), position], dim=1)
        return Queries(content, position, torch.cat([disturbed.boxes.logit().to(queries.boxes), queries.boxes], dim=1))

    def decode(
        self,
        queries: Queries,
        memory: Tensor,
        position: Tensor,
        mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits (L, B, N, K + 1) and boxes (L, B, N, 4) of each layer; all layers share norm and heads."""
        x, place, reference = queries
        hidden, boxes = [], []
        for layer in self.decoder:
            if queries.position is None:
                place = self.box_position(reference.sigmoid())
            x = layer(x, place, memory, position, mask, memory_mask)
            hidden.append(self.norm(x))
            found = self.box_head(hidden[-1]) + reference
            boxes.append(found.sigmoid())
            if queries.position is None:  # the next layer corrects this one's box
                reference = found.detach()
        return self.class_head(torch.stack(hidden)), torch.stack(boxes)

    # --------------------------------------------------------------------------------------------- losses and results

    def losses(self, output: DetrOutput, targets: Sequence[Target]) -> Terms:
        """The terms of the loss: of the last layer, of those before (``_aux0`` …), of proposals and of denoising.

        Targets have corners in pixels. All but the last layer's class term with ``class_count="weights"`` are divided
        by the objects of the batch.
        """
        targets = as_parts(targets, output.sizes)
        *earlier, last = zip(output.logits, output.boxes, strict=True)
        terms = dict(self.criterion(*last, targets))
        for i, layer in enumerate(earlier):
            terms |= named(self.criterion(*layer, targets), f"_aux{i}")
        if output.proposals is not None:
            terms |= named(self.criterion(*output.proposals, targets), "_proposals")
        if output.denoised is not None:
            terms |= self._denoising_terms(output, targets)
        return terms

    def _denoising_terms(self, output: DetrOutput, targets: Sequence[Target]) -> Terms:
        """Each disturbed object is to be found again; nothing needs to be matched. A mean over the groups."""
        image, query, objects = output.disturbed[2:5]
        labels = torch.cat([target["labels"] for target in targets])[objects]
        wanted = torch.cat([target["boxes"] for target in targets])[objects]
        count, groups = count_objects(targets, labels.device), output.disturbed.groups
        terms: dict[str, Term] = {}
        for i, (logits, boxes) in enumerate(zip(*output.denoised, strict=True)):
            found = widened(boxes[image, query])
            error = F.cross_entropy(widened(logits[image, query]), labels, reduction="sum")
            layer = {
                "class": Term(error, count, self.criterion.class_weight),
                **self.criterion.box_terms(found, wanted.to(found), count),
            }
            layer = {name: term._replace(total=term.total / groups) for name, term in layer.items()}
            terms |= named(layer, f"_denoising{i}")
        return terms

    def results(
        self, output: DetrOutput, sizes: Sequence[tuple[int, int]] | None = None, threshold: float = 0.0
    ) -> list[dict[str, Tensor]]:
        """Boxes of each image, the surest first: ``boxes`` (n, 4) in pixels, ``scores`` (n,) and ``labels`` (n,).

        Args:
            output: of the model.
            sizes: (height, width) that each image's boxes are for; by default those of the images that went in.
            threshold: scores must be above. Mean average precision wants them all.
        """
        scores, labels = output.logits[-1].float().softmax(-1)[..., :-1].max(-1)
        found = []
        for s, label, b, size in zip(scores, labels, output.boxes[-1].float(), sizes or output.sizes, strict=True):
            b = to_corners(b, size)
            order = s.argsort(descending=True, stable=True)
            order = order[s[order] > threshold]
            found.append({"boxes": b[order], "scores": s[order], "labels": label[order]})
        return found


def sizes_of(x: Tensor, valid: Tensor | None) -> list[tuple[int, int]]:
    """(height, width) of each image (B, C, H, W), without what ``valid`` (B, H, W) says is padding."""
    if valid is None:
        return [tuple(x.shape[-2:])] * len(x)
    return [(int(v.any(1).sum()), int(v.any(0).sum())) for v in valid]


def as_parts(targets: Sequence[Target], sizes: Sequence[tuple[int, int]]) -> list[Target]:
    """Targets whose boxes are centre, width and height as parts of their image, from corners in pixels."""
    return [{**t, "boxes": to_centres(t["boxes"], size)} for t, size in zip(targets, sizes, strict=True)]
