"""Prefect's server: a run's own, `amazon-ft up` with all its processes, and what a server is told (`amazon-ft deploy`).

May enter: what starts, registers with or ends a server or a worker.
"""
