"""How the host hands a captured step its arrays and gets its tokens: in pinned memory that kernels read and write.

A copy to the device, a graph and a copy back are three things in a row, and a GPU rests for microseconds between any
two. Here the graph's first kernel fetches the arrays, and its last one leaves the tokens where the host reads them.

A graph's addresses are fixed, while the host writes the arrays of a step as the one before is running. So there are two
buffers, used in turns. Host and device count the steps apart, and both know by that whose turn it is.
"""

from __future__ import annotations

import torch

from nanoflow.core.execution.step_buffer import StepBuffer
from nanoflow.core.ops import Ops

BUFFERS = 2  # a power of two, so that a count may overflow


class PinnedIO:
    """Buffers for arrays and tokens of steps that run in the order in which they are sent.

    Args:
        num_tokens, num_seqs: of the largest step.
        device: where steps run; on a CPU everything is done when `send` returns.
        ops: to fetch with.

    Attributes:
        outbox: int64 [buffers, S]; tokens, on the host.
        turn_1: int32; how many steps the device has begun.
    """

    def __init__(self, num_tokens: int, num_seqs: int, device: torch.device, ops: Ops) -> None:
        self.ops = ops
        size = -(-StepBuffer.num_bytes(num_tokens, num_seqs) // 16) * 16
        pinned = device.type == "cuda"
        self.inbox = torch.zeros(BUFFERS, size, dtype=torch.uint8, pin_memory=pinned)
        self.outbox = torch.zeros(BUFFERS, num_seqs, dtype=torch.int64, pin_memory=pinned)
        self.turn_1 = torch.zeros(1, dtype=torch.int32, device=device)
        self.num_sent = 0
        self.done: list[torch.cuda.Event | None] = [None] * BUFFERS

    def open(self, num_tokens: int, num_seqs: int) -> StepBuffer:
        """Where to write the next step's arrays, on the host. Waits for the step that had this buffer before."""
        turn = self.num_sent % BUFFERS
        done = self.done[turn]
        if done is not None:
            done.synchronize()
        memory = self.inbox[turn, : StepBuffer.num_bytes(num_tokens, num_seqs)]
        return StepBuffer(num_tokens, num_seqs, self.inbox.device, memory=memory)

    def send(self) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """To be called when the step has been launched.

        Returns its tokens [S], int64, on the host, to be read before the next step but one is sent; and an event after
        which they are there, None if they are there already.
        """
        turn = self.num_sent % BUFFERS
        self.num_sent += 1
        if self.turn_1.is_cuda:
            self.done[turn] = torch.cuda.Event()
            self.done[turn].record()
        return self.outbox[turn], self.done[turn]

    # Called within the step, which counts itself afterwards (`gather_step_inputs`).

    def receive(self, buffer: StepBuffer) -> None:
        """Fetch this step's arrays into a buffer on the device."""
        self.ops.receive(self.inbox, self.turn_1, buffer.memory)
