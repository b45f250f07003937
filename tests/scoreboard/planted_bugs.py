"""The bugs that our tests must see, each with the fastest test that does.

A bug is a small change that makes the fault in the place where it would happen. Where a net of the server would catch
it, the net is cut too.
"""

from tests.scoreboard.planting import Bug, Edit

_SERVER = "ml_inference_server/server"
_RUNNER = f"{_SERVER}/batch_runner.py"
_PENDING = f"{_SERVER}/pending.py"
_ADMISSION = f"{_SERVER}/admission.py"
_SERVICE = f"{_SERVER}/service.py"
_OBSERVATION = f"{_SERVER}/observation.py"

_HARD = "tests/unit/test_scheduler_hard_cases.py"
_HEALTH = "tests/unit/test_health.py"
_WIRE = "tests/integration/test_grpc_wire.py"
_REFUSED = "tests/integration/test_refused_work.py"

SWAPPED = Bug(
    name="two rows of a batch are swapped",
    edits=(
        Edit(
            path=_RUNNER,
            old="for item, row in zip(items, rows, strict=True):",
            new="for item, row in zip(items, rows[::-1], strict=True):",
        ),
    ),
    seen_by=f"{_HARD}::test_each_caller_gets_its_own_rows_whatever_they_travelled_with",
)
PERMUTED = Bug(
    name="rows stand in the order in which they were computed",
    edits=(Edit(path=_PENDING, old="self.rows[places] = row", new="self.rows[self.texts - self.missing] = row"),),
    seen_by="tests/unit/test_shared_texts.py"
    "::test_a_query_that_equals_a_late_text_of_a_bulk_request_is_served_at_its_own_turn",
)
NEIGHBOURS_DROPPED = Bug(
    name="neighbours of a caller who left are dropped",
    edits=(
        Edit(
            path=_RUNNER,
            old="""
            if are_finite or np.isfinite(row).all():
""",
            new="""
            if not item.subscribers:
                return
            if are_finite or np.isfinite(row).all():
""",
        ),
        Edit(
            path=_RUNNER,
            old="""
        for item in batch.items:
            if item.payload is not None:
""",
            new="""
        for item in ():
            if item.payload is not None:
""",
        ),
    ),
    seen_by=f"{_HARD}::test_caller_leaves_during_its_batch_and_neighbours_get_their_answers",
)
RESULT_TWICE = Bug(
    name="set_result without a look whether the future is done",
    edits=(
        Edit(
            path=_PENDING,
            old="""
            if pending.future.done():
                continue
            if pending is not item.owner:
""",
            new="""
            if pending is not item.owner:
""",
        ),
    ),
    seen_by=f"{_HARD}::test_caller_leaves_in_the_turn_in_which_its_batch_ends",
)
POISON_SPREADS = Bug(
    name="a text that makes the model raise fails its whole batch",
    edits=(
        Edit(
            path=_RUNNER,
            old="""
        await self._answer(replace(retry, items=wanted[:middle]))
        await self._answer(replace(retry, items=wanted[middle:]))
""",
            new="""
        for item in wanted[:middle] + wanted[middle:]:
            self._subscriptions.fail(item, BackendFailure, "the model failed")
""",
        ),
    ),
    seen_by=f"{_HARD}::test_a_poisoned_text_fails_its_whole_request_and_no_other",
)
ROOM_KEPT = Bug(
    name="the room of a caller who left is not given back",
    edits=(
        Edit(
            path=_ADMISSION,
            old="""
        self._admission.release(self)
""",
            new="""
        if kind is None or issubclass(kind, Exception):
            self._admission.release(self)
""",
        ),
    ),
    seen_by=f"{_HARD}::test_caller_leaves_the_queue_and_is_never_computed",
)
ROOM_TWICE = Bug(
    name="the room of a request is given back twice",
    edits=(
        Edit(
            path=_ADMISSION,
            old="self.resize(max(0, self.tokens - tokens), max(0, self.texts - 1))",
            new=(
                "self._shares.change(self._held, -tokens, -1, is_bulk=self.is_bulk, is_overflow=self._is_overflow, "
                "is_named=self._is_named)"
            ),
        ),
    ),
    seen_by=f"{_HARD}::test_each_caller_gets_its_own_rows_whatever_they_travelled_with",
)
EXPIRED_COMPUTED = Bug(
    name="a text whose deadline has passed is computed",
    edits=(Edit(path=_PENDING, old="if pending.call.deadline > now:", new="if now:"),),
    seen_by=f"{_HARD}::test_a_text_whose_deadline_passes_after_it_was_chosen_is_not_started",
)
INVALID_COMPUTED = Bug(
    name="a request is refused after its texts were put in line",
    edits=(
        Edit(
            path=_SERVICE,
            old="""
            self._texts.check_tokens(jobs, where, texts, overflow)
            computed = await self._batcher.compute(parts, call, reservation)
""",
            new="""
            computed = await self._batcher.compute(parts, call, reservation)
            self._texts.check_tokens(jobs, where, texts, overflow)
""",
        ),
    ),
    seen_by=f"{_REFUSED}::test_a_text_that_is_too_long_is_refused_before_any_of_its_request_is_computed",
)
REFUSED_COMPUTED = Bug(
    name="what a full queue refuses is computed all the same",
    edits=(
        Edit(
            path=_SERVICE,
            old="""
        with await self._admission.enter(
            tokens, call.deadline, texts=len(jobs), caller=call.caller, asked=priority
        ) as reservation:
            admitted_at
""",
            new="""
        try:
            reservation = self._admission.admit(tokens, call.deadline, caller=call.caller, asked=priority)
        except Exception:
            from types import SimpleNamespace

            nothing = {"resize": lambda tokens, texts: None, "give_back": lambda tokens: None}
            unpaid = SimpleNamespace(caller="", is_bulk=False, tokens=0, texts=0, **nothing)
            parts = [part for text in self._texts.encode(list(places), overflow) for part in text.parts]
            self._unwanted = asyncio.ensure_future(self._batcher.compute(parts, call, unpaid))
            raise
        with reservation:
            admitted_at
""",
        ),
    ),
    seen_by=f"{_REFUSED}::test_what_a_full_queue_refuses_is_never_computed",
)
LATE_FRAME = Bug(
    name="a late answer of the engine goes to the next batch",
    edits=(
        Edit(
            path=f"{_SERVER}/engine_process.py",
            old="self.kill()  # its answer would be taken for that of the next batch",
            new="pass",
        ),
    ),
    seen_by="tests/integration/test_process_worker.py"
    "::test_a_caller_that_leaves_does_not_get_the_next_ones_answer_mixed_up",
)
BATCHER_DIES = Bug(
    name="the batcher dies without a word",
    edits=(
        Edit(
            path=f"{_SERVER}/scheduler.py",
            old="pending.fail(ServiceError(_BUG))",
            new="pass",
        ),
    ),
    seen_by=f"{_HARD}::test_a_bug_in_the_policy_answers_everybody_and_the_batcher_goes_on",
)
ALWAYS_SERVING = Bug(
    name="health always says SERVING",
    edits=(
        Edit(
            path=f"{_SERVER}/health.py",
            old="ready, why = state.readiness()",
            new='ready, why = True, "ready"',
        ),
    ),
    seen_by=f"{_HEALTH}::test_health_follows_the_trouble_of_the_engine_and_its_end",
)
FAILURES_IGNORED = Bug(
    name="health does not mind that every text fails",
    edits=(
        Edit(
            path=f"{_SERVER}/state.py",
            old="if batcher.failures_in_a_row >= MAX_FAILURES_IN_A_ROW:",
            new="if batcher.failures_in_a_row >= 10**9:",
        ),
    ),
    seen_by=f"{_HEALTH}::test_health_turns_while_texts_fail_one_after_the_other",
)
SET_CODE = Bug(
    name="errors are sent with set_code and not with abort",
    edits=(
        Edit(
            path=f"{_SERVER}/rpc/method_handlers.py",
            old="""
                await self._refuse(context, error, call)
            if metadata:
""",
            new="""
                context.set_code(self._dialect.code(error))
                context.set_details(status_text(error, self._dialect))
                context.set_trailing_metadata(trailing_metadata(error, call.request_id, self._dialect))
                return b""
            if metadata:
""",
        ),
    ),
    seen_by=f"{_WIRE}::test_a_stock_client_with_a_retry_policy_comes_back_and_succeeds",
)
EXCEPTION_TOLD = Bug(
    name="callers are told the text of an exception",
    edits=(
        Edit(
            path=_OBSERVATION,
            old='f"internal error (request_id={call.request_id})"',
            new='f"internal error: {error}"',
        ),
    ),
    seen_by=f"{_WIRE}::test_an_unexpected_exception_stays_in_the_log",
)
MODEL_EXCEPTION_TOLD = Bug(
    name="callers are told the text of the model's exception",
    edits=(
        Edit(
            path=_RUNNER,
            old='message = "the model failed on this input, twice, on its own"',
            new='message = f"the model failed on this input: {error}"',
        ),
    ),
    seen_by=f"{_HARD}::test_a_poisoned_text_fails_alone_at_every_position[1]",
)
BATCH_COUNTED_TWICE = Bug(
    name="a batch that is tried again is counted twice",
    edits=(
        Edit(
            path=_RUNNER,
            old="""
            ok=ok,
            lengths=
""",
            new="""
            ok=True,
            lengths=
""",
        ),
    ),
    seen_by="tests/integration/test_metrics_ledger.py::test_counts_equal_the_ledger_and_percentiles_keep_their_error",
)
REQUEST_COUNTED_TWICE = Bug(
    name="a request that fails after a second try is counted twice",
    edits=(
        Edit(
            path=_OBSERVATION,
            old="""
        self._metrics.request_finished(
            self.method,
""",
            new="""
        if code == "INTERNAL":
            self._metrics.request_finished(self.method, code, 0.0, reason=reason)
        self._metrics.request_finished(
            self.method,
""",
        ),
    ),
    seen_by="tests/integration/test_metrics_ledger.py::test_counts_equal_the_ledger_and_percentiles_keep_their_error",
)
WALL_CLOCK = Bug(
    name="the queue looks at the clock on the wall",
    edits=(
        Edit(
            path=_PENDING,
            old="""
class Subscriptions:
""",
            new="""
import time
_AHEAD_S = time.time() - time.monotonic()

class Subscriptions:
""",
        ),
        Edit(
            path=_PENDING,
            old="""
        now = asyncio.get_running_loop().time()
        kept = []
""",
            new="""
        now = time.time() - _AHEAD_S
        kept = []
""",
        ),
    ),
    seen_by=f"{_REFUSED}::test_the_wall_clock_may_be_set_while_requests_wait[3600.0]",
)
STOPS_FIRST = Bug(
    name="the server stops before it has drained",
    edits=(
        Edit(
            path=f"{_SERVER}/lifecycle.py",
            old="""
            server.cut_off = await _drain(state, model, front)
""",
            new="""
            await front.server.stop(0)
            server.cut_off = await _drain(state, model, front)
""",
        ),
    ),
    seen_by="tests/integration/test_lifecycle.py::test_a_stop_answers_what_it_cannot_finish_and_counts_it",
)

# In the order of the catalogue: by the fault that they make.
BUGS = (
    SWAPPED,
    PERMUTED,
    NEIGHBOURS_DROPPED,
    RESULT_TWICE,
    POISON_SPREADS,
    ROOM_KEPT,
    ROOM_TWICE,
    EXPIRED_COMPUTED,
    INVALID_COMPUTED,
    REFUSED_COMPUTED,
    LATE_FRAME,
    BATCHER_DIES,
    ALWAYS_SERVING,
    FAILURES_IGNORED,
    SET_CODE,
    EXCEPTION_TOLD,
    MODEL_EXCEPTION_TOLD,
    BATCH_COUNTED_TWICE,
    REQUEST_COUNTED_TWICE,
    WALL_CLOCK,
    STOPS_FIRST,
)
# The fastest, of different kinds.
QUICK = (SWAPPED, RESULT_TWICE, ROOM_KEPT, ALWAYS_SERVING)
