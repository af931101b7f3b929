"""All that makes a function a stage: its identity, its record, its files, its locks, and the events of a run.

May enter: what every stage shares and no artifact can hold. The digest of a stage's code stops at this door, so an edit here
reruns nothing; FORMAT_VERSION (identity.py) stands for all of it.
"""
