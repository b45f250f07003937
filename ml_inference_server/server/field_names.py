"""The service's fields under the names that a protocol has for them."""

import re
from collections.abc import Mapping


def renamed(text: str, fields: Mapping[str, str]) -> str:
    """`text` begins with the path of one of the service's fields; `fields` says what the protocol calls it."""
    name = re.match(r"[a-z_]+", text)
    if name is None or name[0] not in fields:
        return text
    return fields[name[0]] + text[name.end() :]
