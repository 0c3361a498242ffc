"""What looks like a key, a token or a password, and must not enter a file or a script. No torch."""

import re

_NAME = re.compile(
    r"(api_?key|access_?key|private_?key|secret|passw|credential|auth(?!or)|_token$|^token$|_pat$)",
    re.IGNORECASE,
)
_VALUE = re.compile(r"(hf_|ghp_|sk-)[A-Za-z0-9_-]{16,}|\b[0-9a-f]{40}\b|(?<=://)[^/@\s]+@")


def is_secret_name(name: str) -> bool:
    """Whether a variable or the last part of a dotted knob is named like a secret."""
    return _NAME.search(name.rpartition(".")[2]) is not None


def is_secret(name: str, value: str) -> bool:
    """Whether the name or the value of a setting looks like a secret."""
    return is_secret_name(name) or _VALUE.search(value) is not None


def without_secrets(argument: str) -> str:
    """A command-line argument, with everything that looks like a secret replaced by `***`."""
    name, equals, _ = argument.partition("=")
    if equals and is_secret_name(name):
        return f"{name}=***"
    return _VALUE.sub("***", argument)
