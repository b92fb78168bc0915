"""lm-evaluation-harness over the compressed cache: its command line on a generated task, batches, log-likelihoods."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import lrsa
from data.synthetic.text import key_value_row
from lrsa import LRSAConfig
from lrsa.cache import CACHE_ARGUMENT
from lrsa.evaluation import generate_answers

pytest.importorskip("lm_eval", reason='lm-evaluation-harness is not installed: pip install "lrsa[harness]"')

from lm_eval.api.instance import Instance

from lrsa.evaluation.harness import LRSALM

ROOT = Path(__file__).resolve().parents[3]
BASE = str(ROOT / "data/tiny_base")
CONFIG = LRSAConfig(4, 16, 4)
SETTINGS = {"sink_size": 4, "lag_size": 16, "top_k": 4}
TASK = """
task: codes
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answers[0]}}}}"
generation_kwargs: {{max_gen_toks: 3, do_sample: false, until: []}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def loaded():
    return lrsa.load(BASE, CONFIG)


@pytest.fixture(scope="module")
def rows(loaded):
    """As RULER makes them: facts at random depths among words, one asked for; of different lengths, one too short."""
    rng = random.Random(0)
    return [key_value_row(rng, loaded.tokenizer, length) for length in (34, 70, 100, 131, 160, 200, 230, 256)]


def test_a_question_is_put_as_training_put_it(loaded, tmp_path):
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    CONFIG.save_pretrained(tmp_path)
    lrsa.PromptFormat("BEFORE ", " BETWEEN", "", "the", 17).save_pretrained(tmp_path)
    lm = LRSALM(str(tmp_path))
    assert lm.apply_chat_template([{"role": "user", "content": "Q"}]) == "BEFORE Q BETWEEN"
    lm.tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}{{ strftime_now('%Y') }}"
    several = [{"role": role, "content": text} for role, text in (("user", "A"), ("assistant", "B"), ("user", "Q"))]
    assert lm.apply_chat_template(several) == "[A][B][Q BETWEEN"
    assert 17 in lm.model.generation_config.eos_token_id


def ask(lm, rows):
    options = {"max_gen_toks": 3, "do_sample": False, "until": []}
    requests = [Instance("generate_until", row, (row["prompt"], dict(options)), i) for i, row in enumerate(rows)]
    return [answer.strip() for answer in lm.generate_until(requests, disable_tqdm=True)]


def test_command_line(loaded, rows, tmp_path):
    """The task's answers, in batches of 3, are those that our own evaluation gets from the same cache."""
    (tmp_path / "codes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "codes.yaml").write_text(TASK.format(file=tmp_path / "codes.jsonl"))
    arguments = ",".join(["pretrained=data/tiny_base", *(f"{name}={value}" for name, value in SETTINGS.items())])
    command = [sys.executable, "-m", "lrsa.evaluation.harness", "run", "--model", "lrsa", "--model_args", arguments]
    command += ["--tasks", "codes", "--include_path", tmp_path, "--batch_size", "3", "--device", "cpu"]
    command += ["--log_samples", "--output_path", tmp_path / "out"]
    found = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert found.returncode == 0, found.stderr
    samples = next((tmp_path / "out").rglob("samples_*.jsonl")).read_text().splitlines()
    samples = sorted(map(json.loads, samples), key=lambda sample: sample["doc_id"])
    answers = [sample["filtered_resps"][0].strip() for sample in samples]
    ids = [loaded.tokenizer(row["prompt"])["input_ids"] for row in rows]
    ours = [{"input_ids": i, "prompt_length": len(i), "answers": r["answers"]} for i, r in zip(ids, rows, strict=True)]
    assert answers == generate_answers(loaded.model, loaded.tokenizer, ours, max_new_tokens=3, batch_size=1)
    score = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())["results"]["codes"]
    right = [answer == row["answers"][0] for answer, row in zip(answers, rows, strict=True)]
    assert 0 < sum(right) < len(rows)
    assert score["exact_match,none"] == pytest.approx(sum(right) / len(rows))


def test_batches_and_caches(rows):
    """One row at a time gives the same answers as all at once; the full cache and another ratio give others."""
    compressed = [ask(LRSALM(BASE, batch_size=size, **SETTINGS), rows) for size in (1, 3, 8)]
    assert compressed[0] == compressed[1] == compressed[2]
    full = ask(LRSALM(BASE, batch_size=8, cache="full", **SETTINGS), rows)
    everything = ask(LRSALM(BASE, batch_size=8, keep_ratio=1.0, **SETTINGS), rows)
    eighth = LRSALM(BASE, batch_size=8, keep_ratio=1 / 8, **SETTINGS)
    assert eighth.batch_size == 8
    assert eighth.new_cache().config == CONFIG.replace(top_k=2) == eighth.model.config.lrsa
    assert full == everything != compressed[0]
    assert ask(eighth, rows) not in (full, compressed[0])


def test_generation_runs_over_a_new_cache_each_time(rows):
    lm = LRSALM(BASE, **SETTINGS)
    made, new_cache = [], lm.new_cache
    lm.new_cache = lambda: made.append(new_cache()) or made[-1]
    ask(lm, rows[-2:])
    assert len(made) == 2
    assert {layer.held()[0] for layer in made[0].layers} != {layer.seen[0] for layer in made[0].layers}


def test_loglikelihoods_are_those_of_the_cache(rows):
    """One forward scores what prompt and continuation get when they are fed to the cache in pieces."""
    lm = LRSALM(BASE, batch_size=3, dtype="float64", **SETTINGS)
    pairs = [(row["prompt"], " " + row["answers"][0]) for row in rows]
    requests = [Instance("loglikelihood", row, pair, i) for i, (row, pair) in enumerate(zip(rows, pairs, strict=True))]
    found = lm.loglikelihood(requests, disable_tqdm=True)
    full = LRSALM(BASE, batch_size=3, dtype="float64", cache="full", **SETTINGS).loglikelihood(requests, True)
    for (prompt, continuation), (value, greedy), (dense, _) in zip(pairs, found, full, strict=True):
        context, target = lm._encode_pair(prompt, continuation)
        cache, logits, ids = lm.new_cache(), [], torch.tensor([context + target[:-1]])
        with torch.no_grad():
            for piece in (ids[:, :40], ids[:, 40 : len(context)], *ids[:, len(context) :].split(2, dim=1)):
                if piece.shape[1]:
                    logits.append(lm.model(piece, **{CACHE_ARGUMENT: cache}).logits[0])
        logits = torch.cat(logits)[len(context) - 1 :].log_softmax(-1)
        expected = logits.gather(1, torch.tensor(target)[:, None]).sum().item()
        assert value == pytest.approx(expected, abs=1e-9)
        assert greedy == (logits.argmax(-1).tolist() == target)
        assert (abs(value - dense) > 1e-3) == (len(context) > CONFIG.dense_length)


def test_adapter(rows, tmp_path):
    """An adapter brings its base, its tokenizer and its settings along, and acts."""
    base = AutoModelForCausalLM.from_pretrained(BASE)
    torch.manual_seed(0)
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    tuned.save_pretrained(tmp_path)
    CONFIG.save_pretrained(tmp_path)
    lm = LRSALM(str(tmp_path), batch_size=3)
    assert lm.new_cache().config == CONFIG
    answers = ask(lm, rows)
    assert answers == ask(LRSALM(str(tmp_path)), rows) != ask(LRSALM(BASE, **SETTINGS), rows)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"cache": "small"}, ValueError, "compressed, full, got 'small'"),
        ({"keep_ration": 0.5}, TypeError, "keep_ration"),
        ({"keep_ratio": 2}, ValueError, "keep_ratio"),
    ],
)
def test_options_that_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        LRSALM(BASE, **SETTINGS, **options)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process"):
        LRSALM(BASE, **SETTINGS)


RULER = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")


@pytest.mark.slow
def test_ruler_tasks_generate_and_run():
    """Those of lm_eval's RULER tasks that need no download, at 4096 tokens; the batch changes no answer."""
    pytest.importorskip("wonderwords", reason='RULER generates with wonderwords: pip install "lrsa[harness]"')
    import lm_eval

    def answers(batch_size):
        lm = LRSALM(BASE, batch_size=batch_size, max_length=5000, **SETTINGS)
        metadata = {"tokenizer": BASE, "max_seq_lengths": [4096]}
        found = lm_eval.simple_evaluate(lm, tasks=list(RULER), limit=3, metadata=metadata, bootstrap_iters=0)
        assert set(found["results"]) == set(RULER)
        assert all(0 <= found["results"][task]["4096,none"] <= 1 for task in RULER)
        lengths = [len(lm.tok_encode(s["arguments"][0][0])) for task in RULER for s in found["samples"][task]]
        assert min(lengths) > 3000
        return [s["filtered_resps"] for task in RULER for s in found["samples"][task]]

    found = answers(3)
    assert len(found) == 3 * len(RULER) and found == answers(1)
