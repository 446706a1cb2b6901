"""The engine: many requests at once through one network.

`step` is the whole of it: schedule, run, sample, commit. Requests join and leave between steps. What a request gets is
what `generation.stream_generate` would give it alone with the same seed.
"""

from __future__ import annotations

import difflib
import itertools
import os
from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import torch

from minimax_m1.accounting import plan_memory
from minimax_m1.cache import PAGE_SIZE, HybridCache
from minimax_m1.continuation import Continuation
from minimax_m1.engine.outputs import Delta, GenerationResult, as_chat, make_result
from minimax_m1.engine.prefix_cache import PrefixCache
from minimax_m1.engine.prompt_lookup import PromptLookup
from minimax_m1.engine.routing_log import RoutingLog
from minimax_m1.engine.runner import Runner
from minimax_m1.engine.scheduler import Scheduler
from minimax_m1.engine.sequence import Sequence
from minimax_m1.errors import UserError
from minimax_m1.generation import resolve_eos
from minimax_m1.grammar import GrammarCompiler
from minimax_m1.model import MiniMaxM1ForCausalLM
from minimax_m1.sampling import SamplingParams, fresh_seed
from minimax_m1.settings import EngineSettings, parse_bytes
from minimax_m1.tokenizer import MiniMaxM1Tokenizer

Params = SamplingParams | Mapping[str, Any] | None  # None: the defaults; a mapping is parsed

FREE_MEMORY_SHARE = 0.4  # of the free memory is the cache, unless the settings say how much


class Engine:
    """Continuous batching over one model. One thread calls it; `AsyncEngine` is the door for others."""

    def __init__(
        self,
        model: MiniMaxM1ForCausalLM,
        tokenizer: MiniMaxM1Tokenizer | None = None,
        settings: EngineSettings | None = None,
        backend: str | None = None,
    ) -> None:
        """Plan the memory and make the pools.

        Args:
            model: its weights are used as they are; change them in place only, and call `forget_prefixes` then.
            tokenizer: needed for prompts that are texts, for stop strings, thinking budgets and grammars.
            settings: None: the defaults.
            backend: kernels to run with, one of `kernels.BACKENDS`; None: the fastest. With "triton" on a GPU, steps
                in which every sequence decodes one token are replayed as CUDA graphs (`decode_graphs`).

        Raises:
            UserError: settings that cannot be used, such as a cache too small for one sequence.
        """
        settings = settings or EngineSettings()
        self.model, self.tokenizer, self.settings = model.eval(), tokenizer, settings
        cache_bytes = settings.cache_bytes
        if cache_bytes is None:
            cache_bytes = int(FREE_MEMORY_SHARE * _free_bytes(model.device))
        self.plan = plan_memory(
            model.config,
            parse_bytes("cache_bytes", cache_bytes),
            page_size=PAGE_SIZE,
            max_batch_size=settings.max_batch_size,
            max_model_len=settings.max_model_len,
            checkpoint_bytes=settings.checkpoint_bytes if settings.prefix_cache else 0,
            dtype=str(model.compute_dtype).removeprefix("torch."),
        )
        self.max_model_len = self.plan.max_model_len
        self.cache = HybridCache(
            model.config,
            self.plan.num_slots,
            self.max_model_len,
            model.compute_dtype,
            model.device,
            self.plan.num_pages,
        )
        self.prefix_cache: PrefixCache | None = None
        if settings.prefix_cache:
            self.prefix_cache = PrefixCache(self.cache.pool, "", self.plan.checkpoint_bytes)
        self._eos = resolve_eos(model, None, tokenizer)
        self.scheduler = Scheduler(
            self.cache,
            self.prefix_cache,
            settings.max_num_tokens,
            settings.speculative_tokens,
            self._eos,
            settings.checkpoint_every,
        )
        self.routing = RoutingLog.of(model.config) if settings.routing_log else None  # of all requests
        valid = None if tokenizer is None else len(tokenizer)
        self.runner = Runner(model, self.cache, self.scheduler, valid, backend, self.routing)
        self._requests: dict[str, list[Sequence]] = {}  # what has not finished
        self._numbers = itertools.count()
        self._deltas: list[Delta] = []
        self._silent: set[str] = set()  # requests of which only the results are wanted
        self._grammars = None if tokenizer is None else GrammarCompiler(tokenizer, model.config.vocab_size)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        quantization: str | None = None,
        backend: str | None = None,
        **settings: Any,
    ) -> Engine:
        """Load a checkpoint folder with its tokenizer; `settings` are the fields of `EngineSettings`.

        Raises:
            UserError: the checkpoint cannot be loaded, or a setting is unknown or cannot be used.
        """
        known = [f.name for f in fields(EngineSettings)]
        for name in settings.keys() - set(known):
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"accepted: {', '.join(known)}"
            raise UserError(f"{name}: is not a setting of the engine; {hint}")
        tokenizer = MiniMaxM1Tokenizer.from_pretrained(folder)
        model = MiniMaxM1ForCausalLM.from_pretrained(folder, dtype=dtype, device=device, quantization=quantization)
        return cls(model, tokenizer, EngineSettings(**settings), backend)

    # -- requests ---------------------------------------------------------------------------------------------------

    def add(
        self,
        prompt: str | Many[int],
        params: Params = None,
        *,
        request_id: str | None = None,
        routing_log: bool | Literal["tokens"] | None = None,
    ) -> str:
        """Queue a request; return its id. Its `params.n` samples share the run of the prompt.

        Args:
            prompt: text, or token ids.
            params: a mapping is parsed, and an unknown field is an error.
            request_id: None makes one.
            routing_log: record which experts it goes to, with "tokens" also token by token; None: as
                `settings.routing_log`.

        Raises:
            UserError: the prompt is empty, too long or has ids outside the vocabulary; parameters that cannot be used.
        """
        if params is None or isinstance(params, Mapping):
            params = SamplingParams.parse(params or {})
        name = f"request-{next(self._numbers)}" if request_id is None else request_id
        if name in self._requests:
            raise UserError(f"request_id: {name!r} is in use; choose another")
        prompt_ids = self._prompt_ids(prompt)
        seed = fresh_seed() if params.seed is None else params.seed
        samples = [self._make_sequence(name, i, prompt_ids, params, seed + i) for i in range(params.n)]
        samples[0].siblings = samples[1:]
        if self.settings.routing_log if routing_log is None else routing_log:
            for sequence in samples:
                sequence.routing = RoutingLog.of(self.model.config, keep_token_ids=routing_log == "tokens")
        self._requests[name] = samples
        self.scheduler.waiting.append(samples[0])
        return name

    def _prompt_ids(self, prompt: str | Many[int]) -> list[int]:
        ids = self.needs_tokenizer("prompt").encode(prompt) if isinstance(prompt, str) else list(prompt)
        vocab_size = self.model.config.vocab_size
        if not ids:
            raise UserError("prompt: is empty; accepted: at least one token")
        if min(ids) < 0 or max(ids) >= vocab_size:
            wrong = next(token for token in ids if not 0 <= token < vocab_size)
            raise UserError(f"prompt: id {wrong} is out of range; accepted: 0 to {vocab_size - 1}")
        if len(ids) >= self.max_model_len:
            raise UserError(
                f"prompt: {len(ids)} tokens are too many; accepted: up to {self.max_model_len - 1}, one less than "
                f"max_model_len"
            )
        return ids

    def needs_tokenizer(self, field: str) -> MiniMaxM1Tokenizer:
        """Return the tokenizer.

        Raises:
            UserError: there is none; the message names the `field` that needs it.
        """
        if self.tokenizer is None:
            raise UserError(f"{field}: cannot be used, for this engine was made without a tokenizer")
        return self.tokenizer

    def prepare(self, params: SamplingParams) -> None:
        """Do in any thread what of `add` takes long: compile the form that the parameters ask for, and keep it.

        Raises:
            UserError: a form that cannot be used.
        """
        if self._grammars is not None:
            self._grammars.prepare(params)

    def _make_sequence(self, name: str, index: int, ids: list[int], params: SamplingParams, seed: int) -> Sequence:
        continuation = Continuation(
            params,
            seed,
            ids,
            self._eos,
            self.tokenizer,
            self.model.config.vocab_size,
            matcher=None if self._grammars is None else self._grammars.matcher(params, self._eos),
            max_tokens=self.max_model_len - len(ids),
        )
        lookup = PromptLookup(ids) if self.settings.speculative_tokens else None
        return Sequence(name, index, ids, params, continuation, lookup=lookup)

    def abort(self, request_id: str) -> None:
        """End a request now; its unfinished samples get results with finish_reason "abort" in the next step's deltas.

        Raises:
            UserError: there is no such request, or it has finished.
        """
        for sequence in list(self._find(request_id)):
            sequence.continuation.finish("abort")
            self._finish(sequence)

    def pause(self, request_id: str, folder: Path | None = None) -> None:
        """Take a request out of the running, its whole state to host memory, or to a file each in `folder`.

        It costs no slot and no page until `resume`, and then goes on to the bit.

        Raises:
            UserError: there is no such request, or a file cannot be written.
        """
        for sequence in self._find(request_id):
            if sequence.slot is not None:
                state = self.scheduler.swap_out(sequence)
                sequence.saved = state
                if folder is not None:
                    path = folder / f"{quote(request_id, safe='')}-{sequence.index}.safetensors"
                    state.save(path)
                    sequence.saved = path
            elif sequence in self.scheduler.waiting:
                self.scheduler.waiting.remove(sequence)
            sequence.paused = True

    def resume(self, request_id: str) -> None:
        """Queue a paused request again.

        Raises:
            UserError: there is no such request.
        """
        waits_for_sibling = {id(s) for s in self._find(request_id)[0].siblings}
        for sequence in self._find(request_id):
            if sequence.paused:
                sequence.paused = False
                if id(sequence) not in waits_for_sibling:
                    self.scheduler.waiting.append(sequence)

    def _find(self, request_id: str) -> list[Sequence]:
        if request_id not in self._requests:
            raise UserError(f"request_id: {request_id!r} is not an unfinished request")
        return self._requests[request_id]

    def num_unfinished(self, request_id: str) -> int:
        """Return how many samples of a request have not ended; 0 for one that is not known."""
        return len(self._requests.get(request_id, ()))

    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self._deltas or self.scheduler.waiting or self.scheduler.running)

    def forget_prefixes(self) -> None:
        """Empty the prefix cache, as the weights were changed."""
        if self.prefix_cache is not None:
            self.prefix_cache.clear()

    # -- the step ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """Advance what the scheduler chose by one forward pass; return what every output gained."""
        step = self.scheduler.schedule()
        if step.chunks:
            with torch.cuda.device_of(self.model.lm_head.weight):  # kernels are launched on the current GPU
                hidden, routings = self.runner.run(step)
                kept = self.runner.sample(step, hidden)
                self.runner.commit(step, hidden, routings, kept)
            for sequence in list(self.scheduler.running):
                self._report(sequence)
        deltas, self._deltas = self._deltas, []
        return deltas

    def _report(self, sequence: Sequence) -> None:
        """Put what a sequence gained into a delta; end it if it has ended."""
        continuation = sequence.continuation
        if continuation.finish_reason is not None:
            self._finish(sequence)
        elif sequence.reported < len(continuation.output_ids) and sequence.request_id not in self._silent:
            self._deltas.append(self._delta(sequence, None))

    def _finish(self, sequence: Sequence) -> None:
        """Free what a sequence holds and give out its result."""
        if sequence.slot is not None:
            self.scheduler.release(sequence)
        elif sequence in self.scheduler.waiting:
            self.scheduler.waiting.remove(sequence)
        if isinstance(sequence.saved, Path):
            sequence.saved.unlink(missing_ok=True)
        samples = self._requests[sequence.request_id]
        samples.remove(sequence)
        if not samples:
            del self._requests[sequence.request_id]
        self._deltas.append(self._delta(sequence, make_result(sequence)))

    def _delta(self, sequence: Sequence, result: GenerationResult | None) -> Delta:
        """What a sequence gained since its last delta."""
        continuation, start = sequence.continuation, sequence.reported
        sequence.reported = len(continuation.output_ids)
        logprobs = continuation.logprobs[start:] if sequence.params.logprobs is not None else []
        return Delta(
            sequence.request_id,
            sequence.index,
            continuation.output_ids[start:],
            continuation.take_text(),
            logprobs,
            result,
        )

    # -- all at once --------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Many[str | Many[int]],
        params: Params | Many[Params] = None,
        *,
        routing_log: bool | Literal["tokens"] | None = None,
    ) -> list[GenerationResult]:
        """Continue prompts together; return the results in their order, n for each prompt.

        Args:
            prompts: texts or token ids.
            params: for all, or one for each.

        Raises:
            UserError: what `add` raises for any of them; then none is run.
        """
        if params is None or isinstance(params, SamplingParams | Mapping):
            params = [params] * len(prompts)
        each = list(params)
        if len(each) != len(prompts):
            raise UserError(f"params: {len(each)} for {len(prompts)} prompts; accepted: one for all, or one for each")
        names: list[str] = []
        try:
            for prompt, own in zip(prompts, each, strict=True):
                names.append(self.add(prompt, own, routing_log=routing_log))
        except UserError:
            for name in names:
                self.abort(name)
            self._deltas = [delta for delta in self._deltas if delta.request_id not in names]
            raise
        wanted = set(names)
        results: dict[tuple[str, int], GenerationResult] = {}
        others: list[Delta] = []
        self._silent |= wanted
        try:
            while any(name in self._requests for name in wanted):
                for delta in self.step():
                    if delta.request_id not in wanted:
                        others.append(delta)
                    elif delta.result is not None:
                        results[delta.request_id, delta.index] = delta.result
        finally:
            self._silent -= wanted
        self._deltas += others  # of requests that were running already: the next step gives them out
        order = {name: i for i, name in enumerate(names)}
        return [results[key] for key in sorted(results, key=lambda key: (order[key[0]], key[1]))]

    def chat(
        self,
        conversations: Many[Many[Mapping[str, Any]]],
        params: Params | Many[Params] = None,
        *,
        tools: Many[Mapping[str, Any]] | None = None,
        routing_log: bool | Literal["tokens"] | None = None,
    ) -> list[GenerationResult]:
        """Answer conversations together: messages through M1's chat template, answers taken apart.

        Args:
            conversations: lists of messages with role and content.
            params: as in `generate`.
            tools: that the model may call, in OpenAI's form.

        Raises:
            UserError: messages that the template cannot take, and what `add` raises.
        """
        tokenizer = self.needs_tokenizer("conversations")
        prompts = [tokenizer.apply_chat_template(messages, tools=tools) for messages in conversations]
        return [as_chat(result) for result in self.generate(prompts, params, routing_log=routing_log)]


def _free_bytes(device: torch.device) -> int:
    """Return the memory that is not in use, within what a container may have."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if not meminfo.exists():  # not Linux: half of all there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    available = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    free = int(available.split()[1]) * 1024
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(limit.with_name("memory.current").read_text()))
    return max(0, free)
