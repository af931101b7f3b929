"""The backend `fast`: packs on one GPU as fast as it allows; its forward pass, attention, frozen matrices and loss.

May enter: what no library does as fast or at all, with its measurement in tests/bench/LOG.md.
"""
