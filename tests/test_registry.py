"""Models by name."""

import re

import pytest
import torch
from torch import nn

import vitcourse
from vitcourse import create_model, factory, list_models, registry
from vitcourse.registry import Preprocess, register_model

ODD = Preprocess(img_size=32, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear", crop_pct=0.8)


@pytest.fixture
def registered(monkeypatch):
    """A copy of the registry, which a test may add to."""
    monkeypatch.setattr(registry, "_models", dict(registry._registered()))


# ------------------------------------------------------------------------------------------------------------- names


def test_list_models_takes_wildcards_and_sorts():
    names = list_models("vit*")
    assert names == sorted(names)
    assert {"vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge", "vit_base_patch16_224"} <= set(names)
    assert all(name.startswith("vit") for name in names)
    assert list_models("vit_*ny_patch16_???") == ["vit_tiny_patch16_224", "vit_tiny_patch16_384"]
    assert list_models("nothing*") == []
    assert set(names) <= set(list_models())


def test_every_name_builds_a_model_with_what_the_contract_asks():
    with torch.device("meta"):
        for name in list_models("vit*"):
            model = create_model(name, num_classes=3, depth=1)
            side = int(name.split("_")[-1]) if "patch" in name else 224
            assert (model.name, model.img_size, model.preprocess.img_size) == (name, (side, side), side)
            assert model.num_prefix_tokens == 1
            assert model.feature_info[0]["num_chs"] == model.embed_dim
            assert model.head.out_features == 3


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("vit_tiny_patch16_22", "vit_tiny_patch16_224"), ("vit_smal", "vit_small"), ("vit-base", "vit_base")],
)
def test_unknown_names_come_with_the_nearest(name, suggestion):
    with pytest.raises(ValueError, match=rf"model '{name}' is unknown; did you mean .*'{suggestion}'"):
        create_model(name)


def test_an_unknown_name_like_no_other_says_where_to_look():
    with pytest.raises(ValueError, match=r"model 'zzz' is unknown; vitcourse\.list_models\(\) names all"):
        create_model("zzz")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vit_tiny", {"depth": "x"}, "argument 'depth' of model 'vit_tiny' must be int, got 'x'"),
        ("vit_tiny", {"init_values": "x"}, "'init_values' of model 'vit_tiny' must be float | None, got 'x'"),
        ("swin_tiny", {"depths": "2,2"}, "'depths' of model 'swin_tiny' must be Sequence[int], got '2,2'"),
        ("coatnet_0", {"stem_dim": "64"}, "'stem_dim' of model 'coatnet_0' must be int, got '64'"),
    ],
)
def test_text_where_none_belongs_names_the_argument(name, arguments, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        create_model(name, **arguments)


def test_unknown_arguments_come_with_the_nearest():
    with pytest.raises(TypeError, match=r"'vit_tiny' has no argument 'num_clases'; did you mean 'num_classes'"):
        create_model("vit_tiny", num_clases=10)
    with pytest.raises(TypeError, match=r"'vit_tiny' has no argument 'zzz'$"):
        create_model("vit_tiny", zzz=1)


def test_overrides_win_over_the_names_defaults():
    model = create_model("vit_tiny_patch16_224", img_size=(32, 48), patch_size=8, depth=1, in_chans=1)
    assert (model.img_size, model.patch_size, len(model.blocks)) == ((32, 48), (8, 8), 1)
    assert model.model_args == {"img_size": (32, 48), "patch_size": 8, "depth": 1, "in_chans": 1}
    assert model.preprocess == Preprocess(img_size=(32, 48), mean=(0.5,), std=(0.5,), crop_pct=0.9)


@pytest.mark.usefixtures("registered")
def test_register_model():
    register_model("mlp_toy", nn.Linear, ODD, in_features=4, out_features=2)
    assert list_models("mlp*") == ["mlp_toy"]
    model = create_model("mlp_toy", out_features=3)
    assert model.weight.shape == (3, 4)
    assert model.preprocess == ODD
    with pytest.raises(ValueError, match="a model named 'mlp_toy' is registered already"):
        register_model("mlp_toy", nn.Linear)


def test_the_top_level_offers_the_same_and_nothing_unknown():
    assert vitcourse.create_model is factory.create_model
    assert {"create_model", "list_models", "load_weights", "VisionTransformer"} <= set(dir(vitcourse))
    with pytest.raises(AttributeError, match="module 'vitcourse' has no attribute 'creat_model'"):
        _ = vitcourse.creat_model


def test_what_only_files_are_built_by_is_not_listed():
    assert not list_models("*_pretrainer") and list_models("beit_*")
    with pytest.raises(TypeError, match=r"model 'mae_pretrainer' needs encoder, encoder_args; create_model\(FILE\)"):
        create_model("mae_pretrainer")
