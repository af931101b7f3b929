"""Imported first by a process that imports what stays: the garbage collector would go over it again and again."""

import gc

gc.disable()
