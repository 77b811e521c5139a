"""MII's scheduler, driven in-process: continuous batching with Dynamic SplitFuse over token tensors.

Scheduling is MII's own: decoding sequences first, then prompts cut to what the token budget leaves; when nothing can
run for want of cache blocks, the youngest sequence gives up its blocks and starts again later. Replaced are:
- sockets and the distributed broadcast: there is one process, or a tensor-parallel group (see tensor_parallel);
- token choice, end of caption and output: meddam_core.engines.sampling and generation, as in the torch engine;
- release: a finished sequence gives back its blocks at once, before the next scheduling, not a step later.
A forward that runs out of memory is done in halves; a sequence that does not fit alone fails alone.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from mii.batching.data_classes import Request as MiiRequest
from mii.batching.data_classes import RequestBatch
from mii.batching.ragged_batching import RaggedBatchBase
from mii.config import GenerateParamsConfig
from torch import Tensor

from meddam_core.engines.base import EngineStats
from meddam_core.engines.faults import out_of_memory
from meddam_core.engines.generation import Generation
from meddam_core.engines.mii.model import RaggedEngine, VisualRows
from meddam_core.engines.sampling import choose_tokens
from meddam_core.records import Reason


@dataclass(frozen=True, slots=True)
class Counts:
    """What a scheduler did, for tests and benchmarks."""

    num_forwards: int
    num_preemptions: int
    max_tokens_per_forward: int
    max_sequences_per_forward: int


class _Sequence(MiiRequest):  # type: ignore[misc]
    """MII's request with its hot properties as plain values: they are read ten times a sequence and step."""

    num_prompt: int

    @property
    def prompt_length(self) -> int:
        return self.num_prompt

    @property
    def num_generated_tokens(self) -> int:
        """0 while parts of the prompt are to come."""
        num: int = self.seq_length - self.num_prompt + 1
        return max(0, num)

    @property
    def is_done(self) -> bool:
        return self._is_done

    @is_done.setter
    def is_done(self, is_done: bool) -> None:
        self._is_done = is_done

    @property
    def stop_generation(self) -> bool:
        """Generation alone decides when a caption ends, its token limit included."""
        return self._is_done


class Scheduler(RaggedBatchBase):  # type: ignore[misc]
    """Runs sequences to their end, many at a time.

    Args:
        ragged: the FastGen engine.
        max_length: positions a sequence may take.
        stats: times and out-of-memory events are added here.
        launched: called after a forward was launched and before its result is waited for.
    """

    def __init__(
        self, ragged: RaggedEngine, *, max_length: int, stats: EngineStats, launched: Callable[[], None]
    ) -> None:
        # not MII's __init__: it opens sockets, sleeps, and needs CUDA
        self.inference_engine = ragged
        self.max_length = max_length
        self.sync_debug = self.profile_model_time = False
        self.request_queue: queue.SimpleQueue[MiiRequest] = queue.SimpleQueue()
        self.buffer: deque[MiiRequest] = deque()
        self._reset_scheduler_bookkeeping()
        self._num_generated_tokens = 0
        self._stats = stats
        self._launched = launched
        self._generations: dict[int, Generation] = {}
        self._finished: list[int] = []
        self._num_forwards = self._num_preemptions = self._max_tokens = self._max_sequences = 0
        self._largest_forward: int | None = None

    @property
    def is_rank_0(self) -> bool:
        """Whether this process schedules; MII takes it from the device's number."""
        return True

    @property
    def num_active(self) -> int:
        """Sequences added and not ended."""
        return len(self._generations)

    @property
    def counts(self) -> Counts:
        return Counts(self._num_forwards, self._num_preemptions, self._max_tokens, self._max_sequences)

    def add(self, uid: int, token_ids: list[int], visual: VisualRows, generation: Generation) -> None:
        """Queues a sequence. `uid` is unique for the life of the scheduler."""
        self.inference_engine._model.visual[uid] = visual
        self._generations[uid] = generation
        tokens = torch.tensor(token_ids)
        limits = GenerateParamsConfig(
            prompt_length=len(token_ids), max_length=self.max_length, max_new_tokens=generation.limit
        )
        sequence = _Sequence(
            tid=0, uid=uid, input_tokens=tokens, prompt_tokens=tokens, seq_length=0, last_in_prompt=True,
            post_processing=[], generate_params=limits,
        )  # fmt: skip
        sequence.num_prompt = len(token_ids)
        self.request_queue.put(sequence)

    def cancel(self, uid: int) -> None:
        """Drops a sequence wherever it is, also between two parts of its prompt, and frees its blocks."""
        if uid not in self._generations:
            return
        while not self.request_queue.empty():
            self.buffer.append(self.request_queue.get())
        self.buffer = deque(r for r in self.buffer if r.uid != uid)
        self.scheduled_requests.prune([uid])
        self._release(uid)

    def step(self) -> list[int]:
        """One forward at most; the sequences that ended in it."""
        if not len(self.scheduled_requests):
            self._reset_scheduler_bookkeeping()  # a cancelled request may have left its tokens counted
            self.schedule_requests()
        self._finished = []
        started, new_tokens = time.perf_counter(), max(self.scheduled_requests.requests_to_run.lengths, default=0)
        self.generate()
        elapsed = time.perf_counter() - started
        if new_tokens > 1:
            self._stats.prefill_s += elapsed
        else:
            self._stats.decode_s += elapsed
        return self._finished

    def put(self, uids: list[int], tokenized_input: list[Tensor]) -> Tensor:
        """Logits (sequences, V) of one forward, or of several smaller ones where memory was short before."""
        num_tokens = sum(len(tokens) for tokens in tokenized_input)
        if self._largest_forward is not None and num_tokens > self._largest_forward:
            return self._put_halves(uids, tokenized_input)
        logits = self._try_put(uids, tokenized_input)
        if logits is None:
            self._stats.num_out_of_memory += 1
            self._largest_forward = max(1, num_tokens // 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return self._put_halves(uids, tokenized_input)
        self._num_forwards += 1
        self._max_tokens = max(self._max_tokens, num_tokens)
        self._max_sequences = max(self._max_sequences, len(uids))
        return logits

    def _try_put(self, uids: list[int], tokens: list[Tensor]) -> Tensor | None:
        # returns rather than retries inside `except`: the exception keeps the failed forward's tensors alive
        try:
            logits: Tensor = self.inference_engine.put(uids, tokens)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            return None
        return logits

    def _put_halves(self, uids: list[int], tokens: list[Tensor]) -> Tensor:
        if len(uids) > 1:
            middle = len(uids) // 2
            first = self.put(uids[:middle], tokens[:middle]).clone()  # the next put reuses the buffer
            return torch.cat((first, self.put(uids[middle:], tokens[middle:])))
        middle = len(tokens[0]) // 2
        if middle:
            self.put(uids, [tokens[0][:middle]])
            return self.put(uids, [tokens[0][middle:]])
        self._largest_forward = None
        self._generations[uids[0]].fail(Reason.OUT_OF_MEMORY, "the device has no memory left for a single token")
        vocabulary = self.inference_engine._model.vocab_size
        return torch.zeros(1, vocabulary, device=self.inference_engine._model._word_emb.device)

    def _bcast_requests(self, force: bool = False) -> tuple[RequestBatch, bool]:
        return self.scheduled_requests, force

    def _process_logits(self, next_token_logits: Tensor, running_requests: RequestBatch) -> tuple[Tensor, Tensor]:
        """The next token of every sequence whose prompt is complete, and whether its caption ended. (S,), (S,)."""
        self._launched()
        num_sequences = len(running_requests)
        next_tokens, done = torch.zeros(num_sequences, dtype=torch.int64), torch.zeros(num_sequences, dtype=torch.bool)
        rows = [i for i, r in enumerate(running_requests) if r.last_in_prompt]
        if not rows:
            return next_tokens, done
        uids = running_requests.uids
        generations = [self._generations[uids[i]] for i in rows]
        logits = next_token_logits if len(rows) == num_sequences else next_token_logits[rows]
        with torch.inference_mode():
            tokens, logprobs = choose_tokens(
                logits, [g.request.sampling for g in generations], [g.num_chosen for g in generations]
            )
        ended = [
            g.finish_reason is not None or g.push(token, logprob)
            for g, token, logprob in zip(generations, tokens, logprobs, strict=True)
        ]
        next_tokens[rows], done[rows] = torch.tensor(tokens), torch.tensor(ended)
        return next_tokens, done

    def _generate_output(self, r: MiiRequest) -> None:
        """A sequence has ended."""
        assert self._generations[r.uid].finish_reason is not None, "MII ended a sequence before its caption did"
        self._release(r.uid)
        self._finished.append(r.uid)

    def reset_request_status(self) -> None:
        """Takes the blocks of the youngest sequence; it starts again from position 0 when there is room."""
        self._num_preemptions += 1
        super().reset_request_status()
        restarted = self.buffer[-1]
        restarted.num_prompt = len(restarted.prompt_tokens)

    def _release(self, uid: int) -> None:
        del self._generations[uid]
        self.inference_engine._model.visual.pop(uid, None)
        if self.inference_engine._state_manager.get_sequence(uid) is not None:
            self.inference_engine.flush(uid)

    @property
    def num_free_blocks(self) -> int:
        return int(min(self.inference_engine.free_blocks))


def blocks_needed(num_positions: int, block_size: int) -> int:
    """Cache blocks that a sequence of this length takes."""
    return -(-num_positions // block_size)
