"""The base model: the transformers implementation with a paged attention hook and LoRA layers put into it."""
