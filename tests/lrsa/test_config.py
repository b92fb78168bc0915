import copy
import json
import pickle

import pytest

from lrsa import LRSAConfig


def test_defaults_and_derived():
    config = LRSAConfig()
    assert (config.sink_size, config.lag_size, config.top_k, config.value_weight) == (16, 128, 32, 1.0)
    assert config.keep_ratio == 0.25
    assert config.dense_length == 16 + 256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 129}, "top_k must be between 1 and lag_size (128), got 129: lower top_k or raise lag_size."),
        ({"top_k": 3.5}, "top_k must be a whole number, got 3.5"),
        ({"top_k": True}, "top_k must be a whole number, got True"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"lag_size": -1, "top_k": 1}, "lag_size must be at least 1, got -1"),
        ({"sink_size": "4"}, "sink_size must be a whole number, got '4'"),
        ({"value_weight": -1.0}, "value_weight must be a number from 0 to 1e6, got -1.0"),
        ({"value_weight": 1e39}, "value_weight must be a number from 0 to 1e6, got 1e+39"),
        ({"value_weight": float("nan")}, "value_weight must be a number from 0 to 1e6, got nan"),
        ({"skip_layers": [-1]}, "skip_layers must be a list of layer indices counted from 0, got [-1]"),
        ({"skip_layers": 3}, "skip_layers must be a list"),
    ],
)
def test_problem_is_named(changes, message):
    with pytest.raises(ValueError) as error:
        LRSAConfig(**changes)
    assert message in str(error.value)


def test_all_problems_at_once():
    with pytest.raises(ValueError) as error:
        LRSAConfig(sink_size=-1, lag_size=8, top_k=9)
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(top_k=1), lambda c: c.__setitem__("top_k", 1), lambda c: c.pop("top_k"), lambda c: c.clear(),
        lambda c: c.setdefault("new", 1), lambda c: c.popitem(), lambda c: c.__delitem__("top_k"),
        lambda c: c.__ior__({"top_k": 1}),
    ],
)  # fmt: skip
def test_cannot_be_changed_in_place(change):
    config = LRSAConfig()
    with pytest.raises(TypeError, match="use config"):
        change(config)
    assert config == LRSAConfig() and dict(config) == dict(LRSAConfig())


def test_save_and_load(tmp_path):
    config = LRSAConfig(4, 32, 8, 0.5, (3, 1))
    path = config.save_pretrained(tmp_path / "adapter")
    assert json.loads(path.read_text()) == {
        "sink_size": 4,
        "lag_size": 32,
        "top_k": 8,
        "value_weight": 0.5,
        "skip_layers": [1, 3],
    }
    assert LRSAConfig.from_pretrained(tmp_path / "adapter") == config


def test_load_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"holds no lrsa_config\.json"):
        LRSAConfig.from_pretrained(tmp_path)
    path = tmp_path / "lrsa_config.json"
    path.write_text('{"lag_sise": 3}')
    with pytest.raises(ValueError, match=r"config\.json: lag_sise is an unknown LRSA setting: allowed are sink_size"):
        LRSAConfig.from_pretrained(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"lrsa_config\.json"):
        LRSAConfig.from_pretrained(tmp_path)


def test_travels_as_plain_values_and_stays_as_it_is():
    config = LRSAConfig(skip_layers=(1,))
    assert json.loads(json.dumps(config)) == config.to_dict()
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    assert len({config, copy.deepcopy(config)}) == 1
    with pytest.raises(TypeError, match="replace"):
        config["top_k"] = 8
    with pytest.raises(AttributeError):
        config.top_k = 8
    assert config.replace(top_k=8).top_k == 8 and config.top_k == 32


def test_keep_ratio_sets_top_k():
    assert LRSAConfig().with_keep_ratio(0.5).top_k == 64
    assert LRSAConfig(lag_size=16, top_k=4).with_keep_ratio(0.01).top_k == 1
    with pytest.raises(ValueError, match="keep_ratio"):
        LRSAConfig().with_keep_ratio(0)


def test_kept_length_counts_what_the_rule_keeps():
    config = LRSAConfig(4, 8, 2)
    assert [config.kept_length(n) for n in (0, 3, 19, 20, 27, 28)] == [0, 3, 19, 20 - 6, 27 - 6, 28 - 12]
    assert config.for_layer(0).kept_length(1000) == config.kept_length(1000)
    assert config.replace(skip_layers=(1,)).for_layer(1).kept_length(1000) == 1000
