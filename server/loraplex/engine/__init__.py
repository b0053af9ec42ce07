"""The batching engine: sequences, blocks, the adapter tiers, the scheduler and the step.

It knows token ids, digests and salts; no name, text, HTTP or asyncio (`async_engine.py` alone knows those threads).
"""
