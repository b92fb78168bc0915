"""The objective in the real trainer: what a step learns from does not depend on how the step is computed."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from trl import SFTConfig

from lrsa import LRSAConfig, apply_lrsa
from lrsa.base_loading import BaseLoading
from train.objective import Objective, config_of_step, objective_problems
from train.settings.schema import ObjectiveSettings
from train.trainer import LRSATrainer

LRSA = LRSAConfig(2, 8, 2)
ALL = ObjectiveSettings(cross_entropy=0.5, distillation=2.0, distillation_temperature=1.5, selection=3.0)


def rows(count=4, tokens=60, trained=5):
    torch.manual_seed(1)
    ids = torch.randint(3, 80, (count, tokens)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100] * (tokens - trained) + x[-trained:] for x in ids]})


def trainer(tmp_path, tokenizer, dataset=None, objective=ALL, lrsa=LRSA, **options) -> LRSATrainer:
    """A trainer of a tiny model in fp64 with plain SGD, so that differences show as they are."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double()
    if lrsa is not None:
        apply_lrsa(model, lrsa)
    defaults = {
        "max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1.0, "max_grad_norm": 0, "optim": "sgd",
        "lr_scheduler_type": "constant", "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no",
        "max_length": 256, "logging_steps": 1, "disable_tqdm": True, "activation_checkpointing": False,
    }  # fmt: skip
    args = SFTConfig(output_dir=str(tmp_path), **(defaults | options))
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights="gaussian")
    built = LRSATrainer(
        model=model, args=args, train_dataset=dataset or rows(), processing_class=tokenizer, peft_config=lora,
        lrsa=lrsa, objective=objective, base=BaseLoading(),
    )  # fmt: skip
    for name, parameter in built.model.named_parameters():  # a student that differs from its teacher from the start
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    built.model.double()
    return built


def after_one_step(built: LRSATrainer) -> dict[str, torch.Tensor]:
    before = {n: p.detach().clone() for n, p in built.model.named_parameters() if p.requires_grad}
    built.train()
    return {n: p.detach() - before[n] for n, p in built.model.named_parameters() if p.requires_grad}


def assert_same(found, expected, atol=1e-11):
    assert found.keys() == expected.keys()
    assert max(step.abs().max() for step in expected.values()) > 1e-4
    for name, step in expected.items():
        torch.testing.assert_close(found[name], step, atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture
def expected(tmp_path, byte_tokenizer):
    return after_one_step(trainer(tmp_path, byte_tokenizer))


def test_every_part_moves_the_adapter(tmp_path, byte_tokenizer, expected):
    for part in ("cross_entropy", "distillation", "selection"):
        without = after_one_step(trainer(tmp_path, byte_tokenizer, objective=ALL.model_copy(update={part: 0.0})))
        assert max((without[name] - step).abs().max() for name, step in expected.items()) > 1e-4, part


def test_accumulation_equals_one_batch(tmp_path, byte_tokenizer, expected):
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    assert_same(after_one_step(trainer(tmp_path, byte_tokenizer, **options)), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(tmp_path, byte_tokenizer, expected, reentrant):
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    built = trainer(tmp_path, byte_tokenizer, **options)
    calls = []
    layer = built.model.get_base_model().model.layers[0]
    layer.input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    assert_same(after_one_step(built), expected)
    assert len(calls) == 3, "teacher, student, and once more in the backward"


def test_packed_rows_equal_padded_ones(tmp_path, byte_tokenizer):
    documents = rows()
    uneven = documents.map(lambda row, i: {name: ids[6 * i :] for name, ids in row.items()}, with_indices=True)
    padded = after_one_step(trainer(tmp_path, byte_tokenizer, uneven))
    options = {"packing": True, "packing_strategy": "bfd", "per_device_train_batch_size": 1}
    built = trainer(tmp_path, byte_tokenizer, uneven, **options)
    assert len(built.train_dataset) == 1, "all documents lie in one row"
    # TRL does not train a document's first token; here none of them is trained anyway.
    assert_same(after_one_step(built), padded)


def test_distillation_is_the_divergence_from_the_base_with_its_full_cache(tmp_path, byte_tokenizer):
    settings = ObjectiveSettings(cross_entropy=0.0, distillation=1.0, selection=0.0, distillation_temperature=1.5)
    built = trainer(tmp_path, byte_tokenizer, objective=settings)
    model, batch = built.model, next(iter(built.get_train_dataloader()))
    trained = batch["labels"][:, 1:] != -100
    ids = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        student = (model(**ids).logits[:, :-1][trained] / 1.5).log_softmax(-1)
        apply_lrsa(model, LRSA.replace(top_k=8))
        with model.disable_adapter():
            teacher = (model(**ids).logits[:, :-1][trained] / 1.5).log_softmax(-1)
        dense = (model(**ids).logits[:, :-1][trained] / 1.5).log_softmax(-1)
    by_hand = 1.5**2 * (teacher.exp() * (teacher - student)).sum(-1).mean()
    objective = Objective(settings, LRSA, model, batch)
    objective.teach(apply_lrsa(model, LRSA))
    with objective.watching():
        inputs = {name: x for name, x in objective.model_inputs().items() if name != "labels"}
        model(**inputs)
    found = objective.total(torch.tensor(0.0))
    torch.testing.assert_close(found, by_hand, atol=1e-11, rtol=0)
    assert abs(by_hand - (teacher.exp() * (teacher - dense)).sum(-1).mean() * 1.5**2) > 1e-2, "nothing was dropped"


def test_the_teacher_leaves_the_model_as_it_was(tmp_path, byte_tokenizer):
    built = trainer(tmp_path, byte_tokenizer)
    model, batch = built.model, next(iter(built.get_train_dataloader()))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    weights = copy.deepcopy(model.state_dict())
    apply_lrsa(model, LRSA.with_keep_ratio(0.5))
    objective = Objective(ALL, LRSA, model, batch)
    objective.teach(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    assert model.config.lrsa.top_k == 4 and model.training and model.active_adapter == "default"
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert not objective._teacher_states.requires_grad and objective.supervision.reached == set()


def test_parts_are_logged(tmp_path, byte_tokenizer):
    built = trainer(tmp_path, byte_tokenizer)
    built.train()
    line = next(line for line in built.state.log_history if "loss" in line)
    assert line["distillation"] > 0 and line["selection"] > 0 and line["kept_fraction"] < 0.7


@pytest.mark.parametrize("accumulated", [1, 4])
def test_cross_entropy_is_logged_by_keep_ratio(tmp_path, byte_tokenizer, accumulated):
    options = {"per_device_train_batch_size": 4 // accumulated, "gradient_accumulation_steps": accumulated}
    settings = ObjectiveSettings(selection=0.0, keep_ratios=[1.0, 0.25])
    built = trainer(tmp_path, byte_tokenizer, objective=settings, max_steps=4, learning_rate=0.1, **options)
    built.train()
    lines = [line for line in built.state.log_history if "loss" in line]
    names = [[name for name in line if name.startswith("loss_keep_")] for line in lines]
    assert sorted(names[:2]) == sorted(names[2:]) == [["loss_keep_0.25"], ["loss_keep_1"]]
    for line, (name,) in zip(lines, names, strict=True):
        assert line[name] == pytest.approx(line["loss"], rel=1e-4)


def test_keep_ratios_of_steps():
    fixed = ObjectiveSettings()
    assert config_of_step(fixed, LRSA, 3, 10, 0) == LRSA
    shrink = ObjectiveSettings(keep_ratios=[1.0, 0.5, 0.25], schedule="shrink")
    assert [config_of_step(shrink, LRSA, step, 6, 0).top_k for step in range(6)] == [8, 8, 4, 4, 2, 2]
    draw = ObjectiveSettings(keep_ratios=[1.0, 0.25])
    found = [config_of_step(draw, LRSA, step, 6, 0).top_k for step in range(200)]
    assert all(sorted(found[at : at + 2]) == [2, 8] for at in range(0, 200, 2)), "every two steps have both"
    assert {tuple(found[at : at + 2]) for at in range(0, 200, 2)} == {(2, 8), (8, 2)}
    assert found == [config_of_step(draw, LRSA, step, 6, 0).top_k for step in range(200)], (
        "a resumed run draws the same"
    )
    assert found != [config_of_step(draw, LRSA, step, 6, 1).top_k for step in range(200)]


def test_layers_that_are_taught():
    """A sliding or skipped layer has no selection: it neither weakens the others' supervision nor can it be named."""
    kinds = ["sliding_attention", "full_attention", "full_attention", "full_attention"]
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, sliding_window=20, use_sliding_window=True,
            layer_types=kinds,
        )
    )  # fmt: skip
    config = LRSA.replace(skip_layers=(2,))
    inputs = {"labels": torch.ones(1, 60, dtype=torch.long)}
    assert Objective(ALL, config, model, dict(inputs)).supervision.layers == [1, 3]
    taught = Objective(ALL, LRSA, apply_lrsa(model, LRSA), dict(inputs)).supervision
    ids = torch.randint(3, 80, (1, 60))
    model(ids, lrsa_supervision=taught, use_cache=False)
    assert sorted(taught.losses) == taught.layers == [1, 2, 3]
    some = ObjectiveSettings(selection=1.0, selection_layers=[3])
    assert Objective(some, config, model, dict(inputs)).supervision.layers == [3]
    assert objective_problems(some, config, model) == []
    (problem,) = objective_problems(ObjectiveSettings(selection=1.0, selection_layers=[0, 2, 3]), config, model)
    assert "must name layers that LRSA compresses, which are [1, 3], got [0, 2]" in str(problem)
    (problem,) = objective_problems(ObjectiveSettings(selection=1.0), LRSA.replace(skip_layers=(1, 2, 3)), model)
    assert "compresses no layer of this model" in str(problem)


def test_evaluation_uses_the_trained_settings(tmp_path, byte_tokenizer):
    """Whatever keep ratio the last step drew, the same weights have the same loss."""
    built = trainer(tmp_path, byte_tokenizer, eval_strategy="no", per_device_eval_batch_size=4)
    losses = []
    for top_k in (LRSA.lag_size, LRSA.top_k, 1):
        apply_lrsa(built.model, LRSA.replace(top_k=top_k))
        losses.append(built.evaluate(rows())["eval_loss"])
    assert losses[0] == losses[1] == losses[2]
