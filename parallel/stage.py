"""A stage of torch.distributed.pipelining that holds memory for messages only while they need it.

message    a hidden state (B, T, D) that is sent to the next stage, or its gradient, which is sent back
F, B, I, W are the forward, the backward, and the two halves of a backward: see pipeline.py
"""

from collections import deque
from contextlib import nullcontext
from copy import copy

import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.utils.checkpoint import GraphExecGroup

from parallel.schedule_picture import Recorder

# A rank posts its receives early, so a send should be over by the second one after it; not timed on a GPU.
SENDS_UNDER_WAY = 2


class Stage(PipelineStage):
    """Extends torch's PipelineStage: a Recorder can watch it, W recomputes each block only once, and a
    message has a buffer only from the moment it is waited for until the backward of its microbatch.

    torch allocates a buffer for every message of a step and keeps all of them. With 64 microbatches of
    (1, 4096, 8192) in bf16 that is 8 GiB on a stage that receives hidden states and gradients, of which 1f1b
    on 8 ranks uses less than 1 GiB at any time. The schedules with several stages a rank also keep the
    handles of all sends to the end of a step, and a handle keeps its tensor. So their stages send themselves.
    """

    recorder: Recorder | None = None
    # Those under way: the handles, and the operations, which hold the tensors. None: the schedule sends.
    sends: deque[tuple] | None = None

    def _prepare_forward_infra(self, num_microbatches: int, *args, **kwargs):
        answer = super()._prepare_forward_infra(1, *args, **kwargs)
        if not self.is_first:
            _free(self.args_recv_info[0])
        self.args_recv_info = _for_each_microbatch(self.args_recv_info[0], num_microbatches)
        return answer

    def _prepare_backward_infra(self, num_microbatches: int, *args, **kwargs):
        answer = super()._prepare_backward_infra(1, *args, **kwargs)
        _free(self.grad_recv_info[0])  # the last stage receives none
        self.grad_recv_info = _for_each_microbatch(self.grad_recv_info[0], num_microbatches)
        self.chunks = num_microbatches
        return answer

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        if not self.is_first:
            _allocate(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        _allocate(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._send(super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._send(super().get_bwd_send_ops(bwd_chunk_id))

    def _send(self, ops: list[dist.P2POp]) -> list[dist.P2POp]:
        """Start these sends and wait for all but the last SENDS_UNDER_WAY of this stage. Return the ones that
        the schedule shall start."""
        if self.sends is None or not ops:
            return ops
        self.sends.append((dist.batch_isend_irecv(ops), ops))
        self.wait_for_sends(SENDS_UNDER_WAY)
        return []

    def wait_for_sends(self, under_way: int = 0) -> None:
        while self.sends and len(self.sends) > under_way:
            for work in self.sends.popleft()[0]:
                work.wait()

    def forward_one_chunk(self, fwd_chunk_id: int, *args, **kwargs):
        with self._noted(fwd_chunk_id, "F"):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, loss=None, full_backward: bool = True, **kwargs):
        # The first stage has no gradient of its input, so its I is empty and its W is a whole B.
        is_empty = self.is_first and not full_backward
        kind = "B" if full_backward else "I"
        with nullcontext() if is_empty else self._noted(bwd_chunk_id, kind):
            super().backward_one_chunk(bwd_chunk_id, loss=loss, full_backward=full_backward, **kwargs)
        if full_backward and loss is not None:
            loss.detach_()  # the list of losses would keep its graph, which ends at the input of the stage
        _free(self.grad_recv_info[bwd_chunk_id])
        if not self.is_first:
            _free(self.args_recv_info[bwd_chunk_id])

    def backward_weight_one_chunk(self, bwd_chunk_id: int, **kwargs):
        # torch asks autograd for one weight after another.
        # Without the group each of them would recompute its block again.
        with self._noted(bwd_chunk_id, "B" if self.is_first else "W"), GraphExecGroup():
            return super().backward_weight_one_chunk(bwd_chunk_id, **kwargs)

    def _noted(self, microbatch: int, kind: str):
        return self.recorder.note(self.stage_index, microbatch, kind) if self.recorder else nullcontext()


def _for_each_microbatch(messages: tuple, n_microbatches: int) -> dict[int, tuple]:
    """Return the messages of each microbatch, which are like those of one."""
    return {i: tuple(copy(message) for message in messages) for i in range(n_microbatches)}


def _allocate(messages: tuple) -> None:
    """Give messages their buffers."""
    for message in messages:
        old = message.buffer
        message.buffer = old.new_empty(old.shape, requires_grad=old.requires_grad)


def _free(messages: tuple) -> None:
    """Take the buffers of messages away. In their place are tensors of the same shape with a single element
    in memory."""
    for message in messages:
        old = message.buffer
        old.grad = None  # an I leaves it at the input, which is there until W
        message.buffer = old.new_empty(()).expand(old.shape).requires_grad_(old.requires_grad)
