"""Where files of a hub may come from: the mirror that was named, and no host beside it."""

import functools
import ipaddress
import os
from typing import Any
from urllib.parse import urlsplit

from stages.lib.errors import UserError


def site_of(host: str) -> str:
    """Return the part of a host's name that its mirrors share, its last two words; an address as it is."""
    try:
        return str(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        return ".".join(host.lower().rstrip(".").split(".")[-2:])


def refuse_other_host(url: str, endpoint: str, variable: str) -> None:
    """Raise `UserError` for an address on another site than `endpoint`, which the environment's `variable` names.

    A mirror that sends a client on to a host elsewhere hands the files out past itself: where only the mirror can be
    reached, that ends in a time-out after minutes. `MIRROR_HOSTS` names hosts that are meant, with commas between them.
    """
    host, meant = urlsplit(url).hostname or "", urlsplit(endpoint).hostname or ""
    more = [each.strip() for each in os.environ.get("MIRROR_HOSTS", "").split(",") if each.strip()]
    if site_of(host) != site_of(meant) and host not in more:
        raise UserError(
            f"{endpoint} sends this machine on to {host or url!r} for a file; expected {meant}, which {variable} "
            f"names, or a host of its site. If that host is meant, too: export MIRROR_HOSTS={host}"
        )


@functools.cache
def keep_to_mirror() -> None:
    """With HF_ENDPOINT, let huggingface_hub ask the mirror's site alone, whatever address a reply names.

    Xet storage is asked by a library of its own, past this: `HF_HUB_DISABLE_XET` turns it off. Raises `UserError` where
    it is on.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "")
    if not endpoint:
        return
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils import _http

    if not constants.HF_HUB_DISABLE_XET:
        raise UserError(
            f"HF_ENDPOINT={endpoint} with Xet storage, which is the hub's own: large files would come past the mirror. "
            f"Run: export HF_HUB_DISABLE_XET=1"
        )

    def client() -> Any:
        made = _http.default_client_factory()
        hooks = made.event_hooks
        hooks["request"].append(lambda request: refuse_other_host(str(request.url), endpoint, "HF_ENDPOINT"))
        made.event_hooks = hooks
        return made

    set_client_factory(client)
