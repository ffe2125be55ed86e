"""The threads that guards run on, for a thread is the only thing in one process that can be left behind when one hangs.

Bounds: `workers` requests at a time, `stuck_max` hung calls a guard; beyond those, errors at once.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from collector.guards.protocol import Judgement
from collector.guards.verdicts import Outcome, Task, checked


@dataclass(slots=True, repr=False)
class _Job:
    """The tasks of one request, done in turn by one worker."""

    tasks: Sequence[Task]
    done: "queue.SimpleQueue[Outcome]" = field(default_factory=queue.SimpleQueue)
    abandoned: bool = False
    """Set by the caller when a deadline has passed: the worker ends as soon as the hung guard returns."""


class Workers:
    """Thread-safe. `text_chars_max`: a longer text is not judged at all."""

    def __init__(self, workers: int, stuck_max: int, text_chars_max: int, clock_s: Callable[[], float]) -> None:
        self._stuck_max, self._text_chars_max, self._clock_s = stuck_max, text_chars_max, clock_s
        self._lock = threading.Lock()
        self._idle: list[queue.SimpleQueue[_Job | None]] = []
        self._slots = threading.Semaphore(workers)
        self._stuck: dict[str, int] = {}
        self._closed = False

    def close(self) -> None:
        """Lets the idle threads end. Requests under way are finished; later ones get a thread for themselves."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for inbox in idle:
            inbox.put(None)

    def outcomes(self, tasks: Sequence[Task]) -> list[Outcome]:
        """What came of each task, in order. Never raises; takes no longer than the sum of their deadlines."""
        outcomes: list[Outcome] = []
        while len(outcomes) < len(tasks):
            refused = self._refuse(tasks[len(outcomes)])
            if refused is not None:
                outcomes.append(refused)
                continue
            stop = next(
                (i for i in range(len(outcomes) + 1, len(tasks)) if self._refuse(tasks[i]) is not None), len(tasks)
            )
            outcomes += self._run(tasks[len(outcomes) : stop])
        return outcomes

    def _refuse(self, task: Task) -> Outcome | None:
        """The error of a task that must not run at all."""
        if len(task.text) > self._text_chars_max:
            return Outcome(None, "TextTooLong", 0.0)
        if self._stuck.get(task.post.guard.name, 0) >= self._stuck_max:
            return Outcome(None, "Stuck", 0.0)
        return None

    def _run(self, tasks: Sequence[Task]) -> list[Outcome]:
        """The outcomes of the tasks in turn, up to and including the first that missed its deadline."""
        if not self._slots.acquire(timeout=tasks[0].deadline_s):
            return [Outcome(None, "Overloaded", tasks[0].deadline_s * 1000)]
        job = _Job(tasks)
        inbox = self._worker()
        inbox.put(job)
        outcomes: list[Outcome] = []
        for task in tasks:
            outcomes.append(self._await(job, task))
            if job.abandoned:
                break
        else:
            self._release(inbox)
        self._slots.release()
        return outcomes

    def _await(self, job: _Job, task: Task) -> Outcome:
        """The outcome of the job's next task; where the deadline passes first, the worker is given up with it."""
        try:
            return job.done.get(timeout=task.deadline_s)
        except queue.Empty:
            pass
        with self._lock:  # under the lock a worker puts its outcome either before this look or never
            try:
                return job.done.get_nowait()
            except queue.Empty:
                job.abandoned = True
                self._stuck[task.post.guard.name] = self._stuck.get(task.post.guard.name, 0) + 1
        return Outcome(None, "DeadlineExceeded", task.deadline_s * 1000)

    def _release(self, inbox: "queue.SimpleQueue[_Job | None]") -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(inbox)
                return
        inbox.put(None)

    def _worker(self) -> "queue.SimpleQueue[_Job | None]":
        with self._lock:
            if self._idle:
                return self._idle.pop()
        inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, args=(inbox,), name="guards", daemon=True).start()
        return inbox

    def _work(self, inbox: "queue.SimpleQueue[_Job | None]") -> None:
        """A worker's life: one job after the other, until it is told to end or was given up."""
        while (job := inbox.get()) is not None:
            for task in job.tasks:
                outcome = _attempt(task, self._clock_s)
                with self._lock:
                    if job.abandoned:
                        self._stuck[task.post.guard.name] -= 1
                        return
                    job.done.put(outcome)
            del job, task, outcome  # an idle worker keeps no text alive


def _attempt(task: Task, clock_s: Callable[[], float]) -> Outcome:
    """One call of a guard, whatever it does."""
    start_s = clock_s()
    try:
        judgement: Judgement | None = checked(
            task.post.guard, task.post.guard.judge(task.text, task.stage, task.context)
        )
        error = ""
    except BaseException as problem:  # noqa: BLE001 - SystemExit too: whatever a guard raises is its verdict's business
        judgement, error = None, type(problem).__name__[:64]
    return Outcome(judgement, error, max(0.0, (clock_s() - start_s) * 1000))
