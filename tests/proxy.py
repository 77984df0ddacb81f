"""The cutting proxy, which is part of the proof kit."""

from holdfast.testing.proxy import Cut, Direction, How, Proxy

__all__ = ["Cut", "Direction", "How", "Proxy"]
