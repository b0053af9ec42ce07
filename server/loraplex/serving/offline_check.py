"""check_folder: what a server with this base would say of an adapter, without a server.

The folder is copied into a store of its own for the while, exactly as `--adapters` does it. The base's config tells the
shapes; its weights are read only where an adapter needs them, or the proof does.
"""

import asyncio
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraplex.engine.adapter_loads import ReadAdapter
from loraplex.engine.build import EngineSpec, build_engine
from loraplex.engine.messages import AdapterUse, Command, CommandResult
from loraplex.engine.proof_result import ProofResult
from loraplex.lora.reader import AdapterReader, Checked
from loraplex.lora.report import AdapterReport, BaseFacts, report_on
from loraplex.lora.staging import Staging
from loraplex.lora.store import AdapterStore
from loraplex.lora.weights import AllocateSlab
from loraplex.model.devices import choose_device, choose_dtype
from loraplex.model.loader import BaseModel, load_base
from loraplex.model.shapes import BaseShapes, ShapesUnknown, read_shapes
from loraplex.model.tokenizer import Tokenizer
from loraplex.serving.generation import as_error
from loraplex.serving.proof_record import proof_record
from loraplex.text.adapter_text import Brought
from loraplex.text.adapter_texts import AdapterTexts

PROOF_SECONDS = 600.0
MODEL_LEN = 64
"""Tokens of KV cache that the proof's engine has: it serves nobody."""


@dataclass(frozen=True, slots=True)
class OfflineCheck:
    """`proof` None: it was not asked for."""

    report: AdapterReport
    proof: dict[str, Any] | None = None


class _WeightsNeeded(Exception):
    """The adapter is read against the base's values."""


def check_folder(
    path: Path, base: Path, *, device: str = "auto", dtype: str = "auto", max_rank: int = 64, proves: bool = False
) -> OfflineCheck:
    """Raises AdapterError for what a server would refuse, StartupError for a base that cannot be used."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loraplex-check-")))
        store = stack.enter_context(AdapterStore(scratch))
        chosen = choose_device(device)
        compute = choose_dtype(dtype, chosen)
        shapes = _shapes(base, compute)
        brought = asyncio.run(_inspect(path, base, shapes.vocab_size))
        staging = stack.enter_context(store.import_folder(path, brought.unneeded))
        checked, fingerprint = _checked(staging, base, shapes, compute, max_rank)
        brought.check_rows(checked.plan.trained_tokens)
        proof = None
        if proves:
            spec = EngineSpec(
                model=base,
                device=device,
                dtype=dtype,
                max_lora_rank=max_rank,
                adapter_cache_bytes=checked.weights.nbytes,
                max_num_seqs=1,
                max_model_len=MODEL_LEN,
            )
            proof = _prove(store, staging, checked.weights.nbytes, spec)
            fingerprint = proof.base_fingerprint
        report = report_on(
            checked.config,
            checked.plan,
            shapes.targets,
            BaseFacts(shapes.model_type, shapes.vocab_size, fingerprint),
            dtype=checked.dtype,
            compute_dtype=str(compute).removeprefix("torch."),
            value_bytes=compute.itemsize,
            disk_bytes=checked.nbytes,
            on_device=chosen.type != "cpu",
            notes=brought.notes,
        )
        return OfflineCheck(report, None if proof is None else proof_record(proof))


async def _inspect(path: Path, base: Path, num_rows: int) -> Brought:
    """What the folder's text files say beside the base's tokenizer."""
    tokenizer = await asyncio.to_thread(Tokenizer.load, base, None)
    texts = AdapterTexts(tokenizer, num_rows)
    try:
        return await texts.inspect(path)
    finally:
        await texts.close()


def _shapes(base: Path, dtype: torch.dtype) -> BaseShapes:
    """By the base's config; by its weights, where that does not suffice."""
    try:
        return read_shapes(base)
    except ShapesUnknown:
        loaded = load_base(base, dtype)
        return BaseShapes(loaded.targets, loaded.config.model_type, loaded.vocab_size)


def _checked(
    staging: Staging, base: Path, shapes: BaseShapes, dtype: torch.dtype, max_rank: int
) -> tuple[Checked, str | None]:
    """The check, and the base's fingerprint if its weights had to be read."""

    def refuse(name: str) -> Tensor:
        raise _WeightsNeeded(name)

    try:
        reader = AdapterReader(staging.folder.parent, shapes.targets, dtype, max_rank, refuse)
        return reader.check(staging.folder), None
    except _WeightsNeeded:
        loaded = load_base(base, dtype)
        reader = AdapterReader(staging.folder.parent, loaded.targets, dtype, max_rank, loaded.tensor_of)
        return reader.check(staging.folder), loaded.fingerprint


def _prove(store: AdapterStore, staging: Staging, nbytes: int, spec: EngineSpec) -> ProofResult:
    """As a server does it before it accepts. Raises AdapterInvalid and kin."""

    def make_reader(base: BaseModel, allocate: AllocateSlab) -> ReadAdapter:
        known = (base.targets, base.dtype, spec.max_lora_rank, base.tensor_of, base.fingerprint)
        return AdapterReader(store.blobs, *known, allocate).read

    digest = store.commit(staging)
    engine, _ = build_engine(spec, make_reader)
    try:
        engine.take(Command(0, "prove", {"use": AdapterUse(digest, nbytes), "timeout": PROOF_SECONDS}))
        answers: tuple[CommandResult, ...] = ()
        while not answers:
            answers = engine.step().answers
            if engine.is_stalled:
                time.sleep(0.01)  # it is being read
    finally:
        engine.close()
    result: ProofResult = answers[0].value
    if result.failure is not None:
        raise as_error(result.failure)
    return result
