"""What keeps a benchmark honest (E1 to E10 of reliability.md 2.9), and the tests that hold each."""

_CLIENT = "tests/integration/test_benchmark_client.py"
_LOADS = "tests/integration/test_load_shapes.py"
_RUNNER = "tests/integration/test_runner.py"
_REPORT = "tests/unit/test_report.py"
_STATS = "tests/unit/test_stats.py"
_COMPARISON = "tests/unit/test_comparison.py"

# key: (what is held, the tests)
CHECKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "E1": (
        "a server that dies voids the run, and its books balance",
        (
            f"{_CLIENT}::test_a_server_killed_in_the_middle",
            f"{_CLIENT}::test_rows_after_the_death_are_not_run_and_counted",
            f"{_CLIENT}::test_a_dead_server_ends_the_loop_with_balanced_books",
        ),
    ),
    "E2": (
        "what an interrupted benchmark had measured is kept, and a sweep goes on where it was",
        (
            f"{_REPORT}::test_what_a_killed_benchmark_had_measured_is_kept",
            f"{_RUNNER}::test_a_runner_killed_outright_leaves_what_it_had_measured",
            f"{_RUNNER}::test_a_run_of_all_experiments_goes_on_where_it_was_interrupted",
        ),
    ),
    "E3": (
        "a full disk leaves earlier results alone",
        (
            f"{_REPORT}::test_a_full_disk_leaves_the_earlier_result_alone",
            f"{_REPORT}::test_results_that_find_no_room_are_written_elsewhere",
        ),
    ),
    "E4": (
        "latency counts from the intended time",
        (
            f"{_LOADS}::test_the_open_loop_shows_a_freeze_and_the_closed_one_hides_it",
            f"{_LOADS}::test_latency_counts_from_the_schedule",
            f"{_STATS}::test_latency_is_counted_from_when_a_request_was_due",
        ),
    ),
    "E5": (
        "no worker dies of an error",
        (
            f"{_CLIENT}::test_failures_are_counted_by_code_and_no_worker_dies",
            f"{_CLIENT}::test_every_worker_keeps_sending_while_some_requests_fail",
        ),
    ),
    "E6": (
        "nothing is measured on the wall clock",
        ("tests/unit/test_benchmark_clock.py::test_only_the_date_of_a_result_is_of_the_wall_clock",),
    ),
    "E7": (
        "a client that is the bottleneck voids the row",
        (
            f"{_LOADS}::test_a_sender_that_cannot_keep_up_voids_the_row",
            f"{_STATS}::test_material_lag_is_told_and_accidents_are_not",
        ),
    ),
    "E8": (
        "texts that were not computed are told, and the warm-up sends others",
        (
            f"{_REPORT}::test_a_report_says_which_rows_did_not_compute_every_text",
            "tests/unit/test_dataset.py::test_warmup_sends_other_texts_than_the_first_measured_ones",
        ),
    ),
    "E9": ("a retry is no success", (f"{_CLIENT}::test_a_refusal_is_not_retried_into_a_success",)),
    "E10": (
        "unlike runs are told apart",
        (
            f"{_COMPARISON}::test_unlike_machines_and_commits_are_told",
            f"{_COMPARISON}::test_models_that_share_their_weights_and_differ_in_other_files_are_told",
            f"{_COMPARISON}::test_ndcg_of_two_definitions_is_never_compared_silently",
        ),
    ),
}
