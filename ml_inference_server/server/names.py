"""The names under which the model is served: what a request may call it."""

import re
from collections.abc import Callable, Iterable

from ml_inference_server.utils.errors import ModelNotFound

_OWNER = "sentence-transformers/"


class ModelNames:
    """served: the name that answers carry. others: the Hugging Face name, the last part of a path, aliases."""

    def __init__(self, served: str, others: Iterable[str] = (), *, accept_any: bool = False) -> None:
        names = [served, *others]
        self.all = tuple(dict.fromkeys(filter(None, (_shown(name) for name in names))))
        self.served = self.all[0]
        # As in sentence-transformers, its own models need no owner before their name.
        short = [name.removeprefix(_OWNER) for name in names]
        self._known = {name.lower() for name in (*names, *short, *self.all) if name}
        self._accept_any = accept_any

    def check(self, asked: str, is_role: Callable[[str], bool]) -> str:
        """The role that the name carries (`name:query`), or empty. ModelNotFound, with the names that exist.

        is_role: what may stand behind the colon.
        """
        if not asked or asked.lower() in self._known:
            return ""
        name, _, role = asked.rpartition(":")
        if name.lower() in self._known and is_role(role):
            return role
        if self._accept_any:
            return ""
        raise ModelNotFound(f"no such model is served here; served: {', '.join(self.all)}")


def _shown(name: str) -> str:
    """A folder is called by its last part: its place on the server's disk is nobody's business."""
    is_path = name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or re.match(r"[A-Za-z]:\\", name)
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1] if is_path else name
