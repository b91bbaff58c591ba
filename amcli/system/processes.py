"""Whether this command runs as one of several processes, and what it then cannot do.

`torchrun` starts the same command several times, for a model whose heads are divided among GPUs.
The first process speaks for all of them; none can read what is typed or piped, which comes once.
"""

from __future__ import annotations

import os

from amcli.errors import UsageError


def launched() -> int:
    """Number of processes that `torchrun` started for this command; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def follows() -> bool:
    """Whether another process speaks for this one."""
    return launched() > 1 and int(os.environ.get("RANK", "0")) > 0


def require_one(what: str, instead: str) -> None:
    """Raise UsageError where several processes would each do `what`."""
    if launched() > 1:
        raise UsageError(
            f"{launched()} processes cannot {what}",
            instead,
            code="several-processes",
            processes=launched(),
        )
