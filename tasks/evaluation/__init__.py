"""How good a model is: its answers on held-out rows, their metrics, the verdict.

May enter: pure functions of answers and figures; the models are asked in tasks/training/inference.
"""
