"""What trains: one Protocol, one module a library. Heavy imports stay inside the functions."""
