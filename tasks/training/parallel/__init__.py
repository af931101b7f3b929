"""A training on several devices: the same steps as on one, each step's rows dealt to processes that add up their gradients.

    launch.py     the process of the stage: starts one process a device by torchrun's agent, shows them as one, explains their end
    peers.py      such a process among the others: what they agree on, and what the first one tells for all
    loader.py     its share of the rows, in batches
    dealing.py    which rows, or packs, those are;  evening.py: rows that change packs, so that all have as much to do
    gradients.py  their mean over the processes, once a step

May enter: what depends on the number of processes. Everything else of a training must not know it.
"""
