"""What publishing refuses before anything is sent: all of it at once, each with what to change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from tests.train.publish.hub_server import TOKEN, LocalHub
from train.failures import RunFailed
from train.publish.hub import prepare
from train.settings.errors import SettingsError


def client(hub: LocalHub, token: str | bool = TOKEN) -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


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
        (with_a_path, "user/tiny", BASE, ["report.md:3: contains a local path"]),
        (None, "user/tiny", {}, ["model.name_or_path: is the local directory", "--base-model ORG/NAME"]),
        (None, "tiny", BASE, ["--repo-id tiny must be OWNER/NAME"]),
        (None, "user/t i", BASE, ["--repo-id user/t i: is not a valid name on the Hub"]),
        (None, "other/tiny", BASE, ["--repo-id other/tiny must begin with one of user, org"]),
        (None, "user/tiny", {"base_model": "org/missing"}, ["org/missing is not a model on the Hub"]),
        (None, "org/base", BASE, ["--repo-id org/base: exists and is public: add --public"]),
        (None, "user/tiny", BASE | {"license": "none"}, ["README.md: is refused by the Hub", "license must be one of"]),
    ],
)
def test_what_would_be_of_no_use_is_refused_before_anything_is_sent(tiny_copy, hub, spoil, repo_id, options, messages):
    if spoil:
        spoil(tiny_copy)
    with pytest.raises(SettingsError) as refused:
        prepare(tiny_copy, repo_id, client(hub), **options)
    assert len(refused.value.problems) == 1
    assert all(message in str(refused.value) for message in messages), str(refused.value)
    assert all(asked.startswith(("GET ", "POST /api/validate-yaml")) for asked in hub.requests), hub.requests
    assert set(hub.repos) == {"org/base"}


def test_all_problems_are_told_at_once(tiny_copy, hub, monkeypatch):
    monkeypatch.setattr("train.publish.hub.get_token", lambda: None)
    untrained(tiny_copy)
    (tiny_copy / "results.json").unlink()
    (tiny_copy / "lrsa_config.json").unlink()
    with pytest.raises(SettingsError) as refused:
        prepare(tiny_copy, "tiny", client(hub, token=False))
    lines = str(refused.value).splitlines()
    assert len(lines) == 6 and hub.requests == []
    assert any(line.startswith("access token: there is none: run `hf auth login`") for line in lines)


@pytest.mark.parametrize(("token", "reason"), [("hf_wrong", "Invalid user token"), (TOKEN, "Connection refused")])
def test_a_hub_that_does_not_answer_as_it_should(tiny_copy, hub, token, reason):
    endpoint = hub.url if token != TOKEN else "http://127.0.0.1:9"
    with pytest.raises(RunFailed, match=rf"The Hub at {endpoint} did not answer as expected: .*{reason}"):
        prepare(tiny_copy, "user/tiny", HfApi(endpoint=endpoint, token=token), **BASE)


def test_visibility_is_never_changed_in_silence(tiny_copy, hub):
    client(hub).create_repo("user/open", private=False)
    client(hub).create_repo("user/hidden", private=True)
    with pytest.raises(SettingsError, match="user/open: exists and is public: add --public"):
        prepare(tiny_copy, "user/open", client(hub), **BASE)
    with pytest.raises(SettingsError, match="--public user/hidden: exists and is private"):
        prepare(tiny_copy, "user/hidden", client(hub), public=True, **BASE)
    for name, public in (("user/open", True), ("user/hidden", False)):
        assert prepare(tiny_copy, name, client(hub), public=public, **BASE)[1].is_dir()
