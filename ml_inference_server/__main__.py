"""python -m ml_inference_server: the command `mlis` where it is not on the PATH."""

from ml_inference_server.cli import program

program()
