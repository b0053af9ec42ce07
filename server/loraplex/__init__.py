"""loraplex: an inference server for many LoRA adapters on one frozen base model."""

__version__ = "0.1.0"
