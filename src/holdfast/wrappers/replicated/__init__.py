"""Replicated: several backends hold the same rows; the first decides, the others follow, the quorum acknowledges."""

from .backend import Lag, Replicated

__all__ = ["Lag", "Replicated"]
