"""Publishing through the Hub's real client: what is sent, what comes back elsewhere, what a broken transfer leaves."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import TOKEN, LocalHub
from huggingface_hub import CommitOperationAdd, HfApi, constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

import lrsa
from lrsa import LRSAConfig
from train.problems import SettingsError
from train.publishing import prepare, send

ROOT = Path(__file__).resolve().parent.parent
LENGTH = 60
GENERATE = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

# Runs where nothing of the run is at hand: only the hub's address, a token and an empty cache.
ELSEWHERE = """
import contextlib, io, json, re, sys
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


@pytest.fixture(scope="module", autouse=True)
def no_xet():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield


def client(hub: LocalHub, token: str | bool = TOKEN) -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


@pytest.fixture(scope="module")
def base_files(tiny_run) -> list[Path]:
    return [path for path in (tiny_run.parents[1] / "base").iterdir() if path.is_file()]


def with_base(hub: LocalHub, base_files: list[Path]) -> LocalHub:
    """Uploads the base model as `org/base`, for everybody."""
    api = client(hub)
    api.create_repo("org/base", private=False)
    api.create_commit("org/base", [CommitOperationAdd(path.name, path) for path in base_files], commit_message="base")
    hub.requests.clear()
    return hub


@pytest.fixture
def hub(base_files):
    with LocalHub() as hub:
        yield with_base(hub, base_files)


@pytest.fixture
def run(tiny_run, tmp_path) -> Path:
    """A copy of the run that a test may spoil."""
    return Path(shutil.copytree(tiny_run, tmp_path / "runs" / "tiny"))


def launch(hub: LocalHub, *arguments: str) -> int:
    """`launch/publish.py` in this process; returns the exit status."""
    spec = importlib.util.spec_from_file_location("launch_publish", ROOT / "launch" / "publish.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["launch/publish.py", *arguments])
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setenv("HF_TOKEN", TOKEN)
        return script.main()


@pytest.fixture(scope="module")
def published(tiny_run, base_files, tmp_path_factory):
    """The hub after `launch/publish.py`, its output, a prompt, and what a process elsewhere then found."""
    home = tmp_path_factory.mktemp("home")
    ids = torch.randint(3, 300, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    torch.save({"ids": ids, "options": GENERATE}, home / "given.pt")
    (home / "elsewhere.py").write_text(ELSEWHERE)
    with LocalHub() as hub:
        with_base(hub, base_files)
        options = ["--base-model", "org/base", "--license", "apache-2.0"]
        with contextlib.redirect_stdout(io.StringIO()) as output:
            assert launch(hub, "--run", str(tiny_run), "--repo-id", "user/tiny", *options) == 0
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home)}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "elsewhere.py", "given.pt", "found.pt"]
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        yield hub, output.getvalue(), ids, torch.load(home / "found.pt")


def test_one_private_commit_holds_everything(published, tiny_run):
    hub, output, *_ = published
    assert hub.repos["user/tiny"]["private"] and len(hub.repos["user/tiny"]["commits"]) == 1
    assert set(hub.files("user/tiny")) == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "config.yaml", "data_report.md"),
        *("lrsa_config.json", "report.md", "results.json", "score_vs_keep_ratio.png"),
        *("tokenizer.json", "tokenizer_config.json"),
        *("custom_generate/generate.py", "custom_generate/settings.py"),
    }
    assert f"published, private: others need access, and a token, to load it: {hub.url}/user/tiny/commit/" in output
    weights = hub.files("user/tiny")["adapter_model.safetensors"]
    assert weights == (tiny_run / "adapter_model.safetensors").read_bytes()
    assert client(hub).file_exists("user/tiny", "README.md") and not client(hub, token=False).repo_exists("user/tiny")


def test_no_path_of_this_machine_is_published(published, tiny_run):
    hub, *_ = published
    work = tiny_run.parents[1]
    for name, content in hub.files("user/tiny").items():
        assert str(work).encode() not in content and str(Path.home()).encode() + b"/" not in content, name
    settings = yaml.safe_load(hub.files("user/tiny")["config.yaml"])
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
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    tokens = model.generate(**inputs, past_key_values=new_cache(), max_new_tokens=100)
    expected = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found["printed"] == [f"{expected}\n"] * 2 and expected.strip()


def test_a_dry_run_writes_the_folder_and_sends_nothing(run, hub, capsys):
    arguments = ["--run", str(run), "--repo-id", "user/tiny", "--dry-run", "--base-model", "org/base"]
    assert launch(hub, *arguments) == 0
    assert hub.requests == []
    assert (run / "hub" / "adapter_model.safetensors").is_file()
    output = capsys.readouterr().out
    assert "custom_generate/generate.py" in output and "base_model: org/base" in output
    assert output.rstrip().endswith(f"nothing was sent; the folder is {run / 'hub'}")


def test_the_command_line_ends_with_one_message(run, hub, capsys):
    (run / "results.json").unlink()
    assert launch(hub, "--run", str(run), "--repo-id", "user/tiny") == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 2


def publish(run: Path, hub: LocalHub, **options) -> str:
    public = options.get("public", False)
    publication, folder = prepare(run, "user/tiny", client(hub), base_model="org/base", **options)
    return send(publication, folder, public, None, client(hub))


def test_a_commit_cut_in_the_middle_shows_nothing_and_publishing_again_completes(run, hub):
    hub.cut["/commit/main"] = 1
    with pytest.raises(SettingsError, match=r"(?s)user/tiny: was not published: .*the same command again completes it"):
        publish(run, hub)
    assert hub.files("user/tiny") == {} and hub.objects, "the weights were there, and no file could be seen"
    sent = len([asked for asked in hub.requests if asked.startswith("PUT /lfs/")])
    assert "/user/tiny/commit/" in publish(run, hub)
    assert len(hub.repos["user/tiny"]["commits"]) == 1 and "adapter_model.safetensors" in hub.files("user/tiny")
    assert len([asked for asked in hub.requests if asked.startswith("PUT /lfs/")]) == sent, "no weight was sent again"


def test_a_lost_answer_to_the_commit_makes_no_second_one(run, hub):
    hub.lost["/commit/main"] = 1
    with pytest.raises(SettingsError, match="was not published"):
        publish(run, hub)
    assert "/user/tiny/commit/" in publish(run, hub)
    assert len(hub.repos["user/tiny"]["commits"]) == 1


def test_weights_cut_in_the_middle_are_sent_again(run, hub):
    hub.cut["PUT /lfs/"] = 1
    assert "/user/tiny/commit/" in publish(run, hub)
    assert hub.cut["PUT /lfs/"] == 0 and len(hub.repos["user/tiny"]["commits"]) == 1
    weights = (run / "adapter_model.safetensors").read_bytes()
    assert hub.files("user/tiny")["adapter_model.safetensors"] == weights


@pytest.mark.slow
def test_weights_that_never_arrive_end_in_an_error(run, hub):
    """The client tries for half a minute, then gives up."""
    hub.cut["PUT /lfs/"] = 100
    with pytest.raises(SettingsError, match=r"was not published: .*Error while uploading"):
        publish(run, hub)
    assert hub.files("user/tiny") == {}
    hub.cut.clear()
    assert "/user/tiny/commit/" in publish(run, hub)
    assert len(hub.repos["user/tiny"]["commits"]) == 1


def untrained(run: Path) -> None:
    weights = load_file(run / "adapter_model.safetensors")
    save_file({name: torch.zeros_like(x) for name, x in weights.items()}, run / "adapter_model.safetensors")


def empty(run: Path) -> None:
    weights = load_file(run / "adapter_model.safetensors")
    save_file({name: x[:0] for name, x in weights.items()}, run / "adapter_model.safetensors")


def without(name: str):
    return lambda run: (run / name).unlink()


def with_a_path(run: Path) -> None:
    (run / "report.md").write_text(f"# Report\n\nwritten in {Path.cwd()}/somewhere\n")


BASE = {"base_model": "org/base"}


@pytest.mark.parametrize(
    ("spoil", "repo_id", "options", "messages"),
    [
        (untrained, "user/tiny", BASE, ["is untrained: every lora_B is zero"]),
        (empty, "user/tiny", BASE, ["holds empty tensors"]),
        (without("results.json"), "user/tiny", BASE, ["results.json cannot be read", "launch/evaluate.py --run"]),
        (without("lrsa_config.json"), "user/tiny", BASE, ["holds no lrsa_config.json"]),
        (without("config.yaml"), "user/tiny", BASE, ["holds no config.yaml"]),
        (with_a_path, "user/tiny", BASE, ["report.md:3: names a place of this machine"]),
        (None, "user/tiny", {}, ["model.name_or_path: is the local directory", "--base-model ORG/NAME"]),
        (None, "tiny", BASE, ["--repo-id tiny must be OWNER/NAME"]),
        (None, "user/t i", BASE, ["--repo-id user/t i: is no name on the Hub"]),
        (None, "other/tiny", BASE, ["--repo-id other/tiny must begin with one of user, org"]),
        (None, "user/tiny", {"base_model": "org/missing"}, ["is no model on the Hub", "org/missing"]),
        (None, "org/base", BASE, ["--repo-id org/base: exists and is public: add --public"]),
    ],
)
def test_what_would_be_of_no_use_is_refused_before_anything_is_sent(run, hub, spoil, repo_id, options, messages):
    if spoil:
        spoil(run)
    with pytest.raises(SettingsError) as refused:
        prepare(run, repo_id, client(hub), **options)
    assert len(refused.value.problems) == 1
    assert all(message in str(refused.value) for message in messages), str(refused.value)
    assert all(asked.startswith("GET ") for asked in hub.requests), hub.requests
    assert set(hub.repos) == {"org/base"}


def test_all_problems_are_told_at_once(run, hub, monkeypatch):
    monkeypatch.setattr("train.publishing.get_token", lambda: None)
    untrained(run)
    (run / "results.json").unlink()
    (run / "lrsa_config.json").unlink()
    with pytest.raises(SettingsError) as refused:
        prepare(run, "tiny", client(hub, token=False))
    lines = str(refused.value).splitlines()
    assert len(lines) == 6 and hub.requests == []
    assert any(line.startswith("access token: there is none: run `hf auth login`") for line in lines)


def test_a_token_that_the_hub_does_not_know(run, hub):
    with pytest.raises(SettingsError, match=r"Hub: http.* does not answer as it should: .*Invalid user token"):
        prepare(run, "user/tiny", client(hub, token="hf_wrong"), **BASE)


def test_visibility_is_never_changed_in_silence(run, hub):
    assert "/user/tiny/commit/" in publish(run, hub, public=True)
    assert hub.repos["user/tiny"]["private"] is False
    with pytest.raises(SettingsError, match="exists and is public: add --public"):
        publish(run, hub)
    client(hub).create_repo("user/hidden", private=True)
    with pytest.raises(SettingsError, match="--public user/hidden: exists and is private"):
        prepare(run, "user/hidden", client(hub), public=True, **BASE)


def test_a_token_in_the_settings_is_left_out(run, hub):
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["train"] |= {"hub_token": "hf_secret", "deepspeed": str(ROOT / "configs" / "deepspeed" / "zero2.json")}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    publish(run, hub)
    assert not any(b"hf_secret" in content for content in hub.files("user/tiny").values())
    train = yaml.safe_load(hub.files("user/tiny")["config.yaml"])["train"]
    assert train["deepspeed"] == "configs/deepspeed/zero2.json"


@pytest.fixture
def folder(run, monkeypatch, tmp_path) -> str:
    """What would be published, loaded by transformers as local code."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return str(prepare(run, "user/tiny", None, base_model="org/base")[1])


def test_custom_generate_carries_the_settings_of_the_adapter(folder):
    text = (Path(folder) / "custom_generate" / "settings.py").read_text()
    found: dict = {}
    exec(text, found)
    assert found["SETTINGS"] == json.loads((Path(folder) / "lrsa_config.json").read_text())


def test_custom_generate_takes_generate_s_arguments_and_its_own_cache_only(folder, tiny_run):
    model, _, new_cache = lrsa.load(tiny_run)
    lm = model.get_base_model()
    options = GENERATE | {"custom_generate": folder, "trust_remote_code": True}
    ids = torch.randint(3, 300, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :25] = 0
    expected = model.generate(ids, attention_mask=mask, past_key_values=new_cache(), **GENERATE)
    cache = new_cache()
    found = lm.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    assert torch.equal(found, expected) and cache.get_seq_length() == LENGTH + 29
    assert lm.config._attn_implementation == "lrsa", "a model under LRSA stays so"
    with pytest.raises(ValueError, match=r"must be an lrsa\.LRSACache, got DynamicCache: leave it out"):
        lm.generate(ids, past_key_values=DynamicCache(), **options)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        lm.generate(ids, custom_generate=folder, trust_remote_code=False)


class NotInstalled:
    def find_spec(self, name, *args):
        if name == "lrsa":
            raise ModuleNotFoundError("No module named 'lrsa'")


def test_custom_generate_says_what_is_missing(folder, tiny_run, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(tiny_run.parents[1] / "base")
    monkeypatch.delitem(sys.modules, "lrsa")
    monkeypatch.setattr("sys.meta_path", [NotInstalled(), *sys.meta_path])
    with pytest.raises(ImportError, match="pip install lrsa"):
        model.load_custom_generate(folder, trust_remote_code=True)
