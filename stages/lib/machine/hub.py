"""Findings on the hub: whether it answers, takes the token, has model and data and gives them."""

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

from stages.lib.data.place import files_of_source
from stages.lib.errors import UserError
from stages.lib.machine.copies import hub_home
from stages.lib.machine.disk import ARTIFACTS
from stages.lib.machine.findings import Finding
from stages.lib.recipe.tables import Recipe, is_hub_name

HUB_SECONDS = 4  # besides COMMAND_SECONDS: the hub is asked when Docker has answered
CLOCK_SECONDS = 300  # farther off, signed download addresses and certificates count as expired
GATED = ("google/gemma", "meta-llama/")  # known to be gated without an answer of the hub


@dataclass(frozen=True)
class Answer:
    """The hub's answer: an HTTP status, or None and the reason; and how many seconds its clock is ahead of ours.

    `commit` is that of the repository at the revision asked for, where the hub states it.
    """

    status: int | None
    reason: str = ""
    ahead_seconds: float | None = None
    commit: str | None = None


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer and is not followed: urllib would send the token to another host."""

    def redirect_request(self, *_: object) -> None:
        """Follow none."""


def endpoint() -> str:
    """Return the hub's address: HF_ENDPOINT, as for huggingface_hub."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def ask_hub(urls: dict[str, str]) -> dict[str, Answer]:
    """Return the hub's answer to a HEAD request for each address, by its name, all asked at once."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return {name: Answer(None, "HF_HUB_OFFLINE is set") for name in urls}
    answers = {name: Answer(None, f"no answer within {HUB_SECONDS} s") for name in urls}

    def note(name: str, url: str) -> None:
        answers[name] = ask(url)

    # Daemons: the look-up of a host's name has no time limit.
    threads = [threading.Thread(target=note, args=each, daemon=True) for each in urls.items()]
    for thread in threads:
        thread.start()
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
        commit = error.headers.get("X-Repo-Commit")  # a redirect's as well
        return Answer(error.code, str(error.reason), ahead(error.headers.get("Date")), commit)
    except (OSError, ValueError) as error:  # URLError, time-outs and TLS are OSErrors; ValueError: no such address
        return Answer(None, str(getattr(error, "reason", error)))


def ahead(date: str | None) -> float | None:
    """Return how many seconds the clock that wrote this HTTP date is ahead of ours."""
    return None if date is None else email.utils.parsedate_to_datetime(date).timestamp() - time.time()


def hub_token() -> str:
    """Return the token in HF_TOKEN or, with RUNTIME=local alone, that of `hf auth login`; "" if there is none."""
    if os.environ.get("HF_TOKEN") or os.environ.get("RUNTIME") != "local":
        return os.environ.get("HF_TOKEN", "")
    stored = Path(os.environ.get("HF_TOKEN_PATH") or hub_home() / "token").expanduser()
    return stored.read_text().strip() if stored.is_file() else ""


def is_token(token: str) -> bool:
    """Return whether this can be sent as a token: one visible word."""
    return re.fullmatch(r"[!-~]+", token) is not None


def hub_finding(what: Literal["model", "data"], name: str, answer: Answer) -> Finding:
    """Return whether the hub would give the repository `name`."""
    if answer.status is None:
        copy = "a local folder as [model] name" if what == "model" else "make ... DATA=FOLDER"
        hint = "; behind a proxy that inspects TLS: CA_BUNDLE=FILE" if "CERTIFICATE" in answer.reason else ""
        remedy = f"fix the network, or set HF_ENDPOINT to a mirror, or give a copy ({copy}){hint}"
        found = f"{name}: no copy here, and {endpoint()} does not answer ({answer.reason})"
        return Finding("fail", what, found, remedy)
    if answer.status < 400:
        return Finding("ok", what, f"{name}: {endpoint()} has it")
    if answer.status in (401, 403):
        return Finding("fail", what, f"{name}: the hub refuses it ({answer.status})", "see token, and check the name")
    if answer.status == 404:
        return Finding("fail", what, f"{name}: not at this revision on the hub", "fix name and revision in the recipe")
    return Finding("warn", what, f"{name}: the hub answers {answer.status} {answer.reason}", "try again later")


def unpinned_finding(finding: Finding, commit: str | None) -> Finding:
    """Return the finding on a dataset that the recipe states no revision of; `commit` is its newest, if known."""
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
    if recipe.model.hub:
        return Finding("ok", "model", f"{name}: to fetch from ModelScope, which make doctor does not ask")
    if is_hub_name(name):
        return hub_finding("model", name, answers[name])
    found = f"{name}: no folder with config.json and all its safetensors files"
    return Finding("fail", "model", found, "fix [model] name, or copy the whole model there")


def data_places(recipe: Recipe) -> tuple[list[Finding], dict[str, str]]:
    """Return findings on the sources on this disk, and by name the hub's addresses of the others.

    A local copy of a hub dataset is at DATA, or where DATA was the last time. Datasets are read from the hub as a
    stream, whatever its cache holds. Every repository has a .gitattributes; where the recipe states no revision, the
    newest is asked for.
    """
    out = ARTIFACTS / recipe.path.stem
    if (out / "prepare-data" / "manifest.json").is_file():
        return [Finding("ok", "data", f"{out / 'prepare-data'} is finished")], {}
    last = out / "data.path"
    data = os.environ.get("DATA") or (last.read_text().strip() if last.is_file() else "")
    findings, urls = {}, {}
    for source in recipe.data.sources:
        if source.name == "base-model":
            continue
        if is_hub_name(source.name) and source.hub and source.revision and not data:
            found = f"{source.name}: to fetch from ModelScope, which make doctor does not ask"
            findings[source.name] = Finding("ok", "data", found)
            continue
        if is_hub_name(source.name) and not data and not source.hub:
            commit = source.revision or "main"
            urls[source.name] = f"{endpoint()}/datasets/{source.name}/resolve/{commit}/.gitattributes"
            continue
        try:
            file = files_of_source(source, None, Path(data) if data else None)[0]
            findings[source.name] = Finding("ok", "data", f"{source.name}: on this disk ({file})")
        except UserError as error:
            findings[error.message] = Finding("fail", "data", error.message, "fix [[data.sources]], or DATA")
    return list(findings.values()), urls


def token_finding(recipe: Recipe, model: Path | None, answers: dict[str, Answer]) -> Finding:
    """Return whether a token is needed, and whether the one here opens what is gated. It is never shown."""
    name, value = recipe.model.name, hub_token()
    which = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "the token of `hf auth login`"
    remedy = f"accept the licence at {endpoint()}/{name}, make a token there that may read, and: export HF_TOKEN=... "
    remedy += "(with RUNTIME=local a login by `hf auth login` does)"
    statuses = {key: answer.status for key, answer in answers.items() if answer.status in (401, 403)}
    if value and not is_token(value):
        return Finding("fail", "token", f"{which} has a space or a line break in it", "give it again, the word alone")
    if statuses:
        found = f"{which} is set and does not open it" if value else "HF_TOKEN is not set"
        return Finding("fail", "token", f"{', '.join(statuses)}: the hub wants one ({found})", remedy)
    if model is not None or not is_hub_name(name) or recipe.model.hub:
        return Finding("ok", "token", "not needed: the model is not fetched")
    if answers[name].status is None and name.startswith(GATED) and not value:
        return Finding("fail", "token", f"{name} is gated and HF_TOKEN is not set", remedy)
    if value:
        return Finding("ok", "token", f"{which} is set")
    reason = "the hub gives the model without" if answers[name].status else "the model is not known to be gated"
    return Finding("ok", "token", f"not needed: {reason}")


def clock_finding(answers: dict[str, Answer]) -> Finding:
    """Return whether this machine's clock is right: by the hub's or, without, by the times of the files here."""
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
