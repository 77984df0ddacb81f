"""Holdfast beside other ways of keeping a row on disk: ``python -m bench.rivals`` (``make bench-rivals``).

Each side runs in a process of its own, under its own interpreter and packages (in ``build/rivals``), and takes turns
with the others on one disk; what each flushes is counted by strace on a run of its own.
"""
