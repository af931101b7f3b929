"""Measurements that a user can repeat: whole processes of ours and of the document's own code, side by side.

May enter: what `amazon-ft bench` runs. A module whose name begins with `document` or `train_document` is the other side.
"""
