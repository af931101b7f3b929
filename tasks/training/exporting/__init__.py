"""A saved adapter in the forms that others take, checked by loading it again.

May enter: what turns adapter and base model into files.
"""
