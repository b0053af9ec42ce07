"""Service: the composition root and the verbs. The one place where names become versions and text becomes token ids."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import structlog
from sqlalchemy import URL

from loraplex.config import Settings
from loraplex.engine.adapter_loads import ReadAdapter
from loraplex.engine.async_engine import AsyncEngine
from loraplex.engine.build import EngineInfo, EngineSpec, build_engine
from loraplex.engine.engine import Engine, EngineStats
from loraplex.engine.messages import Composition, EngineRequest
from loraplex.engine.sampling_params import SamplingParams
from loraplex.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    LoraplexError,
    NotReady,
    Overloaded,
    SourceRefused,
    StartupError,
    StorageFull,
)
from loraplex.lora.database import sqlite_url
from loraplex.lora.reader import AdapterReader
from loraplex.lora.registry import Change
from loraplex.lora.staging import Staging
from loraplex.lora.store import AdapterStore
from loraplex.lora.version import Version
from loraplex.lora.weights import AllocateSlab
from loraplex.model.loader import BaseModel, read_config
from loraplex.model.tokenizer import Tokenizer
from loraplex.serving.acceptance import Acceptance
from loraplex.serving.background import finished
from loraplex.serving.catalog import AdapterCatalog, Catalogued
from loraplex.serving.comparison import Comparisons
from loraplex.serving.evaluating import Evaluations
from loraplex.serving.fetching import Fetching
from loraplex.serving.gating import Gating
from loraplex.serving.generation import Generation
from loraplex.serving.generation_request import GenerationRequest, Prompt
from loraplex.serving.merging import Merging
from loraplex.serving.resolution import Names, Resolved
from loraplex.serving.routes import Routes
from loraplex.serving.shadows import Shadows
from loraplex.serving.tiers import Tiers
from loraplex.serving.watching import Watching
from loraplex.sources.allow_list import AllowList
from loraplex.text.adapter_text import AdapterText
from loraplex.text.adapter_texts import AdapterTexts
from loraplex.text.sampling_defaults import SamplingDefaults

logger = structlog.get_logger(__name__)

MAX_CHOICES = 16
MAX_PROMPTS = 256
REGISTRY_FILE = "registry.sqlite"


class Service:
    """Built by `Service.running(settings)`, which opens everything and closes it again."""

    def __init__(
        self,
        settings: Settings,
        tokenizer: Tokenizer,
        engine: AsyncEngine,
        info: EngineInfo,
        catalog: AdapterCatalog,
        texts: AdapterTexts,
        defaults: SamplingDefaults,
    ):
        self.settings = settings
        self.tokenizer = tokenizer
        self.texts = texts
        self._defaults = defaults  # the base's
        self.engine = engine
        self.info = info
        self.catalog = catalog
        self.base_name = settings.base_name
        self.names = Names(catalog, settings.base_name, info.bytes_per_value)
        gating = Gating(catalog.registry.evaluations, self.names, info.fingerprint)
        self.routes = Routes(catalog.registry.routes, self.names, settings.base_name, gating)
        unheard = partial(self._generate, is_shadow=True)
        self._shadows = Shadows(self.routes, unheard, self._is_idle)
        book = catalog.registry.evaluations
        self.evaluations = Evaluations(book, self.routes, self.names, gating, unheard, self._is_idle)
        self.comparisons = Comparisons(self.names, self.routes, engine, self.generate, settings.base_name)
        self.started_at = time.time()
        self.is_draining = False
        self.num_running = 0
        self._blaming: set[asyncio.Future[str]] = set()
        proof_timeout = settings.proof_timeout if settings.proof == "on" else None
        self.acceptance = Acceptance(catalog, texts, engine, info.vocab_size, proof_timeout)
        self.background = self.acceptance.background
        self.merging = Merging(catalog, engine, settings.merge, info.bytes_per_value)
        self.fetching = Fetching(
            catalog,
            self.accept_upload,
            allow_list(settings),
            max_weights_bytes=int(settings.max_upload_bytes),
            timeout=settings.fetch_timeout,
        )
        self.tiers = Tiers(catalog, engine, info.bytes_per_value, settings.adapter_ttl)

    @classmethod
    @asynccontextmanager
    async def running(
        cls, settings: Settings, on_death: Callable[[str], None] = lambda reason: None
    ) -> AsyncIterator["Service"]:
        """Load the base, open the store, register the operator's adapters. Raises StartupError."""
        await asyncio.to_thread(read_config, settings.model)  # an architecture is refused before its tokenizer is read
        tokenizer = await asyncio.to_thread(Tokenizer.load, settings.model, settings.chat_template)
        defaults = generation_defaults(settings)
        async with AsyncExitStack() as stack:
            data_dir = settings.resolved_data_dir
            store = stack.enter_context(
                await asyncio.to_thread(AdapterStore, data_dir, max_weights_bytes=int(settings.max_upload_bytes))
            )
            spec = engine_spec(settings, tokenizer)
            readers: list[AdapterReader] = []

            def make_reader(base: BaseModel, allocate: AllocateSlab) -> ReadAdapter:
                known = (base.targets, base.dtype, spec.max_lora_rank, base.tensor_of, base.weights_fingerprint)
                reader = AdapterReader(store.blobs, *known, allocate)
                readers.append(reader)
                return reader.read

            def make_engine(wake: Callable[[], None]) -> tuple[Engine, EngineInfo]:
                return build_engine(spec, make_reader, wake)

            engine = AsyncEngine(make_engine, on_death)
            info = await engine.start()
            stack.push_async_callback(engine.stop)
            opened = (store, registry_url(settings), info, readers[0], settings.base_name, settings.max_adapter_depth)
            catalog = stack.enter_context(await asyncio.to_thread(AdapterCatalog, *opened))
            texts = AdapterTexts(tokenizer, info.vocab_size)
            stack.push_async_callback(texts.close)
            service = cls(settings, tokenizer, engine, info, catalog, texts, defaults)
            stack.callback(service.acceptance.close)
            stack.callback(service.fetching.close)
            refused = await service._watch_folders(stack)
            await service._register_folders(refused)
            await asyncio.to_thread(service.routes.load)
            stack.push_async_callback(service.routes.settled)
            stack.push_async_callback(service._shadows.close)
            stack.push_async_callback(service.evaluations.close)
            await stack.enter_async_context(service.tiers.kept())
            yield service

    async def _watch_folders(self, stack: AsyncExitStack) -> frozenset[str]:
        """Look after --adapters if that was asked for; returns the folders that are refused."""
        if self.settings.adapters is None or not self.settings.watch:
            return frozenset()
        watching = Watching(self.settings.adapters, self.fetching, self.settings.watch_interval)
        refused = await watching.seed()
        await stack.enter_async_context(watching.kept())
        return refused

    async def _register_folders(self, refused: frozenset[str]) -> None:
        named = adapter_folders(self.settings)
        await self.acceptance.folders(
            [one for one in named if one[0] not in refused or one[1].parent != self.settings.adapters]
        )
        await asyncio.to_thread(self.catalog.sweep)
        for digest in sorted(await asyncio.to_thread(self.catalog.missing)):
            logger.warning("the files of a version are gone; push it again", digest=digest)

    # -- names ------------------------------------------------------------------------------------------------

    def resolve(self, model: str) -> Resolved:
        """What `model` means now; of a route its main target. Raises ModelNotFound with the nearest names, InvalidName
        for what is no name."""
        return self.names.resolve(self.routes.main_target(model))

    # -- generation -------------------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest) -> Generation:
        """Resolve, encode, queue. Everything that can be refused is refused here, before the first byte."""
        generation = await self._generate(request, is_shadow=False)
        if generation.routed is not None:
            self._shadows.offer(request, generation.routed, generation.request_id)
        return generation

    async def _generate(self, request: GenerationRequest, *, is_shadow: bool) -> Generation:
        self._check_open()
        if not 1 <= request.n <= MAX_CHOICES:
            raise InvalidRequest(f"n must lie between 1 and {MAX_CHOICES}, not {request.n}.", param="n")
        self._check_named_tokens(request.params)
        lifetime = AsyncExitStack()
        try:
            # a shadow's model is no alias: should one have taken its name, it is missing, as a target would be
            hold = partial(self.names.hold, request.model)
            if not is_shadow:
                hold = partial(self.routes.hold, request.model, request.asked)
            held = await finished(asyncio.to_thread(hold, lifetime))
            text = await self.texts.of(held.resolved.adapter, held.folder)
            ends = text.end_token_ids - self.info.config.eos_token_ids
            request = request.with_defaults(text.profile, self._defaults, ends)
            prompts = await self._encode(request, text)
            request_id = secrets.token_hex(12)
            requests = tuple(
                self._engine_request(request, held.composition, token_ids, f"{request_id}-{p}-{j}", j)
                for p, token_ids in enumerate(prompts)
                for j in range(request.n)
            )
            if not is_shadow:
                self._reserve(len(requests), lifetime)
        except BaseException:
            await lifetime.aclose()
            raise
        return Generation(
            request_id=request_id,
            model=held.resolved.model,
            adapter=held.resolved.model if held.resolved.uses else "",
            requests=requests,
            options=request.options,
            num_choices=request.n,
            engine=self.routes.watched(self.engine, held.routed),
            tokenizer=text.tokenizer,
            lifetime=lifetime,
            end_token_ids=ends,
            on_non_finite=None if (sole := held.resolved.sole) is None else partial(self._on_non_finite, sole),
            routed=held.routed,
        )

    def _check_open(self) -> None:
        if self.is_draining:
            raise NotReady("The server is shutting down and takes no new requests.", code="draining")
        if not self.engine.is_alive:
            raise NotReady(f"The engine is not running: {self.engine.death or 'it was stopped'}.")

    def _check_named_tokens(self, params: SamplingParams) -> None:
        named = [("logit_bias", token) for token, _ in params.logit_bias]
        named += [("stop_token_ids", token) for token in params.stop_token_ids]
        for param, token in named:
            if not 0 <= token < self.info.vocab_size:
                raise InvalidRequest(
                    f"{param} names the token {token}, outside the vocabulary (0 to {self.info.vocab_size - 1}).",
                    param=param,
                )

    def _is_idle(self) -> bool:
        """Whether no client's request runs."""
        return not self.num_running and not self.is_draining

    def _reserve(self, num_sequences: int, lifetime: AsyncExitStack) -> None:
        """Count the request's sequences as long as it lives; refuse it when the queue would overflow."""
        limit = self.settings.max_waiting + self.settings.max_num_seqs
        if num_sequences > limit:
            raise InvalidRequest(
                f"The request asks for {num_sequences} sequences (prompts times n), and this server takes at most "
                f"{limit} at once. Split it.",
                param="n",
            )
        if self.num_running + num_sequences > limit:
            raise Overloaded(
                f"The server has {self.num_running} sequences running or waiting and takes at most {limit}. Try again "
                "in a moment.",
                retry_after=2,
            )
        self.num_running += num_sequences
        self._shadows.give_way()
        lifetime.callback(self._release, num_sequences)

    def _release(self, num_sequences: int) -> None:
        self.num_running -= num_sequences
        self._shadows.wake()

    @asynccontextmanager
    async def text_of(self, model: str) -> AsyncIterator[AdapterText]:
        """The text side of what `model` means. Raises ModelNotFound and kin."""
        async with AsyncExitStack() as lifetime:
            main = await asyncio.to_thread(self.routes.main_target, model)
            held = await finished(asyncio.to_thread(self.names.hold, main, lifetime))
            yield await self.texts.of(held.resolved.adapter, held.folder)

    async def _encode(self, request: GenerationRequest, text: AdapterText) -> list[tuple[int, ...]]:
        if request.messages is not None:
            ids = await self.texts.encode_chat(
                text,
                request.messages,
                add_generation_prompt=request.add_generation_prompt,
                continue_final_message=request.continue_final_message,
            )
            return [self._checked(ids, request, "messages")]
        prompts = request.prompts or ()
        if not 1 <= len(prompts) <= MAX_PROMPTS:
            raise InvalidRequest(f"Send between 1 and {MAX_PROMPTS} prompts in a request.", param="prompt")
        return await asyncio.to_thread(self._encode_prompts, request, text.tokenizer, prompts)

    def _encode_prompts(
        self, request: GenerationRequest, tokenizer: Tokenizer, prompts: Sequence[Prompt]
    ) -> list[tuple[int, ...]]:
        encoded = []
        for prompt in prompts:
            if isinstance(prompt, str):
                prompt = tokenizer.encode(prompt, add_special_tokens=request.add_special_tokens)
            encoded.append(self._checked(prompt, request, "prompt"))
        return encoded

    def _checked(self, token_ids: Sequence[int], request: GenerationRequest, param: str) -> tuple[int, ...]:
        if not token_ids:
            raise InvalidRequest("The prompt is empty: it has no tokens.", param=param)
        vocab_size = self.info.vocab_size
        for token in token_ids:
            if not 0 <= token < vocab_size:
                raise InvalidRequest(
                    f"The token id {token} is outside the vocabulary (0 to {vocab_size - 1}).", param=param
                )
        limit = self.info.config.max_model_len
        wanted = request.max_tokens if request.max_tokens is not None else 1
        if len(token_ids) + wanted > limit:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {limit} tokens. However, the prompt has {len(token_ids)} "
                f"tokens and {wanted} were asked for. Shorten the prompt or lower max_tokens.",
                param=param,
            )
        return tuple(token_ids)

    def _engine_request(
        self,
        request: GenerationRequest,
        composition: Composition,
        token_ids: tuple[int, ...],
        seq_id: str,
        choice: int,
    ) -> EngineRequest:
        max_tokens = request.max_tokens
        if max_tokens is None:
            room = self.info.config.max_model_len - len(token_ids)
            max_tokens = room if request.usual_max_tokens is None else min(room, request.usual_max_tokens)
        seed = request.seed if request.seed is not None else secrets.randbits(63)
        params = replace(request.params, max_tokens=max_tokens, seed=seed)
        return EngineRequest(
            seq_id=seq_id,
            token_ids=token_ids,
            params=params,
            composition=composition,
            salt=request.salt,
            choice=choice,
        )

    # -- adapters ---------------------------------------------------------------------------------------------

    async def accept_upload(
        self, name: str, staging: Staging, who: str, source: str = "upload", parent: str | None = None
    ) -> Catalogued:
        """Make staged files what `name` means; that is durable and can be used when this returns."""
        accepted = await self.acceptance.upload(name, staging, who, source, parent)
        self.tiers.wake()
        return accepted

    async def rollback_adapter(self, name: str, to: int | None = None, *, who: str) -> Change:
        """Make `name` mean the version before the last push, or `to`; running requests keep theirs. Raises
        ModelNotFound, AdapterConflict."""
        if name == self.base_name:
            raise InvalidRequest("The base model has no versions.", param="name")
        change = await asyncio.to_thread(self.catalog.rollback, name, to, who=who)
        self.tiers.wake()
        return change

    async def delete_adapter(self, name: str, version: int | None = None, *, who: str) -> Sequence[Version]:
        """Forget a name or one version; running requests keep theirs. Raises ModelNotFound."""
        if name == self.base_name:
            raise InvalidRequest("The base model cannot be deleted.", param="name")
        deleted = await asyncio.to_thread(self.catalog.delete, name, version, who=who)
        self.tiers.wake()
        if self.engine.is_alive:
            unnamed = await asyncio.to_thread(self.catalog.unnamed, [version.digest for version in deleted])
            await self.engine.command("evict", digests=unnamed)
        try:
            await asyncio.to_thread(self.catalog.sweep)
        except StorageFull as error:  # they are deleted all the same; the next sweep removes their files
            logger.warning("deleted adapters still lie on the disk", reason=error.message)
        return deleted

    async def _on_non_finite(self, version: Version, request: EngineRequest, output: Sequence[int]) -> str:
        """A row of `version` gave NaN. To its end, even when the client of that row goes away meanwhile."""
        blaming = asyncio.ensure_future(self._blame(version, request, output))
        self._blaming.add(blaming)
        blaming.add_done_callback(self._blaming.discard)
        return await asyncio.shield(blaming)

    async def _blame(self, version: Version, request: EngineRequest, output: Sequence[int]) -> str:
        """Put the adapter into quarantine, unless the base alone gives NaN on the same tokens."""
        token_ids = (*request.token_ids, *output)[: self.info.config.max_model_len - 1]
        every = None if request.params.prompt_logprobs is None else 0  # of every position, as it was asked for
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=every)
        alone = EngineRequest(seq_id=f"{request.seq_id}-base", token_ids=token_ids, params=params, salt=request.salt)
        try:
            async with aclosing(self.engine.submit((alone,))) as outputs:
                async for one in outputs:
                    if one.failure is not None:
                        return "The base alone cannot compute it either, so the adapter is not put into quarantine."
            reason = "its output was NaN or infinite in a request, on tokens on which the base's alone is not."
            await asyncio.to_thread(self.catalog.quarantine, version.digest, reason)
        except LoraplexError as error:
            logger.error("an adapter that gave NaN could not be put into quarantine", error=error.message)
            return "It could not be put into quarantine; the server's log says why."
        logger.warning("adapter put into quarantine", adapter=version.model_id, digest=version.digest)
        return f"{version.model_id} is in quarantine now: push a corrected version, roll back, or delete it."

    async def stats(self) -> EngineStats:
        return await self.engine.command("stats")


def generation_defaults(settings: Settings) -> SamplingDefaults:
    """The base's sampling defaults by --generation-config. Raises StartupError."""
    if settings.generation_config == "none":
        return SamplingDefaults()
    defaults, unused = SamplingDefaults.of_generation_config(settings.model)
    if unused:
        logger.info("fields of generation_config.json that are not used", fields=list(unused))
    return defaults


def allow_list(settings: Settings) -> AllowList:
    """Where adapters may be fetched from. Raises StartupError for what cannot be understood."""
    token = settings.hub_token
    try:
        return AllowList(
            settings.allow_adapter_root,
            settings.allow_bucket,
            settings.allow_hub,
            hub_endpoint=settings.hub_endpoint,
            hub_token=None if token is None else token.get_secret_value(),
        )
    except SourceRefused as error:
        raise StartupError(error.message) from error


def registry_url(settings: Settings) -> str | URL:
    """--registry-url, else a SQLite file in the data folder."""
    if settings.registry_url is not None:
        return settings.registry_url.get_secret_value()
    return sqlite_url(settings.resolved_data_dir / REGISTRY_FILE)


def engine_spec(settings: Settings, tokenizer: Tokenizer) -> EngineSpec:
    eos = frozenset() if tokenizer.eos_token_id is None else frozenset({tokenizer.eos_token_id})
    return EngineSpec(
        model=settings.model,
        device=settings.device,
        dtype=settings.dtype,
        threads=settings.threads,
        max_loras=settings.max_loras,
        max_lora_rank=settings.max_lora_rank,
        adapter_cache_bytes=int(settings.adapter_cache_bytes),
        eviction=settings.eviction,
        kv_cache_bytes=None if settings.kv_cache_bytes is None else int(settings.kv_cache_bytes),
        gpu_memory_utilization=settings.gpu_memory_utilization,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=settings.max_model_len,
        max_waiting=settings.max_waiting + settings.max_num_seqs,
        merge=settings.merge,
        quantization=settings.quantization,
        extra_eos_token_ids=eos,
    )


def adapter_folders(settings: Settings) -> list[tuple[str, Path]]:
    """The operator's adapters: every PEFT folder below --adapters by its name, and --lora-modules."""
    folders = []
    if settings.adapters is not None:
        folders += [
            (path.name, path)
            for path in sorted(settings.adapters.iterdir())
            if (path / "adapter_config.json").is_file()
        ]
    return folders + list(settings.lora_modules.items())
