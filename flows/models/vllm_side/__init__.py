"""Middleware for vLLM, imported in its process and in its own environment, where amazon-ft need not be installed.

May enter: what imports nothing of ours.
"""
