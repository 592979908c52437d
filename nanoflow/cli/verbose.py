"""`--verbose`: what the package has to say by `logging`, on standard error. Without it, nothing is said."""

from __future__ import annotations

import logging

FLAG = "--verbose"
OBSERVED = ("run", "chat", "bench")  # commands that have an engine, which the observer `log` watches
FORMAT = "%(asctime)s %(levelname)s %(message)s"


def telling(argv: list[str]) -> list[str]:
    """Show the records of the logger `nanoflow`; the arguments with the observer `log`, unless they name others."""
    logger = logging.getLogger("nanoflow")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(FORMAT))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    rest = [argument for argument in argv if argument != FLAG]
    has_settings = rest[:1] != ["bench"] or len(rest) > 1
    names_others = any(argument.lstrip("+").startswith("observers=") for argument in rest)
    if rest[:1] and rest[0] in OBSERVED and has_settings and not names_others:
        rest.append("observers=[log]")
    return rest
