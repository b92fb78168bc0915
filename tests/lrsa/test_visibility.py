import pytest
import torch

from lrsa import LRSAConfig, select_tokens
from lrsa.visibility import visible


@pytest.mark.parametrize("sink", [0, 1, 3])
def test_rule_written_out(sink):
    """Every pair of query and key, by the sentence that defines the rule."""
    torch.manual_seed(0)
    config = LRSAConfig(sink, 4, 2)
    keys = torch.randn(1, 2, 23, 8)
    selection = select_tokens(keys, keys, config)
    mask = visible(selection, torch.arange(23), 23, config)
    dropped = 0
    for head in range(2):
        kept = set(selection.index[0, head].flatten().tolist())
        for query in range(23):
            for key in range(23):
                near = key >= sink and query >= sink and (query - sink) // 4 - (key - sink) // 4 <= 1
                expected = key <= query and (key < sink or near or key in kept)
                assert mask[0, head, query, key] == expected, (head, query, key)
                dropped += key <= query and not expected
    assert dropped > 0


def test_queries_may_be_the_last_of_a_row():
    config = LRSAConfig(2, 4, 1)
    keys = torch.randn(1, 1, 30, 8)
    selection = select_tokens(keys, keys, config)
    whole = visible(selection, torch.arange(30), 30, config)
    assert torch.equal(visible(selection, torch.arange(25, 30), 30, config), whole[:, :, 25:])


def test_selection_is_of_the_past():
    """What a query sees of far windows was chosen from tokens that are not after it."""
    config = LRSAConfig(2, 4, 2)
    keys = torch.randn(1, 1, 31, 8)
    for query in range(10, 31):
        changed = keys.clone()
        changed[:, :, query + 1 :] += 5
        one, other = (
            visible(select_tokens(x, x, config), torch.tensor([query]), 31, config)[..., : query + 1]
            for x in (keys, changed)
        )
        assert torch.equal(one, other)
