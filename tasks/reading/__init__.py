"""From files to rows: sources, what they are packed in, lines, cleaning, duplicates, counts; and model directories.

May enter: what reads what the user brings. Nothing here writes an artifact but the rows set aside.
"""
