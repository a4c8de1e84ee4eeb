"""The harness measures what it says, and the README says what was measured."""

import json
import math
from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    common,
    dispatch,
    importtime,
    lesson_efficient_attention,
    lesson_hierarchical,
    lesson_hybrid,
    lesson_tuning,
    lesson_vit,
    models,
    pruning,
    scenes,
    spinning,
    tables,
)
from benchmarks.sweeps import each_seed, macs, missing, sweep
from vitcourse import create_model
from vitcourse.hardware.flash import ops


@pytest.fixture
def results(tmp_path, monkeypatch):
    for module in (common, tables):
        monkeypatch.setattr(module, "results_dir", lambda: tmp_path)
    return tmp_path


def test_the_readme_shows_the_committed_results():
    text = tables.README.read_text(encoding="utf-8")
    assert tables.fill(text) == text, "run python -m benchmarks.tables"


def test_candidates_run_in_turns_in_alternating_order():
    ran = []
    taken = common.in_turns({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, "cpu", rounds=4, warmup=0)
    assert "".join(ran[-8:]) in ("baabbaab", "abbaabba")
    assert [len(times) for times in taken.values()] == [4, 4]


def test_the_ratio_is_taken_round_by_round():
    noisy = [1.0, 5.0, 1.0, 9.0, 2.0]
    found = common.ratio([1.5 * t for t in noisy], noisy)
    assert found == pytest.approx({"ratio": 1.5, "ratio_low": 1.5, "ratio_high": 1.5})


def test_results_say_where_with_what_and_when(results):
    assert common.read_results("toy") is None
    path = common.write_results("toy", [{"name": "a", "seconds": 0.123456, "n": 123456}])
    assert path == results / "toy.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    assert set(record) == {"benchmark", "device", "versions", "date", "rows"}
    assert record["rows"] == [{"name": "a", "seconds": 0.1235, "n": 123456}]
    assert record["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert f"{torch.get_num_threads()} thread" in record["device"]


def counted(step, device, number):
    """In place of a time, which depends on the machine: the operations of a step."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", models.STEPS)
def test_models_are_compared_and_earlier_rows_kept(monkeypatch, results, kind):
    tiny = partial(create_model, img_size=32, depth=1)
    monkeypatch.setattr(models, "create_model", tiny)
    monkeypatch.setattr(models, "build_peer", lambda name: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)))
    monkeypatch.setattr(common, "seconds", counted)
    pair = models.Pair("vit_tiny_patch16_224", models.PAIRS[0].peer, 2, 2, img_size=32)
    row = models.measure(pair, kind, "eager", "cpu", rounds=3)
    assert row["ratio"] > 1, "a transformer costs more than a linear layer"
    assert (row["batch"], row["rounds"], row["step"]) == (2, 3, kind)

    common.write_results("models_cpu", models.merged("models_cpu", [row], "cpu"))
    again = models.merged("models_cpu", [{**row, "mode": "compiled"}], "cpu")
    assert [r["mode"] for r in again] == ["eager", "compiled"]
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(torch_threads + 1)
    try:
        assert models.merged("models_cpu", [row], "cpu") == [row], "rows of another device are not mixed in"
    finally:
        torch.set_num_threads(torch_threads)


@pytest.mark.parametrize("peer", ["timm:swin_tiny_patch4_window7_224", "torchvision:swin_t"])
def test_peers_are_built_without_stochastic_depth(peer):
    with torch.device("meta"):
        modules = [m for m in models.build_peer(peer).modules() if type(m).__name__ in ("DropPath", "StochasticDepth")]
    assert not any(m.p if hasattr(m, "p") else m.drop_prob for m in modules)


def test_tables_are_made_from_results(results):
    row = {"model": "vit", "peer": "timm:vit", "step": "inference", "mode": "eager", "batch": 8, "ratio": 0.987}
    common.write_results("models_cpu", [row])
    common.write_results("importtime", [{"statement": "import x", "seconds": 0.01, "import_torch_seconds": 2.0}])
    text = "<!-- table:models -->\nold\n<!-- /table -->\nkept\n<!-- table:importtime -->\n<!-- /table -->\n"
    filled = tables.fill(text)
    assert "| `vit` | timm `vit` | 8 | 0.99 |  |  |  |" in filled
    assert "| `import x` | 0.010 s | 2.00 s |" in filled
    assert "old" not in filled
    assert "kept" in filled
    assert tables.fill(filled) == filled
    row = {
        "head_dim": 64,
        "n": 197,
        "batch": 256,
        "backward": True,
        "best_peer": "cudnn",
        "speedup": 1.25,
        "target": 1.3,
    }
    row |= {"times_the_floor": 1.5, "views_speedup": 0.99, "inputs": "packed", "bias": False}
    assert "not measured yet" in tables.attention_table().lower()
    common.write_results("attention", [row, {**row, "inputs": "separate"}])
    expected = "| 64 | 197 | 256 | forward + backward | cudnn | 1.25 | 1.3 | 1.50 | sdpa |"
    assert tables.attention_table().count("| 64 ") == 1
    assert expected in tables.attention_table()
    row = {"capability": 90, "dtype": "bf16", "registers": 200, "spills": 0, "shared_kib": 100.2}
    common.write_results("aot", [row, {**row, "spills": 4}, {**row, "registers": 255, "dtype": "fp32"}])
    assert "| sm_90 | `wgmma.mma_async` | 2 | 200 | 1 (≤ 4 words) | 100 of 227 KiB |" in tables.aot_table()
    with pytest.raises(ValueError, match="there is no table 'zzz'; the tables are attention, aot, models"):
        tables.fill("<!-- table:zzz -->\n<!-- /table -->")


@pytest.mark.parametrize(
    ("step", "passes"), [("inference", ["forward"]), ("forward + backward", ["forward", "backward"])]
)
def test_the_operator_and_the_direct_way_do_the_same_work(monkeypatch, step, passes):
    """What ``benchmarks/dispatch.py`` compares: the same kernels would be launched, with as many arguments."""
    launched = []
    monkeypatch.setattr(dispatch, "CALLS", 1)
    monkeypatch.setattr(ops, "_launch", lambda plan, *arguments: launched.append((plan.kernel, len(arguments))))
    ran = {}
    for name, work in dispatch.candidates(step).items():
        launched.clear()
        work()
        ran[name] = list(launched)
    assert ran["operator"] == ran["direct"]
    assert list(dict.fromkeys(kernel.partition("_")[0] for kernel, _ in ran["direct"])) == passes


def test_import_seconds_are_those_after_torch():
    torch_seconds, own_seconds = importtime.import_seconds("time.process_time = lambda: between + 1000")
    assert own_seconds == 1000 > torch_seconds > 0


class Waiting:
    """In place of a process that trains: takes a second for each program, and nine more in the second round."""

    def __init__(self, told):
        self.stdin, self.stdout, self.told, self.asked = self, self, told, ""

    def write(self, text):
        self.asked += text

    def readline(self):
        programs, steps = map(int, self.asked.split())
        self.asked = ""
        self.told.append((self, programs, steps))
        earlier = self.told.count((self, programs, steps)) - 1
        return f"{programs + 9 * (earlier == 1)}\n"

    def flush(self):
        pass

    close = wait = flush


def test_programs_that_wait_are_measured_in_turns(monkeypatch):
    told = []
    monkeypatch.setattr(spinning, "start", lambda setting: Waiting(told))
    rows = spinning.measure(steps=60, rounds=3)
    assert [(row["setting"], row["programs"]) for row in rows] == [(s, k) for k in (1, 2, 3) for s in spinning.SETTINGS]
    assert [(row["fastest"], row["seconds"], row["slowest"]) for row in rows] == [
        (k, k, k + 9) for k in (1, 2, 3) for _ in spinning.SETTINGS
    ]
    warm, first, second = told[:3], told[3:12], told[12:21]
    assert all(call[1:] == (1, 1) for call in warm) and all(call[2] == 60 for call in told[3:])
    assert first == second[::-1], "in alternating order"


def test_rendered_data_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "AT_ONCE", 1)
    rows = scenes.measure(1, tmp_path)
    assert [row["data"] for row in rows[:5]] == ["scenes"] * 3 + ["moving"] * 2
    assert all(row["items_per_second"] > 0 for row in rows)


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["sweep"])
    monkeypatch.setattr(common, "results_dir", lambda: tmp_path)
    return tmp_path


def test_an_interrupted_sweep_goes_on_where_it_was(scratch):
    settings, trained = [{"name": "a", "lr": 0.1}, {"name": "a", "lr": 0.3}], []

    def train(run):
        if len(trained) == 4:
            trained.append("interrupted")
            raise KeyboardInterrupt
        trained.append((run["lr"], run["seed"]))
        return {"accuracy": run["lr"] + run["seed"]}

    with pytest.raises(KeyboardInterrupt):
        sweep("trial", "", each_seed(settings), train)
    assert not (scratch / "trial.json").exists()
    with (scratch / "runs" / "trial.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"name": "a", "lr"')  # cut off while it was written
    sweep("trial", "", each_seed(settings), train)
    assert [run for run in trained if run != "interrupted"] == [(lr, seed) for seed in (0, 1, 2) for lr in (0.1, 0.3)]
    rows = common.read_results("trial")["rows"]
    assert [row["accuracy"] for row in rows] == [0.1, 0.3, 1.1, 1.3, 2.1, 2.3]
    assert len((scratch / "runs" / "trial.jsonl").read_text(encoding="utf-8").splitlines()) == 6


def test_a_sweep_may_ask_for_more_once_it_knows_what_came_out(scratch, monkeypatch):
    def wanted(rows):
        for name in ("a", "b"):
            lr = 1
            while not any(row["accuracy"] > 0.5 for row in rows if row["name"] == name):
                yield {"name": name, "lr": lr, "seed": 0}
                lr *= 10

    def train(run):
        return {"accuracy": run["lr"] / (100 if run["name"] == "a" else 10)}

    monkeypatch.setattr("sys.argv", ["sweep", "--runs", "4"])
    sweep("trial", "", wanted, train)
    assert common.read_results("trial") is None, "no results of a part, unless it is whole"
    monkeypatch.setattr("sys.argv", ["sweep", "--runs", "0"])
    sweep("trial", "", wanted, train, whole="name")
    assert [(row["name"], row["lr"]) for row in common.read_results("trial")["rows"]] == [
        ("a", n) for n in (1, 10, 100)
    ]
    monkeypatch.setattr("sys.argv", ["sweep"])
    sweep("trial", "", wanted, train, whole="name")
    found = [(row["name"], row["lr"]) for row in common.read_results("trial")["rows"]]
    assert found == [("a", 1), ("a", 10), ("a", 100), ("b", 1), ("b", 10)]


COMMITTED = {
    "lesson_hierarchical": each_seed([{"name": name} for name in lesson_hierarchical.MODELS]),
    "lesson_hybrid": each_seed(lesson_hybrid.settings()),
    "lesson_efficient_attention": each_seed(
        [
            {"name": name, "epochs": n}
            for n in lesson_efficient_attention.EPOCHS
            for name in lesson_efficient_attention.MIXERS
        ]
    ),
    "lesson_vit": lesson_vit.wanted,
}


@pytest.mark.parametrize("name", COMMITTED)
def test_the_committed_results_are_all_that_a_sweep_wants(name):
    rows = common.read_results(name)["rows"]
    asked = list(COMMITTED[name](rows))
    assert list(missing(asked, rows)) == []
    assert len(asked) == len(rows)


def test_the_committed_contenders_are_tuned_to_the_end(monkeypatch):
    rows = common.read_results("lesson_tuning")["rows"]
    names = {row["name"] for row in rows}
    finished = [contender for contender in lesson_tuning.CONTENDERS if contender.name in names]
    monkeypatch.setattr(lesson_tuning, "CONTENDERS", finished)
    asked = list(lesson_tuning.wanted(rows))
    assert asked
    assert list(missing(asked, rows)) == []


@pytest.mark.parametrize(
    ("module", "key"),
    [(lesson_hierarchical, "name"), (lesson_hybrid, "model"), (lesson_efficient_attention, "name")],
)
def test_multiply_adds_are_counted_whatever_kernel_computes_them(module, key):
    """PyTorch's counter does not know all fused kernels of a CPU; which, depends on its version."""
    rows = common.read_results(module.__name__.rpartition(".")[2])["rows"]
    committed = {row[key]: row["macs"] for row in rows}
    assert {name: macs(module.make_model(name)) for name in committed} == committed


# -------------------------------------------------------------------------------------------- the contenders' settings


@pytest.mark.parametrize("best", [1e-4, 3e-3, 3.0])
def test_a_range_grows_until_the_best_lies_inside(best):
    """With a pretended accuracy: a hill over the rate, and less the more decay."""
    rows = []
    for wanted in missing(lesson_tuning.wanted(rows), rows):
        accuracy = -abs(math.log10(wanted["lr"] / best)) - wanted["weight_decay"] / 100
        rows.append({**wanted, "accuracy": accuracy, "loss": 0.0})
    for contender in lesson_tuning.CONTENDERS:
        found = lesson_tuning.chosen(rows, contender.name)
        tuned = [row for row in rows if (row["name"], row["stage"]) == (contender.name, "tune")]
        assert found["lr"] == best and found["weight_decay"] == min(row["weight_decay"] for row in tuned)
        assert max(row["lr"] for row in tuned) > best
        assert min(row["lr"] for row in tuned) < best or best == lesson_tuning.RATES[0]
        tested = [row for row in rows if (row["name"], row["stage"]) == (contender.name, "test")]
        assert {(row["lr"], row["weight_decay"]) for row in tested} <= {(found["lr"], found["weight_decay"])}
        assert contender.in_lesson_vit or [row["seed"] for row in tested] == [0, 1, 2]
    assert list(missing(lesson_tuning.wanted(rows), rows)) == []


def test_settings_are_chosen_by_training_images():
    rest, held_out = lesson_tuning.parts()
    assert (len(rest), len(held_out)) == (8000, 2000)
    assert not set(rest.indices) & set(held_out.indices)
    assert rest.dataset is held_out.dataset and rest.targets == [rest.dataset.targets[i] for i in rest.indices]
    assert Counter(rest.targets) == dict.fromkeys(range(10), 800)


def test_the_product_of_sizes_is_that_of_the_function():
    """Weights of a unit made larger on one side and smaller on the other: the same model, the same worth."""
    model = create_model("vit_tiny", img_size=32, patch_size=16, depth=2)
    before, summed = pruning.products(model), pruning.magnitudes(model)
    with torch.no_grad():
        mlp, attn = model.blocks[0].mlp, model.blocks[1].attn
        mlp.fc1.weight[5] *= 8
        mlp.fc2.weight[:, 5] /= 8
        attn.qkv.weight.unflatten(0, (3, attn.num_heads, -1))[2, 1] *= 8
        attn.proj.weight.unflatten(1, (attn.num_heads, -1))[:, 1] /= 8
    after = pruning.products(model)
    assert before.keys() == after.keys() == pruning.structure(model).keys()
    for name, scores in before.items():
        torch.testing.assert_close(after[name], scores)
    assert pruning.magnitudes(model)["blocks.0.mlp"][5] > 4 * summed["blocks.0.mlp"][5]
