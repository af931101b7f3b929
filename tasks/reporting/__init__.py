"""Numbers to markdown, plots and model cards.

May enter: pure functions from figures to text or SVG.
"""
