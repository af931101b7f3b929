#!/bin/sh
# A program of the image runs as it is, which is how the pools start flow runs; anything else is a command of amazon-ft:
#   docker run amazon-ft:cpu run demo
#   docker run amazon-ft:cpu prefect version
[ -n "$(which -- "$1")" ] || set -- amazon-ft "$@"
exec "$@"
