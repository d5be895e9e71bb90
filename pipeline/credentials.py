"""Credentials in texts: found, so that no configuration holds one, and masked wherever a text is
shown or kept.

They belong into the environment, on Modal into a secret: what a run says and keeps is for others.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

MASK = "***"
# What stands before a host; of a URL a name alone is no secret, but where it is all that opens it
_BEFORE_HOST = re.compile(r"//[^/?#@\s'\"]*@")
_WITH_PASSWORD = re.compile(r"(?:https?://[^/?#@\s'\"]+|//[^/?#@\s'\"]*:[^/?#@\s'\"]+)@")
# What signs a URL, or is asked for by name in one
_SIGNED = re.compile(
    r"([?&](?:x-(?:amz|goog)-(?:signature|credential|security-token)|awsaccesskeyid|signature|sig"
    r"|(?:access_|auth_)?token|api_?key|password|secret)=)[^&\s'\"]+",
    re.IGNORECASE,
)
# Of the Hub, of OpenAI and those who do as it does, AWS, GitHub, Modal, Google, Slack
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|A[KS]IA[A-Z0-9]{16}"
    r"|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{20,}|a[ks]-[A-Za-z0-9]{20,}"
    r"|AIza[A-Za-z0-9_-]{35}|xox[abp]-[A-Za-z0-9-]{20,})(?![A-Za-z0-9])"
)
_NAME = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD)$")
SHORTEST = 8  # characters of a variable that are looked for; shorter ones are words by chance


def masked(text: str) -> str:
    """Return a text without the credentials in it."""
    text = _BEFORE_HOST.sub(f"//{MASK}@", text)
    text = _SIGNED.sub(rf"\1{MASK}", text)
    text = _TOKEN.sub(MASK, text)
    for _, value in _of_environment(os.environ):
        text = text.replace(value, MASK)
    return text


def credential(text: str) -> str:
    """Return what kind of credential a text holds, "" where it holds none that can be told."""
    if _WITH_PASSWORD.search(text):
        return "a password in a URL"
    if _SIGNED.search(text):
        return "a URL that is signed or has a key in it"
    if _TOKEN.search(text):
        return "a key"
    for name, value in _of_environment(os.environ):
        if value in text:
            return f"the value of ${name}"
    return ""


def _of_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the variables that hold a credential by their names, with their values."""
    for name, value in environ.items():
        # The path of a file with a key is named so too, and may be told
        if _NAME.search(name) and len(value) >= SHORTEST and not _is_file(value):
            yield name, value


def _is_file(value: str) -> bool:
    try:
        return Path(value).exists()
    # longer than a name may be, or with what no name has
    except (OSError, ValueError):
        return False
