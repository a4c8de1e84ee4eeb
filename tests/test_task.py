"""Tasks of one's own: what is counted, remembered, compared and frozen in a run."""

import csv
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitcourse.inference import frozen_modules
from vitcourse.train import Classification, Task, TrainConfig, TrainingError, fit
from vitcourse.train.task import check_task, is_better
from vitcourse.weights import read_metadata

sys.path.insert(0, str(Path(__file__).parent))
from _tasks import COUNTED, Nearness, Points, TwoViews, Views, regressor


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, 3))


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def run(model: nn.Module, dataset, config: TrainConfig, task: Task, **options):
    return fit(model, dataset, options.pop("val_set", None), config, task=task, progress=False, **options)


# ------------------------------------------------------------------------------------------------- what is counted


def test_a_step_takes_the_mean_over_all_that_is_counted():
    """One step of SGD, redone by hand: the sum over all points of the batch, divided by their number once."""
    model, by_hand, data = regressor(), regressor(), Points()
    config = replace(COUNTED, batch_size=37, max_steps=1, optimizer="sgd", momentum=0.0, ema=0.0, accum=4, clip_grad=0)
    history = run(model, data, replace(config, weight_decay=0.0, warmup=0.0), Nearness())
    errors = torch.cat([(by_hand(x) - points).square().sum(-1) for x, points in data])
    errors.mean().backward()
    with torch.no_grad():
        for p in by_hand.parameters():
            p -= config.lr * p.grad
    torch.testing.assert_close(weights(model), weights(by_hand), rtol=1e-12, atol=1e-12)
    assert history[0]["train_loss"] == pytest.approx(errors.mean().item(), rel=1e-6)
    assert history[0]["grad_norm"] == pytest.approx(
        torch.cat([p.grad.flatten() for p in by_hand.parameters()]).norm().item(), rel=1e-6
    )


@pytest.mark.parametrize("accum", [2, 3, 8])
def test_accumulation_is_exact_where_counts_differ(accum):
    data, models, histories = Points(), [regressor(), regressor()], []
    for model, config in zip(models, (COUNTED, replace(COUNTED, accum=accum)), strict=True):
        histories.append(run(model, data, config, Nearness(), val_set=Points(11)))
    assert (weights(models[0]) - weights(regressor())).abs().max() > 1e-2
    torch.testing.assert_close(weights(models[1]), weights(models[0]), rtol=1e-10, atol=1e-11)
    for name in ("train_loss", "grad_norm", "val_loss"):
        assert [r[name] for r in histories[1]] == pytest.approx([r[name] for r in histories[0]], rel=1e-6)


def test_what_a_sample_counts_for_changes_nothing_but_the_rounding():
    class Many(Nearness):
        per_sample = 100.0

    models = [regressor(), regressor()]
    for model, task in zip(models, (Nearness(), Many()), strict=True):
        run(model, Points(), COUNTED, task)
    torch.testing.assert_close(weights(models[1]), weights(models[0]), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("accum", [1, 2])
def test_a_batch_that_counts_nothing_changes_nothing(accum, tmp_path):
    model, empty = regressor(), Points(12, most=0)
    config = TrainConfig(batch_size=4, epochs=2, weight_decay=0.0, accum=accum, device="cpu")
    history = run(model, empty, config, Nearness(), val_set=empty, out_dir=tmp_path)
    assert torch.equal(weights(model), weights(regressor()))
    assert history.column("train_loss") == [0.0, 0.0] and history.column("val_loss") == []
    assert (tmp_path / "final.safetensors").exists() and not (tmp_path / "best.safetensors").exists()


def test_the_default_evaluation_is_the_mean_over_all_that_is_counted():
    model, data = regressor(), Points(23)
    errors = torch.cat([(model(x) - points).square().sum(-1) for x, points in data])
    for size in (1, 5, 512):
        found = Nearness().evaluate(model, data, TrainConfig(eval_batch_size=size, device="cpu"))
        assert found["val_loss"] == pytest.approx(errors.mean().item(), rel=1e-12)
    assert model.training


def test_a_step_that_counts_less_is_divided_by_the_least():
    """A detector's batch without objects, and an evaluation of such: the sum itself."""

    class Everywhere(Nearness):
        least_count = 8.0

        def loss(self, model, batch):
            return model(batch[0]["x"]).square().sum(), torch.tensor(0)

    data = Points(6, most=0)
    expected = regressor()(data.x).square().sum().item() / 8
    for accum in (1, 3):
        model, config = regressor(), TrainConfig(batch_size=6, max_steps=1, accum=accum, device="cpu")
        history = run(model, data, config, Everywhere())
        assert history[0]["train_loss"] == pytest.approx(expected, rel=1e-6)
    assert Everywhere().evaluate(regressor(), data)["val_loss"] == pytest.approx(expected, rel=1e-12)


def test_a_running_mean_has_the_buffers_that_a_task_sets_after_a_step():
    class Counting(Nearness):
        def after_step(self, model, step, total):
            model.steps.fill_(step + 1)

    model = regressor()
    model.register_buffer("steps", torch.zeros(()))
    run(model, Points(), replace(COUNTED, max_steps=2), Counting())
    assert model.steps == 2


def test_a_loss_must_depend_on_the_model():
    class Constant(Nearness):
        def loss(self, model, batch):
            return torch.zeros(()), 0

    with pytest.raises(ValueError, match="loss of task 'nearness' does not depend on a trained parameter"):
        run(regressor(), Points(), COUNTED, Constant())

    class Several(Nearness):
        def loss(self, model, batch):
            return model(batch[0]["x"]).sum(0), 1

    with pytest.raises(ValueError, match=r"loss of task 'nearness' has shape \(2,\); return one number"):
        run(regressor(), Points(), COUNTED, Several())


def test_who_says_that_samples_are_counted_must_count_them():
    class Twice(TwoViews):
        def loss(self, model, batch):
            total, count = super().loss(model, batch)
            return total, 2 * count

    with pytest.raises(ValueError, match="task 'two_views' counts 16 of 8 samples"):
        run(encoder(), Views(), TrainConfig(batch_size=8, device="cpu"), Twice())


# -------------------------------------------------------------------------------------------- what is remembered


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("workers", [0, 1])
def test_an_interrupted_run_with_a_momentum_encoder_ends_in_the_same_bits(workers, tmp_path):
    config = TrainConfig(epochs=3, batch_size=8, lr=1e-2, checkpoint_every=2, device="cpu", ema=0.9)

    class Interrupted(TwoViews):
        def after_step(self, model, step, total):
            super().after_step(model, step, total)
            if step == 4:
                raise Interrupt

    whole, model, again = encoder(), encoder(), encoder()
    tasks = TwoViews(), Interrupted(), TwoViews()
    expected = run(whole, Views(), config, tasks[0], val_set=Views(9))
    with pytest.raises(Interrupt):
        run(model, Views(), config, tasks[1], val_set=Views(9), out_dir=tmp_path)
    history = run(
        again, Views(), replace(config, num_workers=workers), tasks[2], val_set=Views(9), out_dir=tmp_path, resume=True
    )
    assert torch.equal(weights(again), weights(whole)) and not torch.equal(weights(whole), weights(encoder()))
    assert torch.equal(weights(tasks[2].teacher), weights(tasks[0].teacher))
    assert torch.equal(tasks[2].queue, tasks[0].queue)
    assert [row["train_loss"] for row in history] == [row["train_loss"] for row in expected]
    assert [row["val_loss"] for row in history] == [row["val_loss"] for row in expected]


def test_an_interrupted_run_with_counts_ends_in_the_same_bits(tmp_path):
    class Interrupted(Nearness):
        def after_step(self, model, step, total):
            if step == 4:
                raise Interrupt

    config, whole, again = replace(COUNTED, checkpoint_every=2, accum=3), regressor(), regressor()
    run(whole, Points(), config, Nearness())
    with pytest.raises(Interrupt):
        run(regressor(), Points(), config, Interrupted(), out_dir=tmp_path)
    run(again, Points(), config, Nearness(), out_dir=tmp_path, resume=True)
    assert torch.equal(weights(again), weights(whole))


def test_a_run_is_not_continued_with_another_task(tmp_path):
    class Other(Nearness):
        name = "other"

    class Shifted(Nearness):
        def settings(self):
            return {"shift": 2}

    config = replace(COUNTED, epochs=1)
    run(regressor(), Points(), config, Nearness(), out_dir=tmp_path)
    for task, message in ((Other(), "task: 'nearness' then, 'other' now"), (Shifted(), "shift: None then, 2 now")):
        with pytest.raises(ValueError, match=message):
            run(regressor(), Points(), config, task, out_dir=tmp_path, resume=True)


def test_a_run_from_before_there_were_tasks_can_be_continued(tmp_path):
    config = replace(COUNTED, epochs=1)
    run(regressor(), Points(), config, Nearness(), out_dir=tmp_path)
    file = tmp_path / "config.json"
    kept = json.loads(file.read_text(encoding="utf-8"))
    assert kept["about"].pop("task") == "nearness"
    file.write_text(json.dumps(kept), encoding="utf-8")
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    del state["task"]
    torch.save(state, tmp_path / "last.pt")
    run(regressor(), Points(), config, Nearness(), out_dir=tmp_path, resume=True)


# ------------------------------------------------------------------------------------------------- what is recorded


def test_the_least_is_the_best_where_the_task_says_so(tmp_path):
    class Scripted(Nearness):
        values = iter((3.0, 1.0, math.nan, 2.0))

        def evaluate(self, *args, **processes):
            return {"val_loss": 7.0, "furthest": next(self.values)}

    history = run(
        regressor(), Points(), replace(COUNTED, epochs=4), Scripted(), val_set=Points(), out_dir=tmp_path / "run"
    )
    best, final = (read_metadata(tmp_path / "run" / f"{name}.safetensors") for name in ("best", "final"))
    assert (best["epoch"], best["furthest"], best["task"]) == (2, 1.0, "nearness")
    assert (final["epoch"], final["furthest"]) == (4, 2.0)
    with open(tmp_path / "run" / "metrics.csv", encoding="utf-8") as file:
        (header, *rows) = list(csv.reader(file))
    assert header == list(history[0])
    assert header[3:] == ["train_loss", "grad_norm", "val_loss", "furthest", "seconds", "images_per_second"]
    assert len(rows) == 4


def test_a_task_that_chooses_nothing_keeps_only_the_final_weights(tmp_path):
    class Undecided(Nearness):
        best = None

    run(regressor(), Points(), replace(COUNTED, epochs=1), Undecided(), val_set=Points(), out_dir=tmp_path)
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == ["final.safetensors"]


def test_better_means_more_or_less():
    assert is_better(1.0, None, "min") and not is_better(math.nan, None, "min")
    assert is_better(0.5, 1.0, "min") and not is_better(1.0, 1.0, "min") and not is_better(math.nan, 1.0, "min")
    assert is_better(2.0, 1.0, "max") and not is_better(math.nan, 1.0, "max")


def test_classification_by_name_is_what_fit_does_unasked():
    from test_train import pictures, tiny

    models = [tiny(), tiny()]
    config = TrainConfig(epochs=2, batch_size=8, mixup=0.5, hflip=True, device="cpu")
    rows = [
        fit(model, pictures(), pictures(), config, task=task, progress=False)
        for model, task in zip(models, (None, Classification()), strict=True)
    ]
    assert torch.equal(weights(models[0]), weights(models[1]))
    assert rows[0].column("val_accuracy") == rows[1].column("val_accuracy")
    images, labels = torch.rand(6, 3, 8, 8), torch.arange(6) % 5
    task = Classification()
    task.config = replace(config, label_smoothing=0.0)
    total, count = task.loss(models[0], (images, labels))
    assert count == 6
    torch.testing.assert_close(total, F.cross_entropy(models[0](images), labels, reduction="sum"))


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("task", "config", "world", "message"),
    [
        (TwoViews, {"accum": 2}, 1, "task 'two_views' compares .* use --accum 1"),
        (TwoViews, {}, 2, "task 'two_views' compares .* 2 processes would part"),
        (Nearness, {"mixup": 0.2, "hflip": True}, 1, "task 'nearness' does not heed hflip, mixup"),
    ],
)
def test_what_a_task_cannot_do_is_refused(task, config, world, message):
    with pytest.raises(ValueError, match=message):
        check_task(task(), TrainConfig(**config), world)


def test_a_loss_that_gathers_runs_in_several_processes():
    task = TwoViews()
    task.gathers_batch = True
    check_task(task, TrainConfig(), 2)


def test_refusals_come_before_the_run():
    with pytest.raises(ValueError, match="use --accum 1"):
        run(encoder(), Views(), TrainConfig(accum=2, batch_size=8), TwoViews())
    with pytest.raises(ValueError, match="leave out loss_fn and eval_fn"):
        run(encoder(), Views(), TrainConfig(batch_size=8), TwoViews(), loss_fn=lambda *_: 0)
    with pytest.raises(ValueError, match="loader 'memory' is for pairs"):
        run(encoder(), Views(), TrainConfig(batch_size=8, loader="memory", device="cpu"), TwoViews())
    data = Points()
    data.points = [torch.zeros(2, 3)] * len(data)
    with pytest.raises(ValueError, match=r"train_set: points have shape \(2, 3\); give \(K, 2\)"):
        run(regressor(), data, COUNTED, Nearness())
    with pytest.raises(ValueError, match="val_set is empty"):
        run(regressor(), Points(), COUNTED, Nearness(), val_set=Points(0))

    class Sideways(Nearness):
        best = ("furthest", "least")

    with pytest.raises(ValueError, match="give \\(metric, 'max'\\) or"):
        run(regressor(), Points(), COUNTED, Sideways())
    with pytest.raises(NotImplementedError, match="override loss"):
        run(regressor(), Points(), COUNTED, type("Bare", (Nearness,), {"loss": Task.loss})())


def test_bad_numbers_are_found_in_any_sample():
    data = Points()
    data.points[2] = data.points[2] * math.nan
    with pytest.raises(TrainingError, match="images with NaN"):
        run(regressor(), data, COUNTED, Nearness())


# -------------------------------------------------------------------------------------------------- what is frozen


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm, self.other = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.BatchNorm1d(5)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(5, 2)
        self.modes: list[tuple[bool, ...]] = []

    def forward(self, x):
        self.modes.append((self.norm.training, self.other.training, self.drop.training))
        return self.head(self.drop(self.other(self.norm(self.stem(x)))))


def normed() -> Norms:
    return Norms().double()


def modes_in_training(model: Norms) -> set[tuple[bool, ...]]:
    model.modes.clear()
    run(model, Points(), replace(COUNTED, ema=0.0, epochs=2), Nearness(), val_set=Points(9))
    return {mode for mode in model.modes if any(mode)}


def test_what_a_caller_has_frozen_stays_frozen():
    model = normed()
    model.norm.eval().requires_grad_(False)
    before = {k: v.clone() for k, v in model.norm.state_dict().items()}
    assert modes_in_training(model) == {(False, True, True)}
    assert all(torch.equal(v, before[k]) for k, v in model.norm.state_dict().items())
    assert model.other.num_batches_tracked == 6
    # It is in evaluation mode as a whole now. A second run, of all that is not frozen, is the same in this.
    assert not any(module.training for module in model.modules())
    assert modes_in_training(model) == {(False, True, True)}
    assert all(torch.equal(v, before[k]) for k, v in model.norm.state_dict().items())


def test_a_model_in_evaluation_mode_trains_whole():
    assert modes_in_training(normed().eval()) == {(True, True, True)}


def test_a_part_in_evaluation_mode_stays_so_without_being_a_norm():
    model = normed()
    model.drop.eval()
    assert modes_in_training(model) == {(True, True, False)}
    assert frozen_modules(model) == []


def test_gradients_of_before_and_of_parameters_in_no_group_do_not_count():
    """Clipping is by the norm of what is trained, in this step."""
    models = [regressor(), regressor()]
    models[0](torch.ones(1, 4).double()).sum().backward()
    norms = []
    for model in models:
        groups = [{"params": list(model[2].parameters())}]
        history = run(model, Points(), replace(COUNTED, epochs=1, ema=0.0), Nearness(), groups=groups)
        norms.append(history[0]["grad_norm"])
        assert model[0].weight.grad is None
    assert torch.equal(weights(models[0]), weights(models[1])) and norms[0] == norms[1]
    alone = regressor()
    alone[0].requires_grad_(False)
    run(
        alone,
        Points(),
        replace(COUNTED, epochs=1, ema=0.0),
        Nearness(),
        groups=[{"params": list(alone[2].parameters())}],
    )
    assert torch.equal(weights(alone), weights(models[0]))
