"""The executor on several ranks: the driver's, which sends each step to the workers, and the loop of a worker."""

from __future__ import annotations

import json
from typing import Any, NoReturn

import numpy as np
import torch

from nanoflow.core.config.errors import NanoflowError, one_line
from nanoflow.core.distributed.rank_group import Driver, Worker
from nanoflow.core.execution.local_executor import LocalExecutor
from nanoflow.core.execution.model_runner import ModelRunner
from nanoflow.core.execution.step_message import CALL, StepMessage
from nanoflow.core.execution.step_output import StepOutput
from nanoflow.core.sampling.logits_processors import LogitsProcessors


class RankExecutor(LocalExecutor):
    """Runs batches on this rank, the driver, and on all workers.

    Args:
        runner: this rank's.
        processors: as in `LocalExecutor`.
        driver: the way to the workers, which are in their `worker_loop`.
    """

    patience = 2.0

    def __init__(self, runner: ModelRunner, processors: LogitsProcessors, driver: Driver) -> None:
        super().__init__(runner, processors)
        self.driver = driver

    def _execute(self, step: StepMessage) -> StepOutput:
        self.driver.send(step.pack())
        return super()._execute(step)

    def call(self, method: str, *args: Any) -> list[Any]:
        text = json.dumps([method, args]).encode()
        self.driver.send(np.frombuffer(np.int64(CALL).tobytes() + text, np.uint8))
        failure, results = None, []
        try:
            results = super().call(method, *args)
        except NanoflowError as error:
            failure = error
        replies = [json.loads(reply) for reply in self.driver.replies()]  # of all, or they'd be taken for the next ones
        if failure is not None:
            raise failure
        for rank, reply in enumerate(replies, 1):
            if "error" in reply:
                raise NanoflowError(f"{method} failed on rank {rank}: {reply['error']}.")
        return results + [reply["result"] for reply in replies]


@torch.inference_mode()
def worker_loop(runner: ModelRunner, worker: Worker) -> NoReturn:
    """Execute what the driver sends.

    Raises:
        EOFError: there is no more.
    """
    if runner.threads.number is not None:
        torch.set_num_threads(runner.threads.number)  # this process is the rank's own
    while True:
        handle(runner, worker, worker.receive())


def handle(runner: ModelRunner, worker: Worker, message: bytes) -> None:
    """Execute one message, a step or a call."""
    if np.frombuffer(message, np.int64, 1) == CALL:
        worker.reply(_result(runner, *json.loads(message[8:])))
        return
    step = StepMessage.unpack(message, runner.open_buffer)
    output = runner.execute(step)
    for _ in output.scored:
        pass
    if not step.temperature_only:
        runner.set_tokens(None, None)


def _result(runner: ModelRunner, method: str, args: list[Any]) -> bytes:
    try:
        return json.dumps({"result": getattr(runner, method)(*args)}).encode()
    except Exception as error:
        return json.dumps({"error": one_line(error)}).encode()
