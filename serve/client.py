"""A client of the HTTP API of `raylift serve`.

```python
from raylift.serve.client import Client

with Client("http://127.0.0.1:8000") as client:
    result = client.reconstruct(frontal="pa.png", lateral="lateral.png")
print(result.hu.shape, result.parameters)
```
"""

from __future__ import annotations

import gzip
import io
import json
import time
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import nibabel as nib
import numpy as np
from jaxtyping import Int16

from raylift.datasets.errors import RayliftError

DEFAULT_RETRY_S = 5.0


class ServiceError(RayliftError, RuntimeError):
    """The service refused a request.

    Attributes:
        status: of the response.
        detail: what is wrong, with the remedy.
    """

    def __init__(self, response: httpx.Response) -> None:
        self.status = response.status_code
        is_problem = response.headers.get("content-type") == "application/problem+json"
        self.detail = str(response.json()["detail"]) if is_problem else response.reason_phrase
        super().__init__(f"{response.url}: status {self.status}: {self.detail}")


@dataclass(frozen=True)
class RemoteModel:
    """A model of a service."""

    name: str
    path: str
    """Path of its routes."""
    views: tuple[str, ...]
    """Required radiographs."""
    sha256: str
    """Digest of the weights."""
    parameters: dict[str, dict[str, int]]
    """Default, min and max of the parameters that a request may set."""
    document: dict[str, Any]
    """All fields of `/v1/models/{name}`."""


@dataclass(frozen=True)
class RemoteReconstruction:
    """A volume from a service, and what the service states about it."""

    hu: Int16[np.ndarray, "d h w"]
    """From superior to inferior, anterior to posterior, and the patient's right to left."""
    spacing_mm: float
    std: Int16[np.ndarray, "d h w"] | None
    """Standard deviation over samples in HU; None unless `return_std` was set."""
    file: bytes
    """The response: a gzipped NIfTI, or with `return_std` a zip of two."""
    sha256: str
    """Digest of the weights."""
    parameters: dict[str, Any]
    """Name of the model and all values on which the volume depends besides the files."""
    level: str
    """Worst level of the checks of the input: ok, caution or stop."""
    warnings: dict[str, list[dict[str, Any]]]
    """Warnings of these checks by view."""
    notes: dict[str, list[str]]
    """What was changed or ignored in reading the files, by view."""


@dataclass(frozen=True)
class RemoteJob:
    """A job of a service, as it was when it was last read."""

    url: str
    state: str
    """queued, running, succeeded, failed or canceled."""
    stage: str | None
    """Stage of a running job: forward (the network), fit (data consistency) or encoding."""
    step: int | None
    """Evaluation of the network or step of the fit that is computed, from 1."""
    steps: int | None
    seconds_left: float | None
    document: dict[str, Any]
    """All fields of `/v1/jobs/{id}`."""

    @classmethod
    def of(cls, response: httpx.Response) -> RemoteJob:
        """The job in a response."""
        document = response.json()
        names = ("state", "stage", "step", "steps", "seconds_left")
        url = str(response.url.join(document["links"]["self"]))
        return cls(url, **{name: document[name] for name in names}, document=document)


class Client:
    """A connection to a service."""

    def __init__(self, url: str, token: str | None = None, timeout_s: float = 300.0, retries: int = 1) -> None:
        """A client.

        Args:
            url: address of the service, with the path below which a proxy offers it, or of one of its models.
            token: of a service with `--token-file`.
            timeout_s: longest wait for a part of a response.
            retries: how often a request with status 503 is repeated, after the time in Retry-After.
        """
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout_s, follow_redirects=True)
        self._retries = retries

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def models(self) -> list[RemoteModel]:
        """The models of the service.

        Raises:
            ServiceError: the service refused the request.
            httpx.HTTPError: the service does not respond.
        """
        return [
            RemoteModel(
                one["name"], one["path"], tuple(one["views"]), one["sha256"], dict(one["parameters"]), dict(one)
            )
            for one in self._send("GET", "/v1/models").json()["models"]
        ]

    def reconstruct(
        self,
        *,
        model: str | None = None,
        samples: int | None = None,
        seed: int | None = None,
        steps: int | None = None,
        consistency_steps: int | None = None,
        return_std: bool | None = None,
        invert: str | None = None,
        flip: dict[str, bool] | None = None,
        **radiographs: str | Path | bytes,
    ) -> RemoteReconstruction:
        """Reconstruct a volume.

        Args:
            model: name of a model of the service; by default that of the client's address.
            samples: number of samples of a diffusion model, whose mean is the volume.
            seed: of a diffusion model's first sample.
            steps: evaluations of a diffusion model's denoiser.
            consistency_steps: steps of the data-consistency fit.
            return_std: whether the standard deviation over samples is returned too.
            invert: auto, yes or no.
            flip: whether to flip an image left to right, by view.
            radiographs: path or content of a file for each of the model's views.

        Raises:
            ServiceError: the service refused the request; a parameter that the model does not use is one reason.
            httpx.HTTPError: the service does not respond.
            OSError: a file cannot be read.
        """
        response = self._post(
            {},
            radiographs,
            flip,
            model=model,
            samples=samples,
            seed=seed,
            steps=steps,
            consistency_steps=consistency_steps,
            return_std=return_std,
            invert=invert,
        )
        return _reconstruction(response)

    def submit(
        self,
        *,
        model: str | None = None,
        samples: int | None = None,
        seed: int | None = None,
        steps: int | None = None,
        consistency_steps: int | None = None,
        return_std: bool | None = None,
        invert: str | None = None,
        flip: dict[str, bool] | None = None,
        **radiographs: str | Path | bytes,
    ) -> RemoteJob:
        """Begin a reconstruction as a job; arguments and errors are those of `reconstruct`."""
        response = self._post(
            {"Prefer": "respond-async"},
            radiographs,
            flip,
            model=model,
            samples=samples,
            seed=seed,
            steps=steps,
            consistency_steps=consistency_steps,
            return_std=return_std,
            invert=invert,
        )
        return RemoteJob.of(response)

    def wait(
        self, job: RemoteJob, on_progress: Callable[[RemoteJob], None] | None = None, poll_s: float = 0.5
    ) -> RemoteReconstruction:
        """The volume of a job, which is then removed from a service that still has it and does not stop.

        Args:
            job: one that `submit` returned.
            on_progress: is called with the job whenever it is read.
            poll_s: how often it is read.

        Raises:
            ServiceError: the job failed (500, 503), was canceled (410) or was removed (404).
            httpx.HTTPError: the service does not respond.
        """
        while job.state in ("queued", "running"):
            time.sleep(poll_s)
            job = RemoteJob.of(self._send("GET", job.url))
            if on_progress:
                on_progress(job)
        # A failed job has the status of its error, and is not repeated.
        response = self._send("GET", f"{job.url}/result", retries=0)
        result = _reconstruction(response)
        with suppress(ServiceError, httpx.HTTPError):
            self._send("DELETE", job.url, retries=0)
        return result

    def cancel(self, job: RemoteJob) -> None:
        """Cancel a job, or remove an ended one and its result; a computation stops before its next step.

        Raises:
            ServiceError: the job was removed.
            httpx.HTTPError: the service does not respond.
        """
        self._send("DELETE", job.url)

    def _post(
        self,
        headers: dict[str, str],
        radiographs: Mapping[str, str | Path | bytes],
        flip: dict[str, bool] | None,
        **given: object,
    ) -> httpx.Response:
        """The response to a request for a reconstruction."""
        given |= {f"flip_{view}": flipped for view, flipped in (flip or {}).items()}
        fields = {
            name: str(value).lower() if isinstance(value, bool) else str(value)
            for name, value in given.items()
            if value is not None
        }
        files = {view: one if isinstance(one, bytes) else Path(one).read_bytes() for view, one in radiographs.items()}
        return self._send("POST", "/v1/reconstructions", data=fields, files=files, headers=headers)

    def _send(self, method: str, path: str, retries: int | None = None, **request: Any) -> httpx.Response:
        """The successful response to a request."""
        retries = self._retries if retries is None else retries
        for attempt in range(retries + 1):
            response = self._http.request(method, path, **request)
            if response.status_code != 503 or attempt == retries:
                break
            time.sleep(_delay_s(response.headers.get("Retry-After", "")))
        if not response.is_success:
            raise ServiceError(response)
        return response


def _reconstruction(response: httpx.Response) -> RemoteReconstruction:
    """The volume of a response, and what its headers state."""
    headers = response.headers
    hu, std, spacing_mm = _volumes(response)
    return RemoteReconstruction(
        hu,
        spacing_mm,
        std,
        response.content,
        headers["X-Raylift-Model"],
        json.loads(headers["X-Raylift-Parameters"]),
        headers["X-Raylift-Level"],
        json.loads(headers.get("X-Raylift-Warnings", "{}")),
        json.loads(headers.get("X-Raylift-Notes", "{}")),
    )


def _delay_s(retry_after: str) -> float:
    """Seconds from now by a Retry-After header, which is a number or a date."""
    if retry_after.isdecimal():
        return float(retry_after)
    try:
        date = parsedate_to_datetime(retry_after)
    except ValueError:
        return DEFAULT_RETRY_S
    return max(date.replace(tzinfo=UTC).timestamp() - time.time(), 0.0)


def _volumes(
    response: httpx.Response,
) -> tuple[Int16[np.ndarray, "d h w"], Int16[np.ndarray, "d h w"] | None, float]:
    """Volume, standard deviation if there is one, and spacing in mm."""
    files = [response.content]
    if response.headers["content-type"] == "application/zip":
        with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
            files = [archive.read(name) for name in archive.namelist()]
    images = [nib.Nifti1Image.from_bytes(gzip.decompress(file)) for file in files]
    # Voxel axes are to the left, posterior and superior.
    volumes = [np.asarray(image.dataobj, dtype=np.int16).transpose(2, 1, 0)[::-1] for image in images]
    return volumes[0], volumes[1] if len(volumes) > 1 else None, float(images[0].header.get_zooms()[0])
