"""Torch is imported below this door only: what trains, loads, asks and exports models.

May enter: what needs a model in memory, and what decides how it lies there. Backends are modules behind the Protocol of
backend.py; heavy imports stay inside functions.
"""
