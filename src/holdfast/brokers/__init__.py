"""Brokers: one account at one venue each, behind the protocol of ``engine/broker.py``."""
