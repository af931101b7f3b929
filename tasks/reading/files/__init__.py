"""Files to blocks of rows: how they are packed, which format they have, and the readers of each.

May enter: what takes a file apart. What a row means is for the room above.
"""
