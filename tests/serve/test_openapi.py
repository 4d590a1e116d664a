"""The OpenAPI description against a running service, by requests that schemathesis derives from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

URL = "/v1/reconstructions"
REQUESTS = {"POST": 20, "GET": 6, "DELETE": 10}
"""Requests to each route, for valid and for invalid ones."""


def send_each(operation: Any, mode: GenerationMode, send: Callable[[str, Any, st.DataObject], None]) -> None:
    """Call a function with the route, each request to it, and further data."""

    @settings(
        max_examples=REQUESTS[operation.method.upper()],
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), data=st.data())
    def run(case: Any, data: st.DataObject) -> None:
        send(operation.label, case, data)

    run()


def test_every_response_is_the_one_of_the_description(small_url: str, radiographs: dict[str, bytes]) -> None:
    statuses: Counter[tuple[str, int]] = Counter()
    jobs: list[str] = []

    def send(route: str, case: Any, data: st.DataObject) -> None:
        is_valid = case.meta.generation.mode == GenerationMode.POSITIVE
        if isinstance(case.body, dict):
            # An invalid request may be so by its files.
            views = [view for view in radiographs if view in case.body and is_valid]
            case.body |= {view: data.draw(st.sampled_from([radiographs[view]] * 5 + [b"text"])) for view in views}
            case.headers["Prefer"] = data.draw(st.sampled_from(["respond-async", "wait=5"]))
        if "/v1/jobs/" in route and jobs and data.draw(st.integers(0, 3)):
            case.path_parameters["id"] = data.draw(st.sampled_from(jobs))
        response = case.call(timeout=60)
        statuses[route, response.status_code] += 1
        if response.status_code == 202:
            jobs.append(response.json()["id"])
        # The description states neither that return_std needs two samples, nor what a radiograph is; a request that
        # was given radiographs counts as invalid.
        excluded = [positive_data_acceptance, *([negative_data_rejection] if is_valid else [])]
        case.validate_response(response, excluded_checks=excluded)

    description = schemathesis.openapi.from_url(f"{small_url}/openapi.json")
    operations = [operation.ok() for operation in description.get_all_operations()]
    # Jobs are made first and removed last.
    operations.sort(key=lambda operation: ("POST", "GET", "DELETE").index(operation.method.upper()))
    for operation in operations:
        send_each(operation, GenerationMode.POSITIVE, send)
        # Any text is a valid name or id.
        if operation.label == f"POST {URL}":
            send_each(operation, GenerationMode.NEGATIVE, send)
    for route, expected in {
        f"POST {URL}": {200, 202, 415, 422},
        "GET /v1/jobs/{id}": {200, 404},
        "GET /v1/jobs/{id}/events": {200, 404},
        "GET /v1/jobs/{id}/result": {200, 404},
        "DELETE /v1/jobs/{id}": {204, 404},
    }.items():
        assert expected <= {status for of, status in statuses if of == route}, (route, statuses)
