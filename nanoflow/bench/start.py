"""From the start of a process to its first token, in a process of its own.

`python -m nanoflow.bench.start` is that process: it reads a config as JSON, and writes the time at which it got so far.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict

from nanoflow.bench.result import Result
from nanoflow.bench.rounds import Rounds
from nanoflow.core.config.engine_config import Config
from nanoflow.core.config.errors import NanoflowError
from nanoflow.core.config.sampling_params import SamplingParams

PHASES = ("imports", "engine", "first_token")
PROMPT = list(range(16))


def measure(config: Config) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of each of `PHASES` in a fresh process, and what its engine is made of.

    Raises:
        NanoflowError: the engine could not be started, with the reason.
    """
    command = [sys.executable, "-m", "nanoflow.bench.start"]
    start = time.time()
    process = subprocess.run(command, input=json.dumps(asdict(config)), capture_output=True, text=True, check=False)
    try:
        times, description = json.loads(process.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        reason = (process.stderr.strip().splitlines() or ["it gave no reason."])[-1]
        raise NanoflowError(f"The process that was to generate a token failed: {reason}") from None
    return {phase: end - begin for phase, begin, end in zip(PHASES, (start, *times), times, strict=False)}, description


def result(config: Config, rounds: Rounds) -> tuple[Result, dict[str, str]]:
    """The measurement over some rounds, and what the engine is made of."""
    measured = rounds.run("start", lambda number: measure(config))
    phases = [phases for phases, _ in measured]
    details = {f"{phase}_s": statistics.median(times[phase] for times in phases) for phase in PHASES}
    return Result("start", "s", [sum(times.values()) for times in phases], details=details), measured[-1][1]


def main() -> None:
    """Generate one token, and write when the imports, the engine and the token were there."""
    config = Config.from_dict(json.load(sys.stdin))

    from nanoflow.core.api.llm import LLM

    times = [time.time()]
    with LLM.from_config(config) as llm:
        times.append(time.time())
        llm.generate(PROMPT, SamplingParams(max_tokens=1), use_tqdm=False)
        times.append(time.time())
        print(json.dumps((times, llm.describe())))


if __name__ == "__main__":
    try:
        main()
    except NanoflowError as error:
        sys.exit(str(error))
