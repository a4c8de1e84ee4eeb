"""What the lessons compare a transformer with."""

from torch import nn


def small_cnn(in_chans: int = 1, num_classes: int = 10, widths: tuple[int, ...] = (32, 64, 128)) -> nn.Sequential:
    """A plain convolutional network: 3×3 convolutions with batch norm, halving the image between them, mean, linear.

    Images (B, C, H, W) with sides of at least ``2 ** (len(widths) - 1)`` pixels to logits (B, num_classes).

    >>> sum(p.numel() for p in small_cnn().parameters())
    94186
    """
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Conv2d(in_chans, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if width != widths[-1] else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        in_chans = width
    return nn.Sequential(*layers, nn.Linear(in_chans, num_classes))
