"""What a worker is told when it is started."""

import json
from dataclasses import asdict, dataclass

WORKER_FLAG = "--worker"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """index: from 0. link: the descriptor of its end. cpus: on how many it may count."""

    index: int
    link: int
    cpus: int

    def written(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> "Seat":
        return cls(**json.loads(text))
