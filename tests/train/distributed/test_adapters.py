"""Adapters of other kinds, and the held-out loss on the way, on several processes as on one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_run import make_workplace
from tests.train.distributed.test_processes import FOUR_ROWS, ZERO, Expected, alone, logged, together

pytestmark = pytest.mark.slow
TWO_ROWS = "train.per_device_train_batch_size=2"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, byte_tokenizer) -> Path:
    return make_workplace(tmp_path_factory.mktemp("work"), byte_tokenizer)


@pytest.mark.parametrize("stage", [2, 3])
def test_dora_on_two_processes(workplace, stage):
    run, _ = together(workplace, 2, f"dora-{stage}", "lora.use_dora=true", f"{ZERO}/zero{stage}.json", TWO_ROWS)
    Expected(workplace, f"dora-{stage}-one", "lora.use_dora=true", FOUR_ROWS).assert_same(run)


def test_an_adapter_is_continued_under_zero_3(workplace):
    start = alone(workplace, "start", FOUR_ROWS)
    given = [f"lora.init_from={start}", "lora.r=4"]
    run, _ = together(workplace, 2, "continued", *given, f"{ZERO}/zero3.json", TWO_ROWS)
    Expected(workplace, "continued-one", *given, FOUR_ROWS).assert_same(run)


@pytest.mark.parametrize("options", [["zero2"], ["zero3"], ["zero2", "parallel.sp_size=2"]], ids=" ".join)
def test_the_best_checkpoint_of_two_processes(workplace, options):
    zero, *shared = options
    steps = ["train.eval_strategy=steps", "train.eval_steps=1", "train.save_strategy=steps", "train.save_steps=1"]
    steps += ["train.early_stopping_patience=1", "train.learning_rate=0.05"]
    rows = [FOUR_ROWS] if shared else [TWO_ROWS]
    name = "-".join(options).replace("=", "")
    run, _ = together(workplace, 2, name, *steps, f"{ZERO}/{zero}.json", *rows, *shared)
    one = Expected(workplace, f"{name}-one", *steps, FOUR_ROWS)
    one.assert_same(run)
    assert len(logged(run, "loss")) == len(logged(one.one, "loss"))
