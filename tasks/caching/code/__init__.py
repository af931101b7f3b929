"""The code of a stage as its key sees it: a module's source, what of its syntax tree counts, and what it must not reach.

May enter: what looks at code without running it.
"""
