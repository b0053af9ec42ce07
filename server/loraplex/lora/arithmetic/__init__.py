"""Offline arithmetic on adapters: weights in, weights out, no server.

    Checkpoint   the base's safetensors, tensor by tensor      Source    an adapter's folder, checked as for serving
    merge        several adapters -> one                       resize    an adapter -> the same with smaller ranks
    bake         base and adapter -> a model                   extract   base and tuned model -> an adapter

What comes out of merge, resize and extract is a `Draft`, written as a PEFT folder by `writer`.
"""
