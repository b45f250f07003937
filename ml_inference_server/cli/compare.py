"""mlis compare: python -m ml_inference_server.benchmark compare."""

from ml_inference_server.benchmark import __main__ as benchmark

add_arguments = benchmark.add_compare_arguments
run = benchmark.run_compare
