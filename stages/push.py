"""Upload the finished model to the hub, with a card made from the manifests, and check what arrived."""

import contextlib
import hashlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stages.lib import options
from stages.lib.artifact.manifest import read_manifest, refuse_other_run
from stages.lib.errors import UserError, nearest
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.tables import Recipe
from stages.lib.report.card import write
from stages.lib.report.repository import KINDS, File, collect, of_text, repositories

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TOKEN = "HF_TOKEN"


@dataclass(frozen=True)
class Upload:
    """One repository and its files, the card last."""

    repository: str
    files: tuple[File, ...]


@click.command(help=__doc__)
@options.recipe
@click.option("--hub", required=True, metavar="USER/NAME", help="The repository; other kinds add a suffix to its name.")
@options.reads("prepare-data")
@options.reads("sft")
@options.reads("grpo")
@options.reads("infer")
@options.reads("merge")
@options.reads("gguf")
@options.reads("ollama-modelfile")
@click.option("--what", help="What to upload, with commas between, instead of the recipe's save: merged_16bit,gguf.")
@click.option("--public", is_flag=True, help="Make it public once all of it is there; asks first.")
@click.option("--yes", is_flag=True, help="Do not ask before anything becomes public.")
def main(recipe: Path, hub: str, what: str | None, public: bool, yes: bool, **folders: Path) -> None:
    run_recipe = read_recipe(recipe)
    kinds = chosen(run_recipe.save if what is None else what.split(","))
    names = repositories(checked_name(hub), kinds)
    token = read_token()
    inputs = {name.replace("_", "-"): folder for name, folder in folders.items()}
    push(prepare(names, inputs, run_recipe), token, public=public, yes=yes)


def prepare(names: Mapping[str, str], folders: Mapping[str, Path], recipe: Recipe) -> list[Upload]:
    """Return the uploads, by repository of `names`. Raises `UserError` unless the artifacts are of one run."""
    manifests = {stage: read_manifest(folder, stage) for stage, folder in folders.items()}
    refuse_other_run(manifests, folders)
    verify_recipe(recipe, manifests)
    uploads = []
    for kind, repository in names.items():
        files = collect(kind, folders, manifests, recipe)
        card = write(kind, names, recipe, manifests, files)
        uploads.append(Upload(repository, (*files, of_text("README.md", card))))
    return uploads


def chosen(kinds: Sequence[str]) -> list[str]:
    """Return the kinds to upload, in the order of `KINDS`. Raises `UserError` for an unknown one."""
    known = tuple(KINDS)
    for kind in kinds:
        if kind not in known:
            raise UserError(f"--what: {kind!r} is not known{nearest(kind, known)}; known: {', '.join(known)}")
    return [kind for kind in known if kind in kinds]


def checked_name(name: str) -> str:
    """Return `name` if it can be a repository of the hub, else raise `UserError`."""
    fits = re.fullmatch(r"\w[\w.-]*/\w([\w.-]*\w)?", name, re.ASCII) and len(name) <= 90  # the hub: 96, with a suffix
    if not fits or "--" in name or ".." in name or name.endswith(".git"):
        raise UserError(
            f"--hub {name!r} is not a name of the hub; expected user/name, as in: make push HUB=ann/my-model"
        )
    return name


def read_token() -> str:
    """Return the hub's token from the environment, its only source. Raises `UserError` without one."""
    token = os.environ.get(TOKEN, "").strip()
    if not token:
        raise UserError(
            f"the environment has no {TOKEN}; expected a token of the hub that may write "
            f"(https://huggingface.co/settings/tokens). Run: export {TOKEN}=...  and this again"
        )
    return token


def verify_recipe(recipe: Recipe, manifests: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise `UserError` when a value of the recipe, which the card shows, is not the one of an artifact."""
    for stage, manifest in manifests.items():
        for table, used in manifest["recipe"].items():
            if table == "save":  # `collect` looks whether each kind is there
                continue
            now = recipe.tables(table).get(table, {})
            for key, value in used.items():
                if now.get(key) != value:
                    raise UserError(
                        f"{recipe.path}: [{table}] {key} = {now.get(key)!r}; expected {value!r}, with which {stage} "
                        f"was made: the card shows the recipe of the model. Run: make all"
                    )


def push(uploads: Sequence[Upload], token: str, *, public: bool, yes: bool) -> None:
    """Upload privately, check what arrived, then publish if `public`. Raises `UserError` on a failure and on a no."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    private = {upload.repository: is_private(api, upload.repository) for upload in uploads}
    confirm(private, public=public, yes=yes)
    for upload in uploads:
        with explained(upload.repository):
            send(api, upload, new=private[upload.repository] is None)
    for upload in uploads:
        if public and private[upload.repository] is not False:
            with explained(upload.repository):
                api.update_repo_settings(upload.repository, visibility="public", repo_type="model")
            click.echo(f"{upload.repository}: is public now")


def is_private(api: "HfApi", repository: str) -> bool | None:
    """Return whether a repository is private; None when this token sees none."""
    from huggingface_hub.errors import RepositoryNotFoundError

    with explained(repository):
        try:
            return bool(api.model_info(repository).private)
        except RepositoryNotFoundError:
            return None


def confirm(private: Mapping[str, bool | None], *, public: bool, yes: bool) -> None:
    """Ask before anything becomes public. Raises `UserError` on a no, and without a terminal to ask on."""
    already = [repository for repository, state in private.items() if state is False]
    becomes = [repository for repository, state in private.items() if public and state is not False]
    for names, text in ((already, "public already"), (becomes, "to become public")):
        for name in names:
            click.echo(f"{name}: {text}; everyone will be able to see and download the upload")
    if not (already or becomes) or yes:
        return
    if not sys.stdin.isatty():
        raise UserError(
            "the upload would be public, and there is no terminal to ask on. To allow it, add YES=1 (--yes)"
        )
    if not click.confirm("Upload it?"):
        raise UserError("nothing was uploaded")


@contextlib.contextmanager
def explained(repository: str) -> Iterator[None]:
    """Turn errors of the hub's client into a `UserError` that says what to do, without signed addresses."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    again = "Run the same again: files that have arrived are not sent again"
    try:
        yield
    except (httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
        # LFS uploads wrap the error. Their addresses are signed: whoever has one may write there.
        cause = error if isinstance(error, HfHubHTTPError) else error.__cause__
        if not isinstance(cause, HfHubHTTPError):
            text = re.sub(r"(https?://[^\s?'\"]*)\?\S*", r"\1", str(error)).strip()
            raise UserError(f"{repository}: {text}. {again}") from error
        status = cause.response.status_code
        reason = f"the hub answered {status}: {cause.server_message or cause.response.reason_phrase}"
        todo = {
            401: f"Is {TOKEN} right, and still valid? https://huggingface.co/settings/tokens",
            403: f"May the token in {TOKEN} write there, and is the name yours?",
        }
        raise UserError(f"{repository}: {reason}. {todo.get(status, again)}") from error


def send(api: "HfApi", upload: Upload, *, new: bool) -> None:
    """Upload the files that are not in the repository yet, in one commit, and check all that are there then.

    Contents go first, a file at a time, and stay with the hub: after an interruption only the file on its way is sent
    again. Raises `UserError` when a file that arrived is not the one that was sent.
    """
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.utils import build_hf_headers, get_session

    name = upload.repository
    card = {"content": upload.files[-1].content.decode(), "repoType": "model"}
    headers = build_hf_headers(token=api.token)
    answer = get_session().post(f"{api.endpoint}/api/validate-yaml", json=card, headers=headers)
    if answer.status_code == 400:  # create_commit asks this too, hours later
        raise ValueError(f"the hub refuses the card: {answer.json().get('errors')}")
    if new:
        api.create_repo(name, private=True, repo_type="model")
    there = remote_files(api, name)
    missing = [file for file in upload.files if not is_same(file, there.get(file.name))]
    size = sum(file.size for file in missing)
    click.echo(
        f"{name}: {len(upload.files) - len(missing)} of {len(upload.files)} files are there, {size / 1e6:,.1f} MB to go"
    )
    if missing:
        additions = [CommitOperationAdd(file.name, file.source) for file in missing]
        for addition in additions:
            api.preupload_lfs_files(name, [addition], free_memory=False)
        api.create_commit(name, additions, commit_message="Upload from Temper")
    verify_remote(upload, remote_files(api, name))
    click.echo(f"{name}: {api.endpoint}/{name}")


def remote_files(api: "HfApi", name: str) -> dict[str, Any]:
    """Return the hub's entry of every file in a repository, by path."""
    return {entry.path: entry for entry in api.list_repo_tree(name, recursive=True) if hasattr(entry, "size")}


def is_same(file: File, remote: Any) -> bool:
    """Return whether the hub's entry is of this file: by sha256 for large files, by git's hash for small ones."""
    if remote is None or remote.size != file.size:
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == file.sha256
    content = file.content
    return (
        remote.blob_id == hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()
    )


def verify_remote(upload: Upload, there: Mapping[str, Any]) -> None:
    """Print every file, its size and sha256, and name others. Raises `UserError` when the hub has another content."""
    for file in upload.files:
        if not is_same(file, there.get(file.name)):
            raise UserError(
                f"{upload.repository}: {file.name} is not on the hub as it is here ({file.size:,} bytes, sha256 "
                f"{file.sha256}). Run the same again"
            )
        click.echo(f"  {file.sha256[:16]}  {file.size:>15,}  {file.name}")
    click.echo(f"{upload.repository}: all {len(upload.files)} files are on the hub as they are here, by size and hash")
    for name in sorted(set(there) - {file.name for file in upload.files} - {".gitattributes"}):  # the hub's own
        click.echo(
            f"{upload.repository}: also holds {name}, which is not of this run. Delete it there if you do not want it"
        )


if __name__ == "__main__":
    main()
