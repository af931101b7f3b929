"""Arrow files, batch by batch, and ordered threads.

May enter: what every stage does with a table, whatever its columns hold.
"""
