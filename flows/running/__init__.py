"""A run while it lives: where its training runs, its processes, its GPU, what it is called, and what it leaves behind.

May enter: what a flow needs around the story of flows/pipeline.py. Nothing here starts a server.
"""
