"""Dopamine: a teaching and reproduction kit for differentially private secure federated learning.

Importing this package loads nothing heavy; each room (``privacy``, ``federation``, ``data`` …) brings
its own libraries when it is entered.
"""

__version__ = "0.1.0"
