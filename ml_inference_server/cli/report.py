"""mlis report: python -m ml_inference_server.benchmark report."""

from ml_inference_server.benchmark import __main__ as benchmark

add_arguments = benchmark.add_report_arguments
run = benchmark.run_report
