"""The picture of the README, from the shipped weights and the committed results.

python -m benchmarks.overview
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from benchmarks.common import read_results
from vitcourse import create_model, paths, plot
from vitcourse.data import open_dataset, photo
from vitcourse.vit import record_attention

PICTURE = Path(__file__).resolve().parent.parent / ".github" / "overview.png"


def main() -> None:
    plot.use_style()
    figure = plt.figure(figsize=(12, 3.7))
    left, middle, right = figure.subfigures(1, 3, width_ratios=(1, 1.1, 1.25))

    ax = left.subplots()
    plot.show_image(ax, photo("cat"), "an image becomes tokens")
    plot.draw_grid(ax, (256, 256), 32)

    model = create_model(paths.data_dir() / "weights" / "fashion_mnist_vit.safetensors").eval()
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (model.preprocess.mean, model.preprocess.std))
    test_set = open_dataset("fashion_mnist_subset", "test")
    items = torch.stack([test_set[i][0].float() / 255 for i in (1, 4, 9)])
    with torch.no_grad(), record_attention(model) as weights:
        model((items - mean) / std)
    maps = weights[-1][:, :3, 0, model.num_prefix_tokens :].unflatten(-1, model.grid_size)
    middle.suptitle("three heads of a trained model", fontsize=12)
    for row, item, heads in zip(middle.subplots(3, 4), items, maps, strict=True):
        plot.show_image(row[0], item)
        for ax, head in zip(row[1:], heads, strict=True):
            plot.show_attention(ax, item, head)

    ax = right.subplots()
    rows = read_results("lesson_vit")["rows"]
    sizes = {500: "500 images", 2000: "2000 images", 10000: "base"}
    for label, names, colour in [
        ("small CNN", [f"cnn, {n} images, equal time" for n in sizes], plot.ORANGE),
        ("small ViT", list(sizes.values()), plot.BLUE),
    ]:
        runs = [[100 * row["accuracy"] for row in rows if row["name"] == name] for name in names]
        plot.spread(ax, list(sizes), runs, label=label, color=colour)
    ax.set_xscale("log")
    ax.set_xticks(list(sizes), [f"{n:,d}" for n in sizes])
    ax.minorticks_off()
    ax.set(xlabel="training images", ylabel="accuracy, %", title="why pre-training: equal training time")
    ax.legend()
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=90)
    print(f"wrote {PICTURE.name}")


if __name__ == "__main__":
    main()
