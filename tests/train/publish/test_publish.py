"""Publishing through the Hub's real client: what is sent, what comes back elsewhere, what a broken transfer leaves."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, constants

import lrsa
from lrsa import LRSAConfig
from tests.train.publish.hub_server import TOKEN, LocalHub
from train.failures import RunFailed
from train.publish.hub import prepare, send
from train.settings.sources import parse, to_yaml

ROOT = Path(__file__).resolve().parents[3]
LENGTH = 60
GENERATE = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

# Runs where nothing of the run is at hand: only the hub's address, a token and an empty cache.
ELSEWHERE = """
import contextlib, io, re, sys
import lrsa, torch
from transformers import AutoModelForCausalLM
from huggingface_hub import ModelCard

torch.set_num_threads(1)
given = torch.load(sys.argv[1])
found = {}
model, tokenizer, new_cache = lrsa.load("user/tiny")
with torch.no_grad():
    found["logits"] = model(given["ids"]).logits
found["config"] = new_cache().config.to_dict()
found["base"] = model.peft_config["default"].base_model_name_or_path
plain = AutoModelForCausalLM.from_pretrained("user/tiny")
found["tokens"] = plain.generate(given["ids"], custom_generate="user/tiny", trust_remote_code=True, **given["options"])
found["attention"] = plain.config._attn_implementation
card = ModelCard.load("user/tiny")
card.validate()
found["printed"] = []
for code in re.findall(r"```python\\n(.*?)```", card.text, flags=re.DOTALL):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {})
    found["printed"].append(printed.getvalue())
torch.save(found, sys.argv[2])
"""

# The same cache, later, without the Hub.
LATER = """
import sys
import lrsa, torch

given = torch.load(sys.argv[1])
model, tokenizer, new_cache = lrsa.load("user/tiny")
with torch.no_grad():
    torch.save(model(given["ids"]).logits, sys.argv[2])
"""


def client(hub: LocalHub, token: str | bool = TOKEN) -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


def launch(hub: LocalHub, *arguments: str) -> int:
    """`launch/publish.py` in this process; returns the exit status."""
    spec = importlib.util.spec_from_file_location("launch_publish", ROOT / "launch" / "publish.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["launch/publish.py", *arguments])
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_TOKEN", TOKEN)
        return script.main()


@pytest.fixture(scope="module")
def published(tiny_run, start_hub, tmp_path_factory):
    """The hub after `launch/publish.py`, its output, a prompt, and what a process elsewhere then found."""
    home = tmp_path_factory.mktemp("home")
    ids = torch.randint(3, 300, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    torch.save({"ids": ids, "options": GENERATE}, home / "given.pt")
    (home / "elsewhere.py").write_text(ELSEWHERE)
    (home / "later.py").write_text(LATER)
    with start_hub() as hub:
        options = ["--base-model", "org/base", "--license", "apache-2.0"]
        with contextlib.redirect_stdout(io.StringIO()) as output:
            assert launch(hub, "--run", str(tiny_run), "--repo-id", "user/tiny", *options) == 0
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home)}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "elsewhere.py", "given.pt", "found.pt"]
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        found = torch.load(home / "found.pt")
        asked = len(hub.requests)
        command, environment = (
            [sys.executable, "later.py", "given.pt", "later.pt"],
            environment | {"HF_HUB_OFFLINE": "1"},
        )
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        assert len(hub.requests) == asked
        found["later"] = torch.load(home / "later.pt")
        yield hub, output.getvalue(), ids, found


def test_one_private_commit_holds_everything(published, tiny_run):
    hub, output, *_ = published
    assert hub.repos["user/tiny"]["private"] and len(hub.repos["user/tiny"]["commits"]) == 1
    assert set(hub.files("user/tiny")) == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "config.yaml", "data_report.md"),
        *(
            "lrsa_config.json",
            "lrsa_prompt.json",
            "report.md",
            "results.json",
            "score_vs_keep_ratio.png",
            "training_losses.png",
        ),
        *("tokenizer.json", "tokenizer_config.json"),
        *("custom_generate/generate.py", "custom_generate/settings.py"),
    }
    assert f"published, private: others need access and a token: {hub.url}/user/tiny/commit/" in output
    weights = hub.files("user/tiny")["adapter_model.safetensors"]
    assert weights == (tiny_run / "adapter_model.safetensors").read_bytes()
    assert client(hub).file_exists("user/tiny", "README.md") and not client(hub, token=False).repo_exists("user/tiny")


def test_no_path_of_this_machine_is_published(published, tiny_run):
    hub, *_ = published
    work = tiny_run.parents[1]
    for name, content in hub.files("user/tiny").items():
        assert str(work).encode() not in content and str(Path.home()).encode() + b"/" not in content, name
    settings = parse(hub.files("user/tiny")["config.yaml"]).values
    assert settings["data"]["path"] == "text.jsonl" and settings["train"]["output_dir"] == "tiny"
    assert settings["model"]["name_or_path"] == "org/base" and settings["train"]["max_steps"] == 2
    assert str(work) in (tiny_run / "config.yaml").read_text(), "the run's own file keeps its paths"
    assert str(work) in (tiny_run / "data_report.md").read_text()


def test_loading_back_gives_bit_identical_logits(published, tiny_run):
    _, _, ids, found = published
    model, _, _ = lrsa.load(tiny_run)
    with torch.no_grad():
        expected = model(ids).logits
        with model.disable_adapter():
            assert not torch.equal(model(ids).logits, expected), "the adapter does something"
        assert not torch.equal(lrsa.remove_lrsa(model)(ids).logits, expected), "something was dropped"
    assert torch.equal(found["logits"], expected)
    assert torch.equal(found["later"], expected), "from the cache, without the Hub"
    assert LRSAConfig.from_dict(found["config"]) == LRSAConfig.from_pretrained(tiny_run)
    assert found["base"] == "org/base"


def test_custom_generate_from_the_hub_gives_the_tokens_of_the_cache(published, tiny_run):
    _, _, ids, found = published
    model, _, new_cache = lrsa.load(tiny_run)
    assert torch.equal(found["tokens"], model.generate(ids, past_key_values=new_cache(), **GENERATE))
    assert not torch.equal(found["tokens"], lrsa.remove_lrsa(model).generate(ids, **GENERATE)), "something was dropped"
    assert found["attention"] != "lrsa", "the model has its own attention back"


def test_the_code_samples_of_the_card_run_as_pasted(published, tiny_run):
    _, _, _, found = published
    model, tokenizer, new_cache = lrsa.load(tiny_run)
    inputs = tokenizer("<s>Once upon a time", return_tensors="pt")  # with the BOS of the training rows
    tokens = model.generate(**inputs, past_key_values=new_cache(), max_new_tokens=100)
    expected = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found["printed"] == [f"{expected}\n"] * 2 and expected.strip()


def test_a_dry_run_writes_the_folder_and_sends_nothing(tiny_copy, hub, capsys):
    arguments = ["--run", str(tiny_copy), "--repo-id", "user/tiny", "--dry-run", "--base-model", "org/base"]
    assert launch(hub, *arguments) == 0
    assert hub.requests == []
    assert (tiny_copy / "hub" / "adapter_model.safetensors").is_file()
    output = capsys.readouterr().out
    assert "custom_generate/generate.py" in output and "base_model: org/base" in output
    assert output.rstrip().endswith(f"nothing was sent; the folder is {tiny_copy / 'hub'}")


def test_the_command_line_ends_with_one_message(tiny_copy, hub, capsys):
    (tiny_copy / "results.json").unlink()
    assert launch(hub, "--run", str(tiny_copy), "--repo-id", "user/tiny") == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 2


def publish(run: Path, hub: LocalHub, **options) -> str:
    public = options.get("public", False)
    publication, folder = prepare(run, "user/tiny", client(hub), base_model="org/base", **options)
    return send(publication, folder, public, None, client(hub))


def test_a_commit_cut_in_the_middle_shows_nothing_and_publishing_again_completes(tiny_copy, hub):
    hub.cut["/commit/main"] = 1
    with pytest.raises(RunFailed, match=r"(?s)user/tiny: upload failed: .*run the same command again to complete it"):
        publish(tiny_copy, hub)
    assert hub.files("user/tiny") == {} and hub.objects, "the weights were there, and no file could be seen"
    sent = len([asked for asked in hub.requests if asked.startswith("PUT /lfs/")])
    assert "/user/tiny/commit/" in publish(tiny_copy, hub)
    assert len(hub.repos["user/tiny"]["commits"]) == 1 and "adapter_model.safetensors" in hub.files("user/tiny")
    assert len([asked for asked in hub.requests if asked.startswith("PUT /lfs/")]) == sent, "no weight was sent again"


def test_a_lost_answer_to_the_commit_makes_no_second_one(tiny_copy, hub):
    hub.lost["/commit/main"] = 1
    with pytest.raises(RunFailed, match="upload failed"):
        publish(tiny_copy, hub)
    assert "/user/tiny/commit/" in publish(tiny_copy, hub)
    assert len(hub.repos["user/tiny"]["commits"]) == 1


def test_weights_cut_in_the_middle_are_sent_again(tiny_copy, hub):
    hub.cut["PUT /lfs/"] = 1
    assert "/user/tiny/commit/" in publish(tiny_copy, hub)
    assert hub.cut["PUT /lfs/"] == 0 and len(hub.repos["user/tiny"]["commits"]) == 1
    weights = (tiny_copy / "adapter_model.safetensors").read_bytes()
    assert hub.files("user/tiny")["adapter_model.safetensors"] == weights


def test_everybody_can_load_what_is_published_for_everybody(tiny_copy, hub):
    publish(tiny_copy, hub, public=True)
    assert "adapter_model.safetensors" in client(hub, token=False).list_repo_files("user/tiny")


def test_tokens_and_paths_deep_in_the_settings_are_left_out(tiny_copy, hub):
    settings = parse((tiny_copy / "config.yaml").read_text()).values
    inner = {"hub_token": "hf_secret", "files": ["/srv/secret/plan.txt"]}
    settings["train"] |= {"deepspeed": str(ROOT / "configs" / "deepspeed" / "zero2.json"), "lr_scheduler_kwargs": inner}
    (tiny_copy / "config.yaml").write_text(to_yaml(settings))
    publish(tiny_copy, hub)
    assert not any(b"secret" in content for content in hub.files("user/tiny").values())
    train = parse(hub.files("user/tiny")["config.yaml"]).values["train"]
    assert train["deepspeed"] == "configs/deepspeed/zero2.json"
    assert train["lr_scheduler_kwargs"] == {"files": ["plan.txt"]}


def test_paths_relative_to_the_run_are_taken_out_as_well(tiny_copy, hub):
    values = parse((tiny_copy / "config.yaml").read_text()).values
    data = values["data"]["path"]
    for section, name in (("model", "name_or_path"), ("data", "path")):
        values[section][name] = os.path.relpath(values[section][name], tiny_copy)
        assert values[section][name].startswith("..")
    (tiny_copy / "config.yaml").write_text(to_yaml(values))
    (tiny_copy / "report.md").write_text(f"rows of {data}\n")
    publish(tiny_copy, hub)
    published = parse(hub.files("user/tiny")["config.yaml"]).values
    assert (published["model"]["name_or_path"], published["data"]["path"]) == ("org/base", "text.jsonl")
    assert hub.files("user/tiny")["report.md"] == b"rows of text.jsonl\n"


@pytest.mark.slow
def test_weights_that_never_arrive_end_in_an_error(tiny_copy, hub):
    """The client tries for half a minute, then gives up."""
    hub.cut["PUT /lfs/"] = 100
    with pytest.raises(RunFailed, match=r"upload failed: .*Error while uploading"):
        publish(tiny_copy, hub)
    assert hub.files("user/tiny") == {}
    hub.cut.clear()
    assert "/user/tiny/commit/" in publish(tiny_copy, hub)
    assert len(hub.repos["user/tiny"]["commits"]) == 1
