"""Puts a finished run on the Hub: everything is checked first, then one commit carries all files or none."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from train.failures import RunFailed
from train.publish.model_card import CARD_NAME
from train.publish.prepare import Publication, read_run, write_folder
from train.settings.errors import Problem, SettingsError

LOG_IN = "there is none: run `hf auth login`, or set HF_TOKEN to one that may write (huggingface.co/settings/tokens)"


def prepare(
    run: Path,
    repo_id: str,
    api: HfApi | None,
    *,
    base_model: str | None = None,
    license: str | None = None,
    public: bool = False,
) -> tuple[Publication, Path]:
    """Check everything that can be checked before something is sent, and write the folder to send.

    Args:
        run: directory of a finished run.
        repo_id: `owner/name` on the Hub.
        api: checks token, names and visibility on the Hub; None skips that, for a dry run.
        base_model: the base model's Hub id, where the run loaded it from a local directory.
        license: the Hub's identifier of a licence, for the card.
        public: whether the repository is public.

    Returns:
        the publication and its folder, the run's `hub/`.

    Raises:
        SettingsError: with all problems of the run, the names and a missing token at once; when there are none, with
            all that the Hub reports.
    """
    problems = _name_problems("--repo-id", repo_id)
    if "/" not in repo_id:
        problems.append(Problem("--repo-id", repo_id, "must be OWNER/NAME, such as user/qa-lora"))
    if base_model:
        problems += _name_problems("--base-model", base_model)
    if api is not None and not (api.token or get_token()):
        problems.append(Problem("", "access token", LOG_IN))
    publication = read_run(run, repo_id, base_model, problems)
    if api is not None and (problems := _hub_problems(publication, public, api)):
        raise SettingsError(problems)
    folder = write_folder(publication, license)
    if api is not None:
        _validate_card(folder)
    return publication, folder


def send(publication: Publication, folder: Path, public: bool, message: str | None, api: HfApi) -> str:
    """Make the repository where there is none, and send the folder as one commit.

    Returns:
        the address of the commit.

    Raises:
        RunFailed: when the upload broke off, or the repository does not hold every file afterwards.
    """
    repo_id = publication.repo_id
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    # Not upload_folder: with hf_xet it may send several commits, of which a reader could see the first alone.
    additions = [CommitOperationAdd(name, path) for name, path in files.items()]
    try:
        api.create_repo(repo_id, private=not public, exist_ok=True)
        commit = api.create_commit(repo_id, additions, commit_message=message or f"Publish {publication.run.name}")
        missing = files.keys() - set(api.list_repo_files(repo_id, revision=commit.oid))
    except Exception as error:  # HTTP status, network, or what the client wraps them in
        raise RunFailed(
            f"{repo_id}: upload failed: {_reason(error)}. All files are sent in one commit, so the repository has all "
            "of them or none; run the same command again to complete it"
        ) from error
    if missing:
        names = ", ".join(sorted(missing))
        raise RunFailed(f"{repo_id} lacks {names} after commit {commit.oid}: are they in its .gitignore?")
    return commit.commit_url


def _name_problems(option: str, name: str) -> list[Problem]:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return [Problem(option, name, f"is not a valid name on the Hub: {error}")]
    return []


def _hub_problems(publication: Publication, public: bool, api: HfApi) -> list[Problem]:
    """What the Hub would refuse, and what others could not load; nothing is written there."""
    repo_id, base = publication.repo_id, publication.base_model
    try:
        user = api.whoami()
        owners = [user["name"], *(organization["name"] for organization in user.get("orgs", []))]
        problems = _visibility_problems(repo_id, public, api)
        if repo_id.split("/")[0] not in owners:
            problems.append(Problem("--repo-id", repo_id, f"must begin with one of {', '.join(owners)}: the token's"))
        if not api.repo_exists(base):
            text = f"{base} is not a model on the Hub that this token can read; set --base-model ORG/NAME"
            problems.append(Problem("", "model.name_or_path", text))
    except Exception as error:  # HTTP status or network: which classes, depends on the version of huggingface_hub
        raise RunFailed(f"The Hub at {api.endpoint} did not answer as expected: {_reason(error)}") from error
    return problems


def _validate_card(folder: Path) -> None:
    """Ask the Hub about the metadata now: it would refuse the commit for them after the repository was made."""
    try:
        ModelCard.load(folder / CARD_NAME).validate()
    except Exception as error:  # as above
        raise SettingsError([Problem("", CARD_NAME, f"is refused by the Hub: {_reason(error)}")]) from error


def _visibility_problems(repo_id: str, public: bool, api: HfApi) -> list[Problem]:
    """An existing repository keeps its visibility."""
    try:
        private = api.model_info(repo_id).private
    except RepositoryNotFoundError:
        return []
    if private != public:
        return []
    if public:
        return [Problem("--public", repo_id, "exists and is private: change that on the Hub, or leave out --public")]
    return [Problem("--repo-id", repo_id, "exists and is public: add --public, or choose another name")]


def _reason(error: BaseException) -> str:
    """The error with its cause, which holds the network's message."""
    causes = [error, *([error.__cause__] if error.__cause__ else [])]
    return "; ".join(" ".join(f"{cause}".split()) for cause in causes)
