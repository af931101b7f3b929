"""The stages of the pipeline, one a module; flows/ strings them together."""
