"""Longspan: exact serving of long contexts over several devices."""

__version__ = "0.1.0"
