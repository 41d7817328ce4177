"""Whether W&B is online, offline or off on this machine, found without asking anybody.

Data flow: what the user asked for + what is installed, set and logged in -> a mode, each change of it a decision.
"""

import netrc
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from lightning_mm.decisions import decide

Mode = Literal["auto", "online", "offline", "off"]


def resolve(asked: Mode) -> Mode:
    """What the mode comes to on this machine; every change of what was asked is a decision with its reason."""
    if asked == "off":
        return asked
    if find_spec("wandb") is None:
        decide("wandb.mode", "off", "wandb is not installed")
        return "off"
    standing = {"disabled": "off", "offline": "offline", "dryrun": "offline"}.get(os.environ.get("WANDB_MODE", ""))
    if asked == "auto" and standing is not None:
        decide("wandb.mode", standing, f"WANDB_MODE is {os.environ['WANDB_MODE']}")
        return "off" if standing == "off" else "offline"
    login = _login() if asked in ("auto", "online") else ""
    if login and asked == "auto":
        decide("wandb.mode", "online", f"logged in by {login}")
    if asked != "offline" and not login:
        decide("wandb.mode", "offline", "not logged in; after `wandb login`, `wandb sync` uploads the run")
    return "online" if login else "offline"


def _login() -> str:
    """Where a W&B login is found, or nothing. Only looked for here: W&B itself would ask at the terminal, and wait."""
    for variable in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if os.environ.get(variable):
            return variable
    import wandb

    settings = wandb.setup().settings
    if settings.api_key:
        return "W&B's settings file"
    servers = (urlsplit(settings.base_url).netloc, "api.wandb.ai")  # a login from before the server moved still counts
    files = (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")
    for file in (Path(name).expanduser() for name in files if name):
        try:
            entries = netrc.netrc(file)
        except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
            continue
        if any(entries.authenticators(server) for server in servers):
            return str(file)
    return ""
