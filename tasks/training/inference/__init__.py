"""A base or tuned model asked: how likely answers are, what it says, a conversation at a terminal.

May enter: what loads a model to read from it.
"""
