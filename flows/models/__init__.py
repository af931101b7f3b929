"""Saved models: found by name, asked, written for other programs, served.

May enter: what begins with a model that a run has saved.
"""
