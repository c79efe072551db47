"""The hub: reachable, the token good, model and data there and allowed."""

import email.utils
import os
import re
import ssl
import threading
import time
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from stages.lib.data.files import files_of_source
from stages.lib.errors import UserError
from stages.lib.machine.copies import hub_home
from stages.lib.machine.disk import ARTIFACTS
from stages.lib.machine.findings import Finding
from stages.lib.recipe.tables import Recipe, is_hub_name

HUB_SECONDS = 4  # after these: where it is looked for copies depends on Docker
CLOCK_SECONDS = 300  # farther off, signed download addresses and certificates count as expired
GATED = ("google/gemma", "meta-llama/")  # where no answer of the hub says so


# ---- network ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What the hub answered: an HTTP status, or None and why there was none; its clock's offset from ours, seconds.

    `commit` is that of the repository at the revision that was asked for, where the hub says so.
    """

    status: int | None
    reason: str = ""
    ahead_seconds: float | None = None
    commit: str | None = None


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects are an answer, and not followed: urllib would take the token along to another host."""

    def redirect_request(self, *_: object) -> None:
        """Follow none."""
        return None


def endpoint() -> str:
    """Return the hub's address: HF_ENDPOINT, as for huggingface_hub."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def ask_hub(urls: dict[str, str]) -> dict[str, Answer]:
    """Return the hub's answer to a HEAD request for each address, by its name, all asked at once."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return {name: Answer(None, "HF_HUB_OFFLINE is set") for name in urls}
    answers = {name: Answer(None, f"no answer within {HUB_SECONDS} s") for name in urls}
    threads = []
    for name, url in urls.items():
        # A daemon, for the look-up of a host's name knows no time limit.
        threads.append(threading.Thread(target=lambda n=name, u=url: answers.update({n: ask(u)}), daemon=True))
        threads[-1].start()
    deadline = time.monotonic() + HUB_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return dict(answers)


def ask(url: str) -> Answer:
    """Return the answer to one HEAD request."""
    token = hub_token()
    headers = {"Authorization": f"Bearer {token}"} if is_token(token) else {}
    try:
        request = urllib.request.Request(url, headers=headers, method="HEAD")
        trust = ssl.create_default_context(cafile=os.environ.get("CA_BUNDLE") or None)
        opener = urllib.request.build_opener(NoRedirect, urllib.request.HTTPSHandler(context=trust))
        with opener.open(request, timeout=HUB_SECONDS) as reply:
            return Answer(reply.status, "", ahead(reply.headers.get("Date")), reply.headers.get("X-Repo-Commit"))
    except urllib.error.HTTPError as error:
        commit = error.headers.get("X-Repo-Commit")  # a redirect comes here as well
        return Answer(error.code, str(error.reason), ahead(error.headers.get("Date")), commit)
    except (OSError, ValueError) as error:  # URLError, time-outs and TLS are OSErrors; ValueError: no such address
        return Answer(None, str(getattr(error, "reason", error)))


def ahead(date: str | None) -> float | None:
    """Return by how many seconds the clock that wrote this HTTP date is ahead of ours."""
    return None if date is None else email.utils.parsedate_to_datetime(date).timestamp() - time.time()


def hub_token() -> str:
    """Return the token in HF_TOKEN or, which no container would see, that of `hf auth login`; "" if there is none."""
    if os.environ.get("HF_TOKEN") or os.environ.get("RUNTIME") != "local":
        return os.environ.get("HF_TOKEN", "")
    stored = Path(os.environ.get("HF_TOKEN_PATH") or hub_home() / "token").expanduser()
    return stored.read_text().strip() if stored.is_file() else ""


def is_token(token: str) -> bool:
    """Say whether this can be sent as a token: one visible word."""
    return re.fullmatch(r"[!-~]+", token) is not None


def hub_finding(what: Literal["model", "data"], name: str, answer: Answer) -> Finding:
    """Return whether the hub would give the repository `name`."""
    if answer.status is None:
        copy = "a local folder as [model] name" if what == "model" else "make ... DATA=FOLDER"
        hint = "; behind a proxy that inspects TLS: CA_BUNDLE=FILE" if "CERTIFICATE" in answer.reason else ""
        remedy = f"mend the network, or set HF_ENDPOINT to a mirror, or give a copy ({copy}){hint}"
        found = f"{name}: no copy here, and {endpoint()} does not answer ({answer.reason})"
        return Finding("fail", what, found, remedy)
    if answer.status < 400:
        return Finding("ok", what, f"{name}: {endpoint()} has it")
    if answer.status in (401, 403):
        return Finding("fail", what, f"{name}: the hub refuses it ({answer.status})", "see token, and check the name")
    if answer.status == 404:
        return Finding("fail", what, f"{name}: not at this revision on the hub", "mend name and revision in the recipe")
    return Finding("warn", what, f"{name}: the hub answers {answer.status} {answer.reason}", "try again later")


def unpinned_finding(finding: Finding, commit: str | None) -> Finding:
    """Return what was found of a dataset, and that the recipe states no revision; `commit` is the newest, if known."""
    found = f"{finding.found}, and the recipe states no revision"
    if finding.status != "ok":
        return replace(finding, found=found)
    newest = f'"{commit}", the newest commit there' if commit else "a commit (40 hex digits) of its history"
    remedy = f"write revision = {newest}, below its name in the recipe; or make ... DATA=FOLDER"
    return Finding("fail", "data", found, remedy)


def model_finding(recipe: Recipe, model: Path | None, answers: dict[str, Answer]) -> Finding:
    """Return where the model comes from."""
    name = recipe.model.name
    if model is not None:
        return Finding("ok", "model", f"{name}: a whole copy is at {model}")
    if name == "base-model":
        return Finding("ok", "model", "made by this run")
    if is_hub_name(name):
        return hub_finding("model", name, answers[name])
    return Finding(
        "fail", "model", f"{name}: no folder with config.json and all its safetensors files",
        "mend [model] name, or copy the whole model there",
    )  # fmt: skip


def data_places(recipe: Recipe) -> tuple[list[Finding], dict[str, str]]:
    """Return findings for the sources that are on this disk, and addresses to ask the hub for the others, by name.

    DATA, or what it was the last time, is where a local copy of a hub dataset is. Datasets are read from the hub as a
    stream, whatever its cache holds. Every repository has a .gitattributes. The hub is asked for the newest one of a
    dataset whose revision the recipe does not state.
    """
    out = ARTIFACTS / recipe.path.stem
    if (out / "prepare-data" / "manifest.json").is_file():
        return [Finding("ok", "data", f"{out / 'prepare-data'} is finished")], {}
    stated = out / "data.path"
    given = os.environ.get("DATA") or (stated.read_text().strip() if stated.is_file() else "")
    findings, urls = {}, {}
    for source in recipe.data.sources:
        if source.name == "base-model":
            continue
        if is_hub_name(source.name) and not source.revision and not given:
            urls[source.name] = f"{endpoint()}/datasets/{source.name}/resolve/main/.gitattributes"
            continue
        try:
            files = files_of_source(source, None, Path(given) if given else None)
        except UserError as error:
            findings[error.message] = Finding("fail", "data", error.message, "mend [[data.sources]], or DATA")
            continue
        if files:
            findings[source.name] = Finding("ok", "data", f"{source.name}: on this disk ({files[0]})")
        else:
            urls[source.name] = f"{endpoint()}/datasets/{source.name}/resolve/{source.revision}/.gitattributes"
    return list(findings.values()), urls


def token_finding(recipe: Recipe, model: Path | None, answers: dict[str, Answer]) -> Finding:
    """Return whether a token is needed, and whether the one that is here opens what is gated. It is never shown."""
    name, value = recipe.model.name, hub_token()
    which = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "the token of `hf auth login`"
    remedy = (
        f"accept the licence at {endpoint()}/{name}, make a token there that may read, and: export HF_TOKEN=... (with "
        f"RUNTIME=local a login by `hf auth login` does)"
    )
    refused = {key: answer.status for key, answer in answers.items() if answer.status in (401, 403)}
    if value and not is_token(value):
        return Finding("fail", "token", f"{which} has a space or a line break in it", "give it again, the word alone")
    if refused:
        found = f"{which} is set and does not open it" if value else "HF_TOKEN is not set"
        return Finding("fail", "token", f"{', '.join(refused)}: the hub wants one ({found})", remedy)
    if model is not None or not is_hub_name(name):
        return Finding("ok", "token", "not needed: the model is not fetched")
    if answers[name].status is None and name.startswith(GATED) and not value:
        return Finding("fail", "token", f"{name} is gated and HF_TOKEN is not set", remedy)
    if value:
        return Finding("ok", "token", f"{which} is set")
    known = "the hub gives the model without" if answers[name].status else "the model is not known to be gated"
    return Finding("ok", "token", f"not needed: {known}")


def clock_finding(answers: dict[str, Answer]) -> Finding:
    """Return whether this machine's clock is right: by the hub's, or else that no file here is from the future."""
    remedy = "sudo timedatectl set-ntp true"
    offsets = [answer.ahead_seconds for answer in answers.values() if answer.ahead_seconds is not None]
    if offsets:
        found = f"{abs(offsets[0]):.0f} s {'behind' if offsets[0] > 0 else 'ahead of'} the hub's"
        late = abs(offsets[0]) > CLOCK_SECONDS
        return Finding("fail", "clock", found, remedy) if late else Finding("ok", "clock", found)
    newest = max(path.stat().st_mtime for path in Path(__file__).parent.rglob("*.py"))
    if newest > time.time() + 60:
        found = f"files of this checkout are {newest - time.time():.0f} s in its future, and make goes by time"
        return Finding("fail", "clock", found, remedy)
    return Finding("ok", "clock", "not behind the files here (no network time to compare with)")
