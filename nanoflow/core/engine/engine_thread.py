"""An engine that steps in a thread of its own, and a second thread that turns what it brings into outputs.

The step loop does nothing but steps. Commands reach it through a queue and are carried out between two steps; updates
leave through another queue. Text is decoded behind that one, mostly in compiled code that lets other threads run, while
the loop is at its next step already. Both queues carry plain data (`core/data/messages.py`).

Python runs one thread at a time, so all that happens to outputs takes time from the step loop. It is kept to a share:
after each round the second thread rests, and what steps bring meanwhile goes into one output a request. With few
streams a round is so short that every token is shown as it comes. And a round is cut into small pieces, between which
the step loop can go on.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

from nanoflow.core.data.messages import AddRequest, Command, Refusal, Stop, Update, merged
from nanoflow.core.data.outputs import RequestOutput
from nanoflow.core.engine.engine import Engine
from nanoflow.core.engine.output_processor import OutputProcessor

REST = 7  # how much longer than a round the outputs' thread rests after it
LONGEST_REST = 0.1  # seconds
PIECE = 32  # updates


class EngineThread:
    """Steps `engine` until it is stopped or fails. Nobody else may touch the engine meanwhile, but for its constants.

    Args:
        engine: with nothing to do yet.
        deliver: called with a few outputs and refusals at a time, in the order of the steps. Returns when they have
            been seen to.
        end: called once, after all outputs: with None when stopped, or with the error that ended the engine.

    Both are called from a thread of this class.
    """

    def __init__(
        self,
        engine: Engine,
        deliver: Callable[[list[RequestOutput | Refusal]], None],
        end: Callable[[BaseException | None], None],
    ) -> None:
        self.deliver = deliver
        self.end = end
        self.commands: SimpleQueue[Command] = SimpleQueue()
        self.updates: SimpleQueue[list[Update | Refusal] | None] = SimpleQueue()  # None: there are no more
        self.output_processor = engine.output_processor
        self.stopped = threading.Event()  # the step loop has ended, and all its updates were taken
        self.failure: BaseException | None = None
        self.threads = [
            threading.Thread(target=self._step_loop, args=(engine,), name="nanoflow-steps", daemon=True),
            threading.Thread(
                target=self._output_loop, args=(self.output_processor,), name="nanoflow-outputs", daemon=True
            ),
        ]
        # Python may not end while they compute. That they end before it does is their own matter, so that it is so as
        # well for those whom nobody else holds any more.
        atexit.register(self.stop)
        for thread in self.threads:
            thread.start()

    def submit(self, command: Command) -> None:
        """Carry out `command` before the next step. A request that can't be added comes back as a refusal."""
        if isinstance(command, AddRequest):
            self.output_processor.add(command)
        self.commands.put(command)

    def stop(self) -> None:
        """Abort what is unfinished and end both threads, which let go of the engine. May be called again."""
        self.submit(Stop())
        for thread in self.threads:
            thread.join()

    def _step_loop(self, engine: Engine) -> None:
        try:
            while self._carry_out_commands(engine) and self.failure is None:
                if engine.has_unfinished:
                    self._pass_on(engine.advance())
            for request_id in list(engine.requests):
                self._pass_on(engine.cancel(request_id))
        except BaseException as error:  # whatever it is, those who wait must hear of it
            self.failure = self.failure or error
        finally:
            self.updates.put(None)  # first, so that nobody waits for the end of other ranks
            if self.failure is None:
                engine.close()
            else:
                engine.close_after_failure()
            atexit.unregister(self.stop)

    def _carry_out_commands(self, engine: Engine) -> bool:
        """Carry out the commands that wait, and wait for one if there is nothing else to do; False: stop."""
        wait = not engine.has_unfinished
        while True:
            try:
                command = self.commands.get(block=wait)
            except Empty:
                return True
            if isinstance(command, Stop):
                return False
            self._pass_on(engine.handle(command))
            wait = False

    def _pass_on(self, updates: list[Update | Refusal]) -> None:
        if updates:
            self.updates.put(updates)

    def _next_updates(self) -> list[Update | Refusal]:
        """All updates that are there, merged, once there are any; none when there will be no more."""
        updates: list[Update | Refusal] = []
        while not self.stopped.is_set() and (not updates or not self.updates.empty()):
            some = self.updates.get()
            if some is None:
                self.stopped.set()
            else:
                updates += some
        return merged(updates)

    def _output_loop(self, output_processor: OutputProcessor) -> None:
        try:
            while updates := self._next_updates():
                start = time.perf_counter()
                for first in range(0, len(updates), PIECE):
                    if outputs := output_processor.process(updates[first : first + PIECE]):
                        self.deliver(outputs)
                self.stopped.wait(min(LONGEST_REST, REST * (time.perf_counter() - start)))
        except BaseException as error:
            self.failure = error
            self.submit(Stop())
        self.end(self.failure)
