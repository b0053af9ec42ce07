"""The demo: a 3 M parameter base model, six adapters for it, and the script that trained them all.

Everything is synthetic and made by `loraplex.demo.build` from fixed seeds. `loraplex.demo.tasks` is pure
Python: it makes prompts and says by program whether a reply is right, so that tests and the command line
can use it without torch. `base/` and, in a wheel, `adapters/` are folders of data beside the modules.
"""
