"""Backends around a backend: each adds one thing, keeps the contract, and stacks in one fixed order.

``Traced(Cached(Encrypted(Replicated(Retrying(a), Retrying(b)))))``; see ``docs/wrappers.md``.
"""
