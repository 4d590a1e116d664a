"""Jobs: reconstructions that go on after the response to their request, with progress, and results that are kept."""

# FastAPI resolves annotations at run time, and `OwnJob` is local to `add_routes`, so they are not postponed here.
import asyncio
import logging
import math
import secrets
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from jaxtyping import Float32

from raylift.models.inference import Step
from raylift.serve.api.documents import JobInfo, JobState
from raylift.serve.api.problem import Problem, described, problem
from raylift.serve.failures import ServiceUnavailableError
from raylift.serve.reconstructor import HUVolume
from raylift.serve.served_model import ReconstructionSettings

ReconstructInSteps = Callable[
    [Float32[np.ndarray, "views rows columns"], ReconstructionSettings], AsyncIterator[Step | HUVolume]
]
"""Maps prepared radiographs and the settings of a request to each step, when it begins, and then the volume; raises
ServiceUnavailableError. It stops before the next step if it is canceled."""
ENDED = ("succeeded", "failed", "canceled")
NO_JOB = "no job has this id: it was removed, or never existed"


@dataclass(eq=False)
class Job:
    """A job in this process."""

    id: str
    owner: str | None
    """Who alone may use it; None in a service without logins and tokens, where the id is a secret."""
    client: str
    """Whose jobs are counted together."""
    path: str
    """Path of its routes, as a proxy offers them."""
    size: int
    """Bytes of the result; their limit until it is written."""
    state: JobState = "queued"
    step: Step | None = None
    is_encoded: bool = False
    """Whether the volume is computed, and its encoding has begun."""
    created: datetime = field(default_factory=lambda: datetime.now(UTC))
    expires: datetime | None = None
    error: Problem | None = None
    headers: dict[str, str] = field(default_factory=dict)
    """Headers of the result."""
    task: asyncio.Task[None] | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set, and replaced by a new one, at every change."""
    _begun: tuple[float, int] = (0.0, 0)
    """Time and number of the first step."""
    _step_begun: float = 0.0

    def begin(self, step: Step) -> None:
        """Note that a step begins."""
        self._step_begun = time.monotonic()
        if self.step is None:
            self._begun = self._step_begun, step.number
        self.step = step
        self.change("running")

    def change(self, state: JobState) -> None:
        """Set the state, and wake up who follows the job."""
        self.state = state
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()

    @property
    def info(self) -> JobInfo:
        """Its document."""
        is_running, step = self.state == "running", self.step
        links = {"self": self.path, "events": f"{self.path}/events"}
        return JobInfo(
            id=self.id,
            state=self.state,
            stage=("encoding" if self.is_encoded else step.stage) if is_running and step else None,
            step=step.number if step else None,
            steps=step.total if step else None,
            seconds_left=self._seconds_left() if is_running else None,
            created=self.created,
            expires=self.expires,
            error=self.error,
            links=links | ({"result": f"{self.path}/result"} if self.state == "succeeded" else {}),
        )

    def _seconds_left(self) -> float | None:
        begun_at, first = self._begun
        if self.step is None or self.step.number == first:
            return None
        step_s = (self._step_begun - begun_at) / (self.step.number - first)
        left = step_s * (self.step.total + 1 - self.step.number) - (time.monotonic() - self._step_begun)
        return 0.0 if self.is_encoded else round(max(0.0, left), 1)


class Jobs:
    """The jobs of one model in this process, and the files of their results in a folder."""

    def __init__(
        self,
        reconstruct: ReconstructInSteps,
        start: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        folder: Path,
        retention_s: float,
        max_jobs: int,
        max_client_jobs: int,
        max_bytes: int,
    ) -> None:
        """No jobs.

        Args:
            reconstruct: the model.
            start: begins the work of a job.
            folder: of results; belongs to these jobs alone.
            retention_s: how long ended jobs are kept.
            max_jobs: most jobs, ended ones included.
            max_client_jobs: most jobs of one client.
            max_bytes: largest size of all results.
        """
        self._reconstruct, self._start, self._folder, self._retention_s = reconstruct, start, folder, retention_s
        self._max_jobs, self._max_client_jobs, self._max_bytes = max_jobs, max_client_jobs, max_bytes
        self._jobs: dict[str, Job] = {}

    def new(self, request: Request, max_size: int) -> Job:
        """A job that is not kept yet.

        Args:
            request: for it.
            max_size: most bytes of the result.

        Raises:
            HTTPException: 429, the client has too many jobs.
            ServiceUnavailableError: there are too many jobs, or results.
        """
        owner = request.scope.get("user")
        client = owner or (request.client.host if request.client else "")
        number = secrets.token_hex(16)
        job = Job(number, owner, client, f"{request.scope.get('root_path', '')}/v1/jobs/{number}", max_size)
        self._require_space(job)
        return job

    async def submit(
        self,
        job: Job,
        request: Request,
        slot: AsyncExitStack,
        radiographs: Float32[np.ndarray, "views rows columns"],
        settings: ReconstructionSettings,
        encode: Callable[[HUVolume], Awaitable[Response]],
    ) -> None:
        """Keep a job and begin its work.

        Args:
            job: a new one.
            request: for it.
            slot: has the one in the queue; is left when the volume is computed or the job has failed.
            radiographs: prepared ones.
            settings: of the request.
            encode: the response with a volume.

        Raises:
            HTTPException, ServiceUnavailableError: as `new`; another request took the place meanwhile.
        """
        self._require_space(job)
        self._jobs[job.id] = job
        steps = self._reconstruct(radiographs, settings)
        job.task = self._start(self._run(job, request, slot.pop_all(), steps, encode))
        # The work has begun and leaves the slot, also if it is canceled.
        await asyncio.sleep(0)

    def find(self, number: str, user: str | None) -> Job:
        """A job of a user.

        Raises:
            HTTPException: 404, this user has no such job.
        """
        job = self._jobs.get(number)
        if job is None or job.owner != user:
            raise HTTPException(404, NO_JOB)
        return job

    def end(self, job: Job) -> None:
        """Cancel a job, or remove one whose work has ended, and its result."""
        if job.expires:
            self._remove(job)
        elif job.task and job.state != "canceled":
            job.change("canceled")
            if not job.is_encoded:
                job.task.cancel()

    async def result(self, job: Job) -> Response:
        """The response with the volume.

        Raises:
            HTTPException: 404, the job was removed meanwhile; 409, it has not ended; 410, it was canceled; the status
                of its error, it failed.
        """
        if job.error:
            raise HTTPException(job.error.status, job.error.detail)
        if job.state == "canceled":
            raise HTTPException(410, "the job was canceled")
        if job.state != "succeeded":
            raise HTTPException(409, f"the job is {job.state}: it has no result yet")
        try:
            content = await asyncio.to_thread(self._file(job).read_bytes)
        except FileNotFoundError:
            raise HTTPException(404, NO_JOB) from None
        return Response(content, headers=job.headers)

    def _require_space(self, job: Job) -> None:
        kept = self._jobs.values()
        own = [one for one in kept if one.client == job.client]
        if len(own) >= self._max_client_jobs:
            detail = f"you have {len(own)} jobs: delete those whose result you have"
            ends = min((one.expires for one in own if one.expires), default=job.created)
            retry_after_s = max(1, math.ceil((ends - job.created).total_seconds()))
            raise HTTPException(429, detail, {"Retry-After": str(retry_after_s)})
        if len(kept) >= self._max_jobs or sum(one.size for one in kept) + job.size > self._max_bytes:
            raise ServiceUnavailableError("the service has no space for further jobs: try again later", 60)

    async def _run(
        self,
        job: Job,
        request: Request,
        slot: AsyncExitStack,
        steps: AsyncIterator[Step | HUVolume],
        encode: Callable[[HUVolume], Awaitable[Response]],
    ) -> None:
        state: JobState = "failed"
        try:
            async with slot:
                async for item in steps:
                    if isinstance(item, HUVolume):
                        volume = item
                    else:
                        job.begin(item)
            job.is_encoded = True
            job.change("running")
            response = await encode(volume)
            await asyncio.to_thread(self._file(job).write_bytes, response.body)
            job.size, job.headers = len(response.body), dict(response.headers)
            state = "succeeded"
        except ServiceUnavailableError as error:
            job.error = problem(request.scope, 503, str(error))
        except asyncio.CancelledError:
            job.error = problem(request.scope, 503, "the service is stopping")
        except Exception:
            logging.getLogger("ray.serve").exception("job %s failed", job.id)
            job.error = problem(request.scope, 500, "the service failed; see its log")
        if job.state == "canceled":
            state, job.error = "canceled", None
        if state != "succeeded":
            self._file(job).unlink(missing_ok=True)
            job.size = 0
        job.expires = datetime.now(UTC) + timedelta(seconds=self._retention_s)
        asyncio.get_running_loop().call_later(self._retention_s, self._remove, job)
        job.change(state)

    def _remove(self, job: Job) -> None:
        if self._jobs.pop(job.id, None):
            self._file(job).unlink(missing_ok=True)

    def _file(self, job: Job) -> Path:
        return self._folder / job.id


def add_routes(app: FastAPI, jobs: Jobs) -> None:
    """The routes of jobs."""
    missing: dict[int | str, Any] = {404: described("this client has no such job")}

    async def own(id: str, request: Request) -> Job:  # noqa: A002
        return jobs.find(id, request.scope.get("user"))

    OwnJob = Annotated[Job, Depends(own)]

    @app.head("/v1/jobs/{id}", include_in_schema=False)
    @app.get("/v1/jobs/{id}", tags=["jobs"], response_description="the job", responses=missing)
    async def job_info(job: OwnJob) -> JobInfo:
        """State, progress and time left of a job."""
        return job.info

    @app.delete("/v1/jobs/{id}", tags=["jobs"], status_code=204, response_description="done", responses=missing)
    async def end_job(job: OwnJob) -> None:
        """Cancel a job, or remove an ended one and its result.

        The place in the queue is free at once. A computation stops before its next step: the next evaluation of the
        network, or step of the data-consistency fit.
        """
        jobs.end(job)

    @app.get(
        "/v1/jobs/{id}/events",
        tags=["jobs"],
        response_class=EventSourceResponse,
        response_description="the job, as an event `progress` at every change, the last one `end`",
        responses=missing,
    )
    async def job_events(job: OwnJob) -> AsyncIterable[ServerSentEvent]:
        """Progress of a job as server-sent events."""
        while job.state not in ENDED:
            changed = job.changed
            yield ServerSentEvent(data=job.info, event="progress")
            await changed.wait()
        yield ServerSentEvent(data=job.info, event="end")

    @app.head("/v1/jobs/{id}/result", include_in_schema=False)
    @app.get(
        "/v1/jobs/{id}/result",
        tags=["jobs"],
        response_class=Response,
        responses=missing
        | {
            200: {"description": "body and headers are those of a request to /v1/reconstructions that waits"},
            409: described("the job has not ended"),
            410: described("the job was canceled"),
            500: described("the job failed"),
            503: described("the model restarted or the service stopped, so that the job failed"),
        },
    )
    async def job_result(job: OwnJob) -> Response:
        """Result of a job, in the format that its request accepted."""
        return await jobs.result(job)
