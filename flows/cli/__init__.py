"""The command line: one file a group of commands, and the tables that they print.

What only a person at a terminal needs lives here; whatever a program could call belongs into a room below.
"""
