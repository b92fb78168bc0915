"""Selection supervision: its target and loss against the formula written out, its gradient, and every way to train."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lrsa import LRSAConfig, apply_lrsa, lag_relative_scores
from tests.lrsa.models.build import build
from tests.lrsa.models.oracle import oracle
from train.selection_loss import SelectionSupervision, future_attention, selection_loss

CONFIG = LRSAConfig(2, 4, 1)


def states(*heads, rows=1, tokens=21, channels=6):
    torch.manual_seed(0)
    return [torch.randn(rows, h, tokens, channels, dtype=torch.float64) for h in heads]


@pytest.mark.parametrize("sinks", [None, torch.tensor([-1.0, 0.0, 1.0, 2.0])])
def test_target_is_what_queries_two_windows_later_take(sinks):
    query, key, value = states(4, 2, 2)
    value[0, 1, 5] *= 9
    found = future_attention(query, key, value, torch.tensor([[9, 17, 20, -1]]), CONFIG, scale=0.5, sinks=sinks)
    norm = value[0].pow(2).sum(-1).sqrt()
    expected = torch.zeros(1, 2, 3, 4, dtype=torch.float64)
    for head in range(4):
        for at in (9, 17, 20):
            weights = (0.5 * key[0, head // 2, : at + 1] @ query[0, head, at]).exp()
            weights = weights / (weights.sum() + (0 if sinks is None else sinks[head].double().exp()))
            for token in range(2, 14):  # three windows have a complete one behind them
                if (at - 2) // 4 - (token - 2) // 4 >= 2:
                    share = weights[token] * norm[head // 2, token] / norm[head // 2].mean()
                    expected[0, head // 2, (token - 2) // 4, (token - 2) % 4] += share / (3 * 2)
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=0)
    assert (found[0, 0, 2] > 0).all() and found[0, 0].sum() < 1  # nearer tokens and the sink take their share


def test_loss_is_the_cross_entropy_with_the_windows_scores():
    key, value = states(2, 2)
    target = torch.rand(1, 2, 3, 4, dtype=torch.float64)
    target[0, 1] = 0  # nobody looks at what this head could keep
    found = selection_loss(target, key, value, CONFIG, temperature=3.0)
    assert found.shape == (1, 2) and found[0, 1] == 0
    surprise = 0.0
    for window in range(3):
        start = 2 + 4 * window
        deviation = 0.0
        for x in (key, value):
            own, reference = x[0, 0, start : start + 4], x[0, 0, start + 4 : start + 8]
            low, high = reference.min(0).values, reference.max(0).values
            deviation = deviation + ((own - low) / (high - low)).std(-1)
        surprise -= (target[0, 0, window] * (3.0 * deviation).log_softmax(0)).sum()
    torch.testing.assert_close(found[0, 0], surprise, atol=1e-12, rtol=0)


def test_gradient_against_finite_differences():
    key, value = (x[:, :, :14].requires_grad_() for x in states(2, 2))
    target = torch.rand(1, 2, 2, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda k, v: selection_loss(target, k, v, CONFIG, 5.0), (key, value))


def test_following_the_gradient_keeps_what_is_asked_for():
    """The point of it: tokens that get attention win the selection after a few steps."""
    key, value = (x.requires_grad_() for x in states(1, 1, tokens=18))
    target = torch.zeros(1, 1, 3, 4, dtype=torch.float64)
    target[..., 1] = 1.0
    before = lag_relative_scores(key, value, CONFIG).argmax(-1)
    for _ in range(50):
        grads = torch.autograd.grad(selection_loss(target, key, value, CONFIG, 5.0).sum(), (key, value))
        with torch.no_grad():
            for x, grad in zip((key, value), grads, strict=True):
                x -= 0.5 * grad
    after = lag_relative_scores(key, value, CONFIG).argmax(-1)
    assert (before != 1).any() and (after == 1).all()


def grads_of(model, weight, ids, mask=None, positions=None, predicting=None, divide=1.0):
    """Gradients of `loss / divide` for all parameters, with supervision of `weight`; and the supervision."""
    if predicting is None:
        predicting = torch.zeros_like(ids, dtype=torch.bool)
        predicting[:, -4:] = True
    supervision = SelectionSupervision(CONFIG, predicting, layers=[0, 2], weight=weight, temperature=5.0)
    options = {"attention_mask": mask, "position_ids": positions, "lrsa_supervision": supervision}
    loss = model(ids, **options).logits.tanh().mean()
    supervision.scale_with(loss)
    model.zero_grad()
    (loss / divide).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, supervision


def assert_same(found, expected):
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=1e-12, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture
def model(random_llama):
    return apply_lrsa(random_llama, CONFIG).train()


def test_attached_gradient_is_that_of_the_sum(model):
    """Against the same loss added by hand outside of the model, with keys and values taken out of it."""
    ids = torch.randint(0, 48, (2, 30))
    found, supervision = grads_of(model, 2.0, ids)
    taken, recorded = {}, supervision._targets

    class Spy:
        def attach(self, layer, query, key, value, out, **rest):
            taken[layer] = (key, value)
            return out

    loss = model(ids, lrsa_supervision=Spy()).logits.tanh().mean()
    for layer in (0, 2):
        terms = selection_loss(recorded[layer][0], *taken[layer], CONFIG, 5.0)
        torch.testing.assert_close(supervision.losses[layer], terms.mean().detach())
        loss = loss + 2.0 * terms.mean() / 2
    model.zero_grad()
    loss.backward()
    assert_same(found, {name: p.grad for name, p in model.named_parameters()})
    plain, _ = grads_of(model, 0.0, ids)
    assert (
        found["model.layers.0.self_attn.k_proj.weight"] - plain["model.layers.0.self_attn.k_proj.weight"]
    ).norm() > 0


def test_all_heads_teach_the_one_selection_of_latents():
    """Against the weights of the model's own attention, of all heads, and its values."""
    model, ids = build("youtu", num_hidden_layers=3), torch.randint(3, 48, (1, 30))
    values = []

    class Spy:
        def attach(self, layer, query, key, value, out, expand, **rest):
            values.append(expand(key, value)[1][0])
            return out

    with torch.no_grad(), oracle(model, None):
        weights = model(ids, output_attentions=True).attentions[0][0]
        taken = [x.detach() for x in model.model.layers[0].self_attn.oracle_latent]
    found, supervision = grads_of(apply_lrsa(model, CONFIG).train(), 2.0, ids)
    with torch.no_grad():
        model(ids, lrsa_supervision=Spy())
    norm = values[0].norm(dim=-1)
    weights = (weights * (norm / norm.mean(-1, keepdim=True))[:, None]).mean(0) / 4
    window = (torch.arange(30) - 2) // 4
    far = (window[26:, None] - window >= 2)[:, 2:26]
    target = (weights[26:, 2:26] * far).sum(0).view(1, 1, 6, 4)
    expected = selection_loss(target, *taken, CONFIG, 5.0).mean()
    torch.testing.assert_close(supervision.losses[0], expected, atol=1e-6, rtol=0)
    plain, _ = grads_of(model, 0.0, ids)
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert (found[name] - plain[name]).norm() > 0


def test_rows_of_which_nothing_is_trained_teach_nothing(model):
    """A process may get prompts alone, as its part of packed rows."""
    ids = torch.randint(0, 48, (2, 30))
    found, supervision = grads_of(model, 2.0, ids, predicting=torch.zeros_like(ids, dtype=torch.bool))
    assert all(loss == 0 for loss in supervision.losses.values()) and len(supervision.losses) == 2
    assert_same(found, grads_of(model, 0.0, ids)[0])


def test_what_the_loss_is_divided_by_divides_the_supervision(model):
    ids = torch.randint(0, 48, (2, 30))
    whole, _ = grads_of(model, 2.0, ids)
    quarter, _ = grads_of(model, 2.0, ids, divide=4.0)
    assert_same({name: 4 * grad for name, grad in quarter.items()}, whole)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(model, reentrant):
    ids = torch.randint(0, 48, (2, 30))
    expected, _ = grads_of(model, 2.0, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls = []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    found, _ = grads_of(model, 2.0, ids)
    assert len(calls) == 2  # forward, and once more in the backward
    assert_same(found, {name: expected[name] for name in found})
    assert "model.layers.0.self_attn.k_proj.weight" in found


def test_padded_and_packed_rows_are_the_documents_alone(model):
    lengths = (30, 23, 25, 7)  # the last is too short to be compressed, and counts
    documents = [torch.randint(0, 48, (1, n)) for n in lengths]
    alone = [grads_of(model, 1.0, ids)[1].losses for ids in documents]
    expected = {layer: sum(losses[layer] for losses in alone) / 4 for layer in (0, 2)}

    packed = torch.cat(documents, 1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    predicting = torch.cat([torch.arange(n) >= n - 4 for n in lengths])[None]
    found = grads_of(model, 1.0, packed, positions=positions, predicting=predicting)[1].losses
    for layer, loss in expected.items():
        torch.testing.assert_close(found[layer], loss, atol=1e-10, rtol=0)

    mask = torch.stack([torch.arange(30) >= 30 - n for n in lengths]).long()
    rows = torch.zeros(4, 30, dtype=torch.long)
    for row, ids in zip(rows, documents, strict=True):
        row[30 - ids.shape[1] :] = ids[0]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    predicting = torch.arange(30).expand(4, 30) >= 26
    for padding in (mask, None):  # without it each padding token is a document, as where processes share rows
        found = grads_of(model, 1.0, rows, padding, positions, predicting)[1].losses
        for layer, loss in expected.items():
            torch.testing.assert_close(found[layer], loss, atol=1e-10, rtol=0)


def test_queries_are_thinned_out_evenly_and_blocks_change_nothing(model, monkeypatch):
    query, *taken = states(4, 2, 2, tokens=60)
    predicting = torch.arange(20, 60)[None]
    whole = future_attention(query, *taken, predicting, CONFIG)
    monkeypatch.setattr("train.selection_loss.BLOCK", 4 * 60 * 7)
    torch.testing.assert_close(future_attention(query, *taken, predicting, CONFIG), whole, atol=1e-14, rtol=0)

    from lrsa.attention.documents import find_documents
    from train.selection_loss import _places

    (found,) = _places(torch.ones(1, 60, dtype=torch.bool), find_documents(None, None, (1, 60)), 4)
    assert found.tolist() == [[0, 20, 39, 59]]


def test_a_checkpointed_attention_alone(model):
    """Selective use: any checkpointing around any part works, because nothing leaves the attention function."""
    key, value = (x.requires_grad_() for x in states(2, 2, rows=2, tokens=30))
    query = states(4, rows=2, tokens=30)[0]
    predicting = torch.zeros(2, 30, dtype=torch.bool)
    predicting[:, -1] = True
    supervision = SelectionSupervision(CONFIG, predicting, layers=[0])
    call = lambda k, v: supervision.attach(0, query, k, v, query * k.sum(), None, None)  # noqa: E731
    expected = torch.autograd.grad(call(key, value).sum(), (key, value))
    found = torch.autograd.grad(checkpoint(call, key, value, use_reentrant=False).sum(), (key, value))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert expected[1].abs().sum() > 0  # value enters through the supervision only
