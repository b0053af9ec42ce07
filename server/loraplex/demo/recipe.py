"""The recipe: every number of the demo's training, as frozen values."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex.demo.kind import EMBEDDING, HEAD, kind_of

BASE_NAME = "loraplex-demo"
SEED = 20
# Not "as many as there are": sums are split by threads, so another number gives other weights.
THREADS = 2

ATTENTION_QV = ("q_proj", "v_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
ALL_LINEAR = ATTENTION + MLP
VOCABULARY = (EMBEDDING, HEAD)


@dataclass(frozen=True, slots=True)
class Shape:
    """The base model's architecture: a Llama with tied embeddings."""

    vocabulary: int = 2048
    layers: int = 4
    hidden: int = 256
    heads: int = 8
    kv_heads: int = 2
    feed_forward: int = 704
    positions: int = 1024
    rope_theta: float = 10_000.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """One optimiser run: AdamW, linear warm-up, cosine to zero."""

    steps: int
    learning_rate: float
    rows: int
    row_tokens: int = 128
    warmup: int = 100
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0


@dataclass(frozen=True, slots=True)
class Mixture:
    """Shares of the base's documents; the rest is tagged. `weights`: how often each task is drawn."""

    echo: float = 0.12
    raw: float = 0.04
    two_turns: float = 0.12
    weights: tuple[tuple[str, float], ...] = (
        ("upper", 1.0), ("pig", 1.2), ("velna", 2.2), ("reverse", 2.6), ("json", 2.6), ("sql", 4.4),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class AdapterRecipe:
    """One LoRA adapter: which task, its shape, and how long it may train."""

    task: str
    rank: int
    alpha: int
    targets: tuple[str, ...]
    rslora: bool = False
    dora: bool = False
    steps: int = 500
    learning_rate: float = 2e-3
    two_turns: float = 0.25

    @property
    def kind(self) -> str:
        """`LoRA`, `DoRA`, …"""
        return kind_of(self.targets, self.dora, self.rslora)

    @property
    def schedule(self) -> Schedule:
        """The optimiser run of this adapter."""
        return Schedule(self.steps, self.learning_rate, rows=12, warmup=20, weight_decay=0.0)


SHAPE = Shape()
MIXTURE = Mixture()
BASE_SCHEDULE = Schedule(steps=5600, learning_rate=2e-3, rows=16)
ADAPTERS = (
    AdapterRecipe("upper", 4, 8, ATTENTION_QV, steps=200),
    AdapterRecipe("reverse", 4, 8, ATTENTION),
    AdapterRecipe("pig", 8, 16, MLP, dora=True, steps=200),
    # rank-stabilised: the delta is scaled by alpha / sqrt(r) = 2.83, not by alpha / r = 1
    AdapterRecipe("json", 8, 8, ATTENTION, rslora=True),
    AdapterRecipe("sql", 16, 32, ALL_LINEAR, steps=600),
    # a language with words of its own: it also reads and writes tokens differently
    AdapterRecipe("velna", 32, 64, VOCABULARY + ATTENTION_QV, steps=300),
)
