"""Scores and selected tokens against what the original LagKV computed, and against the formula written out."""

import json

import numpy as np
import pytest
import torch

from lrsa import LRSAConfig, lag_relative_scores, select_tokens


def golden(shared):
    arrays = np.load(shared / "golden/raw_scoring.npz")
    for case in json.loads((shared / "golden/raw_scoring.json").read_text()):
        found = {part: torch.from_numpy(arrays[f"{case['name']}.{part}"]) for part in ("k", "v", "score")}
        found["kept"] = torch.from_numpy(arrays[f"{case['name']}.topk_local_idx"])
        config = LRSAConfig(case["sink_size"], case["lag_size"], case["k_per_partition"], case["score_v_ratio"])
        yield case["name"], config, found


def test_golden(shared):
    compared = constant = 0
    for name, config, case in golden(shared):
        scores = lag_relative_scores(case["k"], case["v"], config)
        index = select_tokens(case["k"], case["v"], config).index
        windows = case["score"].shape[2]
        assert scores.shape == case["score"].shape and scores.dtype == torch.float32, name
        assert scores.isfinite().all(), name
        if name.startswith("const"):  # LagKV itself yields NaN here
            assert not case["score"].isfinite().all()
            constant += 1
            continue
        torch.testing.assert_close(scores, case["score"], atol=1e-6, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
        local = index - config.sink_size - config.lag_size * torch.arange(windows)[:, None]
        assert torch.equal(local, case["kept"].long().sort(-1).values), name
        compared += 1
    assert (compared, constant) == (13, 2)


def scores_written_out(keys, values, config):
    """The formula of LagKV, one window, head and token at a time."""
    count = (keys.shape[2] - config.sink_size) // config.lag_size
    scores = torch.zeros(*keys.shape[:2], count - 1, config.lag_size)
    for batch, head, window in np.ndindex(*scores.shape[:3]):
        for states, weight in ((keys, 1.0), (values, config.value_weight)):
            start = config.sink_size + window * config.lag_size
            own = states[batch, head, start : start + config.lag_size]
            reference = states[batch, head, start + config.lag_size : start + 2 * config.lag_size]
            deviations = torch.zeros(config.lag_size)
            for token in range(config.lag_size):
                channels = []
                for channel in range(states.shape[3]):
                    low, high = reference[:, channel].min(), reference[:, channel].max()
                    channels.append((own[token, channel] - low) / (high - low) if high > low else torch.tensor(0.0))
                deviations[token] = torch.stack(channels).std()
            scores[batch, head, window] += weight * deviations.softmax(0)
    return scores


@pytest.mark.parametrize("constant", [False, True])
def test_written_out(constant):
    torch.manual_seed(1)
    keys, values = torch.randn(2, 2, 2, 27, 5).unbind()
    if constant:
        keys[:, :, 11:19, 2] = 7.0  # the reference of the first window
    config = LRSAConfig(3, 8, 2, value_weight=0.5)
    torch.testing.assert_close(lag_relative_scores(keys, values, config), scores_written_out(keys, values, config))


def test_nearly_constant_channel_stays_finite():
    keys = torch.randn(1, 1, 20, 4)
    keys[:, :, 12:, 0] = 1e-40 * torch.arange(8)
    assert lag_relative_scores(keys, keys, LRSAConfig(4, 8, 2)).isfinite().all()


@pytest.mark.parametrize("tokens", [1, 4, 12, 19])
def test_short_rows_have_no_scores(tokens):
    states = torch.randn(1, 2, tokens, 4)
    config = LRSAConfig(4, 8, 2)
    assert lag_relative_scores(states, states, config).shape == (1, 2, 0, 8)
    assert select_tokens(states, states, config).index.shape == (1, 2, 0, 2)


def test_ties_keep_the_earlier_token():
    states = torch.ones(1, 1, 3 * 8 + 4, 4)
    index = select_tokens(states, states, LRSAConfig(4, 8, 3)).index
    assert index.tolist() == [[[[4, 5, 6], [12, 13, 14]]]]


def test_no_gradient_through_selection():
    keys = torch.randn(1, 1, 24, 4, requires_grad=True)
    assert not lag_relative_scores(keys, keys, LRSAConfig(0, 8, 2)).requires_grad


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="same batch, heads and tokens"):
        lag_relative_scores(torch.randn(1, 2, 8, 4), torch.randn(1, 2, 9, 4), LRSAConfig(0, 4, 2))
