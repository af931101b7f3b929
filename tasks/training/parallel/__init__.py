"""A training on several devices: the same steps as on one, each step's rows dealt to processes that add up their gradients.

    launch.py   the process of the stage: starts one process a device by torchrun's agent, shows them as one, explains their end
    peers.py    such a process among the others: what they agree on, and what the first one tells for all
    loader.py   its share of the rows, in batches;  dealing.py: which rows those are

May enter: what depends on the number of processes. Everything else of a training must not know it.
"""
