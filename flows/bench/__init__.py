"""Measurements that a user can repeat: whole processes of ours and of the document's, side by side."""
