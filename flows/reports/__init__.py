"""Accounts of a run: in the Prefect UI, in report.html, to trackers, and of past runs.

May enter: subscribers of a run's events (tasks/caching/events.py) and readers of its record. Nothing here can end a run.
"""
