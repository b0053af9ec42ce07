"""Evaluation sets: prompts with checks, and what answers make of them. Pure: no torch, no files, no sockets."""
