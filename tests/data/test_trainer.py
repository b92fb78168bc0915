import json

import pytest
from trl import SFTConfig, SFTTrainer

import data


@pytest.mark.parametrize(
    "flags", [{}, {"completion_only_loss": True}, {"dataset_kwargs": {"skip_prepare_dataset": True}}]
)
def test_the_trainer_takes_rows_as_they_are(flags, tmp_path, byte_tokenizer, random_llama):
    records = [{"question": f"Who {n}?", "context": f"Anna {n}. " * (n + 1), "answers": f"a{n}"} for n in range(30)]
    (tmp_path / "qa.json").write_text(json.dumps(records))
    settings = data.DataSettings(kind="qa", path=str(tmp_path / "qa.json"), context_length=256, eval_rows=2)
    train = data.load(settings, byte_tokenizer, 0, 36).train
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "max_length": 256} | flags
    args = SFTConfig(output_dir=str(tmp_path / "out"), **options)
    trainer = SFTTrainer(model=random_llama, args=args, train_dataset=train, processing_class=byte_tokenizer)
    assert len(trainer.train_dataset) == len(train) > 20
    assert trainer.train_dataset["input_ids"][:] == train["input_ids"][:]
    assert trainer.train_dataset["labels"][:] == train["labels"][:]
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["labels"] != -100).any(dim=1).all() and (batch["labels"] == -100).any(dim=1).all()
